"""The mixer of Mamba (Gu and Dao, arXiv:2312.00752) and its selective scan S6, with gradients, on any device.

Per channel d with a state h of n numbers, A (d, n) negative:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,    y_t = C_t.h_t + D x_t.

The scan works through chunks of tokens for many sequences together. A chunk is cut into pieces of PIECE tokens: all are
scanned side by side, then the state is handed from piece to piece; how many pieces and sequences, the cache decides, so
that the time goes into long vectors and not into Python. Only decays, never their inverses, are formed: no exponent is
positive. Forward keeps the state at the start of each chunk, KEPT numbers at most; backward computes a chunk's states
again, so that memory never holds the L * inner * state numbers of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lscollapse.models.kernels.backends import differentiable
from lscollapse.models.kernels.mamba_ssm import selective_scan_kernel
from lscollapse.models.kernels.ssd import compute_dtype

PIECE = 8  # tokens that are scanned one after the other
LOG2_E = math.log2(math.e)
TILE = {"cpu": 1 << 18, "cuda": 1 << 26}  # numbers of states that are worked on at a time; on a CPU they stay in cache
KEPT = 1 << 26  # numbers, about, of states kept from forward to backward at most
STEP_RANGE = (1e-3, 1e-1)  # dt is drawn log-uniformly from it


def softplus_inverse_of_steps(shape: int) -> Tensor:
    """A bias b for which softplus(b) is log-uniform in STEP_RANGE, (shape,)."""
    low, high = map(math.log, STEP_RANGE)
    step = torch.exp(torch.rand(shape) * (high - low) + low)
    return step + torch.log(-torch.expm1(-step))


class Mamba(nn.Module):
    """out_proj(y * silu(z)), y the selective scan of the convolved x; (B, N, d) -> (B, N, d).

    Parameters have the names and shapes of transformers' MambaMixer, conv1d and dt_proj included.
    """

    def __init__(self, d: int, state: int, expand: int = 2, conv: int = 4) -> None:
        super().__init__()
        inner, rank = expand * d, math.ceil(d / 16)
        self.sizes = (rank, state, state)
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(softplus_inverse_of_steps(inner))

    def forward(self, X: Tensor) -> Tensor:
        x, gate = self.in_proj(X).chunk(2, -1)  # (B, N, inner) each
        x = differentiable(X.device.type).conv(x, self.conv1d.weight, self.conv1d.bias)  # (B, N, inner)
        low, B, C = self.x_proj(x).split(self.sizes, -1)  # (B, N, rank), (B, N, state) each
        dt = F.softplus(self.dt_proj(low))  # (B, N, inner)
        y = selective_scan(x, dt, -self.A_log.exp(), B, C, self.D)  # (B, N, inner)
        Y: Tensor = self.out_proj(y * F.silu(gate))  # (B, N, d)
        return Y


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence at the head of this file from a zero state, in float32 (float64 for a float64 x).

    On a GPU it is mamba-ssm's kernel where that is installed.

    Args:
        x, dt: (b, L, d); dt positive.
        A: (d, n), negative.
        B, C: (b, L, n).
        D: (d,).

    Returns:
        y, (b, L, d).
    """
    dtype, L = compute_dtype(x.dtype), x.shape[1]
    kernel = selective_scan_kernel() if x.is_cuda and dtype == torch.float32 else None
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C, D = (t.to(dtype) for t in (x, dt, A, B, C, D))
        if kernel is not None:
            return kernel(x.mT, dt.mT, A, B.mT, C.mT, D).mT
        # whole pieces: a step of 0 with nothing to add leaves the state as it is
        steps, drive, B, C = (F.pad(t, (0, 0, 0, -L % PIECE)) for t in (dt, dt * x, B, C))
        scan: Callable[..., Tensor] = _SelectiveScan.apply
        y = scan(drive, steps, A.mT.contiguous(), B, C)
        return y[:, :L] + D * x


def _tiles(drive: Tensor, A: Tensor) -> tuple[list[slice], list[slice]]:
    """Sequences and tokens to work on together: as many sequences as TILE holds, then as many pieces."""
    b, L, _ = drive.shape
    size, tile = PIECE * A.numel(), TILE[drive.device.type]
    rows = max(1, min(b, tile // size))
    pieces = max(1, tile // (size * rows), b * L * A.numel() // (PIECE * KEPT))
    tokens = PIECE * pieces
    return [slice(i, i + rows) for i in range(0, b, rows)], [slice(i, i + tokens) for i in range(0, L, tokens)]


def _decay(steps: Tensor, A: Tensor) -> Tensor:
    """exp(steps A), (..., d) and (n, d) -> (..., n, d); through exp2, since torch's exp takes three times as long."""
    decay: Tensor = (steps[..., None, :] * (A * LOG2_E)).exp2_()
    return decay


def _pieces(t: Tensor) -> Tensor:  # (b, Q, ...) -> (b, c, PIECE, ...)
    return torch.unflatten(t, 1, (-1, PIECE))


def _states(drive: Tensor, steps: Tensor, A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (b, Q, n, d) of a chunk that begins with the state `start` (b, n, d)."""
    a = _decay(steps, A)  # (b, Q, n, d)
    h = drive[:, :, None] * B[..., None]  # (b, Q, n, d), what each token adds
    h[:, 0].addcmul_(a[:, 0], start)
    decays, states = _pieces(a).unbind(2), _pieces(h).unbind(2)  # PIECE of (b, c, n, d)
    for i in range(1, PIECE):
        states[i].addcmul_(decays[i], states[i - 1])
    if h.shape[1] > PIECE:
        pieces = _pieces(h).unbind(1)
        since = _decay(_pieces(steps)[:, 1:].cumsum(2), A).unbind(1)  # since the end of the piece before
        for k, decay in enumerate(since, 1):
            pieces[k].addcmul_(decay, pieces[k - 1][:, -1:])
    return a, h


def _adjoints(a: Tensor, steps: Tensor, A: Tensor, C: Tensor, gy: Tensor, end: Tensor) -> Tensor:
    """G_t = C_t gy_t + a_{t+1} G_{t+1}, (b, Q, n, d), where `end` (b, n, d) is what the next chunk adds to the last."""
    G = gy[:, :, None] * C[..., None]
    G[:, -1] += end
    decays, adjoints = _pieces(a).unbind(2), _pieces(G).unbind(2)
    for i in range(PIECE - 2, -1, -1):
        adjoints[i].addcmul_(decays[i + 1], adjoints[i + 1])
    if G.shape[1] > PIECE:
        pieces = _pieces(G).unbind(1)
        later = _pieces(steps.roll(-1, 1))[:, :-1]
        until = _decay(later.flip(2).cumsum(2).flip(2), A).unbind(1)  # until the first token of the next piece
        for k in range(len(until) - 1, -1, -1):
            pieces[k].addcmul_(until[k], pieces[k + 1][:, :1])
    return G


class _SelectiveScan(torch.autograd.Function):
    """y_t = C_t.h_t with h_t = exp(steps_t A) h_{t-1} + drive_t B_t; A (n, d), L a multiple of PIECE."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        drive, steps, A, B, C = inputs
        rows, chunks = _tiles(drive, A)
        y = torch.empty_like(drive)
        starts = drive.new_zeros(len(chunks) + 1, len(drive), *A.shape)  # of the chunks; the last is the final state
        for row in rows:
            for k, part in enumerate(chunks):
                tile = row, part
                _, h = _states(drive[tile], steps[tile], A, B[tile], starts[k, row])
                y[tile] = (C[tile][:, :, None] @ h)[:, :, 0]  # (b, Q, n, d) -> (b, Q, d)
                starts[k + 1, row] = h[:, -1]
        ctx.save_for_backward(*inputs, starts)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        drive, steps, A, B, C, starts = ctx.saved_tensors
        rows, chunks = _tiles(drive, A)
        g_drive, g_steps, g_B, g_C = (torch.empty_like(t) for t in (drive, steps, B, C))
        g_A = torch.zeros_like(A)
        for row in rows:
            end = torch.zeros_like(starts[0, row])
            for k in range(len(chunks) - 1, -1, -1):
                tile, start = (row, chunks[k]), starts[k, row]
                u, dt, b, c, gy = (t[tile] for t in (drive, steps, B, C, grad))
                a, h = _states(u, dt, A, b, start)
                G = _adjoints(a, dt, A, c, gy, end)
                end = a[:, 0] * G[:, 0]
                product = h * gy[:, :, None]
                g_C[tile] = product.sum(3)
                g_B[tile] = torch.mul(G, u[:, :, None], out=product).sum(3)
                g_drive[tile] = (b[:, :, None] @ G)[:, :, 0]
                G *= a
                G[:, 1:] *= h[:, :-1]
                G[:, 0] *= start  # now the gradient of steps_t A
                g_steps[tile] = torch.mul(G, A, out=product).sum(2)
                g_A += torch.mul(G, dt[:, :, None], out=product).sum((0, 1))
        return g_drive, g_steps, g_A, g_B, g_C
