"""The paper's sentences on Figures 1-4, each beside what it asks of the curves: one entry a claim.

A predicate returns whether it holds and the numbers, and raises NotMeasured where the table does not have what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from lscollapse.core.table import COLLAPSED, RISE
from lscollapse.reports.claims.curves import Curves, NotMeasured
from lscollapse.theory.theorem41 import lambda_star

# |lambda| counts as small up to SMALL; a lambda is much lower than a bound when it is at most the share MUCH of it.
SMALL, MUCH = 0.5, 0.1
PAPER_BOUND, PAPER_A = 937.924, 0.9  # condition (7) for Mamba-2 in section 5.1, and its rate
UNGATED, FULL, AT_1 = "gate removed, with LayerNorm", "the whole model", "lambda = 1"
S4D_ARMS = {"skip + LN": (1.0, True), "no skip + LN": (0.0, True), "skip": (1.0, False), "neither": (0.0, False)}

Judgement = tuple[bool, str]
Predicate = Callable[[Curves], Judgement]


class Claim(NamedTuple):
    """A sentence of the paper, the predicate that judges it, and in words what the predicate asks for."""

    sentence: str
    predicate: Predicate
    threshold: str


CLAIMS: dict[str, Claim] = {}  # in the order of the paper


def claim(name: str, sentence: str, threshold: str) -> Callable[[Predicate], Predicate]:
    """Enter the predicate below into CLAIMS."""

    def enter(predicate: Predicate) -> Predicate:
        CLAIMS[name] = Claim(sentence, predicate, threshold)
        return predicate

    return enter


def _measured(*found: pd.Series) -> tuple[pd.Series, ...]:
    """The curves that were found, if none is empty; else NotMeasured is raised."""
    if not all(map(len, found)):
        raise NotMeasured
    return found


@claim(
    "figure 1a", "When |lambda| is small, the model suffers from rank collapse.",
    f"{UNGATED}: last layer under {COLLAPSED} at every measured |lambda| up to {SMALL}",
)  # fmt: skip
def small_lambda_collapses(curves: Curves) -> Judgement:
    small = curves.last(False, [lam for lam in curves.lams(gating=False) if abs(lam) <= SMALL])
    if not small:
        raise NotMeasured
    return all(v < COLLAPSED for v in small.values()), f"last layer {_numbers(small)}"


@claim(
    "figure 1b", "This happens even when lambda = 1.", f"{UNGATED}, {AT_1}: last layer under {COLLAPSED}"
)  # fmt: skip
def lambda_one_collapses(curves: Curves) -> Judgement:
    return _ends_collapsed(curves, 1.0)


@claim(
    "figure 1c", "Sufficiently increasing or decreasing lambda avoids rank collapse.",
    f"{UNGATED}: at the least and the greatest measured lambda, beyond -1 and 1, last layer at least {COLLAPSED} and"
    " above that at 1",
)  # fmt: skip
def large_lambda_avoids(curves: Curves) -> Judgement:
    lams = curves.lams(gating=False)
    if 1.0 not in lams or min(lams) >= -1 or max(lams) <= 1:
        raise NotMeasured
    ends, at_1 = curves.last(False, (min(lams), max(lams))), curves.last(False, [1.0])[1.0]
    good = all(value >= COLLAPSED and value > at_1 for value in ends.values())
    return good, f"last layer {_numbers(ends)}; at 1: {at_1:.3f}"


@claim(
    "figure 1d", "Eliminating the skip can cause rank collapse where A_t depends on the input too (lambda = 0).",
    f"{UNGATED}, lambda = 0: last layer under {COLLAPSED}",
)  # fmt: skip
def without_skip_collapses(curves: Curves) -> Judgement:
    return _ends_collapsed(curves, 0.0)


def _ends_collapsed(curves: Curves, lam: float) -> Judgement:
    end = curves.end(lam, False, True)
    return end < COLLAPSED, f"last layer {end:.3f}"


def _numbers(values: dict[float, float]) -> str:
    return ", ".join(f"{lam:g}: {value:.3f}" for lam, value in values.items())


@claim(
    "figure 2a", "Lambda very close to 0 causes a very low mu, even with LayerNorm.",
    f"{FULL}, three lambdas or more and 0 among them: the lowest last layer is at |lambda| up to {SMALL} and under"
    f" {COLLAPSED}",
)  # fmt: skip
def deep_minimum_near_zero(curves: Curves) -> Judgement:
    last = _swept(curves)
    lowest = min(last, key=lambda lam: last[lam])
    good = abs(lowest) <= SMALL and last[lowest] < COLLAPSED
    return good, f"lowest {last[lowest]:.3f} at lambda {lowest:g}; at 0: {last[0.0]:.3f}"


@claim(
    "figure 2b", "A negative lambda leads to a higher mu.",
    f"{FULL}: last layer higher at -lambda than at lambda, for every lambda measured with both signs",
)  # fmt: skip
def negative_is_higher(curves: Curves) -> Judgement:
    lams = curves.lams(gating=True)
    both = [lam for lam in lams if lam > 0 and -lam in lams]
    if not both:
        raise NotMeasured
    last = curves.last(True, [*both, *(-lam for lam in both)])
    pairs = {lam: (last[-lam], last[lam]) for lam in both}
    text = ", ".join(f"∓{lam:g}: {negative:.3f}/{positive:.3f}" for lam, (negative, positive) in pairs.items())
    return all(negative > positive for negative, positive in pairs.values()), f"last layer, negative/positive {text}"


@claim(
    "figure 2c", "The correct value of lambda is important to avoid rank collapse.",
    f"{FULL}, lambdas as for 2a: the lowest last layer is under {COLLAPSED}, the highest is not",
)  # fmt: skip
def choice_of_lambda_decides(curves: Curves) -> Judgement:
    last = _swept(curves)
    low, high = min(last, key=lambda lam: last[lam]), max(last, key=lambda lam: last[lam])
    return last[low] < COLLAPSED <= last[high], f"last layer {_numbers({low: last[low], high: last[high]})}"


@claim(
    "figure 2d", "Condition (7) is too conservative: much lower values of lambda prevent rank collapse.",
    f"{FULL}, lambdas as for 2a: the least |lambda| > 0 that ends at {COLLAPSED} or more is at most {MUCH} of condition"
    f" (7) at a = {PAPER_A}: {PAPER_BOUND} for Mamba-2 as printed, with C_M = sqrt(N) for attention",
)  # fmt: skip
def much_lower_lambda_suffices(curves: Curves) -> Judgement:
    last = _swept(curves)
    bound = PAPER_BOUND if curves.gated else lambda_star(PAPER_A, float(curves.relative["n_tokens"].max()) ** 0.5)
    keeping = [lam for lam, value in last.items() if lam and value >= COLLAPSED]
    if not keeping:
        return False, f"no measured lambda but 0 keeps it; condition (7) asks for |lambda| > {bound:.3f}"
    least = min(keeping, key=abs)
    text = f"at {least:g}: {last[least]:.3f}; condition (7) asks for |lambda| > {bound:.3f}"
    return abs(least) <= MUCH * bound, text


def _swept(curves: Curves) -> dict[float, float]:
    """Last layers of the whole model, where three lambdas or more were measured and 0 among them."""
    lams = curves.lams(gating=True)
    if len(lams) < 3 or 0.0 not in lams:
        raise NotMeasured
    return curves.last(gating=True)


@claim(
    "figure 3a", "With gating and LayerNorm there is no rank collapse.",
    f"{FULL}, {AT_1}: every layer at least {COLLAPSED}",
)  # fmt: skip
def full_model_does_not_collapse(curves: Curves) -> Judgement:
    (curve,) = _measured(curves.curve(1.0, gating=True, layernorm=True))
    return curve.min() >= COLLAPSED, f"lowest {curve.min():.3f}, last {curve.iloc[-1]:.3f}"


@claim(
    "figure 3b", "Without gating, with LayerNorm, mu approaches zero in later layers.",
    f"{AT_1}: last layer under {COLLAPSED}, and the mean of the later half no higher than that of the early half",
)  # fmt: skip
def ungated_falls(curves: Curves) -> Judgement:
    (curve,) = _measured(curves.curve(1.0, gating=False, layernorm=True))
    half, first, last = len(curve) // 2, curve.iloc[0], curve.iloc[-1]
    early, late = curve.iloc[:half].mean(), curve.iloc[half:].mean()
    means = f"mean of the early half {early:.3f}, of the later half {late:.3f}"
    return last < COLLAPSED and late <= early, f"first {first:.3f}, {means}, last {last:.3f}"


@claim(
    "figure 3c", "Without either, an initial drop, then a dramatic increase.",
    f"{AT_1}: from the first layer down by at least {RISE}, and from there up by at least {RISE}",
)  # fmt: skip
def ungated_unnormed_drops_then_rises(curves: Curves) -> Judgement:
    (curve,) = _measured(curves.curve(1.0, gating=False, layernorm=False))
    at = int(curve.argmin())
    first, lowest, after = curve.iloc[0], curve.iloc[at], curve.iloc[at:].max()
    good = first - lowest >= RISE and after - lowest >= RISE
    return good, f"first {first:.3f}, lowest {lowest:.3f} (layer {curve.index[at]}), then up to {after:.3f}"


@claim(
    "figure 3d", "With gating, without LayerNorm, a sudden increase.",
    f"{AT_1}: some layer at least {RISE} above the lowest before it",
)  # fmt: skip
def gated_unnormed_rises(curves: Curves) -> Judgement:
    (curve,) = _measured(curves.curve(1.0, gating=True, layernorm=False))
    gain = (curve - curve.cummin()).max()  # over the lowest layer up to each
    return gain >= RISE, f"lowest {curve.min():.3f}, greatest gain {gain:.3f}, last finite {curve.iloc[-1]:.3f}"


@claim(
    "figure 3e", "With gating, without LayerNorm, rank collapse is prevented.",
    f"{AT_1}: every layer at least {COLLAPSED}",
)  # fmt: skip
def gated_unnormed_does_not_collapse(curves: Curves) -> Judgement:
    (curve,) = _measured(curves.curve(1.0, gating=True, layernorm=False))
    return curve.min() >= COLLAPSED, f"lowest {curve.min():.3f}"


@claim(
    "figure 3f", "LayerNorm keeps the model stable.",
    f"{AT_1}: both arms without LayerNorm leave the range of floating point or rise by at least {RISE}, neither arm with"
    " it does",
)  # fmt: skip
def layernorm_keeps_stable(curves: Curves) -> Judgement:
    arms = {("gate" if gating else "no gate") + (", LN" if norm else ", no LN"): (gating, norm)
            for norm in (True, False) for gating in (True, False)}  # fmt: skip
    # Here a lost layer is what is looked for; an unresolved one could be a rise.
    found = {name: curves.resolved(1.0, *arm) for name, arm in arms.items()}
    _measured(*found.values())
    if "nan" in set(curves.relative.loc[curves.relative["lam"] == 1.0, "status"]):
        raise NotMeasured("lambda 1: layers are missing, where values are all zero or no numbers")
    lost = {name: curves.lost(1.0, *arm) for name, arm in arms.items()}
    gains = {name: (curve - curve.cummin()).max() for name, curve in found.items()}
    unstable = {name: lost[name] is not None or gains[name] >= RISE for name in arms}
    text = (f"{name}: {'overflow at layer ' + str(lost[name]) if lost[name] is not None else 'none lost'}, "
            f"greatest gain {gains[name]:.3f}" for name in arms)  # fmt: skip
    good = all(unstable[name] != norm for name, (_, norm) in arms.items())
    return good, "; ".join(text)


@claim(
    "figure 3g", "Gating mechanisms play a crucial role in preventing rank collapse.",
    f"{AT_1}, with LayerNorm: last layer at least {COLLAPSED} with the gate, under it without",
)  # fmt: skip
def gate_prevents_collapse(curves: Curves) -> Judgement:
    first, second = (curves.end(1.0, gating, True) for gating in (True, False))
    return second < COLLAPSED <= first, f"last layer {first:.3f} with the gate, {second:.3f} without"


@claim(
    "figure 4", "In S4D no rank collapse, even without skip connection and LayerNorm.",
    f"skip x LayerNorm: in all four arms every layer from the first block on at least {COLLAPSED}",
)  # fmt: skip
def s4d_does_not_collapse(curves: Curves) -> Judgement:
    found = {name: curves.curve(lam, False, layernorm) for name, (lam, layernorm) in S4D_ARMS.items()}
    _measured(*found.values())
    good = all(curve.iloc[1:].min() >= COLLAPSED for curve in found.values())
    numbers = (f"{name}: {curve.iloc[1:].min():.3f}, {curve.iloc[-1]:.3f}" for name, curve in found.items())
    return good, f"lowest from layer 1 on, last: {'; '.join(numbers)}"


@claim(
    "figure 4b", "In S4D rank collapse depends on the weights only, not on the input.",
    f"skip x LayerNorm: in each arm the last layer of all images is under {COLLAPSED}, or of none. Only of the images at"
    " hand: adversarial ones are not searched for",
)  # fmt: skip
def s4d_collapse_is_the_weights(curves: Curves) -> Judgement:
    found = {name: curves.excerpts(lam, False, layernorm) for name, (lam, layernorm) in S4D_ARMS.items()}
    counts = {name: (int((values < COLLAPSED).sum()), len(values)) for name, values in found.items()}
    text = ", ".join(f"{name}: {low} of {n}" for name, (low, n) in counts.items())
    return all(low in (0, n) for low, n in counts.values()), f"images that end under {COLLAPSED:g}: {text}"
