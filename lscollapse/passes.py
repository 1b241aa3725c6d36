"""The passes over a layer's output Y that its measures share, each made once, over all excerpts together: how a GPU has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from lscollapse import eigenvector

# Powers of two up to this, and one over them, are normal float64 numbers.
LARGEST_POWER = 1022
# Rows count as equally long from this quotient of their norms on, so that rounding does not say which is the longest of equals.
ALIKE = 1.0 - 2.0**-10  # which float32 has too


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


def _lengths(Z: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(Z, dim=-1)
    return lengths


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
    """What the measures share of one Y, (B, N, d); each pass over it is made once, when it is first asked for.

    A finite Y is unit * scale, where scale is a power of two, so that nothing is rounded on the way. What is made of a Y that
    is not finite is NaN. Nothing is read back from a device. A subclass may have some of it made otherwise.

    Of N rows in d < N channels the small Gram matrix is that of the columns: below, n = min(N, d) and m = max(N, d).
    """

    def __init__(self, Y: Tensor) -> None:
        self.Y = Y

    def make(self, parts: Iterable[str]) -> None:
        """Have these properties made now, where that is cheaper than one after the other."""

    @cached_property
    def largest(self) -> Tensor:  # (B, N), the largest entry of each row, in float64; NaN where one is NaN
        return self.Y.abs().amax(-1).to(torch.float64)

    @cached_property
    def peak(self) -> Tensor:  # (B,), the largest entry; not finite where Y is not
        return self.largest.amax(-1)

    @cached_property
    def shortest(self) -> Tensor:  # (B,), the length of the shortest row
        lengths: Tensor = torch.linalg.vector_norm(self.Y, dim=-1, dtype=torch.float64)
        return lengths.amin(-1)

    @cached_property
    def scale(self) -> Tensor:  # (B,)
        return _power_of_two(self.peak)

    @cached_property
    def unit(self) -> Tensor:  # (B, N, d) in float64, largest entry about 1 (2^-52 where Y is subnormal)
        return _over(self.Y, self.scale[:, None, None])

    @cached_property
    def R(self) -> Tensor:  # (B, N, d), Y minus its mean row
        return _centred(self.unit)

    @cached_property
    def size(self) -> Tensor:  # (B,), the norm of Y
        return _norm(self.unit)

    @cached_property
    def centred(self) -> Tensor:  # (B,), the norm of R
        return _norm(self.R)

    @cached_property
    def size_1_inf(self) -> Tensor:  # (B,), ||Y||_{1,inf}
        return _norm_1_inf(self.unit)

    @cached_property
    def centred_1_inf(self) -> Tensor:  # (B,), ||R||_{1,inf}
        return _norm_1_inf(self.R)

    @cached_property
    def rank1_residual(self) -> Tensor:  # (B,)
        return self._rank1_residual(self.unit, gram(self.unit))

    # --- of the rows scaled to length 1, each by a power of two first; NaN where one is zero ---

    @cached_property
    def lengths(self) -> Tensor:  # (B, N), of the rows of unit
        own = _power_of_two(self.largest)
        return _lengths(_over(self.Y, own[..., None])) * (own / self.scale[:, None])

    @cached_property
    def directions(self) -> Tensor:  # (B, N, d), the rows u_i
        own = _over(self.Y, _power_of_two(self.largest)[..., None])
        return own.div_(_lengths(own)[..., None])

    @cached_property
    def aligned(self) -> Tensor:  # (B,), ||sum u_i||^2 of the rows u_i
        return self.directions.sum(-2).square().sum(-1)

    @cached_property
    def gram_of_directions(self) -> Tensor:  # (B, n, n)
        return gram(self.directions)

    @cached_property
    def angular_mu(self) -> Tensor:  # (B,)
        return (_norm(_centred(self.directions)) / math.sqrt(self.Y.shape[-2])).clamp(max=1.0)

    @cached_property
    def angular_rank1_residual(self) -> Tensor:  # (B,)
        return self._rank1_residual(self.directions, self.gram_of_directions)

    @cached_property
    def effective_rank(self) -> Tensor:  # (B,), for which a GPU has to be waited for
        gram = self.gram_of_directions
        values: Tensor = torch.linalg.eigvalsh(torch.nan_to_num(gram))
        p = values.clamp(min=0.0) / gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)  # NaN where the matrix is
        entropy: Tensor = torch.special.entr(p).sum(-1)
        return entropy.exp()

    @cached_property
    def row_norm_ratio(self) -> Tensor:  # (B,)
        n, ascending = self.Y.shape[-2], self.lengths.sort(-1).values
        return ascending[:, -1] / ((ascending[:, (n - 1) // 2] + ascending[:, n // 2]) / 2)

    @cached_property
    def longest_row(self) -> Tensor:  # (B,), from 0
        longest = self.lengths >= ALIKE * self.lengths.amax(-1, keepdim=True)
        first = longest.to(torch.int8).argmax(-1).to(torch.float64)
        return first.where((self.peak > 0) & (self.peak < math.inf), math.nan)

    # --- how ---

    def leading(self, gram: Tensor) -> Tensor:  # (B, n, n) -> (B, n)
        return eigenvector.by_squaring(gram)

    def _rank1_residual(self, Y: Tensor, gram: Tensor) -> Tensor:
        return residual(Y, self.leading(gram))


def wide(Y: Tensor) -> Tensor:
    """(B, N, d), or its transpose where that is wide -> (B, n, m), n <= m."""
    return Y.mT if Y.shape[-2] > Y.shape[-1] else Y


def gram(Y: Tensor) -> Tensor:  # (B, N, d) -> (B, n, n)
    Z = wide(Y)
    return Z @ Z.mT


def residual(Y: Tensor, u: Tensor, out: Tensor | None = None) -> Tensor:
    """The norm of Y (B, N, d) without its leading singular component u w, over that of Y: right to a tenth of the spacing of float64.

    u (B, n) comes from the small Gram matrix, with an error e of some roundings, and leaves R = e w + u e' of the same size. Both
    are taken from R itself: e = R w^T / ||w||^2 and e' = u^T R, less what they share. `out` is room for R, (B, n, m).
    """
    Z, u = wide(Y), u[..., None]  # (B, n, m), (B, n, 1)
    w = u.mT @ Z  # (B, 1, m)
    R = torch.addcmul(Z, u, w, value=-1, out=out)  # Z - u w; a product of matrices is slow where they are vectors
    e = R @ w.mT / w.square().sum(-1, keepdim=True)  # (B, n, 1)
    rest = u.mT @ R - (u.mT @ e) * w  # (B, 1, m)
    return _norm(R.addcmul_(e, w, value=-1).addcmul_(u, rest, value=-1)) / _norm(Z)
