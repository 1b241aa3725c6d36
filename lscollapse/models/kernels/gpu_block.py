"""One Mamba-2 block on any device, from a layer's tensors and the kernels that backends.py resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels import guard
from lscollapse.models.kernels.backends import Kernels
from lscollapse.models.kernels.chunked import gated_norm
from lscollapse.models.kernels.mamba2_block import BlockCall, BlockError, Mamba2Block, Mamba2Shape


class GpuBlock(Mamba2Block):
    """A block that calls each kernel once for the whole batch, on the device of its tensors, and reads nothing from there.

    In this order: norm, in_proj (without the gate's rows where the variant has no gate), convolution, scan, gated norm,
    out_proj, sum. Own kernels go first where they take the shape; what they do not take is the other kernels' or torch's.
    A float64 block uses torch's operations, since the Triton kernels compute in float32: `block.kernels.backend` says
    what runs.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: Mamba2Shape, kernels: Kernels, dtype: torch.dtype = torch.float32
    ) -> None:
        """Tensors are shared, not copied, where they have the dtype asked for, or are to be multiplied as they are stored.

        Raises:
            BlockError: as Mamba2Block; or the tensors are on another kind of device than the kernels.
        """
        self.kernels = kernels.for_dtype(dtype)
        own = self.kernels.own
        self._own = own if own is not None and own.takes_rows(max(shape.hidden, shape.inner)) else None
        self._split = self._own is not None and self.kernels.split and dtype == torch.float32
        super().__init__(tensors, shape, dtype)
        device = self._norm.device.type
        if device != kernels.device:
            raise BlockError(f"the tensors are on {device}, the kernels for {kernels.device}: move the tensors there")
        with guard.launching_at(self._norm):
            self._in_weight, self._out_weight = (self._factor(weight) for weight in (self._in_proj, self._out_proj))
        del self._in_proj, self._out_proj  # of float32 weights the two halves are enough

    def parts(self) -> list[Tensor]:
        halves = [weight.parts() for weight in (self._in_weight, self._out_weight) if self._split]
        return super().parts() + [tensor for parts in halves for tensor in parts]

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        as_stored = self._split and name.endswith("_proj.weight") and tensor.dtype != torch.float64
        return tensor if as_stored else super()._held(name, tensor)

    def _factor(self, weight: Tensor) -> Any:
        """A weight as `_product` takes it."""
        return weight if self._own is None or not self._split else self._own.Weight.of(weight)

    def _compute(self, X: Tensor, what: BlockCall) -> Tensor:
        with guard.launching_at(X):
            return self._computed(X.contiguous(), what)

    def _computed(self, X: Tensor, what: BlockCall) -> Tensor:
        normed = self._rows(X, None, self._norm if what.block_norm else None)  # (B, N, hidden)
        skipped = 0 if what.gating else self.shape.inner  # rows that make z
        bias = None if self._in_bias is None else self._in_bias[skipped:]
        projected = self._product(normed, self._in_weight[skipped:], bias)  # (B, N, [z,] xBC, dt)
        mixed = self._mix(projected, what)  # (B, N, inner)
        O = self._product(mixed, self._out_weight, self._out_bias)  # (B, N, hidden)
        if self._own is not None:
            return torch.as_tensor(self._own.combine(X, O, what.skips, what.scales))
        skips, scales = (factors.to(self.stream)[:, None, None] for factors in (what.skips, what.scales))  # (B, 1, 1)
        O = torch.where(scales == 0, 0.0, O.to(self.stream) * scales)
        return torch.where(skips == 0, O, torch.addcmul(O, X, skips))

    def _product(self, rows: Any, weight: Any, bias: Tensor | None) -> Tensor:
        if self._own is not None and self._split:
            return torch.as_tensor(self._own.product(rows, weight, bias))
        return F.linear(rows, weight, bias)

    def _mix(self, projected: Tensor, what: BlockCall) -> Any:
        """Conv, scan, gate and norm: projected (B, N, [z,] xBC, dt) -> (B, N, inner) for the next product."""
        if self._own is not None and self._own.takes_scan(self.shape, projected.shape[1]):
            conv = self._conv, self._conv_bias
            y = self._own.scan(projected, self.shape, self._A, what.D, self._dt_bias, *conv)  # (B, N, inner)
            gate = projected[..., : self.shape.inner] if what.gating else None
        else:
            gate, xBC, dt = self._parts(projected.to(self.stream), what.gating)
            convolved = self.kernels.conv(xBC, self._conv, self._conv_bias)  # (B, N, conv_dim)
            y = self._scan(self.kernels.scan, convolved, dt, what.D).flatten(2)
        return self._rows(y, gate, self._mixer_norm if what.mixer_norm else None, self.shape.groups)

    def _rows(self, y: Tensor, gate: Tensor | None, weight: Tensor | None, groups: int = 1) -> Any:
        """Gate, then norm, each where there is one; for the next product."""
        if self._own is not None:
            return self._own.rows(y, gate, weight, self.shape.eps, groups, None if self._split else self.dtype)
        if weight is not None:
            norm = gated_norm if gate is None else self.kernels.gated_norm
            return norm(y, gate, weight, self.shape.eps, groups).to(self.dtype)
        return (y if gate is None else y * F.silu(gate)).to(self.dtype)
