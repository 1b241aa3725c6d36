"""S4D (the package's own net): post-norm, LayerNorm(X + mixer(X)). It reads pixels, one id each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lscollapse.models.adapters.adapter import Adapter, Edit, HookSet
from lscollapse.models.adapters.post_norm import PostNormAdd


class S4DAdapter(Adapter):
    norm_sites = ("both", "block")

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    def block(self, layer: int) -> Any:
        return self.model.layers[layer]

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed(ids)

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        return self.model.layers[layer](X)

    @property
    def backend(self) -> str:
        return "torch"

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        sum_ = PostNormAdd("mixer", edit, hooks, edit.changes_sum or block.lam != 1, block.norm)
        sum_.skip_is_argument(block, 0)
        sum_.mechanism_is_output(block.dropout)
