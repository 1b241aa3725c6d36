"""The residual stream of a pre-norm net carried as X * 2^exponent, with one exponent per excerpt.

Its mixers see norm(X), which does not depend on the scale of X. So where lam*X would leave the range of the dtype,
powers of two go from lam to the exponent: Y = (lam * 2^-t) X + 2^-(exponent + t) O stands for lam*X + O, exactly.

Everything is where X is: on a GPU nothing here waits for a number.
"""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

Lambda = float | Tensor  # one for all excerpts, or one for each: float64, (B,)
Split = tuple[float, int] | tuple[Tensor, Tensor]  # the same as m and p, lam = m 2^p

# A stream whose largest entry would pass 2^HIGH is carried at 2^LOW, and one that has shrunk is raised to it as far as
# its exponent goes: as high as a norm's gradient allows, which has the third power of 1/rms(X) in float32. A norm's
# eps is negligible beside rows down to 2^-36 of the largest then, as it is beside their true size.
HIGH, LOW = 42, 40
NOTHING = -(2**20)  # stands for log2 of 0
STEEPEST = 100  # log2 of the largest number that X is multiplied with; 2^128 is too large for float32


class Factors(NamedTuple):
    """Y = skip * X + o_scale * O, float64, (B, 1, 1) each."""

    skip: Tensor
    o_scale: Tensor


class Carried:
    """The exponents of a tile of excerpts; the only record of what X was divided by.

    Attributes:
        down: -exponent, (B,), whole numbers in float64, never positive. The tensor is replaced, not changed, so that it may be
            kept.
    """

    def __init__(self, X: Tensor) -> None:
        """Of X (B, N, d), which is in its own scale."""
        self.down = torch.zeros(len(X), dtype=torch.float64, device=X.device)
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # a tensor, its version, its largest entries

    @property
    def exponent(self) -> Tensor:
        """(B,), whole numbers in float64, never negative."""
        return -self.down

    def plan(self, largest: Tensor, lam: Split, still: Tensor | None = None) -> Factors:
        """What X and O are multiplied with in lam*X + O, whose exponents become those carried from now on.

        Args:
            largest: (B,), the largest entries of X.
            lam: as `frexp` splits it.
            still: (B,), which excerpts are to stay as they are, 1 X + 0 O.
        """
        mantissa, power = lam
        shift = self._shift(largest, power)
        skip = mantissa * torch.exp2(power - shift)
        shift = torch.where(largest > 0, shift, self.down)
        if still is not None:
            shift = torch.where(still, 0.0, shift)
        self.down = self.down - shift
        o_scale = torch.exp2(self.down)
        if still is not None:
            skip, o_scale = torch.where(still, 1.0, skip), torch.where(still, 0.0, o_scale)
        return Factors(skip[:, None, None], o_scale[:, None, None])

    def add(self, lam: Lambda, X: Tensor, O: Tensor) -> Tensor:
        """lam*X + O in the scale that it is carried in from now on; exactly O, in its own, for lam = 0."""
        split, before = frexp(lam), self.down
        skip, o_scale = self.plan(self._largest(X), split)
        own = not any_of((before != 0) | (self.down != 0))  # X and lam*X + O are in their own scale
        if not own:
            O = O * o_scale.to(O)
        if not isinstance(lam, Tensor):
            if lam == 0.0:
                return self.fit(O.to(torch.promote_types(X.dtype, O.dtype)))
            if own and abs(lam) >= 2.0**-STEEPEST:  # then lam is a normal number in float32 too
                return self.fit(times(lam, X) + O)
        mantissa = split[0]
        if isinstance(mantissa, Tensor):
            mantissa = torch.where(mantissa == 0, 1.0, mantissa)[:, None, None]
        # X times a power of two first: that rounds nothing, in any dtype.
        return self.fit(times(mantissa, X * (skip / mantissa).to(X)) + O)

    def fit(self, X: Tensor) -> Tensor:
        """X with its largest entry in range, where O was large or cancelled the rest."""
        largest = self._largest(X)
        shift = torch.where(largest > 0, self._shift(largest, 0), self.down)
        if not any_of(shift != 0):
            return X
        self.down = self.down - shift
        return X * torch.exp2(-shift)[:, None, None].to(X)

    def _largest(self, X: Tensor) -> Tensor:
        """The largest entries of X, (B,), looked for once in a tensor: what a sum gives is what the next one takes."""
        if X.is_inference():  # has no version
            return largest_entries(X)
        if self._last is not None:
            last, version, largest = self._last
            if last() is X and version == X._version:
                return largest
        largest = largest_entries(X)
        self._last = weakref.ref(X), X._version, largest
        return largest

    def _shift(self, largest: Tensor, power: int | Tensor) -> Tensor:
        """By how much the exponents have to grow (or fall) for lam*X, not zero, with |lam| < 2^power, (B,).

        Where X is infinite it is lost, whatever its exponent.
        """
        over = torch.frexp(largest.double()).exponent + (power - LOW)  # |lam*X| < 2^(over + LOW)
        shift = torch.where(over > HIGH - LOW, over, over.clamp(max=0).maximum(self.down))
        return shift.clamp(min=power - STEEPEST)


def any_of(mask: Tensor) -> bool:
    """Whether an entry may be True: on a CPU whether one is; elsewhere True, since to know would be to wait for the device."""
    return mask.device.type != "cpu" or bool(mask.any())


def frexp(lam: Lambda) -> Split:
    """m and p of lam = m 2^p, 0.5 <= |m| < 1; of 0 the p is so low that nothing of lam*X matters beside O."""
    if not isinstance(lam, Tensor):
        return math.frexp(lam) if lam else (lam, NOTHING)
    mantissa, power = torch.frexp(lam)
    return mantissa, torch.where(lam == 0, NOTHING, power)


def largest_entries(X: Tensor) -> Tensor:
    """(B, N, d) -> (B,), the largest absolute values; NaN where one is NaN."""
    X = X.detach()
    return torch.maximum(X.amax((1, 2)), -X.amin((1, 2)))  # without a copy of X


def times(factor: float | Tensor, X: Tensor) -> Tensor:
    """factor * X, rounded once to the dtype of X, for 1 X itself; factor a number, or float64 and (B, 1, 1)."""
    if isinstance(factor, Tensor):
        return (factor.to(torch.promote_types(X.dtype, torch.float32)) * X).to(X.dtype)
    return X if factor == 1.0 else factor * X


def lose_unsquarable(X: Tensor, largest: Tensor | None = None) -> Tensor:
    """X (B, N, d), infinite where an excerpt's squares leave the range: a norm would make zeros of it unseen.

    largest: its largest entries (B,), where they are known.
    """
    limit = math.sqrt(torch.finfo(torch.promote_types(X.dtype, torch.float32)).max / X.shape[-1])
    lost = (largest_entries(X) if largest is None else largest) > limit
    return X.masked_fill(lost[:, None, None], math.inf) if any_of(lost) else X
