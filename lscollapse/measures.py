"""Rank-collapse measures: pure functions of a layer's output Y, shape (..., N, d) -> (...).

N tokens, d channels; leading axes (excerpts, variants) are kept apart and never pooled. Everything is computed in float64
after scaling by a power of two, which rounds nothing, so values of 1e-300 or 1e300 are as good as values of 1.

Accuracy, of the numbers in Y as they are: mu, relative mu and dong_residual to a relative 1e-13, also where all rows agree to
their last bits; rank1_residual to that or within 1e-16, however small; angular_mu and angular_rank1_residual to that or within
2e-16, since rows scaled to length 1 are rounded; mean_cosine within 1e-15, whatever the lengths of the rows; row_norm_ratio to
a relative 1e-14; stable_rank s to a relative s * 2e-13, effective_rank to 1e-12. A CPU takes one excerpt after
the other (excerpt.py), a GPU all together (passes.py), which finds some of it otherwise, to the same accuracy.

A layer output that holds NaN or infinity gives NaN; `status` says which it was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from lscollapse.one_by_one import shared_of
from lscollapse.passes import Shared


def mu(Y: Tensor) -> Tensor:
    """Frobenius norm of Y minus its mean row, (..., N, d) -> (...), in units of Y. Eq. (5), arXiv:2410.10609v3.

    Deviation: the text says "mean of columns"; the formula, and this function, subtract the mean row.
    """
    return _of(Y, "mu")


def relative_mu(Y: Tensor) -> Tensor:
    """mu(Y) / ||Y||_F, in [0, 1]; 1 when the mean row is zero, NaN for Y = 0. What the paper's figures plot."""
    return _of(Y, "relative_mu")


def rank1_residual(Y: Tensor) -> Tensor:
    """sqrt(1 - sigma_1^2 / sum sigma^2), in [0, 1]: the distance to the nearest rank-1 matrix over ||Y||_F.

    Sees the collapse of rows to +u and -u that mu cannot. Never larger than relative mu.
    """
    return _of(Y, "rank1_residual")


def angular_mu(Y: Tensor) -> Tensor:
    """Relative mu of the rows scaled to norm 1, in [0, 1]: of directions alone, so that no long row decides it. NaN where a row
    is zero. sqrt((1 - 1/N) (1 - c)) of the mean cosine c."""
    return _of(Y, "angular_mu")


def angular_rank1_residual(Y: Tensor) -> Tensor:
    """The rank-1 residual of the rows scaled to norm 1, in [0, 1]. NaN where a row is zero."""
    return _of(Y, "angular_rank1_residual")


def row_norm_ratio(Y: Tensor) -> Tensor:
    """The largest over the median row norm, from 1 on: whether one row decides relative mu (docs/table.md). Infinite where the
    median row is zero, NaN for Y = 0."""
    return _of(Y, "row_norm_ratio")


def longest_row(Y: Tensor) -> Tensor:
    """The position of the row with the largest norm, from 0; the first of those within a thousandth of it, which rounding could not
    tell apart where all rows agree. NaN for Y = 0."""
    return _of(Y, "longest_row")


def effective_rank(Y: Tensor) -> Tensor:
    """exp of the entropy of p_i = sigma_i^2 / sum sigma^2, of the rows scaled to norm 1, from 1 to min(N, d). NaN where a row is zero.

    With the rows centred before they are scaled it is the effective rank of Diff-eRank (arXiv:2401.17139). RankMe
    (arXiv:2210.02885) takes sigma instead of sigma^2, of the rows as they are. It is the Vendi score (arXiv:2210.02410) of the
    rows under their cosines.
    """
    return _of(Y, "effective_rank")


def stable_rank(Y: Tensor) -> Tensor:
    """||Y||_F^2 / sigma_1^2, from 1 to min(N, d)."""
    return _of(Y, "stable_rank")


def mean_cosine(Y: Tensor) -> Tensor:
    """Mean cosine between distinct rows, in [-1/(N-1), 1]. NaN when a row is zero or there is one row only."""
    return _of(Y, "mean_cosine")


def dong_residual(Y: Tensor) -> Tensor:
    """||R||_{1,inf} / ||Y||_{1,inf} with R = Y minus its mean row and ||A||_{1,inf} = sqrt(||A||_1 ||A||_inf).

    The residual of Dong et al. (2021, arXiv:2103.03404), whose minimiser over rank-1 matrices 1x^T is replaced by the
    mean row; it may therefore exceed 1 (never 2).
    """
    return _of(Y, "dong_residual")


def _of(Y: Tensor, name: str) -> Tensor:
    return measure_all(Y, [name])[name]


def _mean_cosine(aligned: Tensor, Y: Tensor) -> Tensor:
    """(||sum u_i||^2 - N) / (N (N - 1)), whatever the lengths of the rows are."""
    n = Y.shape[-2]
    return ((aligned - n) / (n * (n - 1) or math.nan)).clamp(max=1.0)


# In the order of core.table.MEASURES, of what the measures share of Y: the arguments are named as in `Shared`. The quotients of
# Y = 0 are 0 / 0.
MEASURES: dict[str, Callable[..., Tensor]] = {
    "mu": lambda centred, scale: centred * scale,
    "relative_mu": lambda centred, size: (centred / size).clamp(max=1.0),
    "rank1_residual": lambda rank1_residual: rank1_residual,
    "stable_rank": lambda rank1_residual: 1.0 / (1.0 - rank1_residual.square()),
    "mean_cosine": _mean_cosine,
    "dong_residual": lambda centred_1_inf, size_1_inf: centred_1_inf / size_1_inf,
    "angular_mu": lambda angular_mu: angular_mu,
    "angular_rank1_residual": lambda angular_rank1_residual: angular_rank1_residual,
    "row_norm_ratio": lambda row_norm_ratio: row_norm_ratio,
    "longest_row": lambda longest_row: longest_row,
    "effective_rank": lambda effective_rank: effective_rank,
}
# Those that go to zero as a net collapses: under the floor of its precision they cannot be told from zero.
VANISHING = ("mu", "relative_mu", "rank1_residual", "dong_residual", "angular_mu", "angular_rank1_residual")


def measure_all(Y: Tensor | Shared, names: Sequence[str] = tuple(MEASURES)) -> dict[str, Tensor]:
    """The named measures of Y (..., N, d) at once, {name: (...)}, sharing the passes over it; of a `Shared`, {name: (B,)}."""
    if isinstance(Y, Shared):
        parts = {name: _parts(MEASURES[name]) for name in names}
        Y.make(part for own in parts.values() for part in own)
        return {name: MEASURES[name](*(getattr(Y, part) for part in own)) for name, own in parts.items()}
    shared = shared_of(Y.reshape(-1, *Y.shape[-2:]))
    return {name: value.reshape(Y.shape[:-2]) for name, value in measure_all(shared, names).items()}


@cache
def _parts(measure: Callable[..., Tensor]) -> tuple[str, ...]:
    return tuple(inspect.signature(measure).parameters)


def floor(dtype: torch.dtype) -> float:
    """What rounding makes of the relative mu of equal rows in a forward pass in `dtype`: less than this cannot be told from zero.

    Equal rows stay different by their rounding, and what rounds most is a matrix product. Rounding to nearest has a relative
    error of 0.21 eps (root mean square over a binade, eps the spacing at 1). A sum of n terms of random sign rounds n partial
    sums, the k-th sqrt(k / n) of the last, so its relative error is 0.21 eps sqrt(n / 2). Libraries start another partial sum
    after 256 to 384 terms: 2.4 to 2.9 eps (measured on CPUs for 1,024 to 3,072 terms: 2.1 to 2.6 on AMD's, 3.0 on an Intel with
    AVX-512). From where attention makes the rows equal to the block's output there are two products in a row, hence sqrt(2) of it:
    3.4 to 4.2 eps, here 4. Narrower formats add up in float32 and round a product once, 0.21 eps, so that eps covers a block's
    dozen roundings. It is an estimate, not a cover: a GPU's products may sum in another order and lose more in wide models.
    """
    eps = torch.finfo(dtype).eps
    return 4 * eps if dtype in (torch.float32, torch.float64) else eps


def status(Y: Tensor | Shared) -> list[str]:
    """For Y of shape (B, N, d): "overflow" where an entry is infinite, "nan" where one is NaN, else "ok". Of a `Shared` that was
    measured it takes no further pass, unless there is NaN."""
    shared = Y if isinstance(Y, Shared) else shared_of(Y)
    return [_status(peak, excerpt) for peak, excerpt in zip(shared.peak.tolist(), shared.Y, strict=True)]


def _status(peak: float, excerpt: Tensor) -> str:
    if math.isfinite(peak):
        return "ok"
    return "overflow" if math.isinf(peak) or excerpt.isinf().any() else "nan"
