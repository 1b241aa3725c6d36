"""Products of float32 on the tensor cores of any GPU since 2020: every number as two halves in float16.

    product(split(X), Weight.of(W), bias)  # X W^T + bias

x = scale (high + low), one scale a row, a power of two: of 24 bits these keep 22 to 24 relative to x, and 2^-38 of the
largest of its row at least. Weights stored in float16 are taken as they are, those in bfloat16 are exact in one half
but for what is below 2^-31 of the largest of its row: X W^T = scale (high W^T + low W^T), two passes. Weights in float32
are two halves, and high W_low^T is a third pass, left out where all these are 0; low W_low^T is 2^-22 of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lscollapse.models.kernels import triton_code
from lscollapse.models.kernels.halves import Halves, split

TILE = {"BM": 128, "BN": 128, "BK": 64, "BAND": 8, "num_warps": 8}
STAGE = 3 * 128 * 64 * 2  # bytes of shared memory that one step's tiles of high, low and W take


@dataclass(frozen=True)
class Weight:
    """A weight (n, k) as the kernel reads it: stored, or with one scale a row, and a second half if it has one."""

    high: Tensor
    low: Tensor | None = None
    scale: Tensor | None = None
    has_low: Tensor | None = None  # 1 where some low is not 0, a number on the device

    @classmethod
    def of(cls, weight: Tensor) -> Weight:
        """Of float16, bfloat16 or float32; float16 is shared, not copied."""
        weight = weight.contiguous()
        if weight.dtype == torch.float16:
            return cls(weight)
        high, low, scale = split(weight)
        if weight.dtype == torch.bfloat16:
            return cls(high, None, scale)
        return cls(high, low, scale, low.any().to(torch.int32))

    def parts(self) -> list[Tensor]:
        """The tensors that there are of the four."""
        return [part for part in (self.high, self.low, self.scale, self.has_low) if part is not None]

    def __getitem__(self, rows: slice) -> Weight:
        """Some of the n rows."""
        low, scale = (None if part is None else part[rows] for part in (self.low, self.scale))
        return Weight(self.high[rows], low, scale, self.has_low)


def product(X: Halves, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """X W^T + bias in float32, (..., k) and (n, k) and (n,) -> (..., n)."""
    *lead, k = X.high.shape
    n, m = len(weight.high), X.scale.numel()
    out = torch.empty(*lead, n, dtype=torch.float32, device=X.high.device)

    def given(part: Tensor | None) -> Tensor:
        return out if part is None else part

    grid = (triton.cdiv(m, TILE["BM"]) * triton.cdiv(n, TILE["BN"]),)
    triton_code.product_kernel[grid](
        X.high, X.low, X.scale, weight.high, given(weight.low), given(weight.scale), given(weight.has_low), given(bias),
        out, m, n, k, **TILE, SCALED=weight.scale is not None, LOW=weight.low is not None, BIAS=bias is not None,
        num_stages=_stages(out.device),
    )  # fmt: skip
    return out


def _stages(device: torch.device) -> int:
    """How many steps of the product are in shared memory at a time, at most 4; on a CPU, where none is, 2."""
    if device.type == "cpu":
        return 2
    available: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return min(4, max(1, available // STAGE))
