"""How a statement is put to the test: random instances, then a hill climb that makes the worst one worse.

A statement draws instances (a dict of arrays, floats and integers) and returns a margin for each: the relative slack of
its inequality, negative when violated, None when the instance does not meet its hypotheses or the bound says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .arrays import Array, TheoryError, unit_rows
from .layers import softmax

Rng = np.random.Generator
Instance = dict[str, Any]
Printed = Callable[[], tuple[str, str]]

TOLERANCE = 1e-9
FLOOR = 1e-5  # bounds on mu under this are not compared: rounding would decide


@dataclass(frozen=True)
class Statement:
    """One statement: how the paper's wording fares, and the inequality that is checked.

    printed() -> (verdict, numbers); correction: what is checked in its place, "" when the printed statement itself is.
    """

    name: str
    printed: Printed
    correction: str
    draw: Callable[[Rng], Instance]
    margin: Callable[..., float | None]


@dataclass(frozen=True)
class Verdict:
    """Outcome for one statement. `informative` counts the instances with a margin; worst_margin is the smallest one.

    printed: "holds", "fails", "void" (nothing it applies to, or is computed from), "existence only", "definition" or
    "new" (not in the paper). corrected: "holds", "violated", "untested", or "-" when the printed statement itself was
    checked. counterexample: the worst instance, only when it violates the statement.
    """

    statement: str
    printed: str
    printed_evidence: str
    correction: str
    corrected: str
    instances: int
    informative: int
    worst_margin: float
    counterexample: dict[str, Any] | None = None

    @property
    def violated(self) -> bool:
        """True when what should hold was violated, or could not be put to the test."""
        return self.corrected in ("violated", "untested")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def upper(actual: float, bound: float, floor: float = FLOOR) -> float | None:
    """Margin of actual <= bound."""
    return (bound - actual) / bound if bound > floor else None


def lower(actual: float, bound: float) -> float | None:
    """Margin of actual >= bound >= 0."""
    return (actual - bound) / bound if bound > FLOOR else None


def equal(actual: float, expected: float) -> float:
    """Margin of an identity: minus the difference, relative to the larger side or to 1."""
    return -abs(actual - expected) / max(abs(actual), abs(expected), 1.0)


def smallest(margins: list[float | None]) -> float | None:
    """The smallest margin; None when there is none."""
    return min((margin for margin in margins if margin is not None), default=None)


def check(statement: Statement, instances: int, rng: Rng) -> Verdict:
    """Draw `instances` instances, climb from the worst for half as many steps more, and report."""
    tried, informative, worst, worst_at = 0, 0, float("inf"), None

    def attempt(instance: Instance) -> bool:
        nonlocal tried, informative, worst, worst_at
        tried += 1
        try:
            margin = statement.margin(**instance)
        except TheoryError:  # a zero row, or a perturbed instance outside the statement
            margin = None
        if margin is None:
            return False
        informative += 1
        better = margin < worst
        if better:
            worst, worst_at = margin, instance
        return better

    for _ in range(instances):
        attempt(statement.draw(rng))
    step = 0.5
    for _ in range(instances // 2 if worst_at else 0):
        step = min(1.0, 2 * step) if attempt(_perturbed(worst_at, step, rng)) else max(1e-4, 0.85 * step)
    corrected = "untested" if not informative else "violated" if worst < -TOLERANCE else "holds"
    printed, evidence = statement.printed()
    if not statement.correction and corrected == "holds":
        corrected = "-"
    elif not statement.correction:
        printed = "fails"
    counterexample = _plain(worst_at) if corrected == "violated" and worst_at else None
    counts = tried, informative, worst + 0.0
    return Verdict(statement.name, printed, evidence, statement.correction, corrected, *counts, counterexample)


def _perturbed(instance: Instance | None, step: float, rng: Rng) -> Instance:
    """Arrays get Gaussian noise of `step` times their root mean square, floats a random factor, integers nothing."""
    out = {}
    for name, value in (instance or {}).items():
        if isinstance(value, np.ndarray):
            value = value + step * np.sqrt(np.mean(value**2)) * rng.standard_normal(value.shape)
        elif isinstance(value, float):
            value = value * float(np.exp(step * rng.standard_normal()))
        out[name] = value
    return out


def _plain(instance: Instance) -> Instance:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in instance.items()}


def fails_unless(holds: bool, text: str) -> tuple[str, str]:
    """The printed verdict of a counterexample, with its numbers."""
    return ("holds" if holds else "fails"), text


# --- instances ---


def shape(rng: Rng) -> tuple[int, int]:
    """A small (N, d)."""
    return int(rng.integers(2, 8)), int(rng.integers(1, 6))


def tokens(rng: Rng, N: int, d: int) -> Array:
    """(N, d) not normalised: Gaussian, near consensus, one outlier, antipodal, or with positive entries."""
    noise = rng.standard_normal((N, d))
    common = np.ones((N, 1)) * rng.standard_normal(d)
    kind = rng.integers(5)
    if kind == 1:
        return common + 10.0 ** rng.uniform(-3, 0) * noise
    if kind == 2:
        common[0] = noise[0]
        return common
    if kind == 3:
        return rng.choice([-1.0, 1.0], (N, 1)) * common + 0.1 * noise
    return np.abs(noise) if kind == 4 else noise


def cone(rng: Rng, N: int, d: int) -> Array:
    """(N, d) tokens with non-negative entries, hence non-negative inner products; sometimes near consensus."""
    return np.abs(rng.standard_normal((N, d))) + rng.choice([0.0, 0.0, 1.0, 3.0])


def mixing(rng: Rng, N: int) -> Array:
    """An (N, N) mixing matrix: Gaussian, attention-like, causal, rank one, one heavy row, orthogonal, or averaging."""
    noise = rng.standard_normal((N, N))
    kind = rng.integers(7)
    if kind == 1:
        return softmax(2 * noise)
    if kind == 2:
        return np.tril(noise)
    if kind == 3:
        return np.outer(noise[0], noise[1])
    if kind == 4:
        out = 0.01 * noise
        out[0] = 1.0
        return out
    if kind == 5:
        return np.linalg.qr(noise)[0]
    return np.ones((N, N)) / N - rng.uniform(0, 1) * np.eye(N) if kind == 6 else noise


def layers_of(rng: Rng, K: int, N: int) -> Array:
    """(K, N, N): one mixing matrix a layer, half of the time the same in all."""
    if rng.integers(2):
        return np.repeat(mixing(rng, N)[None], K, axis=0)
    return np.array([mixing(rng, N) for _ in range(K)])


def pulled(fixed: Array, Y: Array, pull: float) -> Array:
    """A direction (N, d) for an adversarial mixer output: `fixed`, plus `pull` times the way to the mean row."""
    return fixed + pull * (Y.mean(0) - Y)


def rows_of_length(Z: Array, G: float) -> Array:
    """Rows of Z scaled to norm G."""
    return G * unit_rows(Z)


def draw_decay(rng: Rng) -> Instance:
    """Tokens, W_BC and a decay in [-1, 1] of a selective SSM."""
    N, d = shape(rng)
    W = rng.standard_normal((d, d))
    alpha = float(rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 1.0))
    return {"Y": tokens(rng, N, d), "W_BC": W @ W.T if rng.integers(2) else W, "alpha": alpha}
