"""The sums over one excerpt that its measures share, by one thread, in buffers that are reused.

numpy's product of a matrix with its own transpose is half of one (BLAS syrk), and its products with a vector of ones are the
fastest sums; torch's operations are faster element by element, and read 16-bit numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from lscollapse import eigenvector
from lscollapse.near_collapse import NearCollapse, dot
from lscollapse.passes import ALIKE, LARGEST_POWER, Shared, residual, wide
from lscollapse.workers import Workspace

# The root of 1 - c, for a quotient c that is right to some 2^-52, is right to 2^-51 from here on, under the floor of float64.
LARGE = 2.0**-4
# float64 rows shorter than this, relative to the largest entry, get a scale of their own before they are squared.
SHORT = 2.0**-480


class Excerpt:
    """One Y (N, d) of finite numbers, each sum of which is made when it is first asked for; names and meaning as in `Shared`.

    Narrower numbers than float64 keep the scale 1, since float64 has their squares. Whether a short way is good enough is asked of
    this excerpt alone, and never of what else was asked for: its sums are the same bits whatever is measured beside.
    """

    def __init__(self, Y: Tensor, peak: float, workspace: Workspace) -> None:
        self.Y = Y
        self.peak = peak
        exponent = max(-LARGEST_POWER, min(math.frexp(peak)[1], LARGEST_POWER))
        self.scale = 2.0**exponent if Y.dtype == torch.float64 else 1.0
        self._workspace = workspace

    @cached_property
    def _both(self) -> Tensor:  # (2, N, d), unit and R, which share what is done to their rows
        both = self._workspace.take("both", (2, *self.Y.shape), torch.float64)
        unit, R = both
        unit.copy_(self.Y)
        if self.scale != 1.0:
            unit.mul_(1.0 / self.scale)
        torch.sub(unit, unit[0], out=R)  # first of all, which is exact near collapse
        _subtract_mean(R)
        return both

    @property
    def unit(self) -> Tensor:  # (N, d)
        return self._both[0]

    @property
    def R(self) -> Tensor:  # (N, d), Y minus its mean row
        return self._both[1]

    @cached_property
    def _norms(self) -> np.ndarray:  # (2, N), of the rows of unit and of R
        return _lengths(self._both)

    @cached_property
    def _near(self) -> NearCollapse | None:
        unit, R = self._both.numpy()
        near = NearCollapse(R, self._norms[1], unit[0] - R[0])
        return near if near.holds else None

    @cached_property
    def _apart(self) -> Shared:  # where no short way is good enough
        return Shared(self.Y[None])

    @cached_property
    def size(self) -> float:
        return math.sqrt(dot(self._norms[0], self._norms[0]))

    @cached_property
    def centred(self) -> float:
        return math.sqrt(dot(self._norms[1], self._norms[1]))

    @cached_property
    def size_1_inf(self) -> float:
        return self._norms_1_inf[0]

    @cached_property
    def centred_1_inf(self) -> float:
        return self._norms_1_inf[1]

    @cached_property
    def _norms_1_inf(self) -> list[float]:
        """Made where unit and R are, which saves room in the cache: what is asked for later makes them again."""
        n, d = self.Y.shape
        sizes = self._both.abs_().numpy()
        for name in ("_both", "_near"):
            vars(self).pop(name, None)
        columns, rows = ones(n) @ sizes, sizes.reshape(2 * n, d) @ ones(d)  # (2, d), (2 N,)
        return list(map(float, np.sqrt(columns.max(1) * rows.reshape(2, n).max(1))))

    @cached_property
    def rank1_residual(self) -> float:
        if self._near:
            return self._near.rank1_residual(ones(len(self.Y)))
        return self._rank1_residual(self._gram, lambda: self.unit)

    def _rank1_residual(self, gram: np.ndarray, rows: Callable[[], Tensor]) -> float:
        """From a Gram matrix, or where rounding would show in that, from the rows themselves (N, d)."""
        u, energy = eigenvector.leading(gram)
        square = 1.0 - energy
        if not square < LARGE:
            return math.sqrt(square)
        Y = rows()[None]
        room = self._workspace.take("rest", wide(Y).shape, torch.float64)
        return float(residual(Y, torch.from_numpy(u)[None], out=room))

    @cached_property
    def _gram(self) -> np.ndarray:  # (n, n)
        return _gram(self.unit)

    # --- of the rows scaled to length 1 ---

    @cached_property
    def _uneven(self) -> bool:  # a row of zeros besides, whose numbers are NaN in either way
        return self.Y.dtype == torch.float64 and bool(self._norms[0].min() < SHORT)

    @cached_property
    def lengths(self) -> np.ndarray:  # (N,), of the rows of unit
        if self._uneven:
            return np.asarray(self._apart.lengths[0].numpy() * (self._apart.scale.numpy() / self.scale))
        return np.asarray(self._norms[0])

    @cached_property
    def shortest(self) -> float:
        return float(self.lengths.min()) * self.scale

    @cached_property
    def aligned(self) -> float:
        n = len(self.Y)
        if self._near:
            return n * (n - self._near.spread)
        if self._uneven:
            return float(self._apart.aligned)
        total = (1.0 / self.lengths) @ self.unit.numpy()  # (d,)
        return float(total @ total)

    @cached_property
    def angular_mu(self) -> float:
        n = len(self.Y)
        if self._near:
            return math.sqrt(max(self._near.spread, 0.0) / n)
        square = 1.0 - self.aligned / n**2
        if not square < LARGE:
            return math.sqrt(square)
        directions = self._directions()
        distances = _lengths(_subtract_mean(directions.sub_(directions[0].clone())))
        return math.sqrt(dot(distances, distances) / n)

    @cached_property
    def angular_rank1_residual(self) -> float:
        if self._near:
            return self._near.rank1_residual(1.0 / self.lengths)
        return self._rank1_residual(self._gram_of_directions, self._directions)

    @cached_property
    def effective_rank(self) -> float:
        gram = self._gram_of_directions
        p = eigenvector.eigenvalues(gram) / gram.trace()
        p = p[~(p <= 0.0)]  # NaN where there is one
        return float(np.exp(-(p @ np.log(p))))

    @cached_property
    def _gram_of_directions(self) -> np.ndarray:  # (n, n)
        n, d = self.Y.shape
        if n > d or self._uneven:
            return _gram(self._directions())
        return np.asarray(self._gram / self.lengths[:, None] / self.lengths)

    def _directions(self) -> Tensor:  # (N, d), the rows u_i, in room that the next who asks overwrites
        if self._uneven:
            return self._apart.directions[0].clone()
        room = self._workspace.take("directions", self.Y.shape, torch.float64)
        return torch.div(self.unit, torch.from_numpy(self.lengths)[:, None], out=room)

    @cached_property
    def row_norm_ratio(self) -> float:
        ascending, n = np.sort(self.lengths), len(self.lengths)
        return float(ascending[-1] / ((ascending[(n - 1) // 2] + ascending[n // 2]) / 2))

    @cached_property
    def longest_row(self) -> float:  # from 0
        return float((self.lengths >= ALIKE * self.lengths.max()).argmax()) if self.peak else math.nan


def _gram(Y: Tensor) -> np.ndarray:  # (N, d) -> (n, n)
    Z = (Y.mT if len(Y) > Y.shape[1] else Y).numpy()
    return np.asarray(Z @ Z.T)


def _subtract_mean(Z: Tensor) -> Tensor:  # (N, d), in place
    return Z.sub_(torch.from_numpy(ones(len(Z)) @ Z.numpy() / len(Z)))


def _lengths(Z: Tensor) -> np.ndarray:  # (..., N, d) -> (..., N)
    lengths: Tensor = torch.linalg.vector_norm(Z, dim=-1)
    return lengths.numpy()


@cache
def ones(n: int) -> np.ndarray:
    return np.ones(n)
