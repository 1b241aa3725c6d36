"""The residual stream of a pre-norm net carried as X * 2^exponent, with one exponent per excerpt.

Its mixers see norm(X), which does not depend on the scale of X. So where lam*X would leave the range of the dtype,
powers of two go from lam to the exponent: Y = (lam * 2^-t) X + 2^-(exponent + t) O stands for lam*X + O, exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A stream whose largest entry would pass 2^HIGH is carried at 2^LOW, and one that has shrunk is raised to it as far as
# its exponent goes: as high as a norm's gradient allows, which has the third power of 1/rms(X) in float32. A norm's
# eps is negligible beside rows down to 2^-36 of the largest then, as it is beside their true size.
HIGH, LOW = 42, 40
STEEPEST = 100  # log2 of the largest number that X is multiplied with; 2^128 is too large for float32


class Factors(NamedTuple):
    """Y = skip * X + o_scale * O, float64 on the CPU, (B, 1, 1) each."""

    skip: Tensor
    o_scale: Tensor


class Carried:
    """The exponents of a tile of excerpts; the only record of what X was divided by.

    Attributes:
        exponent: (B,), int64, never negative. The array is replaced, not changed, so that it may be kept.
    """

    def __init__(self, excerpts: int) -> None:
        self.exponent = np.zeros(excerpts, dtype=np.int64)

    def plan(self, X: Tensor, lam: float) -> Factors:
        """What X and O are multiplied with in lam*X + O, whose exponents become those carried from now on."""
        shift = self._shift(X, lam)
        self.exponent = self.exponent + shift
        skip = np.ldexp(lam, np.minimum(-shift, STEEPEST - math.frexp(lam)[1]))
        return Factors(_per_excerpt(skip), _per_excerpt(np.ldexp(1.0, -self.exponent)))

    def add(self, lam: float, X: Tensor, O: Tensor) -> Tensor:
        """lam*X + O in the scale that it is carried in from now on; exactly O, in its own, for lam = 0."""
        skip, o_scale = self.plan(X, lam)
        O = O * o_scale.to(O)
        if lam == 0.0:
            return self.fit(O.to(torch.promote_types(X.dtype, O.dtype)))
        mantissa = math.frexp(lam)[0]  # X times a power of two first: that rounds nothing, in any dtype
        return self.fit(mantissa * (X * (skip / mantissa).to(X)) + O)

    def fit(self, X: Tensor) -> Tensor:
        """X with its largest entry in range, where O was large or cancelled the rest."""
        shift = self._shift(X, 0.5)
        if not shift.any():
            return X
        self.exponent = self.exponent + shift
        return X * _per_excerpt(np.ldexp(1.0, -shift)).to(X)

    def _shift(self, X: Tensor, lam: float) -> np.ndarray:
        """By how much the exponents have to grow (or fall) for lam*X, (B,)."""
        largest = X.detach().abs().amax((1, 2)).double().cpu().numpy()
        mantissa, exponent = np.frexp(largest)
        mine = math.frexp(lam)[1]
        top = exponent.astype(np.int64) + mine  # |lam*X| < 2^top
        shift = np.where(top > HIGH, top - LOW, np.minimum(np.maximum(top - LOW, -self.exponent), 0))
        shift = np.where((mantissa == 0) | (lam == 0.0), -self.exponent, np.maximum(shift, mine - STEEPEST))
        return np.where(np.isfinite(largest), shift, 0)


def lose_unsquarable(X: Tensor) -> Tensor:
    """X (B, N, d), infinite where an excerpt's squares leave the range: a norm would make zeros of it unseen."""
    limit = math.sqrt(torch.finfo(torch.promote_types(X.dtype, torch.float32)).max / X.shape[-1])
    lost = X.detach().abs().amax((1, 2)) > limit
    return X.masked_fill(lost[:, None, None], math.inf) if lost.any() else X


def _per_excerpt(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)[:, None, None]
