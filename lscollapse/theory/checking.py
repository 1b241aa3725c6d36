"""How a statement is put to the test: random instances, then a hill climb that makes the worst one worse.

A statement draws instances (a dict of arrays, floats and integers) and returns a margin for each: the relative slack of
its inequality, negative when violated, None when the instance does not meet its hypotheses or the bound says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lscollapse.theory.arrays import TheoryError
from lscollapse.theory.instances import Instance, Rng

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
    """The smallest of several margins; None when all of them are."""
    return min((margin for margin in margins if margin is not None), default=None)


def put_to_test(statement: Statement, instances: int, rng: Rng) -> Verdict:
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


def new() -> tuple[str, str]:
    """The printed verdict of a statement that is not the paper's."""
    return "new", "not in the paper"
