"""Sentences of the paper as predicates on the table: each agrees, disagrees, or was not measured, with the numbers.

A curve is the mean over excerpts of relative mu. Thresholds, fixed before any run was judged:

    COLLAPSED  a layer counts as collapsed when its mean relative mu is under 0.5; iid Gaussian rows have about 1
    RISE       a curve rises (or drops) when it gains (or loses) at least 0.1 between two layers
    SMALL      |lambda| counts as small up to 0.5
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lscollapse.tasks.images import reads_pixels

if TYPE_CHECKING:
    import pandas as pd

COLLAPSED, RISE, SMALL = 0.5, 0.1, 0.5
AGREE, DISAGREE, NOT_MEASURED = "agrees", "disagrees", "not measured"


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim for one model, and the numbers behind it."""

    claim: str
    sentence: str
    model: str
    verdict: str
    numbers: str


class Curves:
    """Mean relative mu of one model's arms: `curve(...)` by layer, `last(...)` by lambda."""

    def __init__(self, rows: pd.DataFrame) -> None:
        relative = rows[(rows["measure"] == "relative_mu") & (rows["init"] == "trained")]
        self.gated = bool(relative["gating"].notna().any())
        self.images = reads_pixels(relative)
        keys = ["gating", "layernorm", "lam", "layer"]
        self.means = relative.groupby(keys, dropna=False)["value"].apply(lambda v: v.mean(skipna=False))

    def curve(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Layers 0..K without those that overflowed; empty when the arm was not measured."""
        table = self.means.reset_index()
        gate = table["gating"].isna() if not self.gated else (table["gating"] == gating).fillna(False)
        chosen = table[gate & (table["layernorm"] == layernorm) & (table["lam"] == lam)]
        return chosen.set_index("layer")["value"].dropna()

    def last(self, gating: bool, layernorm: bool = True) -> dict[float, float]:
        """Last-layer value of every lambda measured."""
        lams = sorted(set(self.means.reset_index()["lam"].dropna()))
        curves = {lam: self.curve(lam, gating, layernorm) for lam in lams}
        return {lam: float(curve.iloc[-1]) for lam, curve in curves.items() if len(curve)}


Judgement = tuple[bool, str] | None  # None: not measured


def _numbers(values: dict[float, float]) -> str:
    return ", ".join(f"{lam:g}: {value:.3f}" for lam, value in values.items())


def small_lambda_collapses(curves: Curves) -> Judgement:
    small = {lam: value for lam, value in curves.last(gating=False).items() if abs(lam) <= SMALL}
    return (all(v < COLLAPSED for v in small.values()), f"last layer {_numbers(small)}") if small else None


def lambda_one_collapses(curves: Curves) -> Judgement:
    last = curves.last(gating=False)
    return (last[1.0] < COLLAPSED, f"last layer {last[1.0]:.3f}") if 1.0 in last else None


def large_lambda_avoids(curves: Curves) -> Judgement:
    last = curves.last(gating=False)
    if 1.0 not in last or min(last) >= -1 or max(last) <= 1:
        return None
    ends = {lam: last[lam] for lam in (min(last), max(last))}
    good = all(value >= COLLAPSED and value > last[1.0] for value in ends.values())
    return good, f"last layer {_numbers(ends)}; at 1: {last[1.0]:.3f}"


def deep_minimum_near_zero(curves: Curves) -> Judgement:
    last = curves.last(gating=True)
    if len(last) < 3 or 0.0 not in last:
        return None
    lowest = min(last, key=lambda lam: last[lam])
    return abs(lowest) <= SMALL and last[
        lowest
    ] < COLLAPSED, f"lowest {last[lowest]:.3f} at lambda {lowest:g}; at 0: {last[0.0]:.3f}"


def negative_is_higher(curves: Curves) -> Judgement:
    last = curves.last(gating=True)
    pairs = {lam: (last[-lam], last[lam]) for lam in last if lam > 0 and -lam in last}
    if not pairs:
        return None
    text = ", ".join(f"∓{lam:g}: {negative:.3f}/{positive:.3f}" for lam, (negative, positive) in pairs.items())
    return all(negative > positive for negative, positive in pairs.values()), f"last layer, negative/positive {text}"


def full_model_does_not_collapse(curves: Curves) -> Judgement:
    curve = curves.curve(1.0, gating=True, layernorm=True)
    return (
        (bool(curve.min() >= COLLAPSED), f"lowest {curve.min():.3f}, last {curve.iloc[-1]:.3f}") if len(curve) else None
    )


def ungated_falls(curves: Curves) -> Judgement:
    curve = curves.curve(1.0, gating=False, layernorm=True)
    if not len(curve):
        return None
    half, last = len(curve) // 2, curve.iloc[-1]
    early, late = curve.iloc[:half].mean(), curve.iloc[half:].mean()
    good = last < COLLAPSED and late <= early
    return bool(
        good
    ), f"first {curve.iloc[0]:.3f}, mean of the early half {early:.3f}, of the later half {late:.3f}, last {last:.3f}"


def ungated_unnormed_drops_then_rises(curves: Curves) -> Judgement:
    curve = curves.curve(1.0, gating=False, layernorm=False)
    if not len(curve):
        return None
    at = int(curve.argmin())
    lowest, after = curve.iloc[at], curve.iloc[at:].max()
    good = curve.iloc[0] - lowest >= RISE and after - lowest >= RISE
    return bool(
        good
    ), f"first {curve.iloc[0]:.3f}, lowest {lowest:.3f} (layer {curve.index[at]}), then up to {after:.3f}"


def gated_unnormed_rises(curves: Curves) -> Judgement:
    curve = curves.curve(1.0, gating=True, layernorm=False)
    if not len(curve):
        return None
    gains = curve - curve.cummin()
    return bool(
        gains.max() >= RISE
    ), f"lowest {curve.min():.3f}, greatest gain {gains.max():.3f}, last finite {curve.iloc[-1]:.3f}"


def s4d_does_not_collapse(curves: Curves) -> Judgement:
    arms = {"skip + LN": (1.0, True), "no skip + LN": (0.0, True), "skip": (1.0, False), "neither": (0.0, False)}
    found = {name: curves.curve(lam, False, layernorm) for name, (lam, layernorm) in arms.items()}
    if not all(map(len, found.values())):
        return None
    good = all(curve.iloc[1:].min() >= COLLAPSED for curve in found.values())
    numbers = (f"{name}: {curve.iloc[1:].min():.3f}, {curve.iloc[-1]:.3f}" for name, curve in found.items())
    return bool(good), f"lowest from layer 1 on, last: {'; '.join(numbers)}"


CLAIMS: dict[str, tuple[str, Callable[[Curves], Judgement]]] = {
    "figure 1a": ("When |lambda| is small, the model suffers from rank collapse.", small_lambda_collapses),
    "figure 1b": ("This happens even when lambda = 1.", lambda_one_collapses),
    "figure 1c": ("Sufficiently increasing or decreasing lambda avoids rank collapse.", large_lambda_avoids),
    "figure 2a": ("Lambda very close to 0 causes a very low mu, even with LayerNorm.", deep_minimum_near_zero),
    "figure 2b": ("A negative lambda leads to a higher mu.", negative_is_higher),
    "figure 3a": ("With gating and LayerNorm there is no rank collapse.", full_model_does_not_collapse),
    "figure 3b": ("Without gating, with LayerNorm, mu approaches zero in later layers.", ungated_falls),
    "figure 3c": ("Without either, an initial drop, then a dramatic increase.", ungated_unnormed_drops_then_rises),
    "figure 3d": ("With gating, without LayerNorm, a sudden increase.", gated_unnormed_rises),
    "figure 4": ("In S4D no rank collapse, even without skip connection and LayerNorm.", s4d_does_not_collapse),
}
NEEDS_GATE = ("figure 1", "figure 3")


def judge(rows: pd.DataFrame) -> Iterator[Finding]:
    """Every claim for every model of a table (one skip_site and norm_site reading of it).

    S4D is judged on Figure 4 only, a transformer on Figure 2 only.
    """
    for model in dict.fromkeys(rows["model"]):
        curves = Curves(rows[rows["model"] == model])
        for claim, (sentence, predicate) in CLAIMS.items():
            if curves.images != claim.startswith("figure 4") or (not curves.gated and claim.startswith(NEEDS_GATE)):
                continue
            result = predicate(curves)
            if result is None:
                yield Finding(claim, sentence, model, NOT_MEASURED, "")
            else:
                yield Finding(claim, sentence, model, AGREE if result[0] else DISAGREE, result[1])


def judge_readings(rows: pd.DataFrame) -> pd.DataFrame:
    """The claims on Figures 1 and 3 under every reading: columns model, skip_site, norm_site, claim, sentence, verdict, numbers.

    Of a reading (skip_site, norm_site), the arms with LayerNorm are those of its skip_site, whatever norm_site they carry.
    """
    import pandas as pd

    found = []
    without = rows[~rows["layernorm"].astype(bool)]
    for skip_site, norm_site in dict.fromkeys(zip(without["skip_site"], without["norm_site"], strict=True)):
        chosen = (rows["skip_site"] == skip_site) & (rows["layernorm"].astype(bool) | (rows["norm_site"] == norm_site))
        for finding in judge(rows[chosen]):
            if finding.claim.startswith(NEEDS_GATE):
                found.append({"skip_site": skip_site, "norm_site": norm_site, **asdict(finding)})
    return pd.DataFrame(found)
