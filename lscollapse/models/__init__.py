"""A checkpoint seen as: embed, a stack of blocks, final norm. One adapter file per architecture."""

from __future__ import annotations

from typing import Any

from lscollapse.models.adapter import Adapter, UnsupportedModel
from lscollapse.models.albert import AlbertAdapter
from lscollapse.models.bert import BertAdapter
from lscollapse.models.mamba2 import Mamba2Adapter
from lscollapse.models.s4d import S4DAdapter

ADAPTERS: tuple[type[Adapter], ...] = (Mamba2Adapter, AlbertAdapter, BertAdapter, S4DAdapter)


def adapt(model: Any) -> Adapter:
    """The adapter for a transformers model, with or without a head on top.

    Raises:
        UnsupportedModel: no adapter for this architecture.
    """
    if isinstance(model, Adapter):
        return model
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for adapter in ADAPTERS:
        if model_type in adapter.model_types:
            return adapter(getattr(model, "base_model", model))
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.model_types)
    raise UnsupportedModel(f"no adapter for architecture {model_type!r}: supported are {known}")


__all__ = ["Adapter", "UnsupportedModel", "adapt"]
