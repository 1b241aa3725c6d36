"""Mamba-2 (transformers' Mamba2Model): pre-norm block, X + mixer(norm(X)), with a gated RMSNorm before out_proj."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lscollapse.models.adapters.adapter import Adapter, Edit, HookSet
from lscollapse.models.kernels.backends import Kernels, resolve
from lscollapse.models.kernels.cpu_block import Mamba2Shape, NativeBlock, Workers
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.numerics.carried import Carried


class MambaStack(Adapter):
    """What Mamba and Mamba-2 share: pre-norm blocks with a gate, between an embedding and a final norm."""

    has_gate = True
    skip_sites = ("residual", "mixer")
    pre_norm = True

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    def block(self, layer: int) -> Any:
        return self.model.layers[layer]

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embeddings(ids)

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        return self.model.layers[layer](X)

    def before_output(self) -> nn.Module:
        return self.model.norm_f


class Mamba2Adapter(MambaStack):
    norm_sites = ("both", "mixer", "block")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.workers = Workers()

    @property
    def native(self) -> bool:
        return self.config.hidden_act == "silu"

    @property
    def backend(self) -> str:
        return self.kernels.backend if self.native else super().backend

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of block `layer` under their names in Mamba2Block."""
        return self.held(layer)

    def held(self, layer: int) -> dict[str, Tensor]:
        """The same as they are held, in the dtype of the checkpoint."""
        return dict(self.model.layers[layer].named_parameters())

    def native_block(self, layer: int, dtype: torch.dtype) -> NativeBlock:
        return self.make_block(self.tensors(layer), dtype)

    def make_block(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> NativeBlock:
        """A block of these tensors, which are on this adapter's device."""
        if self.device.type == "cpu" and not self.kernels.triton:
            return NativeBlock(tensors, self.shape, dtype, self.workers)
        return GpuBlock(tensors, self.shape, self.kernels, dtype)

    @cached_property
    def kernels(self) -> Kernels:
        """What scan, conv and gated norm run on; `resolve` for the weights' device unless set to another choice."""
        return resolve("auto", self.device)

    @property
    def bounded_mixer(self) -> bool:
        return True

    def mixer_bound(self, layer: int, spectral_bound: Callable[[Tensor], float]) -> float:
        """sqrt(d_inner) ||W_out diag(w_norm)||_2 + ||bias||: an RMS-normed row of d_inner entries has at most norm sqrt(d_inner)."""
        tensors = self.held(layer)
        weight = tensors["mixer.out_proj.weight"].detach().float() * tensors["mixer.norm.weight"].detach().float()
        bias = tensors.get("mixer.out_proj.bias")
        offset = 0.0 if bias is None else float(torch.linalg.vector_norm(bias.detach().double()))
        return math.sqrt(weight.shape[1]) * spectral_bound(weight) + offset

    @property
    def shape(self) -> Mamba2Shape:
        c = self.config
        return Mamba2Shape(
            c.hidden_size, c.num_heads, c.head_dim, c.state_size, c.n_groups, c.conv_kernel, c.layer_norm_epsilon,
            tuple(c.time_step_limit),
        )  # fmt: skip

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if edit.changes_sum:
            residual_skip(block, edit, hooks)
        if edit.changes_mixer:
            mixer_skip(block.mixer, edit, hooks)
        if edit.removes_norm("mixer"):

            def ungated(args: tuple, kwargs: dict, _output: Tensor) -> Tensor:
                y, gate = _norm_arguments(args, kwargs)
                return y * F.silu(gate) if edit.gating else y

            hooks.after(block.mixer.norm, "mixer.norm (removed)", ungated)
        elif not edit.gating:
            hooks.before(block.mixer.norm, "mixer.norm (gate)", lambda args, kwargs: (_in_range(args[0]), None))
        if edit.removes_norm("block"):
            hooks.after(block.norm, "norm (removed)", lambda args, kwargs, output: args[0].to(output.dtype))


def _in_range(y: Tensor) -> Tensor:
    """y (B, N, inner) at a size whose squares float32 holds, as those of a large lambda in the scan are not; for a norm."""
    return Carried(len(y)).fit(y)


def _norm_arguments(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    return args[0], args[1] if len(args) > 1 else kwargs["gate"]


def residual_skip(block: Any, edit: Edit, hooks: HookSet) -> None:
    """lam*X + O around the whole block (skip_site residual)."""
    seen: dict[str, Tensor] = {}

    def keep_input(args: tuple, kwargs: dict) -> None:
        seen["X"] = args[0]

    def keep_output(args: tuple, kwargs: dict, output: Tensor) -> None:
        seen["O"] = output

    def add(args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return edit.add(seen.pop("X").to(output.dtype), seen.pop("O"))

    hooks.before(block, "block input", keep_input)
    hooks.after(block.mixer, "mixer output", keep_output)
    hooks.after(block, "block output", add)


def mixer_skip(mixer: Any, edit: Edit, hooks: HookSet) -> None:
    """lam*V added to the scan output in place of the gate (skip_site mixer): D + lam while the mixer runs."""
    original = mixer.D.data

    def restore(*_: Any) -> None:
        mixer.D.data = original

    def shift(args: tuple, kwargs: dict) -> None:
        mixer.D.data = original + edit.lam()

    hooks.before(mixer, "mixer.D shifted", shift)
    hooks.after(mixer, "mixer.D restored", restore)
    hooks.on_exit(restore)
