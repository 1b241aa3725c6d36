"""GPT-2: pre-norm decoder blocks with LayerNorm and learned positions."""

from __future__ import annotations

from typing import Any

from torch import nn

from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.pre_norm import Parts, PreNormAdapter


class Gpt2Adapter(PreNormAdapter):
    def __init__(self, model: Any) -> None:
        if model.config.add_cross_attention:
            raise UnsupportedModel("add_cross_attention is set: a decoder that reads an encoder is not supported")
        super().__init__(model)

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.h)

    def parts(self, block: Any) -> Parts:
        return Parts(block.ln_1, block.attn, block.ln_2, block.mlp)

    def before_output(self) -> nn.Module:
        return self.model.ln_f
