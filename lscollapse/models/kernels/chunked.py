"""Scan, causal convolution and gated norm of Mamba-2 in torch operations on whole batches: any device, with autograd."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels import ssd

CHUNK = 64  # tokens between two hand-overs of the state in `chunked_scan`


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None,
    *, dt_limit: tuple[float, float] = (0.0, math.inf), chunk: int = CHUNK,
) -> Tensor:  # fmt: skip
    """The scan of `ssd.scan`; D is (heads,), or (batch, heads) for one row an excerpt.

    Takes memory for batch * heads * chunk^2 decays at a time. float32, or float64 for a float64 x; the logarithm of the
    decay is kept in float64. Axes: b excerpt, g group, h head of a group, L or Q tokens, n state, p channel of a head.
    """
    dtype, groups, L = ssd.compute_dtype(x.dtype), B.shape[2], x.shape[1]
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = F.softplus(raw, threshold=40.0).clamp(*dt_limit)
    log_decay = torch.unflatten((step.double() * A.double()).mT, 1, (groups, -1))  # (b, g, h, L)
    B, C = B.to(dtype).transpose(1, 2), C.to(dtype).transpose(1, 2)  # (b, g, L, n)
    scaled = torch.unflatten((x.to(dtype) * step[..., None]).transpose(1, 2), 1, (groups, -1))  # (b, g, h, L, p)
    state = None  # (b, g, h, n, p)
    parts = []
    for start in range(0, L, chunk):
        part = slice(start, start + chunk)
        cum, Bs, Cs, xs = log_decay[..., part].cumsum(-1), B[:, :, part], C[:, :, part], scaled[..., part, :]
        future = torch.ones(cum.shape[-1], cum.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        decay = (cum[..., None] - cum[..., None, :]).to(dtype).masked_fill(future, -math.inf).exp()  # (b, g, h, Q, Q)
        y = ((Cs @ Bs.mT)[:, :, None] * decay) @ xs  # (b, g, h, Q, p)
        if state is not None:
            y = y + (Cs[:, :, None] @ state) * cum.to(dtype).exp()[..., None]
        if part.stop < L:
            left = (cum[..., -1:] - cum).to(dtype).exp()  # (b, g, h, Q), the decay up to the end of the chunk
            gained = Bs.mT[:, :, None] @ (xs * left[..., None])
            state = gained if state is None else state * cum[..., -1:].to(dtype).exp()[..., None] + gained
        parts.append(y)
    y = torch.cat(parts, 3).flatten(1, 2).transpose(1, 2)  # (b, L, g * h, p)
    return y if D is None else y + D.to(dtype).view(-1, 1, x.shape[2], 1) * x.to(dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of `ssd.conv` as K shifted products of whole batches."""
    dtype, L = ssd.compute_dtype(x.dtype), x.shape[1]
    taps = weight.to(dtype).flatten(1).unbind(1)  # K of (channels,)
    padded = F.pad(x.to(dtype), (0, 0, len(taps) - 1, 0))  # (b, K - 1 + L, channels)
    y = torch.zeros_like(taps[0]) if bias is None else bias.to(dtype)
    for k, tap in enumerate(taps):
        y = torch.addcmul(y, padded[:, k : k + L], tap)
    return F.silu(y)


def gated_norm(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """weight * u / rms(u) with u = y * silu(gate), or u = y without a gate; y, gate (..., width), weight (width,).

    The rms is over each of `groups` equal parts of a row. A row above 2^30 is first scaled down by a power of two:
    exact, and the squares of a finite u never overflow.
    """
    u = torch.unflatten(y if gate is None else y * F.silu(gate), -1, (groups, -1))  # (..., groups, width / groups)
    excess = (torch.frexp(u.detach().abs().amax(-1, keepdim=True)).exponent - 30).clamp_min(0)
    scale = torch.ldexp(torch.ones_like(u[..., :1]), -excess)
    u = u * scale
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps * scale * scale)).flatten(-2) * weight
