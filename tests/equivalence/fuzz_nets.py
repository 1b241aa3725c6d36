"""Random tiny nets of the architectures that have adapters of their own, with the plain models as references."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from lscollapse import Variant
from lscollapse.models.nets.s4d import S4D, S4DConfig
from tests.equivalence import plain_decoders, plain_models, tiny
from tests.equivalence.fuzz import Case, Outputs, vary

_POST = {"skip_sites": ("residual", "ffn", "both"), "norm_sites": ("both", "block")}
NATIVE: dict[str, dict[str, Any]] = {
    "mamba2": {"skip_sites": ("residual", "mixer"), "norm_sites": ("both", "mixer", "block"), "gate": True},
    "mamba": {"skip_sites": ("residual", "mixer"), "norm_sites": ("both", "block"), "gate": True},
    "s4d": {"norm_sites": ("both", "block")},
    **dict.fromkeys(("bert", "roberta", "albert", "gpt2", "llama", "mistral", "qwen2", "qwen3", "vit"), _POST),
}


def native(number: int) -> Case:
    """Configuration `number`: the architectures in turn, everything else drawn."""
    kind = list(NATIVE)[number % len(NATIVE)]
    rng = np.random.default_rng([1, number])
    layers = int(rng.choice((2, 3, 4, 12) if kind in ("mamba2", "mamba", "gpt2", "llama") else (2, 3, 4)))
    model = _BUILDERS.get(kind, _decoder)(kind, layers, rng)
    vary(model, rng)
    if kind not in ("bert", "roberta", "albert", "s4d") and rng.random() < 0.2:
        _be_loud(model, rng)
    ids = _ids(kind, model, rng)

    def reference(variant: Variant, spacing: float, draw: np.random.Generator) -> Outputs:
        with ExitStack() as stack:
            if spacing:
                stack.enter_context(plain_models.shaken(spacing, draw))
            stack.enter_context(np.errstate(all="ignore"))
            return _plain(kind, model, ids, variant)

    n_layers = layers * getattr(model.config, "inner_group_num", 1)
    name = f"native({number}): {kind}, {n_layers} layers, {ids.shape[1]} tokens"
    return Case(name, model, ids, reference, n_layers, **NATIVE[kind])


def _mamba2(_: str, layers: int, rng: np.random.Generator) -> Any:
    heads, head_dim = [(4, 8), (8, 4), (2, 16)][rng.integers(3)]
    limits = [(0.0, float("inf")), (0.3, 0.9)][rng.integers(2)]
    return tiny.mamba2(
        int(rng.choice([g for g in (1, 2, 4) if heads % g == 0])), layers, int(rng.integers(1000)), num_heads=heads,
        head_dim=head_dim, state_size=int(rng.integers(2, 7)), chunk_size=int(rng.choice([4, 8])), time_step_limit=limits,
        conv_kernel=int(rng.integers(2, 5)), use_bias=bool(rng.integers(2)), use_conv_bias=bool(rng.integers(2)),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])),
    )  # fmt: skip


def _mamba(_: str, layers: int, rng: np.random.Generator) -> Any:
    return plain_decoders.tiny(
        "mamba", int(rng.integers(1000)), num_hidden_layers=layers, state_size=int(rng.integers(2, 7)),
        time_step_rank=int(rng.integers(1, 5)), use_bias=bool(rng.integers(2)), use_conv_bias=bool(rng.integers(2)),
        conv_kernel=int(rng.integers(2, 5)), residual_in_fp32=bool(rng.integers(2)),
    )  # fmt: skip


def _bert(kind: str, layers: int, rng: np.random.Generator) -> Any:
    more = {
        "num_attention_heads": int(rng.choice([1, 2, 4])), "intermediate_size": int(rng.choice([8, 24])),
        "hidden_act": str(rng.choice(["gelu", "gelu_new", "relu"])), "attn_implementation": str(rng.choice(["sdpa", "eager"])),
    }  # fmt: skip
    seed = int(rng.integers(1000))
    if kind == "albert":
        return tiny.albert(layers, int(rng.integers(1, 3)), int(rng.integers(1, 3)), seed, **more)
    return tiny.bert(layers, seed, **more) if kind == "bert" else plain_decoders.tiny(kind, seed, num_hidden_layers=layers, **more)  # fmt: skip


def _s4d(_: str, layers: int, rng: np.random.Generator) -> Any:
    channels = int(rng.choice([1, 3]))
    config = S4DConfig(
        hidden_size=int(rng.choice([4, 6, 12])), state_size=int(rng.choice([2, 4, 8])), num_hidden_layers=layers,
        channels=channels, levels=int(rng.choice([5, 17])),
    )  # fmt: skip
    seed = int(rng.integers(1000))
    torch.manual_seed(seed)
    return tiny._shaken(S4D(config), seed)


def _decoder(kind: str, layers: int, rng: np.random.Generator) -> Any:
    more: dict[str, Any] = {"attn_implementation": str(rng.choice(["sdpa", "eager"])), "num_hidden_layers": layers}
    if kind in ("gpt2", "vit"):
        act = "hidden_act" if kind == "vit" else "activation_function"
        more |= {act: str(rng.choice(["gelu", "gelu_new", "relu"])), "num_attention_heads": int(rng.choice([2, 4]))}
    else:
        more |= {"num_key_value_heads": int(rng.choice([1, 2, 4])), "rms_norm_eps": float(rng.choice([1e-6, 1e-3]))}
    return plain_decoders.tiny(kind, int(rng.integers(1000)), **more)


_BUILDERS = {"mamba2": _mamba2, "mamba": _mamba, "bert": _bert, "roberta": _bert, "albert": _bert, "s4d": _s4d}


def _be_loud(model: Any, rng: np.random.Generator) -> None:
    """What the blocks of a pre-norm net add to the stream is of very different size, up to 1e13."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "c_proj.weight", "o_proj.weight", "down_proj.weight", "fc2.weight")):
                parameter *= 10.0 ** rng.uniform(-6.0, 13.0)


def _ids(kind: str, model: Any, rng: np.random.Generator) -> np.ndarray:
    if kind == "vit":
        return rng.integers(0, 2**24, (2, 64))
    highest = model.config.vocab_size if kind == "s4d" else tiny.VOCABULARY
    return rng.integers(3 if kind != "s4d" else 0, highest, (2, int(rng.integers(2, 13))))


def _plain(kind: str, model: Any, ids: np.ndarray, v: Variant) -> Outputs:
    w = plain_models.weights_of(model)
    if kind == "mamba2":
        return plain_models.mamba2(w, model.config, ids, v.lam, v.gating, v.layernorm, v.skip_site, v.norm_site)
    if kind == "mamba":
        return plain_decoders.mamba(w, model.config, ids, v.lam, v.gating, v.layernorm, v.skip_site)
    if kind == "s4d":
        return plain_models.s4d(w, model.config, ids, v.lam, v.layernorm)
    if kind == "roberta":  # positions are counted from the padding id on
        table = "embeddings.position_embeddings.weight"
        w[table] = w[table][model.config.pad_token_id + 1 :]
    if kind in ("bert", "roberta", "albert"):
        function = plain_models.albert if kind == "albert" else plain_models.bert
        return function(w, model.config, ids, v.lam, v.layernorm, v.skip_site)
    function = getattr(plain_decoders, kind if kind in ("gpt2", "vit") else "llama")
    return function(w, model.config, ids, v.lam, v.layernorm, v.skip_site)
