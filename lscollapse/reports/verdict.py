"""Verdicts: on a sentence of the paper, and on whether an arm collapses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import pandas as pd

from lscollapse.core.table import COLLAPSED

VERDICTS = AGREE, DISAGREE, NOT_MEASURED = "agrees", "disagrees", "not measured"


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim for one model, and the numbers behind it."""

    claim: str
    sentence: str
    model: str
    verdict: str
    numbers: str


WORST = {"relative_mu": "min", "rank1_residual": "min", "stable_rank": "min", "mean_cosine": "max"}  # of a curve


class Lost(NamedTuple):
    """Layers that an arm lacks: from `layer` on, in `excerpts` of its `total` excerpts, `why` in words."""

    layer: int
    excerpts: int
    total: int
    why: str


class ArmCurves(NamedTuple):
    """One variant of one model: a curve over layers 0..K, mean over excerpts, for each measure of WORST.

    `lost` is None where every excerpt has every layer; curves end before it.
    """

    model: str
    init: str
    arm: str
    lam: float
    dtype: str
    n_layers: int
    curves: dict[str, pd.Series]
    lost: Lost | None

    def worst(self, measure: str) -> tuple[float, int] | None:
        """The value nearest to collapse from layer 1 on (0 is the embedding), and its layer; None where there is none."""
        curve = self.curves[measure].iloc[1:].dropna()
        if curve.empty:
            return None
        values = curve.to_numpy()
        at = int(values.argmin() if WORST[measure] == "min" else values.argmax())
        return float(values[at]), int(curve.index[at])


def arms(rows: pd.DataFrame) -> Iterator[ArmCurves]:
    """Every variant of a table, as its curves."""
    keys = ["model", "init", "arm", "lam", "dtype"]
    for key, part in rows.groupby(keys, sort=False, dropna=False):
        model, init, arm, lam, dtype = cast("tuple[str, str, str, float, str]", key)  # the stubs know one key only
        lost = _lost(part[part["measure"] == "relative_mu"], dtype)
        held = part if lost is None else part[part["layer"] < lost.layer]
        curves = {name: held[held["measure"] == name].groupby("layer")["value"].mean() for name in WORST}
        yield ArmCurves(model, init, arm, lam, dtype, int(part["layer"].max()), curves, lost)


def _lost(relative: pd.DataFrame, dtype: str) -> Lost | None:
    gone = relative[relative["status"].isin(["overflow", "nan"])]
    if gone.empty:
        return None
    why = f"leave {dtype}" if "overflow" in set(gone["status"]) else "are all zero or no numbers"
    return Lost(int(gone["layer"].min()), gone["excerpt"].nunique(), relative["excerpt"].nunique(), why)


def verdict(arm: ArmCurves) -> str:
    """Whether it collapses, by the threshold COLLAPSED on relative mu, with the numbers; none where layers are missing."""
    if arm.lost is not None:
        return _no_verdict(arm, arm.lost)
    curve = arm.curves["relative_mu"].iloc[1:]
    under = curve.index[curve < COLLAPSED]
    lowest, at, last = float(curve.min()), int(curve.index[int(curve.argmin())]), float(curve.iloc[-1])
    if not len(under):
        text = f"does not collapse: relative mu stays over {COLLAPSED:g}; lowest {lowest:.3f} (layer {at}), last {last:.3f}"
    elif last >= COLLAPSED:
        text = f"falls under {COLLAPSED:g} and recovers: relative mu is lowest in layer {at} ({lowest:.3f}), last {last:.3f}"
    else:
        over = curve.index[curve >= COLLAPSED]
        since, least = int(over[-1]) + 1 if len(over) else 1, f"lowest {lowest:.3f} (layer {at})"
        text = f"collapses: relative mu is under {COLLAPSED:g} from layer {since} on; {least}, last {last:.3f}"
    rank1 = float(arm.curves["rank1_residual"].iloc[-1])
    if last >= COLLAPSED and rank1 < last / 2:
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
    worst = arm.worst("relative_mu")
    return text if worst is None else f"{text}; before that relative mu is lowest in layer {worst[1]} ({worst[0]:.3f})"
