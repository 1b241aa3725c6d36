"""From a transformers model to the adapter of its architecture."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from lscollapse.models.adapters.adapter import Adapter, UnsupportedModel
from lscollapse.models.numerics.widened import computing_in

# model_type of transformers -> "module:class" in models/adapters, imported when it is needed.
ADAPTERS = {
    "mamba2": "mamba2:Mamba2Adapter",
    "albert": "albert:AlbertAdapter",
    "bert": "bert:BertAdapter",
    "roberta": "bert:RobertaAdapter",
    "xlm-roberta": "bert:RobertaAdapter",
    "camembert": "bert:RobertaAdapter",
    "gpt2": "gpt2:Gpt2Adapter",
    "llama": "llama:LlamaAdapter",
    "mistral": "llama:LlamaAdapter",
    "qwen2": "llama:LlamaAdapter",
    "qwen3": "llama:LlamaAdapter",
    "mamba": "mamba:MambaAdapter",
    "vit": "vit:VitAdapter",
    "s4d": "s4d:S4DAdapter",
}
GENERIC = "generic:GenericAdapter"  # of every other architecture of transformers


def adapt(model: Any) -> Adapter:
    """The adapter for a transformers model, with or without a head: that of its architecture, else the generic one.

    Of a float64 model `embed` and `run` compute in float64 throughout (numerics/widened.py).

    Raises:
        UnsupportedModel: no model of transformers, or the generic adapter finds no blocks that it can edit.
    """
    if isinstance(model, Adapter):
        return model
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    place = ADAPTERS.get(model_type) or _generic(model)
    if place is None:
        raise UnsupportedModel(f"no adapter for architecture {model_type!r}: supported are {', '.join(ADAPTERS)}")
    module, _, name = place.partition(":")
    adapter_class = getattr(import_module(f"lscollapse.models.adapters.{module}"), name)
    base = getattr(model, "base_model", model)
    with computing_in(getattr(base, "dtype", None)):  # some adapters try the model out
        adapter: Adapter = adapter_class(base)
    adapter.whole = model
    if adapter.dtype == torch.float64:
        for function in ("embed", "run"):
            setattr(adapter, function, computing_in(torch.float64)(getattr(adapter, function)))
    return adapter


def _generic(model: Any) -> str | None:
    """The generic adapter for what is a model of transformers."""
    from transformers import PreTrainedModel  # not above: what has an adapter of its own may do without it

    return GENERIC if isinstance(model, PreTrainedModel) else None
