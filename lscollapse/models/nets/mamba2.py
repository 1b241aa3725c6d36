"""The mixer of Mamba-2 (Dao and Gu, arXiv:2405.21060) with gradients: SSD scan, causal convolution, gated norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lscollapse.models.kernels.backends import differentiable
from lscollapse.models.nets.mamba import softplus_inverse_of_steps

A_RANGE = (1.0, 16.0)  # -A is drawn uniformly from it
EPS = 1e-5  # of the gated norm


class SSD(nn.Module):
    """The parameters of the scan: dt_bias, A_log and D, one number a head each."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.dt_bias = nn.Parameter(softplus_inverse_of_steps(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(torch.ones(heads))

    def scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
        """x (b, L, inner), B, C (b, L, state), raw dt (b, L, heads) -> y (b, L, inner)."""
        scan = differentiable(x.device.type).scan
        with torch.autocast(x.device.type, enabled=False):
            heads = torch.unflatten(x, -1, (len(self.D), -1))  # (b, L, heads, head_dim)
            return scan(heads, dt, -self.A_log.exp(), B[:, :, None], C[:, :, None], self.D, self.dt_bias).flatten(2)


class Mamba2(SSD):
    """out_proj(norm(y * silu(z))), y the SSD scan of the convolved x, B and C; (B, N, d) -> (B, N, d).

    One group of heads. Parameters have the names and shapes of transformers' Mamba2Mixer.
    """

    def __init__(self, d: int, state: int, head_dim: int, expand: int = 2, conv: int = 4) -> None:
        inner = expand * d
        heads = inner // head_dim
        super().__init__(heads)
        self.state = state
        self.sizes = (inner, inner + 2 * state, heads)
        self.in_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(inner + 2 * state, inner + 2 * state, conv, groups=inner + 2 * state)
        self.norm = nn.RMSNorm(inner, EPS)
        self.out_proj = nn.Linear(inner, d, bias=False)

    def forward(self, X: Tensor) -> Tensor:
        gate, xBC, dt = self.in_proj(X).split(self.sizes, -1)  # (B, N, inner), (B, N, inner + 2 state), (B, N, heads)
        kernels = differentiable(X.device.type)
        xBC = kernels.conv(xBC, self.conv1d.weight, self.conv1d.bias)  # (B, N, inner + 2 state)
        x, B, C = torch.split(xBC, [gate.shape[-1], self.state, self.state], -1)  # (B, N, inner), (B, N, state) each
        y = kernels.gated_norm(self.scan(x, B, C, dt), gate, self.norm.weight, EPS)  # (B, N, inner)
        Y: Tensor = self.out_proj(y)  # (B, N, d)
        return Y


class BareSSD(SSD):
    """out_proj(scan): one head, expansion 1, no gate, no convolution, no norm; the "Mamba-2" of the authors' code."""

    def __init__(self, d: int, state: int) -> None:
        super().__init__(heads=1)
        self.sizes = (d, state, state, 1)
        self.in_proj = nn.Linear(d, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, X: Tensor) -> Tensor:
        Y: Tensor = self.out_proj(self.scan(*self.in_proj(X).split(self.sizes, -1)))  # (B, N, d)
        return Y
