"""Rank-collapse measures: pure functions of a layer's output Y, shape (..., N, d) -> (...).

N tokens, d channels; leading axes (excerpts, variants) are kept apart and never pooled. Everything is computed in float64
after scaling by a power of two, which rounds nothing, so values of 1e-300 or 1e300 are as good as values of 1.

Accuracy, of the numbers in Y as they are: mu, relative mu and dong_residual to a relative 1e-13, also where all rows agree to
their last bits; rank1_residual to that or within 1e-16, however small; mean_cosine within 1e-15, whatever the lengths of the
rows; stable_rank s to a relative s * 2e-13. The same holds on a GPU, where the leading singular vector is found otherwise
(eigenvector.py).

A layer output that holds NaN or infinity gives NaN; `status` says which it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lscollapse import eigenvector

# Powers of two up to this, and one over them, are normal float64 numbers.
LARGEST_POWER = 1022
# Rows shorter than this, relative to the largest entry, get a scale of their own before they are squared.
SHORT = 2.0**-500


def any_of(mask: Tensor) -> bool:
    """Whether an entry may be True: on a CPU whether one is; elsewhere True, since to know would be to wait for the device."""
    return mask.device.type != "cpu" or bool(mask.any())


def _power_of_two(size: Tensor) -> Tensor:
    """2^e with 2^(e-1) <= size < 2^e, e within +-LARGEST_POWER; NaN where size is not finite."""
    exponent = torch.frexp(size).exponent.clamp(-LARGEST_POWER, LARGEST_POWER)
    return torch.ldexp(torch.ones_like(size), exponent).where(size.isfinite(), math.nan)


def _over(Y: Tensor, scale: Tensor) -> Tensor:
    """Y / scale for powers of two in a new float64 tensor."""
    return Y * scale.reciprocal() if Y.dtype == torch.float64 else Y.to(torch.float64).mul_(scale.reciprocal())


def _norm(Z: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(Z, dim=(-2, -1))
    return norm


def _norm_1_inf(A: Tensor) -> Tensor:
    size = A.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt()  # largest column sum, largest row sum


def _centred(unit: Tensor) -> Tensor:
    """Y minus its mean row, exact near collapse: the first row goes first, and the mean is taken twice."""
    R = unit - unit[..., :1, :]
    R -= R.mean(-2, keepdim=True)
    R -= R.mean(-2, keepdim=True)
    return R


class Shared:
    """What the measures share of one Y, (..., N, d); each pass over it is made once, when it is first asked for.

    A finite Y is unit * scale, where scale is a power of two, so that nothing is rounded on the way. What is made of a Y that
    is not finite is NaN. Nothing is read back from a device. A subclass may have some of it made by kernels of its own.
    """

    def __init__(self, Y: Tensor) -> None:
        self.Y = Y

    @cached_property
    def largest(self) -> Tensor:  # (..., N), the largest entry of each row, in float64; NaN where one is NaN
        return self.Y.abs().amax(-1).to(torch.float64)

    @cached_property
    def peak(self) -> Tensor:  # (...), the largest entry; not finite where Y is not
        return self.largest.amax(-1)

    @cached_property
    def shortest(self) -> Tensor:  # (...), the length of the shortest row
        lengths: Tensor = torch.linalg.vector_norm(self.Y, dim=-1, dtype=torch.float64)
        return lengths.amin(-1)

    @cached_property
    def scale(self) -> Tensor:  # (...)
        return _power_of_two(self.peak)

    @cached_property
    def unit(self) -> Tensor:  # (..., N, d) in float64, largest entry about 1 (2^-52 where Y is subnormal)
        return _over(self.Y, self.scale[..., None, None])

    @cached_property
    def R(self) -> Tensor:  # (..., N, d), Y minus its mean row
        return _centred(self.unit)

    @cached_property
    def size(self) -> Tensor:  # (...), the norm of Y
        return _norm(self.unit)

    @cached_property
    def centred(self) -> Tensor:  # (...), the norm of R
        return _norm(self.R)

    @cached_property
    def rest(self) -> Tensor:  # (...), the norm of Y without its leading singular component
        return _norm(_deflated(self.unit, self.leading))

    @cached_property
    def rank1_residual(self) -> Tensor:  # (...)
        return self.rest / self.size

    @cached_property
    def size_1_inf(self) -> Tensor:  # (...), ||Y||_{1,inf}
        return _norm_1_inf(self.unit)

    @cached_property
    def centred_1_inf(self) -> Tensor:  # (...), ||R||_{1,inf}
        return _norm_1_inf(self.R)

    @cached_property
    def aligned(self) -> Tensor:  # (...), ||sum u_i||^2 of the rows u_i scaled to length 1; NaN where a row is zero
        # Whether a row is short is asked where the answer costs nothing; elsewhere all rows get a scale of their own.
        if self.Y.is_cpu and not (self.largest < self.scale[..., None] * SHORT).any():
            return _aligned(self.unit)
        return _aligned(_over(self.Y, _power_of_two(self.largest)[..., None]))

    def leading(self, gram: Tensor) -> Tensor:  # (..., n, n) -> (..., n)
        return eigenvector.by_lapack(gram) if gram.is_cpu else eigenvector.by_squaring(gram)


def mu(Y: Tensor) -> Tensor:
    """Frobenius norm of Y minus its mean row, (..., N, d) -> (...), in units of Y. Eq. (5), arXiv:2410.10609v3.

    Deviation: the text says "mean of columns"; the formula, and this function, subtract the mean row.
    """
    return MEASURES["mu"](Shared(Y))


def relative_mu(Y: Tensor) -> Tensor:
    """mu(Y) / ||Y||_F, in [0, 1]; 1 when the mean row is zero, NaN for Y = 0. What the paper's figures plot."""
    return MEASURES["relative_mu"](Shared(Y))


def rank1_residual(Y: Tensor) -> Tensor:
    """sqrt(1 - sigma_1^2 / sum sigma^2), in [0, 1]: the distance to the nearest rank-1 matrix over ||Y||_F.

    Sees the collapse of rows to +u and -u that mu cannot. Never larger than relative mu.
    """
    return Shared(Y).rank1_residual


def stable_rank(Y: Tensor) -> Tensor:
    """||Y||_F^2 / sigma_1^2, from 1 to min(N, d)."""
    return MEASURES["stable_rank"](Shared(Y))


def mean_cosine(Y: Tensor) -> Tensor:
    """Mean cosine between distinct rows, in [-1/(N-1), 1]. NaN when a row is zero or there is one row only."""
    return MEASURES["mean_cosine"](Shared(Y))


def dong_residual(Y: Tensor) -> Tensor:
    """||R||_{1,inf} / ||Y||_{1,inf} with R = Y minus its mean row and ||A||_{1,inf} = sqrt(||A||_1 ||A||_inf).

    The residual of Dong et al. (2021, arXiv:2103.03404), whose minimiser over rank-1 matrices 1x^T is replaced by the
    mean row; it may therefore exceed 1 (never 2).
    """
    return MEASURES["dong_residual"](Shared(Y))


def _aligned(unit: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(unit, dim=-1)  # (..., N)
    total: Tensor = lengths.reciprocal()[..., None, :] @ unit  # (..., 1, d)
    return total.square().sum((-2, -1))


def _deflated(unit: Tensor, leading: Callable[[Tensor], Tensor]) -> Tensor:
    """Y without its leading singular component u w, right to a tenth of the spacing of float64 times ||Y||.

    u comes from the small Gram matrix, with an error e of some roundings, and leaves R = e w + u e' of the same size. Both are
    taken from R itself: e = R w^T / ||w||^2 and e' = u^T R, less what they share.
    """
    if unit.shape[-2] > unit.shape[-1]:
        return _deflated(unit.mT, leading).mT
    Z = unit.reshape(-1, *unit.shape[-2:])  # (..., n, m) -> (B, n, m), n <= m
    if len(Z) == 1:  # libraries round the product of one matrix otherwise than that of the same among others
        return _deflated(Z.expand(2, -1, -1), leading)[:1].reshape(unit.shape)
    u = leading(Z @ Z.mT)[..., None]  # (B, n, 1)
    w = u.mT @ Z  # (B, 1, m)
    R = torch.baddbmm(Z, u, w, alpha=-1)  # Z - u w, (B, n, m)
    e = R @ w.mT / w.square().sum(-1, keepdim=True)  # (B, n, 1)
    rest = u.mT @ R - (u.mT @ e) * w  # (B, 1, m)
    return torch.baddbmm(R, torch.cat([e, u], -1), torch.cat([w, rest], -2), alpha=-1).reshape(unit.shape)


def _mean_cosine(shared: Shared) -> Tensor:
    """(||sum u_i||^2 - N) / (N (N - 1)), whatever the lengths of the rows are."""
    n = shared.Y.shape[-2]
    return ((shared.aligned - n) / (n * (n - 1) or math.nan)).clamp(max=1.0)


MEASURES: dict[
    str, Callable[[Shared], Tensor]
] = {  # in the order of the table's rows; the quotients of Y = 0 are 0 / 0
    "mu": lambda shared: shared.centred * shared.scale,
    "relative_mu": lambda shared: (shared.centred / shared.size).clamp(max=1.0),
    "rank1_residual": lambda shared: shared.rank1_residual,
    "stable_rank": lambda shared: 1.0 / (1.0 - shared.rank1_residual.square()),
    "mean_cosine": _mean_cosine,
    "dong_residual": lambda shared: shared.centred_1_inf / shared.size_1_inf,
}
# Those that go to zero as a net collapses: under the floor of its precision they cannot be told from zero.
VANISHING = ("mu", "relative_mu", "rank1_residual", "dong_residual")


def measure_all(Y: Tensor | Shared) -> dict[str, Tensor]:
    """Every measure of MEASURES at once, {name: (...)}, sharing the passes over Y."""
    shared = Y if isinstance(Y, Shared) else Shared(Y)
    return {name: measure(shared) for name, measure in MEASURES.items()}


def bounds(values: Mapping[str, np.ndarray], change: np.ndarray, n: int, d: int) -> dict[str, np.ndarray]:
    """The most by which each measure of Y (n, d) can differ from that of Y + E, given ||E_i|| <= b ||Y_i|| for every row i;
    infinite where that is not known.

    Args:
        values: the measures of Y, one array over excerpts each.
        change: b of every excerpt, below 1; NaN gives NaN.

    With alpha = arcsin b the largest angle that a row, and so Y as a whole, turns by:
        relative_mu, rank1_residual: b. Both are sines of the angle between Y and a set of lines through 0.
        mu: of its log10, -log10(1 - b / relative_mu), since ||R|| moves by at most b ||Y||.
        stable_rank: s = 1 / (1 - r^2) of the rank-1 residual r, so ds = 2 r s^2 dr, which grows with s^2: the difference of s at
            r + b and at r; or, where s cannot grow over min(n, d), of s at r and at r - b.
        mean_cosine: 2 b. An angle between two rows moves by at most 2 alpha, its cosine by 2 sin(alpha).
        dong_residual: ||E||_inf <= b sqrt(d) ||Y||_inf and ||E||_1 <= b d ||Y||_1 (norms of rows and columns as entries' sums);
            R moves by at most twice that, and D^2 is a product of two quotients that are at most 2 each.
    """
    r, s, D, b = values["rank1_residual"], values["stable_rank"], values["dong_residual"], change
    columns, rows = b * d, b * math.sqrt(d)
    spread = 4 * columns + 4 * rows + 4 * columns * rows  # of D^2, before the change of ||Y||_1 ||Y||_inf
    least, shrunk, grown = np.minimum(spread, D**2), (1 - columns) * (1 - rows), (1 + columns) * (1 + rows)
    # Differences are written as quotients of what they are made of, so that none of them is rounded to zero.
    with np.errstate(divide="ignore", invalid="ignore"):
        over = (spread + D**2 * (columns + rows - columns * rows)) / (shrunk * (np.sqrt((D**2 + spread) / shrunk) + D))
        under = (least + D**2 * (columns + rows + columns * rows)) / (grown * (np.sqrt((D**2 - least) / grown) + D))
        dong = np.where(columns < 1, np.minimum(np.fmax(over, under), 2.0), 2.0)
        known = {
            "mu": log10_mu_change(values["relative_mu"], b),
            "relative_mu": b,
            "rank1_residual": b,
            "stable_rank": stable_rank_change(r, s, b, min(n, d)),
            "mean_cosine": 2 * b,
            "dong_residual": np.where(b > 0, dong, b),
        }
    return {name: known.get(name, np.inf + b) for name in MEASURES}


def log10_mu_change(relative_mu: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The most by which log10 of mu differs from that of a relative mu within b, the norm being the same; infinite from there on."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change: np.ndarray = np.where(b < relative_mu, -np.log1p(-b / relative_mu) / math.log(10), np.inf + b)
    return change


def stable_rank_change(r: np.ndarray, s: np.ndarray, b: np.ndarray, most: int) -> np.ndarray:
    """The most by which the stable rank s = 1 / (1 - r^2), at most `most`, differs from that of a rank-1 residual within b of r."""
    below = np.minimum(r, b)
    with np.errstate(divide="ignore", invalid="ignore"):  # quotients, so that no difference is rounded to zero
        larger = s * (2 * r * b + b**2) / (1 - np.minimum(r + b, 1) ** 2)
        smaller = s * (2 * r * below - below**2) / (1 - (r - below) ** 2)
    change: np.ndarray = np.maximum(np.minimum(larger, most - s), smaller)
    return change


def floor(dtype: torch.dtype) -> float:
    """What rounding makes of the relative mu of equal rows in a forward pass in `dtype`: less than this cannot be told from zero.

    Equal rows stay different by their rounding, and what rounds most is a matrix product. Rounding to nearest has a relative
    error of 0.21 eps (root mean square over a binade, eps the spacing at 1). A sum of n terms of random sign rounds n partial
    sums, the k-th sqrt(k / n) of the last, so its relative error is 0.21 eps sqrt(n / 2). Libraries start another partial sum
    after some 256 terms: 2.4 eps (measured on CPUs: 2.1 to 2.6 for 1,024 to 3,072 terms). From where attention makes the rows
    equal to the block's output there are two products in a row, hence sqrt(2) of it: 3.4 eps, here 4. Narrower formats add up in
    float32 and round a product once, 0.21 eps, so that eps covers a block's dozen roundings. A GPU's products may sum in another
    order and lose more in wide models: there it is an estimate, not a cover.
    """
    eps = torch.finfo(dtype).eps
    return 4 * eps if dtype in (torch.float32, torch.float64) else eps


def status(Y: Tensor) -> list[str]:
    """For Y of shape (B, N, d): "overflow" where an entry is infinite, "nan" where one is NaN, else "ok"."""
    flat = Y.flatten(1)
    overflow = flat.isinf().any(1).tolist()
    nan = flat.isnan().any(1).tolist()
    return ["overflow" if o else "nan" if n else "ok" for o, n in zip(overflow, nan, strict=True)]
