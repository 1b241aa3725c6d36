"""Verdicts: on a sentence of the paper, and on whether an arm collapses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import pandas as pd

from lscollapse.core.table import COLLAPSED, LOST, UNRESOLVED, layer_words

VERDICTS = AGREE, DISAGREE, NOT_MEASURED = "agrees", "disagrees", "not measured"


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim for one model, and the numbers behind it."""

    claim: str
    sentence: str
    model: str
    verdict: str
    numbers: str


NOT_EVEN = "not even float64 resolves {}"
WORST = {"relative_mu": "min", "rank1_residual": "min", "stable_rank": "min", "mean_cosine": "max"}  # of a curve


class Lost(NamedTuple):
    """Layers that an arm lacks: from `layer` on, in `excerpts` of its `total` excerpts, `why` in words."""

    layer: int
    excerpts: int
    total: int
    why: str


class ArmCurves(NamedTuple):
    """One variant of one model: a curve over layers 0..K, mean over excerpts, for each measure of WORST.

    `lost` is None where every excerpt has every layer; curves end before it. They are NaN where an excerpt is unresolved.
    """

    model: str
    init: str
    arm: str
    lam: float
    dtype: str
    n_layers: int
    curves: dict[str, pd.Series]
    lost: Lost | None

    @property
    def unresolved(self) -> list[int]:
        """Layers from 1 on whose relative mu is not known, for rounding."""
        curve = self.curves["relative_mu"].iloc[1:]
        return [int(layer) for layer in curve.index[curve.isna()]]

    def worst(self, measure: str) -> tuple[float, int] | None:
        """The known value nearest to collapse from layer 1 on (0 is the embedding), and its layer; None where none is."""
        curve = self.curves[measure].iloc[1:].dropna()
        if curve.empty:
            return None
        values = curve.to_numpy()
        at = int(values.argmin() if WORST[measure] == "min" else values.argmax())
        return float(values[at]), int(curve.index[at])


def arms(rows: pd.DataFrame) -> Iterator[ArmCurves]:
    """Every variant of a table, as its curves."""
    keys = ["model", "init", "arm", "lam", "dtype"]
    rows = rows[rows["measure"].isin(list(WORST))]  # the gradient's norm is of float32 whatever the arm is
    for key, part in rows.groupby(keys, sort=False, dropna=False):
        model, init, arm, lam, dtype = cast("tuple[str, str, str, float, str]", key)  # the stubs know one key only
        lost = _lost(part[part["measure"] == "relative_mu"], dtype)
        held = part if lost is None else part[part["layer"] < lost.layer]
        curves = {name: _curve(held[held["measure"] == name]) for name in WORST}
        yield ArmCurves(model, init, arm, lam, dtype, int(part["layer"].max()), curves, lost)


def _curve(rows: pd.DataFrame) -> pd.Series:
    unresolved = rows["status"].eq(UNRESOLVED).groupby(rows["layer"]).any()
    return rows.groupby("layer")["value"].mean().mask(unresolved)


def _lost(relative: pd.DataFrame, dtype: str) -> Lost | None:
    gone = relative[relative["status"].isin(LOST)]
    if gone.empty:
        return None
    why = f"leave {dtype}" if "overflow" in set(gone["status"]) else "are all zero or no numbers"
    return Lost(int(gone["layer"].min()), gone["excerpt"].nunique(), relative["excerpt"].nunique(), why)


def verdict(arm: ArmCurves) -> str:
    """Whether it collapses, by the threshold COLLAPSED on relative mu, with the numbers.

    None where layers are missing, and none where unresolved ones would decide: the last, or any of a curve that is
    otherwise over the threshold.
    """
    if arm.lost is not None:
        return _no_verdict(arm, arm.lost)
    curve, unresolved = arm.curves["relative_mu"].iloc[1:], arm.unresolved
    under = curve.index[curve < COLLAPSED]
    if unresolved and (arm.n_layers in unresolved or not len(under)):
        which = unresolved_words(unresolved, arm.dtype, f" of {arm.n_layers}")
        return f"no verdict: {which}{_lowest(arm, 'elsewhere')}"
    lowest, at, last = float(curve.min()), int(curve.index[int(curve.argmin())]), float(curve.iloc[-1])
    if not len(under):
        text = f"does not collapse: relative mu stays over {COLLAPSED:g}; lowest {lowest:.3f} (layer {at}), last {last:.3f}"
    elif last >= COLLAPSED:
        text = f"falls under {COLLAPSED:g} and recovers: relative mu is lowest in layer {at} ({lowest:.3f}), last {last:.3f}"
    else:
        over = curve.index[~(curve < COLLAPSED)]  # or not known
        since, least = int(over[-1]) + 1 if len(over) else 1, f"lowest {lowest:.3f} (layer {at})"
        text = f"collapses: relative mu is under {COLLAPSED:g} from layer {since} on; {least}, last {last:.3f}"
    if unresolved:
        text += f"; unresolved in {arm.dtype}: {layer_words(unresolved)}"
    rank1 = float(arm.curves["rank1_residual"].iloc[-1])
    if last >= COLLAPSED and rank1 != rank1:
        text += f"; the rank-1 residual of the last is unresolved in {arm.dtype}"
    elif last >= COLLAPSED and rank1 < last / 2:
        text += (
            f"; but the rank-1 residual of the last is {rank1:.3f}: one direction carries nearly everything (rows at +u and"
            " -u, or a few long rows), which relative mu does not see"
        )
    return text


def _no_verdict(arm: ArmCurves, lost: Lost) -> str:
    several = lost.layer < arm.n_layers
    which = f"layers {lost.layer} to {arm.n_layers}" if several else f"layer {lost.layer}"
    where = f"where the values of {lost.excerpts} of {lost.total} excerpts {lost.why}"
    text = f"no verdict: {which} of {arm.n_layers} {'are' if several else 'is'} missing, {where}"
    if arm.unresolved:
        text += f"; unresolved in {arm.dtype}: {layer_words(arm.unresolved)}"
    return text + _lowest(arm, "before that")


def _lowest(arm: ArmCurves, where: str) -> str:
    worst = arm.worst("relative_mu")
    return "" if worst is None else f"; {where} relative mu is lowest in layer {worst[1]} ({worst[0]:.3f})"


def unresolved_words(layers: Sequence[int], dtype: str, of: str = "") -> str:
    """That layers of a run in `dtype` are unresolved, and how to mend it; `of` says how many there are."""
    which, it = ("are", "them") if len(layers) > 1 else ("is", "it")
    again = f"rounding in {dtype} decides {it}: run with --dtype float64"
    return f"{layer_words(layers)}{of} {which} unresolved: {NOT_EVEN.format(it) if dtype == 'float64' else again}"
