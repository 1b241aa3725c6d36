"""Rank-collapse measures: pure functions of a layer's output Y, shape (..., N, d) -> (...).

N tokens, d channels; leading axes (excerpts, variants) are kept apart and never pooled. Everything is computed in float64
after scaling by a power of two, which rounds nothing, so values of 1e-300 or 1e300 are as good as values of 1.

Accuracy, of the numbers in Y as they are: mu, relative mu and dong_residual to a relative 1e-13, also where all rows agree to
their last bits; rank1_residual within 1e-16, however small; mean_cosine within 1e-15, whatever the lengths of the rows;
stable_rank s to a relative s * 1e-15.

A layer output that holds NaN or infinity gives NaN; `status` says which it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, cached_property

import numpy as np
import torch
from scipy.linalg.lapack import dsyevr
from threadpoolctl import ThreadpoolController
from torch import Tensor

# Powers of two up to this, and one over them, are normal float64 numbers.
LARGEST_POWER = 1022
# Rows shorter than this, relative to the largest entry, get a scale of their own before they are squared.
SHORT = 2.0**-500


def any_of(mask: Tensor) -> bool:
    """Whether an entry may be True: on a CPU whether one is; elsewhere True, since to know would be to wait for the device."""
    return mask.device.type != "cpu" or bool(mask.any())


def _exponent(size: Tensor) -> Tensor:
    """e with 2^(e-1) <= size < 2^e, within +-LARGEST_POWER; 1 where size is not finite."""
    return torch.frexp(size.where(size.isfinite(), 1.0)).exponent.clamp(-LARGEST_POWER, LARGEST_POWER)


def _times_two_to(Y: Tensor, power: Tensor) -> Tensor:
    """Y * 2^power in a new float64 tensor."""
    factor = torch.ldexp(torch.ones_like(power, dtype=torch.float64), power)
    return Y * factor if Y.dtype == torch.float64 else Y.to(torch.float64).mul_(factor)


def _norm(Z: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(Z, dim=(-2, -1))
    return norm


def _centred(unit: Tensor) -> Tensor:
    """Y minus its mean row, exact near collapse: the first row goes first, and the mean is taken twice."""
    R = unit - unit[..., :1, :]
    R -= R.mean(-2, keepdim=True)
    R -= R.mean(-2, keepdim=True)
    return R


class Shared:
    """What the measures share of one Y, (..., N, d); each further pass over it is made once, when it is first asked for.

    A finite Y is unit * scale, where scale is a power of two, so that nothing is rounded on the way.

    Attributes:
        unit: (..., N, d) in float64, largest entry about 1 (2^-52 where Y is subnormal); NaN where Y is not finite.
        scale: (...), that power of two.
        largest: (..., N), the largest entry of each row of Y, in float64.
    """

    def __init__(self, Y: Tensor) -> None:
        self.Y = Y
        self.largest = Y.abs().amax(-1).to(torch.float64)  # (..., N, d) -> (..., N)
        whole = self.largest.amax(-1)  # (..., N) -> (...), NaN where an entry is NaN
        power = _exponent(whole)
        self.unit = _times_two_to(Y, -power[..., None, None])
        self.scale = torch.ldexp(torch.ones_like(whole), power)
        finite = torch.isfinite(whole)
        if not finite.all():
            self.unit = self.unit.masked_fill(~finite[..., None, None], math.nan)

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
    def rank1_residual(self) -> Tensor:  # (...)
        return _divide(_norm(_deflated(self.unit)), self.size)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, torch.nan)


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
    return _mean_cosine(Shared(Y))


def dong_residual(Y: Tensor) -> Tensor:
    """||R||_{1,inf} / ||Y||_{1,inf} with R = Y minus its mean row and ||A||_{1,inf} = sqrt(||A||_1 ||A||_inf).

    The residual of Dong et al. (2021, arXiv:2103.03404), whose minimiser over rank-1 matrices 1x^T is replaced by the
    mean row; it may therefore exceed 1 (never 2).
    """
    return MEASURES["dong_residual"](Shared(Y))


def _norm_1_inf(A: Tensor) -> Tensor:
    size = A.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt()  # largest column sum, largest row sum


def _deflated(unit: Tensor) -> Tensor:
    """Y without its leading singular component u w, right to a tenth of the spacing of float64 times ||Y||.

    u comes from the small Gram matrix, with an error e of some roundings, and leaves R = e w + u e' of the same size. Both are
    taken from R itself: e = R w^T / ||w||^2 and e' = u^T R, less what they share.
    """
    if unit.shape[-2] > unit.shape[-1]:
        return _deflated(unit.mT).mT
    Z = unit.reshape(-1, *unit.shape[-2:])  # (..., n, m) -> (B, n, m), n <= m
    if len(Z) == 1:  # libraries round the product of one matrix otherwise than that of the same among others
        return _deflated(Z.expand(2, -1, -1))[:1].reshape(unit.shape)
    finite = Z if Z.isfinite().all() else torch.nan_to_num(Z)
    u = _leading_eigenvector(finite @ finite.mT)[..., None]  # (B, n, 1)
    w = u.mT @ Z  # (B, 1, m)
    R = torch.baddbmm(Z, u, w, alpha=-1)  # Z - u w, (B, n, m)
    e = R @ w.mT / w.square().sum(-1, keepdim=True)  # (B, n, 1)
    rest = u.mT @ R - (u.mT @ e) * w  # (B, 1, m)
    return torch.baddbmm(R, torch.cat([e, u], -1), torch.cat([w, rest], -2), alpha=-1).reshape(unit.shape)


def _leading_eigenvector(gram: Tensor) -> Tensor:
    """Unit eigenvector of the largest eigenvalue, (..., n, n) symmetric -> (..., n).

    LAPACK's dsyevr for that one pair, on one thread: a third of the time of a full decomposition, and threads slow it down.
    """
    n = gram.shape[-1]
    flat = gram.detach().cpu().reshape(-1, n, n).numpy()
    vectors = np.empty((len(flat), n))
    with _thread_pools().limit(limits=1):
        for i, matrix in enumerate(flat):
            _, z, _, _, info = dsyevr(matrix, range="I", il=n, iu=n)
            if info != 0:
                raise ArithmeticError(f"LAPACK dsyevr failed with info={info} on a {n} x {n} Gram matrix")
            vectors[i] = z[:, 0]
    return torch.from_numpy(vectors).reshape(gram.shape[:-1]).to(gram.device)


@cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of the libraries loaded, looked for once: that takes longer than the eigenvector."""
    return ThreadpoolController()


def _mean_cosine(shared: Shared) -> Tensor:
    """With u_i the rows of Y scaled to length 1, whatever their lengths are: (||sum u_i||^2 - N) / (N (N - 1))."""
    unit, n = shared.unit, shared.Y.shape[-2]
    if (shared.largest < shared.scale[..., None] * SHORT).any():
        unit = _times_two_to(shared.Y, -_exponent(shared.largest)[..., None])
    lengths = torch.linalg.vector_norm(unit, dim=-1)  # (..., N)
    total = (lengths.reciprocal()[..., None, :] @ unit).square().sum((-2, -1))  # (..., 1, d) -> (...)
    return _divide(total - n, torch.full_like(total, float(n * (n - 1)))).clamp(max=1.0)


MEASURES: dict[str, Callable[[Shared], Tensor]] = {  # in the order of the table's rows
    "mu": lambda shared: shared.centred * shared.scale,
    "relative_mu": lambda shared: _divide(shared.centred, shared.size).clamp(max=1.0),
    "rank1_residual": lambda shared: shared.rank1_residual,
    "stable_rank": lambda shared: 1.0 / (1.0 - shared.rank1_residual.square()),
    "mean_cosine": _mean_cosine,
    "dong_residual": lambda shared: _divide(_norm_1_inf(shared.R), _norm_1_inf(shared.unit)),
}
# Those that go to zero as a net collapses: under the floor of its precision they cannot be told from zero.
VANISHING = ("mu", "relative_mu", "rank1_residual", "dong_residual")


def measure_all(Y: Tensor) -> dict[str, Tensor]:
    """Every measure of MEASURES at once, {name: (...)}, sharing the passes over Y."""
    shared = Shared(Y)
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
