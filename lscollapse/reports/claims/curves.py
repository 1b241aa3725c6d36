"""Curves of relative mu, means over excerpts, of the arms of one model."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lscollapse.core.table import reads_pixels


class NotMeasured(Exception):
    """The table does not have what a sentence is about; in words where an arm has lost layers, else empty."""


class Curves:
    """Mean relative mu of one model's arms: `curve(...)` by layer, `last(...)` by lambda."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.relative = relative = rows[(rows["measure"] == "relative_mu") & (rows["init"] == "trained")]
        self.gated = bool(relative["gating"].notna().any())
        self.images = reads_pixels(relative)
        keys = ["gating", "layernorm", "lam", "layer"]
        means = relative.groupby(keys, dropna=False)["value"].apply(lambda v: v.mean(skipna=False))
        self.means = means.reset_index()

    def curve(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Layers 0..K; empty when the arm was not measured.

        Raises:
            NotMeasured: an excerpt lacks some; nothing is said on part of a curve.
        """
        held, lost = self.held(lam, gating, layernorm), self.lost(lam, gating, layernorm)
        if lost is None:
            return held
        gate = ("gate, " if gating else "no gate, ") if self.gated else ""
        arm = self._arm(self.relative, lam, gating, layernorm)
        gone, total = arm.loc[arm["value"].isna(), "excerpt"].nunique(), arm["excerpt"].nunique()
        before = ""
        if len(held):
            lowest = f"lowest {held.min():.3f} (layer {held.idxmin()})"
            before = f"; before: first {held.iloc[0]:.3f}, {lowest}, then {held.iloc[-1]:.3f}"
        raise NotMeasured(
            f"{gate}{'LN' if layernorm else 'no LN'}, lambda {lam:g}: layers {lost} to {int(arm['layer'].max())} are missing,"
            f" where {gone} of {total} excerpts leave the range of floating point{before}"
        )

    def held(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """The layers that every excerpt has; empty when the arm was not measured."""
        return self._layers(lam, gating, layernorm).dropna()

    def lost(self, lam: float, gating: bool, layernorm: bool) -> int | None:
        """The first layer whose values an excerpt's floating point could not hold; None where there is none."""
        values = self._layers(lam, gating, layernorm)
        return int(values.index[values.isna()].min()) if values.isna().any() else None

    def excerpts(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Last-layer value of every excerpt; errors as for `curve`."""
        self.curve(lam, gating, layernorm)
        arm = self._arm(self.relative, lam, gating, layernorm)
        values: pd.Series = arm.loc[arm["layer"] == arm["layer"].max(), "value"]
        return values

    def lams(self, gating: bool) -> list[float]:
        """Every lambda measured with LayerNorm, ascending."""
        return [lam for lam in sorted(set(self.means["lam"].dropna())) if len(self._arm(self.means, lam, gating, True))]

    def last(self, gating: bool, lams: Iterable[float] | None = None) -> dict[float, float]:
        """Last-layer value with LayerNorm of these lambdas (of every one measured by default); errors as for `curve`."""
        wanted = self.lams(gating) if lams is None else lams
        return {lam: float(self.curve(lam, gating, True).iloc[-1]) for lam in wanted}

    def _layers(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        values: pd.Series = self._arm(self.means, lam, gating, layernorm).set_index("layer")["value"]
        return values

    def _arm(self, table: pd.DataFrame, lam: float, gating: bool, layernorm: bool) -> pd.DataFrame:
        # A model without a gate has NA there, and is the same arm with and without.
        gate = table["gating"].isna() if not self.gated else (table["gating"] == gating).fillna(False)
        return table[gate & (table["layernorm"] == layernorm) & (table["lam"] == lam)]
