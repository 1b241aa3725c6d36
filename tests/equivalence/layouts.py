"""Tiny Mamba-2 checkpoints in both layouts, written without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

D_MODEL, N_LAYER, VOCAB, PADDED = 16, 3, 37, 48
ORIGINAL_CONFIG = {
    "d_model": D_MODEL,
    "d_intermediate": 0,
    "n_layer": N_LAYER,
    "vocab_size": VOCAB,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 4, "ngroups": 2, "chunk_size": 16},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
HF_CONFIG = {
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYER,
    "vocab_size": PADDED,
    "state_size": 8,
    "head_dim": 4,
    "num_heads": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "tie_word_embeddings": True,
}


def hf_state(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Weights of Mamba2ForCausalLM, from a plain list of shapes."""
    generator = torch.Generator().manual_seed(seed)
    inner, heads, channels = 2 * D_MODEL, 8, 2 * D_MODEL + 2 * 2 * 8
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (PADDED, D_MODEL)}
    for k in range(N_LAYER):
        block = {
            "norm.weight": (D_MODEL,),
            "mixer.A_log": (heads,),
            "mixer.D": (heads,),
            "mixer.dt_bias": (heads,),
            "mixer.in_proj.weight": (inner + channels + heads, D_MODEL),
            "mixer.conv1d.weight": (channels, 1, 4),
            "mixer.conv1d.bias": (channels,),
            "mixer.norm.weight": (inner,),
            "mixer.out_proj.weight": (D_MODEL, inner),
        }
        shapes |= {f"backbone.layers.{k}.{name}": shape for name, shape in block.items()}
    shapes["backbone.norm_f.weight"] = (D_MODEL,)
    return {name: torch.randn(shape, generator=generator).mul(0.1).to(dtype) for name, shape in shapes.items()}


def original_state(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The same weights as mamba_ssm saves them: another name for the embedding, and the tied head beside it."""
    state = hf_state(seed, dtype)
    embedding = state.pop("backbone.embeddings.weight")
    return {"backbone.embedding.weight": embedding, **state, "lm_head.weight": embedding}


def write_original(folder: Path, state: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | changes))
    torch.save(original_state() if state is None else state, folder / "pytorch_model.bin")
    return folder


def write_hf(folder: Path, state: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    save_file(hf_state() if state is None else state, folder / "model.safetensors", {"format": "pt"})
    return folder
