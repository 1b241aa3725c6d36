"""What a Mamba-2 block is, whatever computes it: its sizes, its tensors, and what a variant changes of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lscollapse.models.kernels import ssd

SKIP_SITES = ("residual", "mixer")
NORM_SITES = ("both", "mixer", "block")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class BlockError(ValueError):
    """The tensors are not those of a Mamba-2 block of this shape, or the variant asked for does not exist."""


@dataclass(frozen=True)
class Mamba2Shape:
    """The sizes of a block: `inner` channels go through the scan, `conv_dim` through the convolution."""

    hidden: int
    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv_kernel: int = 4
    eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name (transformers' layout, within a layer) -> shape of every tensor that a block must have."""
        return {
            "norm.weight": (self.hidden,),
            "mixer.in_proj.weight": (self.inner + self.conv_dim + self.heads, self.hidden),
            "mixer.conv1d.weight": (self.conv_dim, 1, self.conv_kernel),
            "mixer.dt_bias": (self.heads,),
            "mixer.A_log": (self.heads,),
            "mixer.D": (self.heads,),
            "mixer.norm.weight": (self.inner,),
            "mixer.out_proj.weight": (self.hidden, self.inner),
        }

    def optional_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the biases, each of which a block may lack."""
        return {
            "mixer.conv1d.bias": (self.conv_dim,),
            "mixer.in_proj.bias": (self.inner + self.conv_dim + self.heads,),
            "mixer.out_proj.bias": (self.hidden,),
        }


class BlockCall(NamedTuple):
    """What one call computes: D of the scan, whether gate and norms are there, Y = skips*X + scales*O.

    D is (heads,), or (B, heads) where it is not the same for all excerpts; skips and scales (B,), float64, on the device of X.
    """

    D: Tensor
    gating: bool
    block_norm: bool
    mixer_norm: bool
    skips: Tensor
    scales: Tensor


class Mamba2Block(ABC):
    """A Mamba-2 block as a function X, (B, N, hidden) -> Y, (B, N, hidden).

    float32 and float64 compute everything in that dtype. bfloat16 keeps the weights of in_proj and out_proj in bfloat16
    and rounds what goes into and comes out of these two products; the scan, the norms and the residual stream are
    float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shape: Mamba2Shape, dtype: torch.dtype = torch.float32) -> None:
        """Tensors are shared, not copied, where they have the dtype asked for.

        Raises:
            BlockError: a tensor is missing, not known, or of another shape; or a dtype not in DTYPES.
        """
        _check_tensors(tensors, shape)
        if dtype not in DTYPES:
            raise BlockError(f"dtype {dtype} is not supported: choose one of {', '.join(map(str, DTYPES))}")
        self.shape, self.dtype = shape, dtype
        self.stream = ssd.compute_dtype(dtype)
        weights = {name: self._held(name, tensor) for name, tensor in tensors.items()}
        self._norm, self._mixer_norm = weights["norm.weight"], weights["mixer.norm.weight"]
        self._in_proj, self._in_bias = weights["mixer.in_proj.weight"], weights.get("mixer.in_proj.bias")
        self._out_proj, self._out_bias = weights["mixer.out_proj.weight"], weights.get("mixer.out_proj.bias")
        self._conv = weights["mixer.conv1d.weight"].flatten(1).T.contiguous().T  # (conv_dim, K), taps contiguous
        self._conv_bias = weights.get("mixer.conv1d.bias")
        self._A = -weights["mixer.A_log"].exp()
        self._D, self._dt_bias = weights["mixer.D"], weights["mixer.dt_bias"]

    @torch.no_grad()
    def __call__(
        self,
        X: Tensor,
        *,
        lam: float | Tensor = 1.0,
        gating: bool = True,
        layernorm: bool = True,
        skip_site: str = "residual",
        norm_site: str = "both",
        skip: float | Tensor | None = None,
        o_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The block of one variant, with O = mixer(norm(X)).

        Args:
            X: (B, N, hidden).
            lam: strength of the skip; one number or one an excerpt (B,).
            gating: False takes the gate, silu(z), out of the mixer.
            layernorm: False takes out the norms that norm_site names.
            skip_site: `residual`: Y = lam*X + O, exactly O for lam = 0. `mixer`: lam times the scan's input is added to
                its output (D + lam in the place of D), and Y = X + O.
            norm_site: `mixer` (the norm before out_proj), `block` (the pre-norm) or `both`.
            skip, o_scale: where X is carried scaled (carried.py), Y = skip*X + o_scale*O instead; one number or one an
                excerpt (B, 1, 1). A factor of 0 leaves X or O out, whatever it holds.

        Returns:
            Y, (B, N, hidden), a new tensor, float32 (float64 for a float64 block).

        Raises:
            BlockError: an unknown site, or an X of another width.
        """
        self._check_call(X, skip_site, norm_site)
        on_mixer = skip_site == "mixer"
        if skip is None:
            skip = 1.0 if on_mixer else lam
        D = self._D
        if on_mixer:
            D = D + (lam.to(D)[:, None] if isinstance(lam, Tensor) else lam)
        skips, scales = (_per_excerpt(factor, X) for factor in (skip, o_scale))
        norms = layernorm or norm_site == "mixer", layernorm or norm_site == "block"
        return self._compute(X.to(self.stream), BlockCall(D, gating, *norms, skips, scales))

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as the block keeps it: what the two products read in the block's dtype, all else in the stream's."""
        return tensor.to(self.dtype if "_proj" in name else self.stream)

    def parts(self) -> list[Tensor]:
        """Every tensor that the block holds, for what must know whose memory it is."""
        return [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor)]

    @abstractmethod
    def _compute(self, X: Tensor, what: BlockCall) -> Tensor:
        """X (B, N, hidden) in the dtype of the stream -> Y."""

    def _in_rows(self, gating: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of in_proj, without the rows that make z where the gate is off: they are never multiplied."""
        skipped = 0 if gating else self.shape.inner
        return self._in_proj[skipped:], None if self._in_bias is None else self._in_bias[skipped:]

    def _parts(self, projected: Tensor, gating: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """projected (..., [z,] xBC, dt) -> the gate z, (..., inner), xBC (..., conv_dim), dt (..., heads)."""
        s = self.shape
        gate = projected[..., : s.inner] if gating else None
        return gate, projected[..., -s.conv_dim - s.heads : -s.heads], projected[..., -s.heads :]

    def _scan(
        self, scan: Callable[..., Tensor], convolved: Tensor, dt: Tensor, D: Tensor, **options: Any
    ) -> Tensor:  # (B, N, conv_dim), (B, N, heads) -> (B, N, heads, head_dim)
        s = self.shape
        x, B, C = torch.split(convolved, [s.inner, s.groups * s.state, s.groups * s.state], dim=-1)
        x = torch.unflatten(x, -1, (s.heads, s.head_dim))
        B, C = (torch.unflatten(t, -1, (s.groups, s.state)) for t in (B, C))  # (B, N, groups, state)
        return scan(x, dt, self._A, B, C, D, self._dt_bias, dt_limit=s.dt_limit, **options)

    def _check_call(self, X: Tensor, skip_site: str, norm_site: str) -> None:
        if X.ndim != 3 or X.shape[-1] != self.shape.hidden:
            raise BlockError(f"X has shape {tuple(X.shape)}, expected (B, N, {self.shape.hidden})")
        for name, site, known in (("skip_site", skip_site, SKIP_SITES), ("norm_site", norm_site, NORM_SITES)):
            if site not in known:
                raise BlockError(f"{name} {site!r} does not exist: choose one of {', '.join(known)}")


def _per_excerpt(factor: float | Tensor, X: Tensor) -> Tensor:
    """One number an excerpt, (B,), where X is."""
    if not isinstance(factor, Tensor):
        return torch.full((len(X),), factor, dtype=torch.float64, device=X.device)
    return factor.to(X.device, torch.float64).flatten()


def _check_tensors(tensors: Mapping[str, Tensor], shape: Mamba2Shape) -> None:
    required = shape.tensors()
    known = required | shape.optional_tensors()
    for name in required:
        if name not in tensors:
            raise BlockError(f"the block has no tensor {name!r}: expected {', '.join(required)}")
    for name, tensor in tensors.items():
        if name not in known:
            raise BlockError(f"unknown tensor {name!r} in a Mamba-2 block: known are {', '.join(known)}")
        if tuple(tensor.shape) != known[name]:
            raise BlockError(f"{name} has shape {tuple(tensor.shape)}, expected {known[name]} for {shape}")
