"""GPT-NeoX, Gemma and T5's encoder, which the generic adapter reads, plainly in float64 numpy; lam acts on the first sum.

As plain_decoders.py. Their norms, rotary angles and position buckets are float32 in transformers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.equivalence.plain_decoders import _attend, _heads, _rotate, _softmax
from tests.equivalence.plain_models import Lam, Weights, _activation, _lam, _layer_norm, _linear, _rms_norm


def gpt_neox(w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0) -> list[np.ndarray]:
    """Y = lam*X + attention(norm(X)) + mlp(norm'(X)); the first part of each head turns with its position."""
    n, h = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    turning = int(h * config.rope_parameters["partial_rotary_factor"])
    causal = np.tril(np.ones((ids.shape[1],) * 2, dtype=bool))

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = _rotate(x[..., :turning], config.rope_parameters["rope_theta"])
        return np.concatenate([turned, x[..., turning:]], -1)

    X = w["embed_in.weight"][ids]
    outputs = [X]
    for k in range(config.num_hidden_layers):
        at = f"layers.{k}."
        u = _layer_norm(w, at + "input_layernorm", X, config.layer_norm_eps)
        qkv = _linear(w, at + "attention.query_key_value", u).reshape(*ids.shape, n, 3, h)
        q, key, v = (qkv[..., i, :].transpose(0, 2, 1, 3) for i in range(3))
        O = _linear(w, at + "attention.dense", _attend(rotate(q), rotate(key), v, causal))
        u = _layer_norm(w, at + "post_attention_layernorm", X, config.layer_norm_eps)
        up = _activation(config.hidden_act, _linear(w, at + "mlp.dense_h_to_4h", u))
        X = _lam(lam, k) * X + O + _linear(w, at + "mlp.dense_4h_to_h", up)
        outputs.append(X)
    return outputs


def gemma(w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0) -> list[np.ndarray]:
    """Llama with norms that multiply by 1 + weight, embeddings times sqrt(d), and GELU in the MLP."""
    n, n_kv, theta = config.num_attention_heads, config.num_key_value_heads, config.rope_parameters["rope_theta"]
    causal = np.tril(np.ones((ids.shape[1],) * 2, dtype=bool))
    X = w["embed_tokens.weight"][ids] * math.sqrt(config.hidden_size)
    outputs = [X]
    for k in range(config.num_hidden_layers):
        at = f"layers.{k}."
        u = _rms_norm(1.0 + w[at + "input_layernorm.weight"], X, config.rms_norm_eps)
        q, key, v = (
            _heads(_linear(w, f"{at}self_attn.{p}_proj", u), m) for p, m in (("q", n), ("k", n_kv), ("v", n_kv))
        )
        key, v = (np.repeat(part, n // n_kv, axis=1) for part in (_rotate(key, theta), v))
        Z = _lam(lam, k) * X + _linear(w, at + "self_attn.o_proj", _attend(_rotate(q, theta), key, v, causal))
        u = _rms_norm(1.0 + w[at + "post_attention_layernorm.weight"], Z, config.rms_norm_eps)
        gate = _activation("gelu_new", _linear(w, at + "mlp.gate_proj", u))
        X = Z + _linear(w, at + "mlp.down_proj", gate * _linear(w, at + "mlp.up_proj", u))
        outputs.append(X)
    return outputs


def t5_encoder(w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0) -> list[np.ndarray]:
    """Scores are not divided by sqrt(h), and have a bias for the distance, exact up to 8 tokens."""
    n, N = config.num_heads, ids.shape[1]
    distance = np.arange(N)[None, :] - np.arange(N)[:, None]  # of key minus query
    assert abs(distance).max() <= 8
    buckets = np.abs(distance) + 16 * (distance > 0)
    bias = w["block.0.layer.0.SelfAttention.relative_attention_bias.weight"][buckets].transpose(2, 0, 1)
    X = w["embed_tokens.weight"][ids]
    outputs = [X]
    for k in range(config.num_layers):
        at = f"block.{k}.layer."
        u = _rms_norm(w[at + "0.layer_norm.weight"], X, config.layer_norm_epsilon)
        q, key, v = (_heads(_linear(w, f"{at}0.SelfAttention.{p}", u), n) for p in "qkv")
        mixed = _softmax(q @ key.transpose(0, 1, 3, 2) + bias) @ v
        O = _linear(w, at + "0.SelfAttention.o", mixed.transpose(0, 2, 1, 3).reshape(*ids.shape, -1))
        Z = _lam(lam, k) * X + O
        u = _rms_norm(w[at + "1.layer_norm.weight"], Z, config.layer_norm_epsilon)
        X = Z + _linear(w, at + "1.DenseReluDense.wo", np.maximum(_linear(w, at + "1.DenseReluDense.wi", u), 0.0))
        outputs.append(X)
    return outputs
