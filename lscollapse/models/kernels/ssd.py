"""The two sequence operations of Mamba-2 on CPU: the SSD scan and the causal depthwise convolution (torch ops).

The scan is the recurrence of Dao and Gu (arXiv:2405.21060), per head, with a state S of shape (state, head_dim):

    dt_t = clamp(softplus(dt_t + dt_bias), dt_limit)
    S_t  = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T
    y_t  = C_t^T S_t + D x_t

Within a chunk that is one lower triangular matrix per head, M_ij = C_i.B_j exp(cum_i - cum_j) dt_j, applied to x, and
chunks hand the state on. What makes it fast: C_i.B_j is formed once per group of heads; M is formed for ROWS rows at a
time, up to its diagonal, in a buffer that stays in cache; left of the diagonal block its decay is a product of two
vectors, so that exp runs on ROWS x ROWS blocks only; nothing is padded. One excerpt is worked on at a time, so its
result cannot depend on the others.

No exponent is ever positive, and cum is kept in float64: a float32 result is good to float32 under any decay. There is
no autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.workers import Workspace

CHUNK = 128  # tokens between two hand-overs of the state
ROWS = 32  # rows of M in memory at a time
CONV_BYTES = 1 << 20  # of output that the convolution works on at a time


class ScanError(ValueError):
    """The tensors given to the scan or the convolution do not fit together."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk: int = CHUNK,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The SSD scan from a zero state, in float32 (float64 for a float64 x). Time is linear in L.

    Args:
        x: (batch, L, heads, head_dim); any strides whose last is 1, as for B and C.
        dt: (batch, L, heads), raw: before bias, softplus and clamp.
        A: (heads,), negative: -exp(A_log).
        B, C: (batch, L, groups, state); consecutive heads share a group.
        D: (heads,), the skip from x to y, or None.
        dt_bias: (heads,) or None.
        dt_limit: smallest and largest time step.
        chunk: tokens between two hand-overs of the state.
        out: written to and returned if given, (batch, L, heads, head_dim).
        workspace: scratch buffers to reuse.

    Returns:
        y, (batch, L, heads, head_dim).

    Raises:
        ScanError: shapes that do not fit together.
    """
    _check_scan(x, dt, A, B, C, D, dt_bias, chunk)
    dtype = compute_dtype(x.dtype)
    workspace = workspace or Workspace()
    y = torch.empty(x.shape, dtype=dtype) if out is None else out
    A = A.to(torch.float64)[:, None]
    for one_x, one_dt, one_B, one_C, one_y in zip(x, dt, B, C, y, strict=True):
        raw = one_dt.T.to(dtype)  # (heads, L)
        if dt_bias is not None:
            raw = raw + dt_bias.to(dtype)[:, None]
        step = F.softplus(raw, threshold=40.0).clamp_(*dt_limit)  # torch's threshold of 20 is coarse for float64
        x_heads, B_groups, C_groups = (t.to(dtype).transpose(0, 1) for t in (one_x, one_B, one_C))
        tokens = _Tokens(x_heads, step, B_groups, C_groups, one_y.transpose(0, 1))
        _scan_excerpt(tokens, A, D, chunk, workspace)
    return y


def _check_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, chunk: int
) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ScanError(f"x {tuple(x.shape)} and B {tuple(B.shape)} must have the four axes of `scan`")
    heads, groups = x.shape[2], B.shape[2]
    if B.shape != C.shape or B.shape[:2] != x.shape[:2] or dt.shape != x.shape[:3]:
        found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("x", x), ("dt", dt), ("B", B), ("C", C)))
        raise ScanError(f"the shapes do not fit together: {found}")
    if groups == 0 or heads % groups:
        raise ScanError(f"{heads} heads cannot share {groups} groups: the heads must be a multiple of the groups")
    for name, vector in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if vector is not None and vector.shape != (heads,):
            raise ScanError(f"{name} has shape {tuple(vector.shape)}, expected ({heads},): one entry a head")
    if chunk < 1:
        raise ScanError(f"chunk is {chunk}: it must be at least 1")


class _Tokens(NamedTuple):
    """Some tokens of one excerpt, heads or groups first."""

    x: Tensor  # (heads, Q, head_dim)
    dt: Tensor  # (heads, Q), the time steps
    B: Tensor  # (groups, Q, state)
    C: Tensor  # (groups, Q, state)
    y: Tensor  # (heads, Q, head_dim), to be filled


def _scan_excerpt(excerpt: _Tokens, A: Tensor, D: Tensor | None, chunk: int, workspace: Workspace) -> None:
    """Fill y of one excerpt chunk by chunk; A (heads, 1), in float64."""
    heads, L, head_dim = excerpt.x.shape
    state = None
    for start in range(0, L, chunk):
        part = _Tokens(*(tensor[:, start : start + chunk] for tensor in excerpt))
        cum = (part.dt.to(torch.float64) * A).cumsum(1)  # (heads, Q), log of the decay since the start of the chunk
        _chunk(part, cum, D, state, workspace)
        if start + chunk < L:
            if state is None:
                state = workspace.take("state", (heads, part.B.shape[2], head_dim), part.x.dtype).zero_()
            _hand_over(state, part, cum, workspace)


def _chunk(part: _Tokens, cum: Tensor, D: Tensor | None, state: Tensor | None, workspace: Workspace) -> None:
    """Fill y of one chunk of Q tokens that begins with the state (heads, state, head_dim); None stands for 0."""
    x, dt, B, C, y = part
    heads, Q, head_dim = x.shape
    scores = workspace.take("scores", (len(B), Q, Q), x.dtype)
    torch.bmm(C, B.transpose(1, 2), out=scores).tril_()
    for start in range(0, Q, ROWS):
        stop = min(start + ROWS, Q)
        M = _rows_of_M(start, stop, dt, cum, scores, D, workspace)  # (heads, rows, stop)
        result = workspace.take("result", (heads, stop - start, head_dim), x.dtype)
        torch.bmm(M, x[:, :stop], out=result)
        if state is not None:
            carried = workspace.take("carried", result.shape, x.dtype)
            _by_group(carried, C[:, start:stop], state, accumulate=False)  # C_i^T S, (heads, rows, head_dim)
            result.addcmul_(carried, _exp(cum[:, start:stop], x.dtype)[:, :, None])
        y[:, start:stop].copy_(result)


def _rows_of_M(
    start: int, stop: int, dt: Tensor, cum: Tensor, scores: Tensor, D: Tensor | None, workspace: Workspace
) -> Tensor:
    """Rows start..stop of M up to column stop, (heads, stop - start, stop); scores C_i.B_j (groups, Q, Q)."""
    heads, dtype, rows = len(cum), scores.dtype, cum[:, start:stop]
    M = workspace.take("M", (heads, stop - start, stop), dtype)
    left, diagonal = M[:, :, :start], M[:, :, start:]
    by_group = scores[:, None, start:stop]  # (groups, 1, rows, Q)

    def grouped(t: Tensor) -> Tensor:  # (heads, ...) -> (groups, heads of a group, ...)
        return torch.unflatten(t, 0, (len(scores), -1))

    decay = workspace.take("decay", (heads, stop - start, stop - start), dtype)
    torch.sub(rows[:, :, None], rows[:, None, :], out=decay)  # float64, rounded as it is stored
    decay.clamp_(max=0.0).exp_().mul_(dt[:, None, start:stop])
    torch.mul(grouped(decay), by_group[..., start:stop], out=grouped(diagonal))
    if D is not None:  # D x_t is one more term of row t
        diagonal.diagonal(dim1=1, dim2=2).add_(D.to(dtype)[:, None])
    if start:
        # exp(cum_i - cum_j) as a product of two vectors: up to the token before this block of rows, and from it on
        border = cum[:, start - 1 : start]
        after, before = _exp(rows - border, dtype), _exp(border - cum[:, :start], dtype).mul_(dt[:, :start])
        torch.mul(grouped(after)[..., None], by_group[..., :start], out=grouped(left))
        left.mul_(before[:, None])
    return M


def _hand_over(state: Tensor, part: _Tokens, cum: Tensor, workspace: Workspace) -> None:
    """Move the state (heads, state, head_dim) from the start to the end of a chunk."""
    x, last = part.x, cum[:, -1:]
    scaled = workspace.take("scaled", x.shape, x.dtype)
    torch.mul(x, _exp(last - cum, x.dtype).mul_(part.dt)[:, :, None], out=scaled)
    state.mul_(_exp(last, x.dtype)[:, :, None])
    _by_group(state, part.B.transpose(1, 2), scaled, accumulate=True)


def _by_group(target: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    """target_h (+)= left_g(h) @ right_h for every head h, without copying left, (groups, ...), for each head."""
    per_group = len(target) // len(left)
    for g, one in enumerate(left):
        heads = slice(g * per_group, (g + 1) * per_group)
        target[heads].baddbmm_(one.expand(per_group, *one.shape), right[heads], beta=float(accumulate))


def _exp(log: Tensor, dtype: torch.dtype) -> Tensor:
    return log.to(dtype).exp()


@torch.no_grad()
def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """silu of the causal depthwise convolution, as K shifted multiply-adds; float32 (float64 for a float64 x).

    Args:
        x: (batch, L, channels); any strides whose last is 1.
        weight: (channels, 1, K) or (channels, K); fastest as the transpose of a contiguous (K, channels).
        bias: (channels,) or None.
        out: written to and returned if given, (batch, L, channels).

    Returns:
        (batch, L, channels): silu(bias + sum of weight[:, K-1-s] x_{t-s} over s < K), x being 0 before its first token.

    Raises:
        ScanError: shapes that do not fit together.
    """
    if x.ndim != 3 or len(weight) != x.shape[-1] or (bias is not None and bias.shape != x.shape[-1:]):
        found = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ScanError(f"the shapes do not fit (batch, L, channels), (channels, 1, K) and a bias (channels,): {found}")
    dtype = compute_dtype(x.dtype)
    taps = weight.to(dtype).flatten(1).T.contiguous()  # (K, channels)
    offset = torch.zeros_like(taps[0]) if bias is None else bias.to(dtype)
    y = torch.empty(x.shape, dtype=dtype) if out is None else out
    L, channels = x.shape[1:]
    size = max(1, CONV_BYTES // (channels * y.element_size()))
    for one_x, one_y in zip(x.to(dtype), y, strict=True):
        for start in range(0, L, size):
            stop = min(start + size, L)
            torch.addcmul(offset, one_x[start:stop], taps[-1], out=one_y[start:stop])
            for shift in range(1, min(len(taps), stop)):
                first = max(start, shift)
                one_y[first:stop].addcmul_(one_x[first - shift : stop - shift], taps[-1 - shift])
            torch.ops.aten.silu.out(one_y[start:stop], out=one_y[start:stop])
    return y
