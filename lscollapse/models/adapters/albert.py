"""ALBERT: post-norm, one layer (or a few groups of layers) used K times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lscollapse.models.adapters.post_norm import PostNormAdapter


class AlbertAdapter(PostNormAdapter):
    @property
    def blocks(self) -> list[Any]:
        n_outer, groups = self.config.num_hidden_layers, self.model.encoder.albert_layer_groups
        per_group = n_outer / self.config.num_hidden_groups
        return [inner for outer in range(n_outer) for inner in groups[int(outer / per_group)].albert_layers]

    def embed(self, ids: Tensor) -> Tensor:
        X: Tensor = self.model.encoder.embedding_hidden_mapping_in(self.model.embeddings(ids))  # (B, N, e) -> (B, N, d)
        return X

    def before_output(self) -> nn.Module:
        head = self.whole.predictions
        return nn.Sequential(head.dense, head.activation, head.LayerNorm)

    def sums(self, block: Any) -> Iterator[tuple[Any, tuple[Any, int | None], Any]]:
        attention = block.attention
        yield attention.LayerNorm, (attention, 0), attention.output_dropout
        yield block.full_layer_layer_norm, (attention, None), block.ffn_output
