"""Verdicts: on a sentence of the paper, and on whether an arm collapses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import pandas as pd

from lscollapse.core.table import ANGULAR, COLLAPSED, LITTLE, LOST, POSITION, layer_words
from lscollapse.reports.massive import Massive, curve, massive, sides

VERDICTS = AGREE, DISAGREE, NOT_MEASURED = "agrees", "disagrees", "not measured"


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim for one model, the numbers behind it, and what a reader of them has to know ("" if nothing)."""

    claim: str
    sentence: str
    model: str
    verdict: str
    numbers: str
    note: str = ""


NOT_EVEN = "not even float64 resolves {}"
AGAIN = "is not in this table: measure it again"
# The end of a curve that is nearest to collapse; of the ratio, to a row that decides alone.
WORST = {
    "relative_mu": "min", "rank1_residual": "min", "stable_rank": "min", "mean_cosine": "max", "angular_mu": "min",
    "angular_rank1_residual": "min", "row_norm_ratio": "max", "effective_rank": "min",
}  # fmt: skip


class Lost(NamedTuple):
    """Layers that an arm lacks: from `layer` on, in `excerpts` of its `total` excerpts, `why` in words."""

    layer: int
    excerpts: int
    total: int
    why: str


class ArmCurves(NamedTuple):
    """One variant of one model: a curve over layers 0..K, mean over excerpts, for each measure of WORST that was measured.

    `lost` is None where every excerpt has every layer; curves end before it. They are NaN where an excerpt is unresolved, or has
    no value: `undefined` names those layers, where rows are zero. `massive` is of the layers from 1 on, and `doubtful` those of them
    where rounding leaves open whether a row is massive.
    """

    model: str
    init: str
    arm: str
    lam: float
    dtype: str
    n_layers: int
    curves: dict[str, pd.Series]
    undefined: dict[str, list[int]]
    massive: Massive
    doubtful: list[int]
    lost: Lost | None

    @property
    def unresolved(self) -> list[int]:
        """Layers from 1 on whose relative mu is not known, for rounding."""
        return _unknown(self.curves["relative_mu"].iloc[1:])

    def worst(self, measure: str) -> tuple[float, int] | None:
        """The known value nearest to collapse from layer 1 on (0 is the embedding), and its layer; None where none is."""
        return _worst(self.curves[measure].iloc[1:], WORST[measure])


def arms(rows: pd.DataFrame) -> Iterator[ArmCurves]:
    """Every variant of a table, as its curves."""
    keys = ["model", "init", "arm", "lam", "dtype"]
    rows = rows[rows["measure"].isin([*WORST, POSITION])]  # the gradient's norm is of float32 whatever the arm is
    for key, part in rows.groupby(keys, sort=False, dropna=False):
        model, init, arm, lam, dtype = cast("tuple[str, str, str, float, str]", key)  # the stubs know one key only
        lost = _lost(part[part["measure"] == "relative_mu"], dtype)
        held = part if lost is None else part[part["layer"] < lost.layer]
        parts = {name: held[held["measure"] == name] for name in WORST if (part["measure"] == name).any()}
        curves = {name: curve(own) for name, own in parts.items()}
        undefined = {name: _undefined(curves[name], own) for name, own in parts.items()}
        deep = held[held["layer"] > 0]
        doubtful = _unknown(sides(deep)) if "row_norm_ratio" in curves else []
        n_layers = int(part["layer"].max())
        yield ArmCurves(model, init, arm, lam, dtype, n_layers, curves, undefined, massive(deep), doubtful, lost)


def _lost(relative: pd.DataFrame, dtype: str) -> Lost | None:
    gone = relative[relative["status"].isin(LOST)]
    if gone.empty:
        return None
    why = f"leave {dtype}" if "overflow" in set(gone["status"]) else "are all zero or no numbers"
    return Lost(int(gone["layer"].min()), gone["excerpt"].nunique(), relative["excerpt"].nunique(), why)


def _worst(curve: pd.Series, end: str) -> tuple[float, int] | None:
    curve = curve.dropna()
    if curve.empty:
        return None
    at = int(curve.to_numpy().argmin() if end == "min" else curve.to_numpy().argmax())
    return float(curve.iloc[at]), int(curve.index[at])


def _unknown(curve: pd.Series) -> list[int]:
    return [int(layer) for layer in curve.index[curve.isna()]]


def _undefined(curve: pd.Series, rows: pd.DataFrame) -> list[int]:
    lacking = set(rows.loc[rows["status"].isin(LOST), "layer"])
    return [layer for layer in _unknown(curve) if layer in lacking]


class Judged(NamedTuple):
    """The curve that decides, from layer 1 on: relative mu, and angular mu at the layers where a row is massive.

    `name` is in words; layers of NaN are `unresolved`, or `undefined` where zero rows have no direction. `aside` says what is
    massive, or not known to be, and is "" where nothing is.
    """

    name: str
    curve: pd.Series
    unresolved: list[int]
    undefined: list[int]
    aside: str


def judged(arm: ArmCurves) -> Judged:
    """By what an arm is judged. Where a row is massive and angular mu was not measured, the curve is NaN."""
    relative, layers = arm.curves["relative_mu"].iloc[1:], arm.massive.layers
    doubtful = [layer for layer in arm.doubtful if relative[layer] == relative[layer]]
    aside = f"; whether a row is massive is unresolved at {layer_words(doubtful)}" if doubtful else ""
    angular = arm.curves.get("angular_mu", relative)
    decided = [layer for layer in doubtful if (relative[layer] < COLLAPSED) != (angular[layer] < COLLAPSED)]
    relative = relative.mask(relative.index.isin(decided))
    if not layers:
        return Judged("relative mu", relative, _unknown(relative), [], aside)
    span, own = _span(relative.reindex(layers)), f"weighs that {arm.massive.unit} most"
    alone = f"relative mu, {span}, {own}" if span else f"relative mu {own}"
    chosen = relative.mask(relative.index.isin(layers))
    if "angular_mu" not in arm.curves:
        unresolved = [layer for layer in _unknown(relative) if layer not in layers]
        aside = f"; {arm.massive.words}: {alone}, and angular mu {AGAIN}{aside}"
        return Judged("relative mu", chosen, unresolved, [], aside)
    directions = arm.curves["angular_mu"].reindex(layers)
    chosen = chosen.fillna(directions)
    undefined = [layer for layer in arm.undefined["angular_mu"] if layer in layers]
    unresolved = [layer for layer in _unknown(chosen) if layer not in undefined]
    name = "relative mu, angular where a row is massive," if set(relative.index) - set(layers) else "angular mu"
    if directions.notna().any():
        alone = f"judged by directions there (angular mu {_span(directions)}; {alone})"
    return Judged(name, chosen, unresolved, undefined, f"; {arm.massive.words}: {alone}{aside}")


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return "" if values.isna().all() else low if low == high else f"{low} to {high}"


def verdict(arm: ArmCurves) -> str:
    """Whether it collapses, with the numbers: by the threshold COLLAPSED on relative mu, or on angular mu where a row is massive.

    None where layers are missing, and none where unresolved ones would decide: the last, or any of a curve that is
    otherwise over the threshold. None where a row is massive and angular mu was not measured.
    """
    found = judged(arm)
    curve, K = found.curve, arm.n_layers
    if arm.lost is not None:
        return f"no verdict: {_missing(arm.lost, K)}{_not_known(found, arm.dtype)}{_lowest(found, 'before that')}{found.aside}"
    if arm.massive.layers and "angular_mu" not in arm.curves:
        return f"no verdict: {found.aside.removeprefix('; ')}{_lowest(found, 'elsewhere')}"
    unknown, under = _unknown(curve), curve.index[curve < COLLAPSED]
    if unknown and (K in unknown or not len(under)):
        return f"no verdict: {_undecided(found, arm)}{_lowest(found, 'elsewhere')}{found.aside}"
    lowest, at, last = float(curve.min()), int(curve.index[int(curve.argmin())]), float(curve.iloc[-1])
    if not len(under):
        text = f"does not collapse: {found.name} stays over {COLLAPSED:g}; lowest {lowest:.3f} (layer {at}), last {last:.3f}"
    elif last >= COLLAPSED:
        text = f"falls under {COLLAPSED:g} and recovers: {found.name} is lowest in layer {at} ({lowest:.3f}), last {last:.3f}"
    else:
        over = curve.index[~(curve < COLLAPSED)]  # or not known
        since, least = int(over[-1]) + 1 if len(over) else 1, f"lowest {lowest:.3f} (layer {at})"
        text = f"collapses: {found.name} is under {COLLAPSED:g} from layer {since} on; {least}, last {last:.3f}"
    return text + _not_known(found, arm.dtype) + (_but(arm, last) if last >= COLLAPSED else "") + found.aside


def _but(arm: ArmCurves, last: float) -> str:
    """What to say of a last layer that is spread out by the measure that it is judged by, and not by another."""
    by_direction, angular = arm.n_layers in arm.massive.layers, arm.curves.get("angular_mu")
    lengths = "" if by_direction or angular is None else _lengths(float(angular.iloc[-1]))
    said = " and ".join(filter(None, (lengths, _rank1(arm, last, by_direction))))
    return (f"; but {said}" if said else "") + _rank1_unresolved(arm, by_direction)


def _lengths(angular: float) -> str:
    """Among few tokens a row decides that is not massive yet: among 32 one of 5 times the median norm has 44 % of ||Y||^2."""
    if not angular < COLLAPSED:
        return ""
    return f"angular mu of the last is {angular:.3f}: most rows point one way, and their lengths keep relative mu over {COLLAPSED:g}"


def _last_rank1(arm: ArmCurves, by_direction: bool) -> float | None:
    """The (angular) rank-1 residual of the last layer; None where it was not measured."""
    residual = arm.curves.get(ANGULAR["rank1_residual"] if by_direction else "rank1_residual")
    return None if residual is None else float(residual.iloc[-1])


def _rank1(arm: ArmCurves, last: float, by_direction: bool) -> str:
    rank1 = _last_rank1(arm, by_direction)
    if rank1 is None or not rank1 < LITTLE * last:
        return ""
    rows = "rows at +u and -u" + ("" if by_direction else ", or a few long rows")
    unseen = f"({rows}), which {'angular' if by_direction else 'relative'} mu does not see"
    words = f"the {'angular ' * by_direction}rank-1 residual of the last is {rank1:.3f}"
    return f"{words}: one direction carries nearly everything {unseen}"


def _rank1_unresolved(arm: ArmCurves, by_direction: bool) -> str:
    rank1 = _last_rank1(arm, by_direction)
    if rank1 is None or rank1 == rank1:
        return ""
    return f"; the {'angular ' * by_direction}rank-1 residual of the last is unresolved in {arm.dtype}"


def _missing(lost: Lost, n_layers: int) -> str:
    several = lost.layer < n_layers
    which = f"layers {lost.layer} to {n_layers}" if several else f"layer {lost.layer}"
    where = f"where the values of {lost.excerpts} of {lost.total} excerpts {lost.why}"
    return f"{which} of {n_layers} {'are' if several else 'is'} missing, {where}"


def _undecided(found: Judged, arm: ArmCurves) -> str:
    """Which layers leave the verdict open, and why."""
    of = f" of {arm.n_layers}"
    unresolved = unresolved_words(found.unresolved, arm.dtype, of) if found.unresolved else ""
    return "; ".join(filter(None, (unresolved, undefined_words(found.undefined, of) if found.undefined else "")))


def _not_known(found: Judged, dtype: str) -> str:
    """Which layers are not known, where a verdict stands without them."""
    unresolved = f"; unresolved in {dtype}: {layer_words(found.unresolved)}" if found.unresolved else ""
    return unresolved + (f"; {undefined_words(found.undefined)}" if found.undefined else "")


def _lowest(found: Judged, where: str) -> str:
    worst = _worst(found.curve, "min")
    return "" if worst is None else f"; {where} {found.name} is lowest in layer {worst[1]} ({worst[0]:.3f})"


def unresolved_words(layers: Sequence[int], dtype: str, of: str = "") -> str:
    """That layers of a run in `dtype` are unresolved, and how to mend it; `of` says how many there are."""
    which, it = ("are", "them") if len(layers) > 1 else ("is", "it")
    again = f"rounding in {dtype} decides {it}: run with --dtype float64"
    return f"{layer_words(layers)}{of} {which} unresolved: {NOT_EVEN.format(it) if dtype == 'float64' else again}"


def undefined_words(layers: Sequence[int], of: str = "") -> str:
    """That layers have no angular mu."""
    return f"{layer_words(layers)}{of} {'have' if len(layers) > 1 else 'has'} no angular mu, since rows are zero"
