"""Curves of relative mu, and what each sentence of the paper on Figures 1-4 asks of them.

A curve is the mean over excerpts of relative mu. Thresholds, the first three fixed before any run was judged:

    COLLAPSED  a layer counts as collapsed when its mean relative mu is under 0.5; iid Gaussian rows have about 1
    RISE       a curve rises (or drops) when it gains (or loses) at least 0.1 between two layers
    SMALL      |lambda| counts as small up to 0.5
    MUCH       a lambda is much lower than a bound when it is at most a tenth of it

A predicate returns whether it holds and the numbers, or None where the table does not have what it needs. Where an arm that
it needs lacks layers, because an excerpt left the range of floating point there, it raises MissingLayers: nothing is said on
part of a curve.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lscollapse.core.table import COLLAPSED, RISE, reads_pixels
from lscollapse.theory.theorem41 import lambda_star

if TYPE_CHECKING:
    import pandas as pd

SMALL, MUCH = 0.5, 0.1
PAPER_BOUND, PAPER_A = 937.924, 0.9  # condition (7) for Mamba-2 in section 5.1, and its rate


class MissingLayers(Exception):
    """What an arm lacks that a sentence is about."""


class Curves:
    """Mean relative mu of one model's arms: `curve(...)` by layer, `last(...)` by lambda."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.relative = relative = rows[(rows["measure"] == "relative_mu") & (rows["init"] == "trained")]
        self.gated = bool(relative["gating"].notna().any())
        self.images = reads_pixels(relative)
        keys = ["gating", "layernorm", "lam", "layer"]
        means = relative.groupby(keys, dropna=False)["value"].apply(lambda v: v.mean(skipna=False))
        self.means = means.reset_index()

    def _arm(self, table: pd.DataFrame, lam: float, gating: bool, layernorm: bool) -> pd.DataFrame:
        gate = table["gating"].isna() if not self.gated else (table["gating"] == gating).fillna(False)
        return table[gate & (table["layernorm"] == layernorm) & (table["lam"] == lam)]

    def curve(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Layers 0..K; empty when the arm was not measured.

        Raises:
            MissingLayers: an excerpt lacks some.
        """
        lost = self.lost(lam, gating, layernorm)
        if lost is not None:
            gate = ("gate, " if gating else "no gate, ") if self.gated else ""
            depth = int(self._arm(self.means, lam, gating, layernorm)["layer"].max())
            held = self.held(lam, gating, layernorm)
            before = (
                f"; before: first {held.iloc[0]:.3f}, lowest {held.min():.3f} (layer {held.idxmin()}), then"
                f" {held.iloc[-1]:.3f}"
            )
            raise MissingLayers(
                f"{gate}{'LN' if layernorm else 'no LN'}, lambda {lam:g}: layers {lost} to {depth} are missing, where"
                f" {self._lost_excerpts(lam, gating, layernorm)} excerpts leave the range of floating point"
                + (before if len(held) else "")
            )
        return self.held(lam, gating, layernorm)

    def held(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """The layers that every excerpt has; empty when the arm was not measured."""
        return self._arm(self.means, lam, gating, layernorm).set_index("layer")["value"].dropna()

    def lost(self, lam: float, gating: bool, layernorm: bool) -> int | None:
        """The first layer whose values an excerpt's floating point could not hold; None where there is none."""
        values = self._arm(self.means, lam, gating, layernorm).set_index("layer")["value"]
        return int(values.index[values.isna()].min()) if values.isna().any() else None

    def _lost_excerpts(self, lam: float, gating: bool, layernorm: bool) -> str:
        arm = self._arm(self.relative, lam, gating, layernorm)
        return f"{arm.loc[arm['value'].isna(), 'excerpt'].nunique()} of {arm['excerpt'].nunique()}"

    def excerpts(self, lam: float, gating: bool, layernorm: bool) -> pd.Series:
        """Last-layer value of every excerpt; errors as for `curve`."""
        self.curve(lam, gating, layernorm)
        arm = self._arm(self.relative, lam, gating, layernorm)
        return arm.loc[arm["layer"] == arm["layer"].max(), "value"]

    def lams(self, gating: bool, layernorm: bool = True) -> list[float]:
        """Every lambda measured, ascending."""
        return [
            lam for lam in sorted(set(self.means["lam"].dropna())) if len(self._arm(self.means, lam, gating, layernorm))
        ]

    def last(self, gating: bool, lams: Iterable[float] | None = None) -> dict[float, float]:
        """Last-layer value with LayerNorm of these lambdas (of every one measured by default); errors as for `curve`."""
        wanted = self.lams(gating) if lams is None else lams
        return {lam: float(self.curve(lam, gating, True).iloc[-1]) for lam in wanted}


Judgement = tuple[bool, str] | None  # None: not measured


def _numbers(values: dict[float, float]) -> str:
    return ", ".join(f"{lam:g}: {value:.3f}" for lam, value in values.items())


def small_lambda_collapses(curves: Curves) -> Judgement:
    small = curves.last(False, [lam for lam in curves.lams(gating=False) if abs(lam) <= SMALL])
    return (all(v < COLLAPSED for v in small.values()), f"last layer {_numbers(small)}") if small else None


def lambda_one_collapses(curves: Curves) -> Judgement:
    return _ends_collapsed(curves, 1.0)


def large_lambda_avoids(curves: Curves) -> Judgement:
    lams = curves.lams(gating=False)
    if 1.0 not in lams or min(lams) >= -1 or max(lams) <= 1:
        return None
    ends, at_1 = curves.last(False, (min(lams), max(lams))), curves.last(False, [1.0])[1.0]
    good = all(value >= COLLAPSED and value > at_1 for value in ends.values())
    return good, f"last layer {_numbers(ends)}; at 1: {at_1:.3f}"


def without_skip_collapses(curves: Curves) -> Judgement:
    return _ends_collapsed(curves, 0.0)


def _ends_collapsed(curves: Curves, lam: float) -> Judgement:
    curve = curves.curve(lam, False, True)
    return (bool(curve.iloc[-1] < COLLAPSED), f"last layer {curve.iloc[-1]:.3f}") if len(curve) else None


def deep_minimum_near_zero(curves: Curves) -> Judgement:
    lams = curves.lams(gating=True)
    if len(lams) < 3 or 0.0 not in lams:
        return None
    last = curves.last(gating=True)
    lowest = min(last, key=lambda lam: last[lam])
    return abs(lowest) <= SMALL and last[
        lowest
    ] < COLLAPSED, f"lowest {last[lowest]:.3f} at lambda {lowest:g}; at 0: {last[0.0]:.3f}"


def negative_is_higher(curves: Curves) -> Judgement:
    lams = curves.lams(gating=True)
    both = [lam for lam in lams if lam > 0 and -lam in lams]
    if not both:
        return None
    last = curves.last(True, [*both, *(-lam for lam in both)])
    pairs = {lam: (last[-lam], last[lam]) for lam in both}
    text = ", ".join(f"∓{lam:g}: {negative:.3f}/{positive:.3f}" for lam, (negative, positive) in pairs.items())
    return all(negative > positive for negative, positive in pairs.values()), f"last layer, negative/positive {text}"


def choice_of_lambda_decides(curves: Curves) -> Judgement:
    lams = curves.lams(gating=True)
    if len(lams) < 3 or 0.0 not in lams:
        return None
    last = curves.last(gating=True)
    low, high = min(last, key=lambda lam: last[lam]), max(last, key=lambda lam: last[lam])
    return last[low] < COLLAPSED <= last[high], f"last layer {_numbers({low: last[low], high: last[high]})}"


def much_lower_lambda_suffices(curves: Curves) -> Judgement:
    lams = curves.lams(gating=True)
    if len(lams) < 3 or 0.0 not in lams:
        return None
    last = curves.last(gating=True)
    bound = PAPER_BOUND if curves.gated else lambda_star(PAPER_A, float(curves.relative["n_tokens"].max()) ** 0.5)
    keeping = [lam for lam, value in last.items() if lam and value >= COLLAPSED]
    if not keeping:
        return False, f"no measured lambda but 0 keeps it; condition (7) asks for |lambda| > {bound:.3f}"
    least = min(keeping, key=abs)
    text = f"at {least:g}: {last[least]:.3f}; condition (7) asks for |lambda| > {bound:.3f}"
    return abs(least) <= MUCH * bound, text


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


def gated_unnormed_does_not_collapse(curves: Curves) -> Judgement:
    curve = curves.curve(1.0, gating=True, layernorm=False)
    return (bool(curve.min() >= COLLAPSED), f"lowest {curve.min():.3f}") if len(curve) else None


def layernorm_keeps_stable(curves: Curves) -> Judgement:
    arms = {("gate" if gating else "no gate") + (", LN" if norm else ", no LN"): (gating, norm)
            for norm in (True, False) for gating in (True, False)}  # fmt: skip
    found = {name: curves.held(1.0, *arm) for name, arm in arms.items()}  # here a lost layer is what is looked for
    if not all(map(len, found.values())):
        return None
    if "nan" in set(curves.relative.loc[curves.relative["lam"] == 1.0, "status"]):
        raise MissingLayers("lambda 1: layers are missing, where values are all zero or no numbers")
    lost = {name: curves.lost(1.0, *arm) for name, arm in arms.items()}
    gains = {name: (curve - curve.cummin()).max() for name, curve in found.items()}
    unstable = {name: lost[name] is not None or gains[name] >= RISE for name in arms}
    text = (f"{name}: {'overflow at layer ' + str(lost[name]) if lost[name] is not None else 'none lost'}, "
            f"greatest gain {gains[name]:.3f}" for name in arms)  # fmt: skip
    good = all(unstable[name] != norm for name, (_, norm) in arms.items())
    return good, "; ".join(text)


def gate_prevents_collapse(curves: Curves) -> Judgement:
    with_gate, without = (curves.curve(1.0, gating, True) for gating in (True, False))
    if not len(with_gate) or not len(without):
        return None
    first, second = with_gate.iloc[-1], without.iloc[-1]
    return bool(second < COLLAPSED <= first), f"last layer {first:.3f} with the gate, {second:.3f} without"


S4D_ARMS = {"skip + LN": (1.0, True), "no skip + LN": (0.0, True), "skip": (1.0, False), "neither": (0.0, False)}


def s4d_does_not_collapse(curves: Curves) -> Judgement:
    found = {name: curves.curve(lam, False, layernorm) for name, (lam, layernorm) in S4D_ARMS.items()}
    if not all(map(len, found.values())):
        return None
    good = all(curve.iloc[1:].min() >= COLLAPSED for curve in found.values())
    numbers = (f"{name}: {curve.iloc[1:].min():.3f}, {curve.iloc[-1]:.3f}" for name, curve in found.items())
    return bool(good), f"lowest from layer 1 on, last: {'; '.join(numbers)}"


def s4d_collapse_is_the_weights(curves: Curves) -> Judgement:
    found = {name: curves.excerpts(lam, False, layernorm) for name, (lam, layernorm) in S4D_ARMS.items()}
    if not all(map(len, found.values())):
        return None
    counts = {name: (int((values < COLLAPSED).sum()), len(values)) for name, values in found.items()}
    text = ", ".join(f"{name}: {low} of {n}" for name, (low, n) in counts.items())
    return all(low in (0, n) for low, n in counts.values()), f"images that end under {COLLAPSED:g}: {text}"
