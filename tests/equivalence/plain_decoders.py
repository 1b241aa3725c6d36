"""GPT-2, Llama and its kin, ViT and Mamba written out plainly in float64 numpy, and tiny random models of them.

As plain_models.py: the oracle for the surgery, with names of weights as transformers' base models have them. Every model
returns [X_0, ..., X_K]: the embedding and the output of each block, (B, N, d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from tests.equivalence.plain_models import (
    Lam,
    Weights,
    _activation,
    _lam,
    _layer_norm,
    _linear,
    _product,
    _rms_norm,
    _rounded,
    _silu,
    _sum,
)
from tests.equivalence.tiny import VOCABULARY, _shaken

Map = Callable[[np.ndarray], np.ndarray]

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_inner": 24}),
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", {**_GROUPED, **_WINDOW}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "mamba": ("Mamba", {"state_size": 5, "time_step_rank": 3, "use_bias": True}),
    "roberta": ("Roberta", {"pad_token_id": 1}),
    "vit": ("ViT", {"image_size": 8, "patch_size": 4, "max_position_embeddings": None}),
}  # fmt: skip


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A base model of transformers with every weight random."""
    prefix, settings = TINY[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**_COMMON | settings | changes)
    return _shaken(getattr(transformers, f"{prefix}Model")(config), seed)


def _softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def _heads(x: np.ndarray, n: int) -> np.ndarray:  # (B, N, n * h) -> (B, n, N, h)
    return x.reshape(*x.shape[:2], n, -1).transpose(0, 2, 1, 3)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Heads (B, n, N, h) and which token sees which (N, N) -> (B, N, n * h)."""
    scores = np.where(seen, _product(q, k.transpose(0, 1, 3, 2)) / math.sqrt(q.shape[-1]), -np.inf)
    out = _product(_softmax(scores), v)
    return out.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def _block(
    X: np.ndarray, first: Map, second: Map, norms: tuple[Map, Map], lam: float, layernorm: bool, site: str
) -> Any:
    """Z = X + first(norm(X)); Y = Z + second(norm(Z)), lam at the sites named."""
    one, two = norms if layernorm else (lambda x: x, lambda x: x)
    Z = _sum(lam if site in ("residual", "both") else 1.0, X, first(one(X)))
    return _sum(lam if site in ("ffn", "both") else 1.0, Z, second(two(Z)))


def gpt2(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, layernorm: bool = True, site: str = "residual"
) -> Any:
    n, seen = config.n_head, np.tril(np.ones((ids.shape[1],) * 2, dtype=bool))
    X = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    outputs = [X]
    for k in range(config.n_layer):

        def dense(name: str, x: np.ndarray, at: str = f"h.{k}.") -> np.ndarray:
            return _product(x, w[f"{at}{name}.weight"]) + w[f"{at}{name}.bias"]

        def norm(name: str, at: str = f"h.{k}.") -> Map:
            return lambda x: _layer_norm(w, at + name, x, config.layer_norm_epsilon)

        def attention(x: np.ndarray, dense: Any = dense) -> np.ndarray:
            q, key, v = (_heads(part, n) for part in np.split(dense("attn.c_attn", x), 3, -1))
            return dense("attn.c_proj", _attend(q, key, v, seen))

        def mlp(x: np.ndarray, dense: Any = dense) -> np.ndarray:
            return dense("mlp.c_proj", _activation(config.activation_function, dense("mlp.c_fc", x)))

        X = _block(X, attention, mlp, (norm("ln_1"), norm("ln_2")), _lam(lam, k), layernorm, site)
        outputs.append(X)
    return outputs


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Pairs (i, i + h/2) of the last axis turn by position * theta^(-2i/h)."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[-2])[:, None] / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def llama(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, layernorm: bool = True, site: str = "residual"
) -> Any:
    """Also Mistral, Qwen2 and Qwen3: grouped keys, windows, and norms of queries and keys where there are weights of them."""
    n, n_kv = config.num_attention_heads, config.num_key_value_heads
    N = ids.shape[1]
    causal = np.tril(np.ones((N, N), dtype=bool))
    kinds = getattr(config, "layer_types", None)
    X = w["embed_tokens.weight"][ids]
    outputs = [X]
    for k in range(config.num_hidden_layers):
        windowed = config.model_type == "mistral" or (kinds and kinds[k] == "sliding_attention")
        seen = causal & ~np.tril(causal, -config.sliding_window) if windowed else causal
        at = f"layers.{k}."

        def norm(name: str, at: str = at) -> Map:
            return lambda x: _rms_norm(w[f"{at}{name}.weight"], x, config.rms_norm_eps)

        def attention(x: np.ndarray, at: str = at, norm: Any = norm, seen: np.ndarray = seen) -> np.ndarray:
            q, key, v = (
                _heads(_linear(w, f"{at}self_attn.{p}_proj", x), m) for p, m in (("q", n), ("k", n_kv), ("v", n_kv))
            )
            if f"{at}self_attn.q_norm.weight" in w:
                q, key = norm("self_attn.q_norm")(q), norm("self_attn.k_norm")(key)
            theta = config.rope_parameters["rope_theta"]
            q, key = _rotate(q, theta), _rotate(key, theta)
            key, v = (np.repeat(part, n // n_kv, axis=1) for part in (key, v))
            return _linear(w, f"{at}self_attn.o_proj", _attend(q, key, v, seen))

        def mlp(x: np.ndarray, at: str = at) -> np.ndarray:
            gate, up = _linear(w, f"{at}mlp.gate_proj", x), _linear(w, f"{at}mlp.up_proj", x)
            return _linear(w, f"{at}mlp.down_proj", _silu(gate) * up)

        norms = norm("input_layernorm"), norm("post_attention_layernorm")
        X = _block(X, attention, mlp, norms, _lam(lam, k), layernorm, site)
        outputs.append(X)
    return outputs


def vit(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, layernorm: bool = True, site: str = "residual"
) -> Any:
    """ids are 24-bit colours in reading order; channels are scaled to -1..1, patches taken one by one."""
    side, patch, d = config.image_size, config.patch_size, config.hidden_size
    colour = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], 1).reshape(len(ids), 3, side, side) / 127.5 - 1.0
    kernel, bias = (w[f"embeddings.patch_embeddings.projection.{part}"] for part in ("weight", "bias"))
    patches = [
        (colour[:, None, :, i : i + patch, j : j + patch] * kernel).sum((2, 3, 4)) + bias
        for i in range(0, side, patch)
        for j in range(0, side, patch)
    ]
    first = np.broadcast_to(w["embeddings.cls_token"][:, 0], (len(ids), d))
    X = np.stack([first, *patches], 1) + w["embeddings.position_embeddings"]
    seen, n = np.ones((X.shape[1],) * 2, dtype=bool), config.num_attention_heads
    outputs = [X]
    for k in range(config.num_hidden_layers):
        at = f"layers.{k}."

        def norm(name: str, at: str = at) -> Map:
            return lambda x: _layer_norm(w, at + name, x, config.layer_norm_eps)

        def attention(x: np.ndarray, at: str = at) -> np.ndarray:
            q, key, v = (_heads(_linear(w, f"{at}attention.{p}_proj", x), n) for p in "qkv")
            return _linear(w, f"{at}attention.o_proj", _attend(q, key, v, seen))

        def mlp(x: np.ndarray, at: str = at) -> np.ndarray:
            return _linear(w, f"{at}mlp.fc2", _activation(config.hidden_act, _linear(w, f"{at}mlp.fc1", x)))

        norms = norm("layernorm_before"), norm("layernorm_after")
        X = _block(X, attention, mlp, norms, _lam(lam, k), layernorm, site)
        outputs.append(X)
    return outputs


def mamba(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, gating: bool = True, layernorm: bool = True,
    site: str = "residual",
) -> Any:  # fmt: skip
    """X' = lam*X + mixer(norm(X)); at site `mixer` X' = X + O with lam*V in the mixer in place of the gate."""
    X = w["embeddings.weight"][ids]
    outputs = [X]
    for k in range(config.num_hidden_layers):
        part = {n.removeprefix(f"layers.{k}."): a for n, a in w.items() if n.startswith(f"layers.{k}.")}
        u = _rms_norm(part["norm.weight"], X, config.layer_norm_epsilon) if layernorm else X
        strength = _lam(lam, k)
        O = _mamba_mixer(part, config, u, gating, strength if site == "mixer" and not gating else 0.0)
        X = _sum(1.0 if site == "mixer" else strength, X, O)
        outputs.append(X)
    return outputs


def _mamba_mixer(w: Weights, config: Any, u: np.ndarray, gating: bool, extra_skip: float) -> np.ndarray:
    """h' = exp(dt A) h + dt B x token by token, y = C h + (D + extra_skip) x, times silu(gate)."""
    x, z = np.split(_linear(w, "mixer.in_proj", u), 2, -1)
    kernel = w["mixer.conv1d.weight"][:, 0]
    convolved = np.zeros_like(x)
    for t in range(x.shape[1]):
        for back in range(min(kernel.shape[1], t + 1)):
            convolved[:, t] += x[:, t - back] * kernel[:, kernel.shape[1] - 1 - back]
    x = _silu(convolved + w.get("mixer.conv1d.bias", 0.0))
    rank, n_state = config.time_step_rank, config.state_size
    dt, B, C = np.split(_linear(w, "mixer.x_proj", x), [rank, rank + n_state], -1)
    dt = np.logaddexp(0.0, _linear(w, "mixer.dt_proj", dt))
    A, h, y = -np.exp(w["mixer.A_log"]), np.zeros((len(x), x.shape[2], n_state)), np.empty_like(x)
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = np.exp(step * A) * h + step * B[:, t, None] * x[:, t, :, None]
        terms = h * C[:, t, None]
        y[:, t] = _rounded(terms.sum(-1) + (w["mixer.D"] + extra_skip) * x[:, t], np.abs(terms).sum(-1))
    return _linear(w, "mixer.out_proj", y * _silu(z) if gating else y)
