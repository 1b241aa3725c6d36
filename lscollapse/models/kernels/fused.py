"""A Mamba-2 block in six launches of own Triton kernels beside its two products; needs a CUDA build of torch alone.

backends.py imports this where Triton is installed; nothing else does. `scan` takes texts of at most LENGTH tokens, which
are one chunk: no state is handed over. What the kernels compute stands in triton_code.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lscollapse.models.kernels import triton_code
from lscollapse.models.kernels.halves import rows, split, takes_rows
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.models.kernels.products import Weight, product

__all__ = ["LENGTH", "VERSION", "Weight", "combine", "product", "rows", "scan", "split", "takes_rows", "takes_scan"]

VERSION: str = triton.__version__
LENGTH = 128  # tokens of the longest text that `scan` takes


def takes_scan(s: Mamba2Shape, n_tokens: int) -> bool:
    """Whether `scan` has a kernel for this block: sizes of tiles are powers of two."""
    tiles = all(16 <= size <= most and size & (size - 1) == 0 for size, most in ((s.head_dim, 128), (s.state, 256)))
    return tiles and n_tokens <= LENGTH and 2 <= s.conv_kernel <= 4


def scan(
    projected: Tensor, s: Mamba2Shape, A: Tensor, D: Tensor, dt_bias: Tensor, taps: Tensor, bias: Tensor | None
) -> Tensor:
    """Convolution and scan of one chunk.

    Args:
        projected: (B, N, [inner +] conv_dim + heads), float32 or bfloat16, contiguous, N at most LENGTH.
        s: a shape that `takes_scan`.
        A, dt_bias: (heads,).
        D: (heads,), or one row an excerpt, (B, heads).
        taps: (conv_dim, K), the transpose of a contiguous (K, conv_dim).
        bias: (conv_dim,) or None.

    Returns:
        y, (B, N, inner), float32.
    """
    batch, N, _ = projected.shape
    length = max(16, triton.next_power_of_2(N))
    tile = min(64, length)
    xBC, dt = projected[..., -s.conv_dim - s.heads :], projected[..., -s.heads :]
    scores = torch.empty(batch, s.groups, length, length, device=projected.device)
    y = torch.empty(batch, N, s.inner, device=projected.device)
    step, high, low = torch.empty(3, batch, s.heads, length, device=projected.device).unbind()
    steps = projected.stride(0), projected.stride(1)
    has_bias, taps, D = bias is not None, taps.T.contiguous(), D.contiguous()
    triton_code.scores_kernel[(batch * s.groups, (length // tile) ** 2)](
        xBC, taps, bias if has_bias else taps, scores, *steps, N, s.conv_dim, s.inner, s.groups, STATE=s.state,
        PART=min(32, s.state), LENGTH=length, ROWS=tile, TAPS=s.conv_kernel, BIAS=has_bias, num_warps=4,
        num_stages=1,
    )  # fmt: skip
    triton_code.decays_kernel[(batch * s.heads,)](
        dt, A, dt_bias, step, high, low, *steps, N, s.heads, *s.dt_limit, LENGTH=length, num_warps=1
    )
    triton_code.scan_kernel[(batch * s.heads,)](
        xBC, scores, step, high, low, taps, bias if has_bias else taps, D, y, *steps, D.stride(0) if D.ndim == 2 else 0,
        N, s.conv_dim, s.heads, s.heads // s.groups, HEAD_DIM=s.head_dim, LENGTH=length, ROWS=min(32, length),
        TAPS=s.conv_kernel, BIAS=has_bias, num_warps=4, num_stages=1,
    )  # fmt: skip
    return y


def combine(X: Tensor, O: Tensor, skips: Tensor, scales: Tensor) -> Tensor:
    """skips*X + scales*O, (B, N, hidden) in float32 and (B,); a factor of 0 leaves X or O out, whatever it holds.

    Factors of more digits are rounded to float32: infinite where they are too large.
    """
    Y = torch.empty_like(X)
    size = X[0].numel()
    triton_code.combine_kernel[(len(X) * triton.cdiv(size, 2048),)](
        X, O, skips, scales, Y, size, BLOCK=2048, num_warps=4
    )
    return Y
