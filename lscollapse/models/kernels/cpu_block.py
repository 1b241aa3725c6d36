"""One Mamba-2 block on CPU, from a layer's tensors, near the speed of its two matrix products.

The same function as transformers' Mamba2Block edited by `models/mamba2.py`. What a variant does not use is not
computed: with the gate off, the z half of in_proj is never multiplied. Between the two products each thread works on
one excerpt at a time, in buffers that are reused, and its result overwrites its own projection.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


class Workers:
    """Threads that each work on one excerpt at a time, in scratch buffers of their own.

    A thread runs its torch operations alone: nothing waits for another core inside an excerpt, which on a busy machine
    costs far more than the work, and results do not depend on the number of threads.
    """

    def __init__(self) -> None:
        self.workspace = ssd.Workspace()  # of the calling thread
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, initializer=self._start)
        self._local = threading.local()

    def _start(self) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self._local.workspace = ssd.Workspace()

    def each(self, function: Callable[..., None], *columns: Iterable) -> None:
        """function(workspace, *row) for every row of the columns, in any order."""
        for _ in self._pool.map(lambda *row: function(self._local.workspace, *row), *columns):
            pass
        torch.set_num_threads(self._threads)  # threads of others would otherwise start with the setting above


class NativeBlock:
    """A Mamba-2 block as a function X, (B, N, hidden) -> Y, (B, N, hidden).

    float32 and float64 compute everything in that dtype. bfloat16 keeps the weights of in_proj and out_proj in bfloat16
    and rounds what goes into and comes out of these two products; the scan, the norms and the residual stream are
    float32. An excerpt's result does not depend on the others in the batch, up to the rounding of the two products.
    Give all blocks of a model the same workers: they then share threads and scratch buffers.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: Mamba2Shape,
        dtype: torch.dtype = torch.float32,
        workers: Workers | None = None,
    ) -> None:
        """Tensors are shared, not copied, where they have the dtype asked for.

        Raises:
            BlockError: a tensor is missing, not known, or of another shape; or a dtype not in DTYPES.
        """
        _check_tensors(tensors, shape)
        if dtype not in DTYPES:
            raise BlockError(f"dtype {dtype} is not supported: choose one of {', '.join(map(str, DTYPES))}")
        self.shape, self.dtype = shape, dtype
        self.stream = ssd.compute_dtype(dtype)
        self.workers = workers or Workers()
        weights = {name: t.to(dtype if "_proj" in name else self.stream) for name, t in tensors.items()}
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
        lam: float = 1.0,
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
            lam: strength of the skip.
            gating: False takes the gate, silu(z), out of the mixer.
            layernorm: False takes out the norms that norm_site names.
            skip_site: `residual`: Y = lam*X + O, exactly O for lam = 0. `mixer`: lam times the scan's input is added to
                its output (D + lam in the place of D), and Y = X + O.
            norm_site: `mixer` (the norm before out_proj), `block` (the pre-norm) or `both`.
            skip, o_scale: where X is carried scaled (carried.py), Y = skip*X + o_scale*O instead; one number or one an
                excerpt (B, 1, 1).

        Returns:
            Y, (B, N, hidden), a new tensor, float32 (float64 for a float64 block).

        Raises:
            BlockError: an unknown site, or an X of another width.
        """
        self._check_call(X, skip_site, norm_site)
        batch, N, _ = X.shape
        keep_block = layernorm or norm_site == "mixer"
        keep_mixer = layernorm or norm_site == "block"
        X = X.to(self.stream)
        D = self._D + lam if skip_site == "mixer" else self._D
        if skip is None:
            skip = 1.0 if skip_site == "mixer" else lam

        def enter(workspace: ssd.Workspace, X: Tensor, out: Tensor) -> None:
            if keep_block:
                rms_norm(X, self._norm, self.shape.eps, out, workspace)
            else:
                out.copy_(X)

        def mix(workspace: ssd.Workspace, projected: Tensor, out: Tensor) -> None:
            self._mix(workspace, projected, D, gating, keep_mixer, out)

        def add(_: ssd.Workspace, X: Tensor, O: Tensor, skip: float, scale: float, out: Tensor) -> None:
            torch.mul(O, scale, out=out)
            if skip:
                out.add_(X, alpha=skip)

        take = self.workers.workspace.take
        normed = take("normed", X.shape, self.dtype)
        self.workers.each(enter, X, normed)
        skipped = 0 if gating else self.shape.inner  # rows of in_proj that make z
        projected = take("projected", (batch, N, len(self._in_proj) - skipped), self.dtype)
        bias = None if self._in_bias is None else self._in_bias[skipped:]
        _linear(normed.flatten(0, 1), self._in_proj[skipped:], bias, projected.flatten(0, 1))

        mixed = projected[..., : self.shape.inner]
        self.workers.each(mix, projected, mixed)
        O = normed  # its buffer is free again
        _linear(mixed.flatten(0, 1), self._out_proj, self._out_bias, O.flatten(0, 1))

        Y = torch.empty_like(X)
        skips, scales = (per_excerpt(factor, batch, self.stream).tolist() for factor in (skip, o_scale))
        self.workers.each(add, X, O, skips, scales, Y)
        return Y

    def _mix(
        self, workspace: ssd.Workspace, projected: Tensor, D: Tensor, gating: bool, keep_norm: bool, out: Tensor
    ) -> None:
        """Conv, scan, gate and norm of one excerpt: projected (N, [z,] xBC, dt) -> out (N, inner), which may alias."""
        s, N = self.shape, len(projected)
        if projected.dtype != self.stream:
            projected = workspace.take("widened", projected.shape, self.stream).copy_(projected)
        gate = projected[:, : s.inner] if gating else None
        xBC, dt = projected[:, -s.conv_dim - s.heads : -s.heads], projected[:, -s.heads :]
        convolved = workspace.take("convolved", xBC.shape, self.stream)
        ssd.conv(xBC[None], self._conv, self._conv_bias, out=convolved[None])
        x, B, C = convolved[None].split([s.inner, s.groups * s.state, s.groups * s.state], dim=-1)
        y = workspace.take("y", (N, s.inner), self.stream)
        ssd.scan(
            x.unflatten(-1, (s.heads, s.head_dim)),
            dt[None],
            self._A,
            B.unflatten(-1, (s.groups, s.state)),
            C.unflatten(-1, (s.groups, s.state)),
            D,
            self._dt_bias,
            dt_limit=s.dt_limit,
            out=y.view(1, N, s.heads, s.head_dim),
            workspace=workspace,
        )
        if gate is not None:
            y.mul_(F.silu(gate, inplace=True))
        if keep_norm:
            rms_norm(y, self._mixer_norm, s.eps, out, workspace, s.groups)
        else:
            out.copy_(y)

    def _check_call(self, X: Tensor, skip_site: str, norm_site: str) -> None:
        if X.ndim != 3 or X.shape[-1] != self.shape.hidden:
            raise BlockError(f"X has shape {tuple(X.shape)}, expected (B, N, {self.shape.hidden})")
        if skip_site not in SKIP_SITES:
            raise BlockError(f"skip_site {skip_site!r} does not exist: choose one of {', '.join(SKIP_SITES)}")
        if norm_site not in NORM_SITES:
            raise BlockError(f"norm_site {norm_site!r} does not exist: choose one of {', '.join(NORM_SITES)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, workspace: ssd.Workspace, groups: int = 1) -> None:
    """out = weight * x / rms(x), x (N, width), the rms over each of `groups` equal parts of a row; x and out may alias.

    Deviation: where the squares of a finite x overflow, the result is still right (transformers' would be zero).
    """
    parts = x.unflatten(-1, (groups, -1))  # (N, groups, width / groups)
    rms = torch.linalg.vector_norm(parts, dim=-1, keepdim=True) / math.sqrt(parts.shape[-1])
    if torch.isfinite(rms).all():
        rms = rms.square_().add_(eps).sqrt_()
    else:
        largest = parts.abs().amax(-1, keepdim=True)
        rms = (parts / largest).square_().mean(-1, keepdim=True).add_(eps / largest / largest).sqrt_() * largest
    unit = torch.div(parts, rms, out=workspace.take("unit", parts.shape, x.dtype))
    torch.mul(unit.flatten(1), weight, out=out)


def per_excerpt(factor: float | Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """One number an excerpt, (B,), as `dtype` holds it: infinite where it is too large."""
    return torch.as_tensor(factor, dtype=torch.float64).to(dtype).flatten().expand(batch)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


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
