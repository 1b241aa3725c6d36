"""One Mamba-2 block on any device, from a layer's tensors and the kernels that `lscollapse.models.kernels.backends` resolved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels.backends import Kernels, gated_norm
from lscollapse.models.kernels.cpu_block import BlockError, Mamba2Shape, NativeBlock, per_excerpt


class GpuBlock(NativeBlock):
    """A Mamba-2 block as a function X, (B, N, hidden) -> Y, (B, N, hidden), each kernel once for the whole batch.

    The same function, dtypes and variants as NativeBlock, on the device of its tensors: in_proj (without the gate's rows
    where the variant has no gate), convolution, scan, gated norm, out_proj. A float64 block uses torch's operations,
    since the Triton kernels compute in float32: `block.kernels.backend` says what runs.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: Mamba2Shape, kernels: Kernels, dtype: torch.dtype = torch.float32
    ) -> None:
        """Tensors are shared, not copied, where they have the dtype asked for.

        Raises:
            BlockError: as NativeBlock; or the tensors are on another kind of device than the kernels.
        """
        super().__init__(tensors, shape, dtype)
        self.kernels = kernels.for_dtype(dtype)
        found = self._norm.device.type
        if found != kernels.device:
            raise BlockError(f"the tensors are on {found}, the kernels for {kernels.device}: move the tensors there")

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
        """The block of one variant; arguments, result and errors as in NativeBlock."""
        self._check_call(X, skip_site, norm_site)
        X = X.to(self.stream)
        on_mixer = skip_site == "mixer"
        normed = gated_norm(X, None, self._norm, self.shape.eps) if layernorm or norm_site == "mixer" else X
        skipped = 0 if gating else self.shape.inner  # rows of in_proj that make z
        bias = None if self._in_bias is None else self._in_bias[skipped:]
        projected = F.linear(normed.to(self.dtype), self._in_proj[skipped:], bias).to(self.stream)
        mixed = self._mix_batch(
            projected, self._D + lam if on_mixer else self._D, gating, layernorm or norm_site == "block"
        )
        if skip is None:
            skip = 1.0 if on_mixer else lam
        skips, scales = (per_excerpt(factor, len(X), self.stream) for factor in (skip, o_scale))
        O = F.linear(mixed.to(self.dtype), self._out_proj, self._out_bias).to(self.stream)
        O *= scales.to(X.device)[:, None, None]
        return O.addcmul_(X, skips.to(X.device)[:, None, None]) if skips.any() else O

    def _mix_batch(self, projected: Tensor, D: Tensor, gating: bool, keep_norm: bool) -> Tensor:
        """Conv, scan, gate and norm: projected (B, N, [z,] xBC, dt) -> (B, N, inner)."""
        s = self.shape
        gate = projected[..., : s.inner] if gating else None
        xBC, dt = projected[..., -s.conv_dim - s.heads : -s.heads], projected[..., -s.heads :]
        convolved = self.kernels.conv(xBC, self._conv, self._conv_bias)
        x, B, C = convolved.split([s.inner, s.groups * s.state, s.groups * s.state], dim=-1)
        y = self.kernels.scan(
            x.unflatten(-1, (s.heads, s.head_dim)),
            dt,
            self._A,
            B.unflatten(-1, (s.groups, s.state)),
            C.unflatten(-1, (s.groups, s.state)),
            D,
            self._dt_bias,
            dt_limit=s.dt_limit,
        ).flatten(2)
        if keep_norm:
            return self.kernels.gated_norm(y, gate, self._mixer_norm, s.eps, s.groups)
        return y if gate is None else y * F.silu(gate)
