"""BERT (and MiniLM, which is a BERT): post-norm blocks with weights of their own, encoder or (is_decoder) causal decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lscollapse.models.adapters.adapter import Adapter, Edit, HookSet, UnsupportedModel
from lscollapse.models.adapters.post_norm import PostNormAdd


class BertAdapter(Adapter):
    skip_sites = ("residual", "ffn", "both")
    norm_sites = ("both", "block")

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    def block(self, layer: int) -> Any:
        return self.model.encoder.layer[layer]

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embeddings(ids)

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        return self.block(layer)(X, self._mask(X))

    @property
    def causal(self) -> bool:
        """Whether a token attends to earlier ones alone."""
        return bool(self.config.is_decoder)

    def _mask(self, X: Tensor) -> Any:
        """As the model makes it for excerpts without padding; None where its attention needs none."""
        if not self.causal:
            return None
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(config=self.config, inputs_embeds=X, attention_mask=None, past_key_values=None)

    def before_output(self) -> nn.Module:
        return self.whole.cls.predictions.transform

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if self.config.chunk_size_feed_forward:
            raise UnsupportedModel(
                "chunk_size_feed_forward is set: set it to 0, the edited sum needs the whole sequence"
            )
        for name, output, sites in (
            ("attention", block.attention.output, ("residual", "both")),
            ("ffn", block.output, ("ffn", "both")),
        ):
            add = PostNormAdd(name, edit, hooks, edit.changes_sum and edit.skip_site in sites, output.LayerNorm)
            add.skip_is_argument(output, 1)
            add.mechanism_is_output(output.dropout)


class RobertaAdapter(BertAdapter):
    """The same blocks; positions are numbered from the padding id on."""

    @property
    def longest(self) -> int:
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def before_output(self) -> nn.Module:
        head = self.whole.lm_head
        return nn.Sequential(head.dense, nn.GELU(), head.layer_norm)
