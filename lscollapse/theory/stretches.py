"""Stretches of |lambda| on which a measured net keeps a target, or a theorem promises that it does, and the report of both."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lscollapse.theory.arrays import Array

MEASURES = ("relative_mu", "rank1_residual")
BESIDE = ("angular_mu", "row_norm_ratio")  # what says whether one row decides them
SIGNS = (1, -1)
NOTHING = math.inf  # the low end of a stretch that is empty


class Kept(NamedTuple):
    """One stretch of tested |lambda| on which a measure is over the target; both ends were measured and are over it."""

    low: float
    high: float


def in_words(low: float, high: float) -> str:
    """A stretch of |lambda| as every table, figure and page writes it; high infinite: no end; low infinite: it is empty, NaN: not
    known."""
    if np.isnan(low):
        return "not known, values are missing or unresolved"
    if not np.isfinite(low):
        return "none suffices"
    if np.isfinite(high):
        return f"{_number(low)} only" if low == high else f"{_number(low)} to {_number(high)}"
    return "no collapse" if low == 0.0 else f"from {_number(low)}"


def _number(lam: float) -> str:
    """From 1000 on with four digits, below with three: further ones differ from one processor to another."""
    return f"{lam:.3g}" if lam < 999.5 else f"{float(f'{lam:.4g}'):,.0f}"


class Estimate(NamedTuple):
    """|lambda| of one sign guessed from few excerpts: 0 when no collapse is in sight, infinity when nothing suffices, NaN where
    values are missing."""

    lam: float
    how: str
    high: float = math.inf  # where it ceases to suffice

    @property
    def reads(self) -> str:
        return in_words(self.lam, self.high)


@dataclass
class Found:
    """What the search for lambda (`find-lambda`) measured of one model and arm.

    Attributes:
        arm: in words, without lambda.
        n_layers, n_excerpts, n_tokens: of the passes.
        estimates: sign -> Estimate.
        points: lambda -> {measure: mean of the last layer over the excerpts}, of MEASURES and BESIDE; NaN where an excerpt
            lacks it.
    """

    model: str
    arm: str
    n_layers: int
    n_excerpts: int
    n_tokens: int
    target: float
    tol: float
    estimates: dict[int, Estimate] = field(default_factory=dict)
    points: dict[float, dict[str, float]] = field(default_factory=dict)

    def curve(self, sign: int, measure: str) -> tuple[Array, Array]:
        """Tested |lambda| of one sign, ascending from 0, and the measure there."""
        sizes = sorted(abs(lam) for lam in self.points if lam * sign >= 0.0)
        return np.array(sizes), np.array([self.points[sign * size][measure] for size in sizes])

    def kept(self, sign: int, measure: str) -> list[Kept]:
        """The stretches of |lambda| over the target, ascending."""
        sizes, values = self.curve(sign, measure)
        runs = itertools.groupby(zip(sizes, values, strict=True), key=lambda pair: bool(pair[1] >= self.target))
        stretches = [[float(size) for size, _ in run] for over, run in runs if over]
        return [Kept(stretch[0], stretch[-1]) for stretch in stretches]

    def intervals(self, sign: int, measure: str) -> list[Kept]:
        """The same; the last has no end (infinity) where the largest tested |lambda| is over the target."""
        stretches = self.kept(sign, measure)
        if stretches and stretches[-1].high == self.curve(sign, measure)[0][-1]:
            stretches[-1] = Kept(stretches[-1].low, math.inf)
        return stretches

    def missing(self, sign: int, measure: str) -> list[float]:
        """The tested |lambda| whose last layer is missing, or unresolved, in some excerpt, ascending."""
        sizes, values = self.curve(sign, measure)
        return [float(size) for size in sizes[np.isnan(values)]]

    def smallest(self, sign: int, measure: str) -> float:
        """Smallest |lambda| from which on every tested one is over the target; 0 when all are, infinity when none is.

        NaN, which is no answer, where a value is missing above the largest tested |lambda| that is under the target.
        """
        sizes, values = self.curve(sign, measure)
        under = sizes[values < self.target]
        if len(under) and under[-1] == sizes[-1]:
            return math.inf
        above = sizes > under[-1] if len(under) else sizes >= 0.0
        return math.nan if np.isnan(values[above]).any() else float(sizes[above][0])

    def rank_warning(self) -> str | None:
        """What to say where a negative lambda keeps relative mu over the target but not the rank-1 residual."""
        sizes, spread = self.curve(-1, "relative_mu")
        rank1 = self.curve(-1, "rank1_residual")[1]
        lost = (sizes > 0.0) & (spread >= self.target) & (rank1 < self.target)
        if not lost.any():
            return None
        worst, at = min(zip(rank1[lost].tolist(), sizes[lost].tolist(), strict=True))
        where = ", ".join(in_words(*stretch) for stretch in self.intervals(-1, "relative_mu"))
        return (
            f"negative lambda: relative mu is over {self.target:g} for |lambda| {where}, but the rank-1 residual falls"
            f" to {worst:.3f} (lambda = {-at:.4g}): rows gather on one line (+u and -u), which relative mu cannot see"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dict a tested lambda, ascending."""
        return [{"lam": lam, **self.points[lam]} for lam in sorted(self.points)]


@dataclass(frozen=True)
class Line:
    """One stretch of |lambda| on which a bound holds, for one sign (0: both); a bound that holds on several has several.

    Attributes:
        lam, to: its ends; `to` infinite: it has none (of a measured one: it holds at the largest |lambda| tested); `lam`
            infinite: the bound certifies nothing, or no tested |lambda| suffices.
    """

    bound: str
    sign: int
    lam: float
    note: str = ""
    to: float = math.inf

    @property
    def measured(self) -> bool:
        return self.bound.startswith("measured")

    @property
    def reads(self) -> str:
        """The stretch in words: what every table and figure shows."""
        if self.measured:
            return in_words(self.lam, self.to)
        return _number(self.lam) if math.isfinite(self.lam) else "certifies nothing"


@dataclass(frozen=True)
class Report:
    """Everything `lscollapse theory bound` shows; layers, and heads (of S4D: channels), are rows for a table."""

    found: Found
    a: float
    C_M: float
    first: float
    lines: list[Line]
    layers: list[dict[str, Any]]
    heads: list[dict[str, Any]]
    remarks: list[str]
