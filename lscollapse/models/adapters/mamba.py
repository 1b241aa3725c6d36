"""Mamba (transformers' MambaModel): pre-norm block, X + mixer(norm(X)); the scan output is multiplied by silu(gate)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lscollapse.models.adapters.edit import Edit, HookSet
from lscollapse.models.adapters.mamba2 import MambaStack, mixer_skip, residual_skip

OPEN = 1.2784645427610738  # silu(OPEN) = 1: a gate that changes nothing


class MambaAdapter(MambaStack):
    """Deviation: without its gate the mixer is given one that multiplies by 1 up to the rounding of the dtype."""

    norm_sites = ("both", "block")

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        # At lambda = 1 too: with residual_in_fp32 the block itself rounds a float64 X to float32.
        residual_skip(block, edit, hooks)
        if edit.changes_mixer:
            mixer_skip(block.mixer, edit, hooks)
        if not edit.gating:
            hooks.after(block.mixer.in_proj, "gate (opened)", lambda args, kwargs, output: _open_gate(output))
        if edit.removes_norm("block"):
            hooks.after(block.norm, "norm (removed)", lambda args, kwargs, output: args[0])


def _open_gate(projected: Tensor) -> Tensor:
    """in_proj's output (B, N, 2 * inner), whose second half is the gate, with the gate at OPEN."""
    value, gate = projected.chunk(2, dim=-1)
    return torch.cat([value, torch.full_like(gate, OPEN)], dim=-1)  # (B, N, 2 * inner)
