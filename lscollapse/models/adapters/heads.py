"""The language-model head of a checkpoint, for runs that ask for it: `load` of checkpoints/checkpoint.py leaves heads out."""

from __future__ import annotations

from typing import Any, Unpack

import torch

from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.streamed import StreamedMamba2
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.architectures import seeded
from lscollapse.models.checkpoints.located import Where


def attach(adapter: Adapter, name_or_path: str, random_init: int | None = None, **where: Unpack[Where]) -> bool:
    """Give `adapter` the head of its checkpoint, so that `adapter.head` is there; False where it has none.

    Args:
        name_or_path, where: as for `checkpoint.load`; nothing is read where the embeddings are the head.
        random_init: a seed; the head is initialised by transformers and nothing is read.
    """
    if isinstance(adapter, StreamedMamba2):
        if adapter.output is None:
            adapter.output = checkpoint.open_head(name_or_path, **where).get("lm_head.weight")
        return adapter.head is not None
    if adapter.head_class is None:
        return False
    import transformers  # not above: a run without a head may do without it

    kind = getattr(transformers, adapter.head_class)
    with torch.device("meta") if random_init is None else seeded(random_init):
        whole = kind(adapter.model.config)
    whole = _around(whole, adapter)
    if _unfilled(whole):
        whole.load_state_dict(checkpoint.open_head(name_or_path, **where), strict=False, assign=True)
        whole.tie_weights()
    if _unfilled(whole):
        loaded = checkpoint.load_with_head(name_or_path, kind, dtype=adapter.dtype, **where)
        if loaded is None:
            return False
        whole = _around(loaded, adapter)
    if _unfilled(whole):
        return False
    adapter.whole = whole.to(adapter.device, adapter.dtype).eval()
    return adapter.head is not None


def _around(whole: Any, adapter: Adapter) -> Any:
    """A model with a head, whose base model is that of the adapter."""
    setattr(whole, whole.base_model_prefix, adapter.model)
    whole.tie_weights()
    return whole


def missing(adapter: Adapter) -> str:
    """What to say of a model without a language-model head: which class has one, if any has."""
    what = adapter.config.model_type
    if adapter.head_class is None:
        return f"no language-model head is known of {what}: choose a model that predicts or fills in tokens"
    return f"no language-model head came with this {what}: give it as {adapter.head_class}"


def _unfilled(whole: Any) -> bool:
    return any(tensor.is_meta for tensor in whole.state_dict().values())
