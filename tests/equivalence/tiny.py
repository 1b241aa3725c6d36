"""Tiny random transformers models: the configurations that the equivalence tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, Mamba2Config, Mamba2Model

VOCABULARY = 61


def ids(batch: int, n_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, n_tokens))


def _shaken(model: nn.Module, seed: int) -> Any:
    """Every weight moved off its initial value: biases off 0, norms and D off 1, so that none can go missing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def mamba2(n_groups: int = 1, n_layers: int = 3, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "expand": 2, "num_heads": 4, "head_dim": 8, "state_size": 5,
        "n_groups": n_groups, "num_hidden_layers": n_layers, "chunk_size": 8, "conv_kernel": 4, "use_bias": True,
        "pad_token_id": 0,
    }  # fmt: skip
    return _shaken(Mamba2Model(Mamba2Config(**settings | changes)), seed)


def bert(n_layers: int = 3, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": n_layers, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 32,
    }  # fmt: skip
    return _shaken(BertModel(BertConfig(**settings | changes), add_pooling_layer=False), seed)


def albert(n_layers: int = 4, n_groups: int = 2, inner: int = 2, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "embedding_size": 12, "hidden_size": 16, "num_hidden_layers": n_layers,
        "num_hidden_groups": n_groups, "inner_group_num": inner, "num_attention_heads": 4, "intermediate_size": 24,
        "max_position_embeddings": 32, "hidden_act": "gelu_new",
    }  # fmt: skip
    return _shaken(AlbertModel(AlbertConfig(**settings | changes), add_pooling_layer=False), seed)
