"""Norm and gate of rows by an own Triton kernel, its result as the next product takes it: rounded, or as two halves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lscollapse.models.kernels import triton_code

WIDEST = 16384  # numbers of the longest row that `rows` takes: one program holds it in registers


class Halves(NamedTuple):
    """Numbers as scale (high + low), high and low (..., width) in float16, scale (...) in float32."""

    high: Tensor
    low: Tensor
    scale: Tensor


def takes_rows(width: int) -> bool:
    """Whether `rows` has a kernel for rows of this width."""
    return width <= WIDEST


def rows(
    y: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, groups: int, dtype: torch.dtype | None
) -> Tensor | Halves:
    """`gated_norm` of y, (B, N, width), or y silu(gate) alone without a weight, as a product takes it.

    Args:
        y, gate: (B, N, width); any strides whose last is 1 and whose rows are evenly spaced.
        weight: (width,), float32, or None.
        eps, groups: as for `gated_norm`.
        dtype: of the result; None: the two halves of every row.
    """
    *lead, width = y.shape
    out = torch.empty(y.shape, dtype=dtype or torch.float16, device=y.device)
    low = scale = out
    if dtype is None:
        low, scale = torch.empty_like(out), torch.empty(lead, dtype=torch.float32, device=y.device)
    gated, tile = gate is not None, (triton.next_power_of_2(groups), triton.next_power_of_2(width // groups))
    triton_code.rows_kernel[(y.numel() // width,)](
        y, gate if gated else y, y if weight is None else weight, out, low, scale, y.stride(-2),
        gate.stride(-2) if gate is not None else 0, groups, width // groups, eps, GROUPS=tile[0], WIDTH=tile[1],
        GATE=gated, NORM=weight is not None, HALVES=dtype is None, num_warps=4 if tile[0] * tile[1] <= 4096 else 8,
    )  # fmt: skip
    return Halves(out, low, scale) if dtype is None else out


def split(X: Tensor) -> Halves:
    """X, (..., width), as two halves."""
    halves = rows(X, None, None, 0.0, 1, None)
    assert isinstance(halves, Halves)
    return halves
