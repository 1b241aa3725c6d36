"""Llama and decoders of the same plan: RMSNorm, rotary positions, gated MLP; with sliding windows where they have them.

The product inside the gated MLP (SwiGLU) is not the paper's gate, which multiplies the output of the sequence mixer: the
MLP mixes no tokens, so `gating` has no meaning here.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lscollapse.models.adapters.pre_norm import Parts, PreNormAdapter


class LlamaAdapter(PreNormAdapter):
    @property
    def blocks(self) -> list[Any]:
        return list(self.model.layers)

    def parts(self, block: Any) -> Parts:
        return Parts(block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp)

    def before_output(self) -> nn.Module:
        return self.model.norm
