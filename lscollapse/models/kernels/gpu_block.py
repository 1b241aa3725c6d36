"""One Mamba-2 block on any device, from a layer's tensors and the kernels that backends.py resolved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels.backends import Kernels, gated_norm
from lscollapse.models.kernels.mamba2_block import BlockCall, BlockError, Mamba2Block, Mamba2Shape


class GpuBlock(Mamba2Block):
    """A block that calls each kernel once for the whole batch, on the device of its tensors.

    In this order: in_proj (without the gate's rows where the variant has no gate), convolution, scan, gated norm,
    out_proj. A float64 block uses torch's operations, since the Triton kernels compute in float32:
    `block.kernels.backend` says what runs.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: Mamba2Shape, kernels: Kernels, dtype: torch.dtype = torch.float32
    ) -> None:
        """Tensors are shared, not copied, where they have the dtype asked for.

        Raises:
            BlockError: as Mamba2Block; or the tensors are on another kind of device than the kernels.
        """
        super().__init__(tensors, shape, dtype)
        self.kernels = kernels.for_dtype(dtype)
        device = self._norm.device.type
        if device != kernels.device:
            raise BlockError(f"the tensors are on {device}, the kernels for {kernels.device}: move the tensors there")

    def _compute(self, X: Tensor, what: BlockCall) -> Tensor:
        normed = gated_norm(X, None, self._norm, self.shape.eps) if what.block_norm else X  # (B, N, hidden)
        projected = F.linear(normed.to(self.dtype), *self._in_rows(what.gating)).to(self.stream)  # (B, N, [z,] xBC, dt)
        mixed = self._mix(projected, what)  # (B, N, inner)
        O = F.linear(mixed.to(self.dtype), self._out_proj, self._out_bias).to(self.stream)  # (B, N, hidden)
        skips, scales = (factors.to(X.device)[:, None, None] for factors in (what.skips, what.scales))  # (B, 1, 1)
        O *= scales
        return O.addcmul_(X, skips) if what.skips.any() else O

    def _mix(self, projected: Tensor, what: BlockCall) -> Tensor:
        """Conv, scan, gate and norm: projected (B, N, [z,] xBC, dt) -> (B, N, inner)."""
        gate, xBC, dt = self._parts(projected, what.gating)
        convolved = self.kernels.conv(xBC, self._conv, self._conv_bias)  # (B, N, conv_dim)
        y = self._scan(self.kernels.scan, convolved, dt, what.D).flatten(2)  # (B, N, inner)
        if what.mixer_norm:
            return self.kernels.gated_norm(y, gate, self._mixer_norm, self.shape.eps, self.shape.groups)
        return y if gate is None else y * F.silu(gate)
