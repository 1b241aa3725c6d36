"""GPT-2: pre-norm decoder blocks with LayerNorm and learned positions."""

from __future__ import annotations

from typing import Any

from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.pre_norm import Parts, PreNormAdapter


class Gpt2Adapter(PreNormAdapter):
    stack = "h"
    final_norm = "ln_f"
    parts = Parts("ln_1", "attn", "ln_2", "mlp")

    def __init__(self, model: Any) -> None:
        if model.config.add_cross_attention:
            raise UnsupportedModel("add_cross_attention is set: a decoder that reads an encoder is not supported")
        super().__init__(model)
