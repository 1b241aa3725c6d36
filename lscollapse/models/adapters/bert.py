"""BERT (and MiniLM, which is one): post-norm blocks with weights of their own, encoder or causal decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from lscollapse.models.adapters.post_norm import PostNormAdapter


class BertAdapter(PostNormAdapter):
    stack = "encoder.layer"

    @property
    def causal(self) -> bool:
        """Whether a token attends to earlier ones alone."""
        return bool(self.config.is_decoder)

    def mask(self, X: Tensor) -> Any:
        if not self.causal:
            return None
        return create_causal_mask(config=self.config, inputs_embeds=X, attention_mask=None, past_key_values=None)

    def before_output(self) -> nn.Module:
        transform: nn.Module = self.whole.cls.predictions.transform
        return transform

    def sums(self, block: Any) -> Iterator[tuple[Any, tuple[Any, int | None], Any]]:
        for output in (block.attention.output, block.output):
            yield output.LayerNorm, (output, 1), output.dropout


class RobertaAdapter(BertAdapter):
    """The same blocks; positions are numbered from the padding id on."""

    @property
    def longest(self) -> int:
        return int(self.config.max_position_embeddings - self.config.pad_token_id - 1)

    def before_output(self) -> nn.Module:
        head = self.whole.lm_head
        return nn.Sequential(head.dense, nn.GELU(), head.layer_norm)
