"""Tiny nets of classes of transformers that the generic adapter measures, with a whole forward under surgery as reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lscollapse
from lscollapse import Variant
from lscollapse.models.adapt import adapt
from tests.equivalence import tiny
from tests.equivalence.fuzz import Case, Outputs, vary

_COMMON = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_KV = {"num_key_value_heads": 2}
_GROUPED = {**_KV, "head_dim": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 24,
}  # fmt: skip
GENERIC: dict[str, dict[str, Any]] = {
    "GPTNeoX": {}, "GPTJ": {"rotary_dim": 4}, "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "DistilBert": {"hidden_dim": 24}, "Electra": {"embedding_size": 8}, "Falcon": {}, "Bloom": {}, "Gemma": _GROUPED,
    "Gemma2": {**_GROUPED, "sliding_window": 4}, "Gemma3Text": {**_GROUPED, "sliding_window": 4}, "Phi": {}, "Phi3": _KV,
    "Cohere": {}, "Cohere2": {**_GROUPED, "sliding_window": 4}, "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, "Mixtral": {**_KV, "num_local_experts": 5},
    "Jamba": {**_KV, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "T5": {"d_model": 16, "d_kv": 4, "d_ff": 24}, "Bart": _SEQ2SEQ, "Granite": _GROUPED, "StableLm": _KV, "Starcoder2": _KV,
    "Olmo2": _KV, "CodeGen": {"n_embd": 16, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "Mpt": {"d_model": 16, "n_heads": 4, "n_layers": 3}, "Qwen3Moe": {**_GROUPED, **_EXPERTS}, "Nemotron": _GROUPED,
    "Glm4": _GROUPED, "SmolLM3": _KV, "FalconMamba": {"state_size": 4}, "RecurrentGemma": {}, "Esm": {"mask_token_id": 3},
    "GPTNeo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 4},
    "DiffLlama": _GROUPED,
    "Gemma4Text": {
        **_GROUPED, "num_hidden_layers": 6, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCABULARY, "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 6,
    },
}  # fmt: skip
# To be measured right or refused: a block that uses what an earlier one left, and one that adds in float32 always.
MAY_BE_REFUSED = ("Gemma4Text", "FalconMamba")


def generic(name: str) -> Case:
    """One class with random weights."""
    rng = np.random.default_rng([2, list(GENERIC).index(name)])
    seed = int(rng.integers(1000))
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**_COMMON | GENERIC[name])
    config._experts_implementation = "eager"  # the fused product of experts knows no float64
    model = tiny._shaken(transformers.AutoModel.from_config(config).float(), seed)
    vary(model, rng)
    ids = rng.integers(3, tiny.VOCABULARY, (2, int(rng.integers(5, 13))))
    with _float64(), _Exact(rng):  # so that rotary frequencies and the like are made in float64
        exact = transformers.AutoModel.from_config(config).double().eval()
    exact.load_state_dict(model.state_dict())

    def reference(variant: Variant, spacing: float, draw: np.random.Generator) -> Outputs:
        return whole_forward(exact, ids, variant, spacing, draw)

    return Case(f"generic({name!r})", model, ids, reference, adapt(model).n_layers)


def whole_forward(model: Any, ids: np.ndarray, variant: Variant, spacing: float, draw: np.random.Generator) -> Outputs:
    """Outputs of the blocks in one forward of a float64 model under surgery, every operation of it in float64."""
    seen: list[Tensor] = []

    def first(_: Any, args: tuple, kwargs: dict) -> None:
        if not seen:
            seen.append(args[0] if args else next(iter(kwargs.values())))

    def after(_: Any, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_float64())
        exact = stack.enter_context(_Exact(draw))
        adapter = stack.enter_context(lscollapse.surgery(model, variant))
        for block in {id(adapter.block(k)): adapter.block(k) for k in range(adapter.n_layers)}.values():
            stack.callback(block.register_forward_pre_hook(first, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        exact.spacing = spacing  # from here on: what the adapter tests of the model when it is made is left alone
        adapter.forward(torch.as_tensor(ids))
    assert len(seen) == adapter.n_layers + 1
    return [X.double().numpy() for X in seen]


@contextmanager
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class _Exact(TorchFunctionMode):
    """Whatever a model converts to float32 stays float64; results are off by up to `spacing` as in plain_models.shaken."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.spacing, self._rng = 0.0, rng

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_wide(a) for a in args)
        kwargs = {key: _wide(a) for key, a in (kwargs or {}).items()}
        out = func(*args, **kwargs)
        size = self._size(func, args, out) if self.spacing and isinstance(out, Tensor) else None
        if size is None or out.dtype != torch.float64:
            return out
        noise = torch.as_tensor(self._rng.uniform(-self.spacing, self.spacing, out.shape))
        return out + noise * torch.where(size < 1e100, size, 0.0)  # a mask stays a mask

    def _size(self, func: Any, args: tuple, out: Tensor) -> Tensor | None:
        if func is F.linear:
            return F.linear(args[0].abs(), args[1].abs())
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm):
            return args[0].abs() @ args[1].abs()
        if func in (torch.addmm, torch.baddbmm, F.scaled_dot_product_attention, torch.einsum):
            return out.abs().amax(-1, keepdim=True)
        if func in (torch.add, Tensor.add, F.layer_norm, F.softmax, torch.rsqrt, Tensor.mul, torch.cos, torch.sin):
            return out.abs()
        return None


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
