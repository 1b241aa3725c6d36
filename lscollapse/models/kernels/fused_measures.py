"""The measures of a batch where it lies; on an NVIDIA GPU by four Triton kernels. Nothing is read back.

Before their first use on a GPU the kernels are compared with LAPACK's measures of the same numbers.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lscollapse import one_by_one
from lscollapse.eigenvector import SQUARINGS
from lscollapse.measures import measure_all
from lscollapse.models.kernels import guard
from lscollapse.passes import ALIKE, Shared

MOST_ROWS = 128  # of a matrix in a program of the kernels
TILE = 64  # of a Gram matrix, for tensor cores
# What the kernels write of an excerpt, in their order: properties of `Fused`.
SUMS = (
    "size", "centred", "size_1_inf", "centred_1_inf", "rest", "aligned", "scale", "peak", "shortest", "angular_mu",
    "row_norm_ratio", "longest_row",
)  # fmt: skip
COLUMNS = 32  # of Y at a time: 128 bytes of a row
TOLERANCE = 1e-11  # relative, of a measure in `error`; float32 sums would be off by 1e-7


def shared_of(Y: Tensor) -> Shared:
    """What the measures share of Y (B, N, d), made by what suits it best.

    float64 Y, and more than 128 rows, are measured by torch on a GPU too, and everything where the kernels are not right. On a CPU
    it is one excerpt after the other.
    """
    if not Y.is_cuda:
        return one_by_one.shared_of(Y)
    if fault(Y.device):
        return Shared(Y)
    fused = Y.dtype != torch.float64 and Y.shape[-2] <= MOST_ROWS
    return Fused(Y) if fused else BySquaring(Y)


@cache
def fault(device: torch.device) -> str:
    """Why the kernels are not used on this GPU, for the user; empty where they are right. Waits for the GPU, once a process.

    Raises:
        Exception: the device has no room for the few MB that this takes (`is_out_of_memory`).
    """
    if torch.version.hip or find_spec("triton") is None:
        return "there are no Triton kernels for this GPU: torch operations measure"
    return guard.fault("the kernels of the measures", lambda: error(device), TOLERANCE)


def error(device: torch.device) -> float:
    """The largest relative error of the kernels on two excerpts (128, 96), one near collapse, of whose measures none is near zero."""
    Y = torch.randn(2, MOST_ROWS, 3 * COLUMNS, generator=torch.Generator().manual_seed(0)) + 0.5
    Y[1, 1:] = Y[1, :1] + 0.01 * Y[1, 1:]
    found, right = (torch.stack(list(measure_all(of).values())).cpu() for of in (Fused(Y.to(device)), Y))
    return float(((found - right) / right).abs().max())


class BySquaring(Shared):
    """Measures by torch, but for the leading eigenvector of matrices that the kernel can hold."""

    def leading(self, gram: Tensor) -> Tensor:
        n = gram.shape[-1]
        if n > MOST_ROWS:
            return super().leading(gram)
        rows = _rows(n)
        room = gram.new_zeros(len(gram), 2, rows, rows)
        room[:, 0, :n, :n] = gram
        return _leading(room, n)


class Fused(Shared):
    """Measures of a Y (B, N <= 128, d) of numbers that float32 has: every sum over it is made by the kernels, with scale 1."""

    def __init__(self, Y: Tensor) -> None:
        # Triton does not compile a float64 product of 16-bit numbers.
        super().__init__(Y.to(torch.float32).contiguous())
        self.rest: Tensor  # (B,), the norm of Y without its leading singular component
        vars(self).update(zip(SUMS, _sums(self.Y).unbind(-1), strict=True))  # in the place of what would be computed

    @cached_property
    def rank1_residual(self) -> Tensor:  # (B,)
        return self.rest / self.size

    @cached_property
    def unit(self) -> Tensor:  # (B, N, d), for measures whose sum no kernel makes
        return self.Y.to(torch.float64) * self.scale[:, None, None]


def _sums(Y: Tensor) -> Tensor:
    """SUMS of Y (B, N, d) in float32, (B, 12)."""
    from lscollapse.models.kernels import measure_code

    batch, n, d = Y.shape
    rows, tile, tiles = _rows(n), _tile(n), _tiles(n)
    sums, lengths, w, room = (
        torch.empty(batch, *shape, dtype=torch.float64, device=Y.device)
        for shape in ((len(SUMS),), (n,), (2, d), (2, rows, rows))
    )
    sizes: dict[str, Any] = {"ROWS": rows, "COLUMNS": COLUMNS, "SUMS": len(SUMS), "num_warps": 16}
    with guard.launching_at(Y):
        measure_code.sums_kernel[(batch,)](Y, lengths, sums, n, d, ALIKE, **sizes)
        measure_code.gram_kernel[(batch * tiles,)](
            Y, room, n, d, ROWS=rows, TILE=tile, TILES=tiles, COLUMNS=COLUMNS, num_warps=8
        )
        measure_code.rest_kernel[(batch,)](Y, _leading(room, n), lengths, w, sums, n, d, **sizes)
    return sums


def _rows(n: int) -> int:
    """The rows that n rows are padded to: a power of two that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def _tile(n: int) -> int:
    return min(_rows(n), TILE)


def _tiles(n: int) -> int:
    """The tiles of a Gram matrix of n rows on its diagonal and over it."""
    across = _rows(n) // _tile(n)
    return across * (across + 1) // 2


def _leading(room: Tensor, n: int) -> Tensor:
    """(B, 2, rows, rows), the first of each two a Gram matrix of n rows -> (B, n)."""
    from lscollapse.models.kernels import measure_code

    rows, tile = room.shape[-1], _tile(n)
    u = room.new_empty(len(room), n)
    with guard.launching_at(room):
        measure_code.leading_kernel[(len(room),)](
            room, u, n, SQUARINGS, ROWS=rows, TILE=tile, COLUMNS=min(rows, COLUMNS), num_warps=4
        )
    return u


class Cost(NamedTuple):
    """What `Fused` takes for one excerpt, by formula.

    Attributes:
        reads: bytes of Y, read four times and a Gram matrix's tiles besides, which a cache may save: from memory.
        other: bytes of what the kernels hand to each other, most of which stays in the cache.
        products: floating-point operations of the float64 products on tensor cores.
        arithmetic: of the rest, in float64.
    """

    reads: int
    other: int
    products: int
    arithmetic: int


def cost(n: int, d: int, squarings: float = 10) -> Cost:
    """Of an excerpt of n tokens in d channels. `squarings` lie between 1 (collapsed) and SQUARINGS (equal singular values);
    10 is for a second eigenvalue of 0.97 of the first."""
    rows, tile = _rows(n), _tile(n)
    tiled = 2 * _tiles(n) * tile**2  # operations of a Gram matrix for each column
    return Cost(
        reads=4 * 4 * n * d,
        other=8 * (4 * d + round((squarings + 1) * 2 * rows**2)),
        products=round(tiled * (d + squarings * rows)),
        arithmetic=50 * n * d,
    )
