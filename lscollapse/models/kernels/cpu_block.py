"""One Mamba-2 block on CPU, from a layer's tensors, near the speed of its two matrix products.

The same function as transformers' Mamba2Block edited by `adapters/mamba2.py`. Between the two products each thread
works on one excerpt at a time, in buffers that are reused, and its result overwrites its own projection: in C++
(native.py) where that can be had, else in torch operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels import ssd
from lscollapse.models.kernels.mamba2_block import BlockCall, Mamba2Block, Mamba2Shape
from lscollapse.models.kernels.native import Mixer, Native
from lscollapse.workers import Workers, Workspace

WIDENED = 512  # rows of a bfloat16 weight that are in float32 at a time: a few MB, which the cache holds


class CpuBlock(Mamba2Block):
    """A block whose excerpts are shared out among threads.

    An excerpt's result does not depend on the others in the batch, up to the rounding of the two products. Give all
    blocks of a model the same workers: they then share threads and scratch buffers.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: Mamba2Shape,
        dtype: torch.dtype = torch.float32,
        workers: Workers | None = None,
        native: Native | None = None,
        widens: bool = False,
    ) -> None:
        """Tensors and errors as for Mamba2Block.

        Args:
            workers: threads and scratch buffers, to share them; its own by default.
            native: the C++ functions; None, and any block in float64, takes torch operations.
            widens: bfloat16 products are those of the same numbers in float32, rounded to bfloat16: for CPUs that have
                no instructions for bfloat16, or slow ones, where torch's take up to many times as long.
        """
        super().__init__(tensors, shape, dtype)
        self.workers, self.native = workers or Workers(), None if dtype == torch.float64 else native
        self._product = self._widened if widens and dtype == torch.bfloat16 else _linear

    def _compute(self, X: Tensor, what: BlockCall) -> Tensor:
        def mix(workspace: Workspace, projected: Tensor, D: Tensor, out: Tensor) -> None:
            self._mix(workspace, projected, what._replace(D=D), out)

        X, norm = X.contiguous(), self._norm if what.block_norm else None
        take, each = self.workers.workspace.take, self.workers.each
        normed = take("normed", X.shape, self.dtype)  # (B, N, hidden)
        each(functools.partial(self._enter, norm), X, normed)
        weight, bias = self._in_rows(what.gating)
        projected = take("projected", (*X.shape[:2], len(weight)), self.dtype)  # (B, N, [z,] xBC, dt)
        self._product(normed.flatten(0, 1), weight, bias, projected.flatten(0, 1))

        mixed = projected[..., : self.shape.inner]  # (B, N, inner)
        each(mix, projected, what.D.expand(len(X), -1), mixed)
        O = normed  # its buffer is free again
        self._product(mixed.flatten(0, 1), self._out_proj, self._out_bias, O.flatten(0, 1))  # (B, N, hidden)

        Y = torch.empty_like(X)
        skips, scales = (
            factors.to(self.stream).tolist() for factors in (what.skips, what.scales)
        )  # infinite where too large
        each(self._add, X, O, skips, scales, Y)
        return Y

    def _enter(self, norm: Tensor | None, workspace: Workspace, X: Tensor, out: Tensor) -> None:
        """X (N, hidden), normed where there is a norm (hidden,), as the first product reads it."""
        if self.native is not None:
            self.native.enter(X, norm, self.shape.eps, out)
        elif norm is not None:
            rms_norm(X, norm, self.shape.eps, out, workspace)
        else:
            out.copy_(X)

    def _mix(self, workspace: Workspace, projected: Tensor, what: BlockCall, out: Tensor) -> None:
        """Conv, scan, gate and norm of one excerpt: projected (N, [z,] xBC, dt) -> out (N, inner), which may alias."""
        s, N = self.shape, len(projected)
        if self.native is not None:
            held = self._conv.T, self._conv_bias, self._A, self._dt_bias, self._mixer_norm
            self.native.mix(Mixer(s, what.gating, what.mixer_norm, *held), projected, what.D, out, workspace)
            return
        if projected.dtype != self.stream:
            projected = workspace.take("widened", projected.shape, self.stream).copy_(projected)
        gate, xBC, dt = self._parts(projected, what.gating)
        convolved = workspace.take("convolved", xBC.shape, self.stream)
        ssd.conv(xBC[None], self._conv, self._conv_bias, out=convolved[None])
        y = workspace.take("y", (N, s.inner), self.stream)
        by_head = y.view(1, N, s.heads, s.head_dim)
        self._scan(ssd.scan, convolved[None], dt[None], what.D, out=by_head, workspace=workspace)
        if gate is not None:
            y.mul_(F.silu(gate, inplace=True))
        if what.mixer_norm:
            rms_norm(y, self._mixer_norm, s.eps, out, workspace, s.groups)
        else:
            out.copy_(y)

    def _add(self, _: Workspace, X: Tensor, O: Tensor, skip: float, scale: float, out: Tensor) -> None:
        """out = skip*X + scale*O of one excerpt, (N, hidden); a factor of 0 leaves X or O out, whatever it holds."""
        if self.native is not None:
            self.native.add(X, O, skip, scale, out)
            return
        if scale:
            torch.mul(O, scale, out=out)
        else:
            out.zero_()
        if skip:
            out.add_(X, alpha=skip)

    def _widened(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """`_linear` of bfloat16 in float32; only what is multiplied at the moment is widened."""
        take = self.workers.workspace.take
        wide = take("wide factor", x.shape, torch.float32).copy_(x)  # (rows, inner)
        for start in range(0, len(weight), WIDENED):
            some = weight[start : start + WIDENED]
            factor = take("wide weight", some.shape, torch.float32).copy_(some)
            result = take("wide product", (len(x), len(some)), torch.float32)
            _linear(wide, factor, None if bias is None else bias[start : start + WIDENED].float(), result)
            out[:, start : start + WIDENED].copy_(result)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, workspace: Workspace, groups: int = 1) -> None:
    """out = weight * x / rms(x), x (N, width), the rms over each of `groups` equal parts of a row; x and out may alias.

    Deviation: where the squares of a finite x overflow, the result is still right (transformers' would be zero).
    """
    parts = torch.unflatten(x, -1, (groups, -1))  # (N, groups, width / groups)
    rms = torch.linalg.vector_norm(parts, dim=-1, keepdim=True) / math.sqrt(parts.shape[-1])
    if torch.isfinite(rms).all():
        rms = rms.square_().add_(eps).sqrt_()
    else:  # the same over the largest entry, whose square is 1
        largest = parts.abs().amax(-1, keepdim=True)
        rms = (parts / largest).square_().mean(-1, keepdim=True).add_(eps / largest / largest).sqrt_() * largest
    unit = torch.div(parts, rms, out=workspace.take("unit", parts.shape, x.dtype))
    torch.mul(unit.flatten(1), weight, out=out)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)
