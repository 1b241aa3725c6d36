"""A checkpoint seen as: embed, a stack of blocks, final norm. One adapter file per architecture."""

from __future__ import annotations

from typing import Any

import torch

from lscollapse.models.adapters.adapter import Adapter, UnsupportedModel
from lscollapse.models.adapters.albert import AlbertAdapter
from lscollapse.models.adapters.bert import BertAdapter, RobertaAdapter
from lscollapse.models.adapters.generic import GenericAdapter
from lscollapse.models.adapters.gpt2 import Gpt2Adapter
from lscollapse.models.adapters.llama import LlamaAdapter
from lscollapse.models.adapters.mamba import MambaAdapter
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.adapters.s4d import S4DAdapter
from lscollapse.models.adapters.vit import VitAdapter
from lscollapse.models.numerics.widened import computing_in, within

ADAPTERS: tuple[type[Adapter], ...] = (
    Mamba2Adapter, AlbertAdapter, BertAdapter, RobertaAdapter, Gpt2Adapter, LlamaAdapter, MambaAdapter, VitAdapter,
    S4DAdapter,
)  # fmt: skip


def adapt(model: Any) -> Adapter:
    """The adapter for a transformers model, with or without a head on top: that of its architecture, else the generic one.

    Of a float64 model `embed` and `run` compute in float64 throughout (models/widened.py).

    Raises:
        UnsupportedModel: no model of transformers, or the generic adapter finds no blocks that it can edit.
    """
    from transformers import PreTrainedModel

    if isinstance(model, Adapter):
        return model
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    fitting = [adapter for adapter in ADAPTERS if model_type in adapter.model_types]
    if not fitting and isinstance(model, PreTrainedModel):
        fitting = [GenericAdapter]
    for adapter in fitting:
        base = getattr(model, "base_model", model)
        with computing_in(getattr(base, "dtype", None)):  # some adapters try the model out
            found = adapter(base)
        found.whole = model
        if found.dtype == torch.float64:
            for name in ("embed", "run"):
                setattr(found, name, within(torch.float64, getattr(found, name)))
        return found
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.model_types)
    raise UnsupportedModel(f"no adapter for architecture {model_type!r}: supported are {known}")


__all__ = ["Adapter", "UnsupportedModel", "adapt"]
