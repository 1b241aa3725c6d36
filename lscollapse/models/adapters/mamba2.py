"""Mamba-2 (transformers' Mamba2Model): pre-norm block, X + mixer(norm(X)), with a gated RMSNorm before out_proj."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lscollapse.models.adapters.adapter import Adapter, narrowest
from lscollapse.models.adapters.edit import Args, Edit, HookSet, Kwargs
from lscollapse.models.checkpoints.held import HeldMamba2, with_modules
from lscollapse.models.checkpoints.mamba2_config import block_shape
from lscollapse.models.checkpoints.refusals import token_embedding
from lscollapse.models.kernels.backends import Kernels, resolve_kernels
from lscollapse.models.kernels.cpu_block import CpuBlock
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Block, Mamba2Shape
from lscollapse.models.numerics.carried import Carried
from lscollapse.workers import Workers


class MambaStack(Adapter):
    """What Mamba and Mamba-2 share: pre-norm blocks with a gate, between an embedding and a final norm."""

    final_norm = "norm_f"
    has_gate = True
    skip_sites = ("residual", "mixer")
    pre_norm = True


class Mamba2Adapter(MambaStack):
    """Blocks with the usual activation are computed by the package itself (kernels/), in any dtype, others by their modules.

    Attributes:
        held_as: the model as it is held: by itself, or its parameters without transformers' modules, which are there from
            then on that somebody asks for `model`. Where `computes_in` is set the weights may be of 16 bits, which the
            package's own blocks convert; the modules do not, so `model` is in that dtype.
        computes_in: the dtype that counts as the model's, None for that of its weights.
    """

    norm_sites = ("both", "mixer", "block")
    bounded_mixer = True
    computes_in: torch.dtype | None = None

    def __init__(self, model: Any) -> None:
        self.held_as, self.config = model, model.config
        self.workers = Workers()

    @property
    def model(self) -> Any:
        if isinstance(self.held_as, HeldMamba2):
            built = with_modules(self.held_as)
            self.whole = built if self.whole is self.held_as else self.whole
            self.held_as, self.config = built, built.config
        if self.computes_in is not None:
            self.held_as.to(self.computes_in)  # which does nothing from the second time on
        return self.held_as

    @property
    def n_layers(self) -> int:
        return len(self.held_as.layers)

    @property
    def embedding(self) -> tuple[str, Tensor] | None:
        return token_embedding(self.held_as)

    def before_output(self) -> nn.Module | None:
        norm: nn.Module = self.model.norm_f
        return norm

    @property
    def dtype(self) -> torch.dtype:
        return self.computes_in or narrowest(self.held_as)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.held_as.embeddings.weight.device
        return device

    def embed(self, ids: Tensor) -> Tensor:
        X: Tensor = self.held_as.embeddings(ids)  # (B, N, d)
        return X if self.computes_in is None else X.to(self.computes_in)

    @property
    def has_own_blocks(self) -> bool:
        return bool(self.config.hidden_act == "silu")

    def backend(self, dtype: torch.dtype) -> str:
        return self.kernels.for_dtype(dtype).backend if self.has_own_blocks else super().backend(dtype)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of block `layer` under transformers' names in it, which hold the numbers that the model computes with."""
        return self.held(layer)

    def held(self, layer: int) -> dict[str, Tensor]:
        """The same in the dtype that they are held in."""
        return dict(self.held_as.layers[layer].named_parameters())

    def own_block(self, layer: int, dtype: torch.dtype) -> Mamba2Block:
        return self.make_block(self.tensors(layer), dtype)

    def make_block(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> Mamba2Block:
        """A block of these tensors, which are on this adapter's device."""
        if self.device.type == "cpu" and not self.kernels.triton:
            return CpuBlock(tensors, self.shape, dtype, self.workers, self.kernels.native, self.kernels.widens)
        return GpuBlock(tensors, self.shape, self.kernels, dtype)

    @cached_property
    def kernels(self) -> Kernels:
        """What scan, convolution and gated norm run on: what `auto` means on the weights' device, unless set to another choice."""
        return resolve_kernels("auto", self.device)

    def mixer_bound(self, layer: int, spectral_bound: Callable[[Tensor], float]) -> float:
        """sqrt(d_inner) ||W_out diag(w_norm)||_2 + ||bias||: an RMS-normed row has norm sqrt(d_inner) at most."""
        tensors = self.held(layer)
        weight = tensors["mixer.out_proj.weight"].detach().float() * tensors["mixer.norm.weight"].detach().float()
        bias = tensors.get("mixer.out_proj.bias")
        offset = 0.0 if bias is None else float(torch.linalg.vector_norm(bias.detach().double()))
        return math.sqrt(weight.shape[1]) * spectral_bound(weight) + offset

    @property
    def shape(self) -> Mamba2Shape:
        return block_shape(self.config)

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if edit.changes_sum:
            residual_skip(block, edit, hooks)
        if edit.changes_mixer:
            mixer_skip(block.mixer, edit, hooks)
        if edit.removes_norm("mixer"):

            def ungated(args: Args, kwargs: Kwargs, _output: Tensor) -> Tensor:
                y, gate = _norm_arguments(args, kwargs)
                return y * F.silu(gate) if edit.gating else y

            hooks.after(block.mixer.norm, "mixer.norm (removed)", ungated)
        elif not edit.gating:
            hooks.before(block.mixer.norm, "mixer.norm (gate)", lambda args, kwargs: (_in_range(args[0]), None))
        if edit.removes_norm("block"):
            hooks.after(block.norm, "norm (removed)", lambda args, kwargs, output: args[0].to(output.dtype))


def _in_range(y: Tensor) -> Tensor:
    """y (B, N, inner) at a size whose squares float32 holds, for a norm: a large lambda in the scan makes it larger."""
    return Carried(y).fit(y)


def _norm_arguments(args: Args, kwargs: Kwargs) -> tuple[Tensor, Tensor]:
    return args[0], args[1] if len(args) > 1 else kwargs["gate"]


def residual_skip(block: Any, edit: Edit, hooks: HookSet) -> None:
    """lam*X + O around the whole block (skip_site residual)."""
    seen: dict[str, Tensor] = {}

    def add(args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        return edit.add(seen.pop("X").to(output.dtype), seen.pop("O"))

    hooks.keep(block, 0, "block input", seen, "X")
    hooks.keep(block.mixer, None, "mixer output", seen, "O")
    hooks.after(block, "block output", add)


def mixer_skip(mixer: Any, edit: Edit, hooks: HookSet) -> None:
    """lam*V added to the scan output in place of the gate (skip_site mixer): D + lam while the mixer runs."""
    original = mixer.D.data

    def restore(*_: Any) -> None:
        mixer.D.data = original

    def shift(args: Args, kwargs: Kwargs) -> None:
        mixer.D.data = original + edit.lam()

    hooks.before(mixer, "mixer.D shifted", shift)
    hooks.after(mixer, "mixer.D restored", restore)
    hooks.on_exit(restore)
