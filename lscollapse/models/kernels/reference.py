"""The definitions that kernels are held against, in float64 on any device: no kernel, no chunk, one token after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels.mamba2_block import Mamba2Shape

# Largest error relative to the largest value. float32 sums of a few hundred terms stay well below; TF32 is at 4e-4.
TOLERANCE = {
    "scan": 5e-6, "scan backward": 2e-5, "conv": 2e-6, "gated norm": 2e-6, "mixer": 5e-6, "product": 4e-6, "block": 2e-5,
}  # fmt: skip


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest |found - exact| over the largest |exact|, NaN where something found is no number."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def block_weights(shape: Mamba2Shape, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """Random weights of a block with the spread of decays and time steps that Mamba-2 is trained from."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    sizes = shape.tensors() | {"mixer.conv1d.bias": (shape.conv_dim,)}
    weights = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name in ("mixer.in_proj.weight", "mixer.out_proj.weight"):
        weights[name] /= weights[name].shape[1] ** 0.5
    weights["mixer.conv1d.weight"] /= shape.conv_kernel**0.5
    weights["mixer.A_log"] = uniform(1.0, 16.0, shape.heads).log()
    weights["mixer.dt_bias"] = uniform(-7.0, -2.0, shape.heads)  # softplus: 0.001 to 0.13
    return {name: tensor.to(device) for name, tensor in weights.items()}


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    *, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:  # fmt: skip
    """The definition at the head of ssd.py, token by token, in float64, with autograd; shapes as for `ssd.scan`."""
    x, dt, A, B, C, D, dt_bias = (t.double() for t in (x, dt, A, B, C, D, dt_bias))
    heads, groups = x.shape[2], B.shape[2]
    B, C = (t.repeat_interleave(heads // groups, 2) for t in (B, C))  # (batch, L, heads, state)
    step = torch.logaddexp(dt + dt_bias, dt.new_zeros(())).clamp(*dt_limit)
    state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        gained = torch.einsum("bhp,bhn->bhpn", step[:, t, :, None] * x[:, t], B[:, t])
        state = torch.exp(step[:, t] * A)[..., None, None] * state + gained
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of torch's own convolution in float64; x (B, L, channels), weight (channels, 1, K)."""
    K = weight.shape[-1]
    y = F.conv1d(x.double().transpose(1, 2), weight.double(), bias.double(), padding=K - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def plain_norm(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Gate first, then RMSNorm per group, in float64."""
    u = y.double() if gate is None else y.double() * F.silu(gate.double())
    parts = torch.unflatten(u, -1, (groups, -1))  # (..., groups, width / groups)
    return F.rms_norm(parts, [u.shape[-1] // groups], eps=eps).flatten(-2) * weight.double()


def plain_mixer(weights: dict[str, Tensor], s: Mamba2Shape, projected: Tensor, gating: bool = True) -> Tensor:
    """What lies between the products: projected (B, N, [inner +] conv_dim + heads) -> (B, N, inner), in float64."""
    w, projected = {name: tensor.double() for name, tensor in weights.items()}, projected.double()
    gate = projected[..., : s.inner] if gating else None
    xBC, dt = torch.split(projected[..., s.inner * gating :], [s.conv_dim, s.heads], dim=-1)
    convolved = plain_conv(xBC, w["mixer.conv1d.weight"], w["mixer.conv1d.bias"])
    x, B, C = torch.split(convolved, [s.inner, s.groups * s.state, s.groups * s.state], dim=-1)
    x = torch.unflatten(x, -1, (s.heads, s.head_dim))  # (B, N, heads, head_dim)
    B, C = (torch.unflatten(t, -1, (s.groups, s.state)) for t in (B, C))  # (B, N, groups, state)
    y = recurrence(x, dt, -w["mixer.A_log"].exp(), B, C, w["mixer.D"], w["mixer.dt_bias"], dt_limit=s.dt_limit)
    return plain_norm(y.flatten(2), gate, w["mixer.norm.weight"], s.eps, s.groups)


def plain_block(weights: dict[str, Tensor], s: Mamba2Shape, X: Tensor) -> Tensor:
    """X + mixer(norm(X)) in float64."""
    projected = plain_norm(X, None, weights["norm.weight"], s.eps) @ weights["mixer.in_proj.weight"].double().T
    return X + plain_mixer(weights, s, projected) @ weights["mixer.out_proj.weight"].double().T
