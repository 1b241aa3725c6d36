"""ALBERT: post-norm, one layer (or a few groups of layers) used K times."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lscollapse.models.adapters.adapter import Adapter, Edit, HookSet, UnsupportedModel
from lscollapse.models.adapters.post_norm import PostNormAdd


class AlbertAdapter(Adapter):
    skip_sites = ("residual", "ffn", "both")
    norm_sites = ("both", "block")

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers * self.config.inner_group_num

    def block(self, layer: int) -> Any:
        outer, inner = divmod(layer, self.config.inner_group_num)
        group = int(outer / (self.config.num_hidden_layers / self.config.num_hidden_groups))
        return self.model.encoder.albert_layer_groups[group].albert_layers[inner]

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.encoder.embedding_hidden_mapping_in(self.model.embeddings(ids))

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        return self.block(layer)(X, None)

    def before_output(self) -> nn.Module:
        head = self.whole.predictions
        return nn.Sequential(head.dense, head.activation, head.LayerNorm)

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if self.config.chunk_size_feed_forward:
            raise UnsupportedModel(
                "chunk_size_feed_forward is set: set it to 0, the edited sum needs the whole sequence"
            )
        attention = block.attention
        edits_attention = edit.changes_sum and edit.skip_site in ("residual", "both")
        first = PostNormAdd("attention", edit, hooks, edits_attention, attention.LayerNorm)
        first.skip_is_argument(attention, 0)
        first.mechanism_is_output(attention.output_dropout)
        edits_ffn = edit.changes_sum and edit.skip_site in ("ffn", "both")
        second = PostNormAdd("ffn", edit, hooks, edits_ffn, block.full_layer_layer_norm)
        second.skip_is_output(attention)
        second.mechanism_is_output(block.ffn_output)
