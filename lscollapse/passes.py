"""The passes over a layer's output Y that its measures share, each made once, and how its rows are told apart to the last digit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lscollapse import eigenvector

# Powers of two up to this, and one over them, are normal float64 numbers.
LARGEST_POWER = 1022
# Rows shorter than this, relative to the largest entry, get a scale of their own before they are squared.
SHORT = 2.0**-500
# The root of 1 - c, for a quotient c that is right to some 2^-52, is right to a relative 1e-15 from here on.
LARGE = 0.25
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
    is not finite is NaN. Nothing is read back from a device. A subclass may have some of it made by kernels of its own.

    Of N rows in d < N channels the small Gram matrix is that of the columns: below, n = min(N, d) and m = max(N, d).
    """

    def __init__(self, Y: Tensor) -> None:
        self.Y = Y
        self.tall = Y.shape[-2] > Y.shape[-1]

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
    def gram(self) -> Tensor:  # (B, n, n), of unit
        return _gram(_wide(self.unit))

    @cached_property
    def rank1_residual(self) -> Tensor:  # (B,)
        u = self.leading(self.gram)  # (B, n)
        return self._root(1.0 - _energy(self.gram, u), lambda some: _residual(_wide(self.unit[some]), u[some]))

    # --- of the rows scaled to length 1; NaN where one is zero ---

    @cached_property
    def uneven(self) -> Tensor:  # (B,)
        """Where some row is so short that each is to get a scale of its own."""
        return (self.largest < self.scale[:, None] * SHORT).any(-1)

    @cached_property
    def lengths(self) -> Tensor:  # (B, N), of the rows of unit
        def scaled(some: Tensor | slice) -> Tensor:
            own = _power_of_two(self.largest[some])
            return _lengths(_over(self.Y[some], own[..., None])) * (own / self.scale[some, None])

        return self._each(lambda: _lengths(self.unit), scaled)

    @cached_property
    def directions(self) -> Tensor:  # (B, N, d), the rows u_i
        def scaled(some: Tensor | slice) -> Tensor:
            own = _over(self.Y[some], _power_of_two(self.largest[some])[..., None])
            return own.div_(_lengths(own)[..., None])

        return self._each(lambda: self.unit / self.lengths[..., None], scaled)

    @cached_property
    def aligned(self) -> Tensor:  # (B,), ||sum u_i||^2 of the rows u_i
        def plain() -> Tensor:
            total: Tensor = self.lengths.reciprocal()[:, None] @ self.unit  # (B, 1, d)
            return total.square().sum((-2, -1))

        return self._each(plain, lambda some: self.directions[some].sum(-2).square().sum(-1))

    @cached_property
    def gram_of_directions(self) -> Tensor:  # (B, n, n)
        def plain() -> Tensor:
            shorten = self.lengths.reciprocal()
            return self.gram * shorten[:, :, None] * shorten[:, None]

        def scaled(some: Tensor | slice) -> Tensor:
            return _gram(_wide(self.directions[some]))

        return scaled(slice(None)) if self.tall else self._each(plain, scaled)

    @cached_property
    def angular_mu(self) -> Tensor:  # (B,)
        n = self.Y.shape[-2]
        square = 1.0 - self.aligned / n**2
        return self._root(square, lambda some: (_norm(_centred(self.directions[some])) / math.sqrt(n)).clamp(max=1.0))

    @cached_property
    def angular_rank1_residual(self) -> Tensor:  # (B,)
        gram = self.gram_of_directions
        u = self.leading(gram)
        return self._root(1.0 - _energy(gram, u), lambda some: _residual(_wide(self.directions[some]), u[some]))

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
        return eigenvector.by_lapack(gram) if gram.is_cpu else eigenvector.by_squaring(gram)

    def _each(self, plain: Callable[[], Tensor], scaled: Callable[[Tensor | slice], Tensor]) -> Tensor:
        """`plain` but where rows are uneven."""
        return self._but(plain, lambda: self.uneven, scaled)

    def _root(self, square: Tensor, exactly: Callable[[Tensor | slice], Tensor]) -> Tensor:
        """The root of `square` (B,) = 1 - c, but where rounding would show in it."""
        return self._but(lambda: square.clamp(min=0.0).sqrt(), lambda: square < LARGE, exactly)

    def _but(
        self, cheap: Callable[[], Tensor], bad: Callable[[], Tensor], dear: Callable[[Tensor | slice], Tensor]
    ) -> Tensor:
        """`cheap` (B, ...), but where it is `bad` (B,) what `dear` makes of those of the B, by passes over Y. Which they are is asked
        where the answer costs nothing; elsewhere it makes all of them."""
        if not self.Y.is_cpu:
            return dear(slice(None))
        some = bad()
        if some.all():
            return dear(slice(None))
        value = cheap()
        if some.any():
            value[some] = dear(some)
        return value


def _wide(Y: Tensor) -> Tensor:
    """(B, N, d), or its transpose where that is wide -> (B, n, m), n <= m."""
    return Y.mT if Y.shape[-2] > Y.shape[-1] else Y


def _gram(Z: Tensor) -> Tensor:  # (B, n, m) -> (B, n, n)
    if len(Z) == 1:  # libraries round the product of one matrix otherwise than that of the same among others
        return _gram(Z.expand(2, -1, -1))[:1]
    return Z @ Z.mT


def _energy(gram: Tensor, u: Tensor) -> Tensor:
    """u^T G u / tr G of Gram matrices (B, n, n) and unit vectors u (B, n) -> (B,)."""
    within = ((gram * u[:, None]).sum(-1) * u).sum(-1)
    return within / gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _residual(Z: Tensor, u: Tensor) -> Tensor:
    """The norm of Z (B, n, m) without its leading singular component u w, over that of Z: right to a tenth of the spacing of float64.

    u (B, n) comes from the small Gram matrix, with an error e of some roundings, and leaves R = e w + u e' of the same size. Both
    are taken from R itself: e = R w^T / ||w||^2 and e' = u^T R, less what they share.
    """
    if len(Z) == 1:  # as in _gram
        return _residual(Z.expand(2, -1, -1), u.expand(2, -1))[:1]
    u = u[..., None]  # (B, n, 1)
    w = u.mT @ Z  # (B, 1, m)
    R = torch.baddbmm(Z, u, w, alpha=-1)  # Z - u w, (B, n, m)
    e = R @ w.mT / w.square().sum(-1, keepdim=True)  # (B, n, 1)
    rest = u.mT @ R - (u.mT @ e) * w  # (B, 1, m)
    return _norm(torch.baddbmm(R, torch.cat([e, u], -1), torch.cat([w, rest], -2), alpha=-1)) / _norm(Z)
