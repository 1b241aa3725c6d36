"""S4D (Gu, Goel, Gupta and Ré, 2022): a deep net of diagonal linear state-space layers, with skips and post-norm.

A layer is one LTI system per channel, h' = A h + B x, y = Re(C h) + D x, with a diagonal complex A of conjugate pairs.
Discretised by a zero-order hold with step dt it is the convolution of x with

    K[l] = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l),    B_n = 1.

The defaults are the shape of Figure 4 of arXiv:2410.10609v3: 32 layers, 1.60 M parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lscollapse.core.config import ConfigError, Lambda32, Layers, Section, Width
from lscollapse.core.outside import checked

STEP_RANGE = (1e-3, 1e-1)  # dt is drawn log-uniformly from it
SSM_RATE = 1e-3  # highest learning rate of dt and A


class S4DConfig(Section):
    """Shape of an S4D image classifier; the defaults are the paper's.

    Attributes:
        hidden_size: d, the channels of a layer.
        state_size: N, twice the number of complex pairs of each channel.
        levels: integer values that one colour channel of a pixel can take.
        channels: colour channels of a pixel: 1 grey, 3 red, green and blue.
        data: what it was trained on, as `data.images.read_images` names it.
        lam: strength of the skip; 0 for a net without.
        layernorm: whether the blocks have their norm.
    """

    model_type: Literal["s4d"] = "s4d"
    hidden_size: Width = 128
    state_size: int = Field(default=64, ge=2, le=2**14, multiple_of=2)
    num_hidden_layers: Layers = 32
    channels: int = Field(default=3, ge=1, le=3)
    levels: int = Field(default=256, ge=2, le=2**16)
    num_labels: int = Field(default=10, ge=1, le=2**20)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    data: str = "cifar10"
    lam: Lambda32 = 1.0
    layernorm: bool = True

    @property
    def vocab_size(self) -> int:
        """Pixels there are: a pixel is one id, its channels the digits of the id in base `levels`, red first."""
        return int(self.levels**self.channels)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> S4DConfig:
        """The config of a config.json; ConfigError names what is wrong with it."""
        return checked(cls, values, ConfigError)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()


class S4DMixer(nn.Module):
    """GLU(W GELU(K * u + D u)): the diagonal state space, then a 1x1 convolution d -> 2d and its gate.

    The gate of the GLU multiplies the mixer's output by a function of itself, not of the input; all arms have it.
    """

    def __init__(self, d: int, n_pairs: int, dropout: float) -> None:
        super().__init__()
        low, high = map(math.log, STEP_RANGE)
        self.log_dt = nn.Parameter(torch.rand(d) * (high - low) + low)
        self.C = nn.Parameter(torch.randn(d, n_pairs, 2) * math.sqrt(0.5))  # real and imaginary part
        self.log_A_real = nn.Parameter(torch.full((d, n_pairs), math.log(0.5)))  # S4D-Lin: A_n = -1/2 + i pi n
        self.A_imag = nn.Parameter(math.pi * torch.arange(n_pairs, dtype=torch.float32).repeat(d, 1))
        self.D = nn.Parameter(torch.randn(d))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(d, 2 * d)

    def forward(self, u: Tensor) -> Tensor:  # (B, N, d) -> (B, N, d)
        y = causal_convolution(u, self.kernel(u.shape[1])) + u * self.D  # (B, N, d)
        return F.glu(self.output(self.dropout(F.gelu(y))), dim=-1)  # (B, N, 2 d) -> (B, N, d)

    def kernel(self, length: int) -> Tensor:
        """K[0..length-1] of every channel, (length, d), real; in float32 at least.

        exp(dt A l) with l = i t + j is formed as the product of two factors, so that N sqrt(length) exponentials are
        taken, not N length.
        """
        real = torch.promote_types(self.C.dtype, torch.float32)
        C = torch.view_as_complex(self.C.to(real))  # (d, n)
        A = torch.complex(-self.log_A_real.to(real).exp(), self.A_imag.to(real))
        dtA = A * self.log_dt.to(real).exp()[:, None]  # (d, n)
        t = math.isqrt(length - 1) + 1
        steps = torch.arange(t, device=C.device, dtype=real)
        fine = torch.exp(dtA[:, :, None] * steps)  # (d, n, t)
        coarse = torch.exp(dtA[:, :, None] * (steps * t))  # (d, n, t)
        weight = C * torch.expm1(dtA) / A  # (d, n); expm1, since exp(dt A) - 1 would lose the digits of a small step
        K = 2 * ((weight[:, :, None] * coarse).mT @ fine).real  # (d, t, t)
        return K.flatten(1)[:, :length].T


def causal_convolution(u: Tensor, K: Tensor) -> Tensor:
    """y[l] = sum_j K[j] u[l - j] for each channel: (B, N, d) and (N, d) -> (B, N, d), by FFT without wrapping round."""
    length = u.shape[1]
    real = torch.promote_types(u.dtype, torch.float32)
    rows = u.mT.to(real, memory_format=torch.contiguous_format)  # (B, d, N): transforms of neighbours in memory
    spectrum = torch.fft.rfft(rows, 2 * length) * torch.fft.rfft(K.to(real).T, 2 * length)  # (B, d, N + 1)
    y: Tensor = torch.fft.irfft(spectrum, 2 * length)[..., :length]  # (B, d, N)
    return y.mT.to(u.dtype)


class S4DBlock(nn.Module):
    """norm(lam X + O) with O = dropout(mixer(X))."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        self.mixer = S4DMixer(config.hidden_size, config.state_size // 2, config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size) if config.layernorm else nn.Identity()
        self.lam = config.lam

    def forward(self, X: Tensor) -> Tensor:  # (B, N, d) -> (B, N, d)
        Y: Tensor = self.norm(self.lam * X + self.dropout(self.mixer(X)))
        return Y


class S4D(nn.Module):
    """An image classifier: pixels -> linear encoder -> blocks -> mean over positions -> linear decoder."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(config.channels, config.hidden_size)
        self.layers = nn.ModuleList(S4DBlock(config) for _ in range(config.num_hidden_layers))
        self.decoder = nn.Linear(config.hidden_size, config.num_labels)

    def embed(self, ids: Tensor) -> Tensor:
        """Pixels as ids (B, N), see `S4DConfig.vocab_size` -> the input of the first block (B, N, d)."""
        base = self.config.levels
        places = base ** torch.arange(self.config.channels - 1, -1, -1, device=ids.device)
        values = ids[..., None] // places % base  # (B, N, channels)
        weight = self.encoder.weight
        X: Tensor = self.encoder(values.to(weight.dtype) * (2 / (base - 1)) - 1)  # channels scaled to [-1, 1]
        return X

    def forward(self, ids: Tensor) -> Tensor:
        X = self.embed(ids)
        for layer in self.layers:
            X = layer(X)  # (B, N, d)
        scores: Tensor = self.decoder(X.mean(1))  # (B, labels)
        return scores

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For `training.fit`, as the S4 authors train: dt and A at a rate of at most 1e-3 and without weight decay."""
        ssm = [p for name, p in self.named_parameters() if name.endswith(("log_dt", "log_A_real", "A_imag"))]
        held = set(map(id, ssm))
        rest = [p for p in self.parameters() if id(p) not in held]
        return [
            {"params": rest, "weight_decay": weight_decay},
            {"params": ssm, "weight_decay": 0.0, "highest_lr": SSM_RATE},
        ]
