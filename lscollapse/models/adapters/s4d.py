"""S4D (the package's own net): post-norm, LayerNorm(X + mixer(X)). It reads pixels, one id each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.edit import Edit, HookSet
from lscollapse.models.adapters.post_norm import edit_sum


class S4DAdapter(Adapter):
    norm_sites = ("both", "block")
    engine = "torch"

    def embed(self, ids: Tensor) -> Tensor:
        X: Tensor = self.model.embed(ids)  # (B, N, d)
        return X

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        scaled = edit.changes_sum or block.lam != 1
        edit_sum("mixer", edit, hooks, scaled, block.norm, (block, 0), block.dropout)
