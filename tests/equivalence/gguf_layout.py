"""A tiny Llama as a GGUF file, written by llama.cpp's own package; its weights are numbers that the file's types hold exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, BASE = 64, 96, 4, 2, 2, 5000.0
TOKENS = [*sorted(ByteLevel.alphabet()), "th", "<|endoftext|>"]
BLOCK = 32  # numbers that share a scale in Q8_0 and Q4_1
PARTS = {
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN), "Q8_0"),
    "attn_k": ("self_attn.k_proj", (HIDDEN // 2, HIDDEN), "Q4_1"),
    "attn_v": ("self_attn.v_proj", (HIDDEN // 2, HIDDEN), "Q4_1"),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN), "Q4_1"),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN), "Q4_1"),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN), "Q4_1"),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER), "F16"),
    "attn_norm": ("input_layernorm", (HIDDEN,), "F32"),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,), "F32"),
}


def exact(shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> np.ndarray:
    """Random float32 numbers that the type holds exactly: whole multiples of a power of two, and in each block the extremes."""
    levels, scale, lowest = {"Q8_0": (255, 2.0**-9, -127), "Q4_1": (16, 2.0**-5, -7)}.get(kind, (1023, 2.0**-11, -511))
    codes = generator.integers(0, levels, shape)
    if kind in ("Q8_0", "Q4_1"):
        codes.reshape(-1, BLOCK)[:, :2] = 0, levels - 1
    numbers = (codes + lowest) * scale
    return (numbers + (len(shape) == 1)).astype(np.float32)  # weights of norms are near 1


def weights(tied: bool = True) -> dict[str, tuple[str, np.ndarray, str]]:
    """Name in the file -> name in transformers, numbers, and type in the file."""
    generator = np.random.default_rng(0)
    plan = {"token_embd": ("model.embed_tokens", (len(TOKENS), HIDDEN), "Q8_0")}
    for k in range(LAYERS):
        plan |= {f"blk.{k}.{own}": (f"model.layers.{k}.{name}", *rest) for own, (name, *rest) in PARTS.items()}
    plan["output_norm"] = ("model.norm", (HIDDEN,), "F32")
    plan |= {} if tied else {"output": ("lm_head", (len(TOKENS), HIDDEN), "Q8_0")}
    return {
        f"{own}.weight": (f"{name}.weight", exact(shape, kind, generator), kind)
        for own, (name, shape, kind) in plan.items()
    }


def as_llama_cpp_rotates(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head (first half, second half) as pairs of one from each, which llama.cpp turns together."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(matrix.shape)


def write_gguf(
    path: Path,
    *,
    tied: bool = True,
    tokens: Sequence[str] = TOKENS,
    changed: Mapping[str, np.ndarray | None] | None = None,
    said: Mapping[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write the file; `changed` replaces tensors by others, in float32, or leaves them out, `said` adds to the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(2.0**-16)
    writer.add_rope_freq_base(BASE)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    for key, value in (said or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint16}[type(value)](key, value)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(tokens))
        writer.add_token_merges(["t h"])
        writer.add_eos_token_id(len(tokens) - 1)
    for name, (_, numbers, kind) in weights(tied).items():
        if name in (changed or {}):
            continue
        heads = HEADS if "attn_q" in name else KV_HEADS
        ordered = as_llama_cpp_rotates(numbers, heads) if "attn_q" in name or "attn_k" in name else numbers
        raw = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(ordered, raw), raw_dtype=raw)
    for name, other in (changed or {}).items():
        if other is not None:
            writer.add_tensor(name, other.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference(tied: bool = True, **rope: Any) -> Any:
    """LlamaForCausalLM with the same numbers, as transformers builds it without a file."""
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=2.0**-16, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": BASE, **rope}, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(numbers) for name, numbers, _ in weights(tied).values()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model
