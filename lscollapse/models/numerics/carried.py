"""The residual stream of a pre-norm net carried as X * 2^exponent, with one exponent per excerpt.

Its mixers see norm(X), which does not depend on the scale of X. So where lam*X would leave the range of the dtype,
powers of two go from lam to the exponent: Y = (lam * 2^-t) X + 2^-(exponent + t) O stands for lam*X + O, exactly.

Everything is where X is: on a GPU nothing here waits for a number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lscollapse import measures

Lambda = float | Tensor  # one for all excerpts, or one for each: float64, (B,)

# A stream whose largest entry would pass 2^HIGH is carried at 2^LOW, and one that has shrunk is raised to it as far as
# its exponent goes: as high as a norm's gradient allows, which has the third power of 1/rms(X) in float32. A norm's
# eps is negligible beside rows down to 2^-36 of the largest then, as it is beside their true size.
HIGH, LOW = 42, 40
STEEPEST = 100  # log2 of the largest number that X is multiplied with; 2^128 is too large for float32


class Factors(NamedTuple):
    """Y = skip * X + o_scale * O, float64, (B, 1, 1) each."""

    skip: Tensor
    o_scale: Tensor


class Carried:
    """The exponents of a tile of excerpts; the only record of what X was divided by.

    Attributes:
        exponent: (B,), int64, never negative. The tensor is replaced, not changed, so that it may be kept.
    """

    def __init__(self, X: Tensor) -> None:
        """Of X (B, N, d), which is in its own scale."""
        self.exponent = torch.zeros(len(X), dtype=torch.int64, device=X.device)

    def plan(self, largest: Tensor, lam: Lambda, still: Tensor | None = None) -> Factors:
        """What X and O are multiplied with in lam*X + O, whose exponents become those carried from now on.

        Args:
            largest: (B,), the largest entries of X.
            still: (B,), which excerpts are to stay as they are, 1 X + 0 O.
        """
        mantissa, power = _frexp(lam)
        shift = self._shift(largest, mantissa, power)
        if still is not None:
            shift = torch.where(still, 0, shift)
        self.exponent = self.exponent + shift
        skip = mantissa * power_of_two(torch.clamp(power - shift, max=STEEPEST))
        o_scale = power_of_two(-self.exponent)
        if still is not None:
            skip, o_scale = torch.where(still, 1.0, skip), torch.where(still, 0.0, o_scale)
        return Factors(skip[:, None, None], o_scale[:, None, None])

    def add(self, lam: Lambda, X: Tensor, O: Tensor) -> Tensor:
        """lam*X + O in the scale that it is carried in from now on; exactly O, in its own, for lam = 0."""
        skip, o_scale = self.plan(largest_entries(X), lam)
        O = O * o_scale.to(O)
        if not isinstance(lam, Tensor) and lam == 0.0:
            return self.fit(O.to(torch.promote_types(X.dtype, O.dtype)))
        mantissa = _frexp(lam)[0]
        if isinstance(mantissa, Tensor):
            mantissa = torch.where(mantissa == 0, 1.0, mantissa)[:, None, None]
        # X times a power of two first: that rounds nothing, in any dtype.
        return self.fit(times(mantissa, X * (skip / mantissa).to(X)) + O)

    def fit(self, X: Tensor) -> Tensor:
        """X with its largest entry in range, where O was large or cancelled the rest."""
        shift = self._shift(largest_entries(X), *_frexp(0.5))
        if not measures.any_of(shift != 0):
            return X
        self.exponent = self.exponent + shift
        return X * power_of_two(-shift)[:, None, None].to(X)

    def _shift(self, largest: Tensor, mantissa: float | Tensor, power: int | Tensor) -> Tensor:
        """By how much the exponents have to grow (or fall) for lam*X, (B,), where lam = mantissa * 2^power."""
        size, exponent = torch.frexp(largest.double())
        top = exponent.long() + power  # |lam*X| < 2^top
        shift = torch.where(top > HIGH, top - LOW, (top - LOW).maximum(-self.exponent).clamp_max(0))
        shift = torch.where((size == 0) | (mantissa == 0), -self.exponent, shift.clamp(min=power - STEEPEST))
        return torch.where(largest.isfinite(), shift, 0)


def _frexp(lam: Lambda) -> tuple[float, int] | tuple[Tensor, Tensor]:
    if not isinstance(lam, Tensor):
        return math.frexp(lam)
    mantissa, power = torch.frexp(lam)
    return mantissa, power.long()


def power_of_two(n: Tensor) -> Tensor:
    """2^n in float64, exact on any device, for integers n; 0 or infinite where float64 has no such number."""
    half = n.clamp(-2044, 2046) >> 1  # the two factors are normal numbers, made of their exponents
    return (
        torch.stack([half, n.clamp(-2044, 2046) - half]).add_(1023).bitwise_left_shift_(52).view(torch.float64).prod(0)
    )


def largest_entries(X: Tensor) -> Tensor:
    """(B, N, d) -> (B,), the largest absolute values; NaN where one is NaN."""
    X = X.detach()
    return torch.maximum(X.amax((1, 2)), -X.amin((1, 2)))  # without a copy of X


def times(factor: float | Tensor, X: Tensor) -> Tensor:
    """factor * X, rounded once to the dtype of X; factor a number, or float64 and (B, 1, 1)."""
    if isinstance(factor, Tensor):
        return (factor.to(torch.promote_types(X.dtype, torch.float32)) * X).to(X.dtype)
    return factor * X


def lose_unsquarable(X: Tensor) -> Tensor:
    """X (B, N, d), infinite where an excerpt's squares leave the range: a norm would make zeros of it unseen."""
    limit = math.sqrt(torch.finfo(torch.promote_types(X.dtype, torch.float32)).max / X.shape[-1])
    lost = largest_entries(X) > limit
    return X.masked_fill(lost[:, None, None], math.inf) if measures.any_of(lost) else X
