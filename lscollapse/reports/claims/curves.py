"""Curves of relative mu, means over excerpts, of the arms of one model."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from lscollapse.core.table import LOST, UNRESOLVED, known, reads_pixels
from lscollapse.reports.massive import curve, massive, pooled
from lscollapse.reports.verdict import AGAIN, unresolved_words

Arm = tuple[float, bool, bool]  # lambda, gating, layernorm


class NotMeasured(Exception):
    """The table does not have what a sentence is about; in words where layers are lost or unresolved, else empty."""


class Curves:
    """Mean relative mu of one model's arms: `curve(...)` by layer, `last(...)` by lambda; `used` are the arms asked for."""

    def __init__(self, rows: pd.DataFrame) -> None:
        rows = rows[rows["init"] == "trained"]
        self.used: dict[Arm, None] = {}
        self.long = rows[rows["measure"].isin(("row_norm_ratio", "longest_row", "angular_mu"))]
        relative = rows[rows["measure"] == "relative_mu"]
        self.relative = relative = relative.assign(value=known(relative))
        self.gated = bool(relative["gating"].notna().any())
        self.images = reads_pixels(relative)
        keys = ["gating", "layernorm", "lam", "layer"]
        means = relative.groupby(keys, dropna=False)["value"].apply(lambda v: v.mean(skipna=False))
        self.means = means.reset_index()

    def curve(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Layers 0..K; empty when the arm was not measured.

        Raises:
            NotMeasured: an excerpt lacks some, or rounding decides some; nothing is said on part of a curve.
        """
        self._refuse_lost(lam, gating, layernorm)
        return self.resolved(lam, gating, layernorm)

    def _refuse_lost(self, lam: float, gating: bool, layernorm: bool) -> None:
        held, lost = self.held(lam, gating, layernorm), self.lost(lam, gating, layernorm)
        if lost is None:
            return
        arm = self._arm(self.relative, lam, gating, layernorm)
        gone, total = arm.loc[arm["status"].isin(LOST), "excerpt"].nunique(), arm["excerpt"].nunique()
        before = ""
        if len(held):
            lowest = f"lowest {held.min():.3f} (layer {held.idxmin()})"
            before = f"; before: first {held.iloc[0]:.3f}, {lowest}, then {held.iloc[-1]:.3f}"
        raise NotMeasured(
            f"{self._name(lam, gating=gating, layernorm=layernorm)}: layers {lost} to {int(arm['layer'].max())} are missing,"
            f" where {gone} of {total} excerpts leave the range of floating point{before}"
        )

    def _refuse_unresolved(self, lam: float, gating: bool, layernorm: bool, last_only: bool = False) -> None:
        arm = self._arm(self.relative, lam, gating, layernorm)
        layers = sorted(arm.loc[arm["status"] == UNRESOLVED, "layer"].unique())
        if not layers or (last_only and layers[-1] < arm["layer"].max()):
            return
        name = self._name(lam, gating=gating, layernorm=layernorm)
        raise NotMeasured(f"{name}: {unresolved_words(layers, arm['dtype'].iloc[0])}")

    def end(self, lam: float, gating: bool, layernorm: bool) -> float:
        """The last layer, whatever is unresolved before it.

        Raises:
            NotMeasured: an excerpt lacks it, rounding decides it, or the arm was not measured.
        """
        self._refuse_lost(lam, gating, layernorm)
        self._refuse_unresolved(lam, gating, layernorm, last_only=True)
        held = self.held(lam, gating, layernorm)
        if held.empty:
            raise NotMeasured
        return float(held.iloc[-1])

    def resolved(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """The layers that every excerpt has; empty when the arm was not measured. NotMeasured where one is unresolved."""
        self._refuse_unresolved(lam, gating, layernorm)
        return self.held(lam, gating, layernorm)

    def held(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """The layers whose value is known for every excerpt; empty when the arm was not measured."""
        self.used[lam, gating, layernorm] = None
        return self._layers(lam, gating, layernorm).dropna()

    def lost(self, lam: float, gating: bool, layernorm: bool) -> int | None:
        """The first layer whose values an excerpt's floating point could not hold; None where there is none."""
        arm = self._arm(self.relative, lam, gating, layernorm)
        lost = arm.loc[arm["status"].isin(LOST), "layer"]
        return int(lost.min()) if len(lost) else None

    def excerpts(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Last-layer value of every excerpt; errors as for `end`."""
        self.end(lam, gating, layernorm)
        arm = self._arm(self.relative, lam, gating, layernorm)
        values: pd.Series = arm.loc[arm["layer"] == arm["layer"].max(), "value"]
        return values

    def lams(self, gating: bool) -> list[float]:
        """Every lambda measured with LayerNorm, ascending."""
        return [lam for lam in sorted(set(self.means["lam"].dropna())) if len(self._arm(self.means, lam, gating, True))]

    def last(self, gating: bool, lams: Iterable[float] | None = None) -> dict[float, float]:
        """Last-layer value with LayerNorm of these lambdas (of every one measured by default); errors as for `end`."""
        wanted = self.lams(gating) if lams is None else lams
        return {lam: self.end(lam, gating, True) for lam in wanted}

    def note(self) -> str:
        """In which of the arms `used` a row is massive, and what angular mu says of their last layers; "" where in none."""
        parts = []
        for gating, layernorm in dict.fromkeys(arm[1:] for arm in self.used):
            lams = [lam for lam, *rest in self.used if rest == [gating, layernorm]]
            every = {lam: massive(self._arm(self.long, lam, gating, layernorm)) for lam in lams}
            found = {lam: long for lam, long in sorted(every.items()) if long.layers}
            if found:
                name = self._name(*found, gating=gating, layernorm=layernorm)
                ends = self._directions(list(found), gating, layernorm)
                parts.append(
                    f"{name}: {pooled(found.values()).words}, which decides relative mu there; angular mu {ends}"
                )
        return "; ".join(parts)

    def _directions(self, lams: list[float], gating: bool, layernorm: bool) -> str:
        """What angular mu is at the last layer, in words that go on from its name."""
        ends = []
        for lam in lams:
            rows = self._arm(self.long, lam, gating, layernorm)
            angular = rows[rows["measure"] == "angular_mu"]
            if angular.empty:
                return AGAIN
            end = curve(angular).iloc[-1]
            value = f"{end:.3f}" if end == end else "not known"
            ends.append(value if len(lams) == 1 else f"{lam:g}: {value}")
        return f"of the last layer {', '.join(ends)}"

    def _name(self, *lams: float, gating: bool, layernorm: bool) -> str:
        gate = ("gate, " if gating else "no gate, ") if self.gated else ""
        return f"{gate}{'LN' if layernorm else 'no LN'}, lambda {', '.join(f'{lam:g}' for lam in lams)}"

    def _layers(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        values: pd.Series = self._arm(self.means, lam, gating, layernorm).set_index("layer")["value"]
        return values

    def _arm(self, table: pd.DataFrame, lam: float, gating: bool, layernorm: bool) -> pd.DataFrame:
        # A model without a gate has NA there, and is the same arm with and without.
        gate = table["gating"].isna() if not self.gated else (table["gating"] == gating).fillna(False)
        return table[gate & (table["layernorm"] == layernorm) & (table["lam"] == lam)]
