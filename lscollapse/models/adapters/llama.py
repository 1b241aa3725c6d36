"""Llama and decoders of the same plan: RMSNorm, rotary positions, gated MLP; with sliding windows where they have them.

The product inside the gated MLP (SwiGLU) is not the paper's gate, which multiplies the output of the sequence mixer:
the MLP mixes no tokens, so `gating` has no meaning here.
"""

from __future__ import annotations

from lscollapse.models.adapters.pre_norm import Parts, PreNormAdapter


class LlamaAdapter(PreNormAdapter):
    final_norm = "norm"
    parts = Parts("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
