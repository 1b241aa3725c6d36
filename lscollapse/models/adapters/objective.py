"""What a model is scored on, the next token or hidden ones, and which class of transformers has the head for it."""

from __future__ import annotations

from typing import Any


def fills_masks(config: Any, whole: Any = None) -> bool:
    """Whether a model fills in hidden tokens instead of predicting the next one.

    By the class of the model, else by the class its checkpoint was saved as, else by what transformers has for the
    architecture: of those that have both, such as BERT, a decoder predicts.

    Args:
        whole: the model as it came, with its head if it has one.
    """
    names = [kind.__name__ for kind in type(whole).__mro__] + list(getattr(config, "architectures", None) or [])
    for name in names:
        if "MaskedLM" in name:
            return True
        if "CausalLM" in name or "LMHead" in name:
            return False
    predicts, fills = _names(config)
    return fills is not None and (predicts is None or not getattr(config, "is_decoder", False))


def class_with_head(config: Any, whole: Any = None) -> str | None:
    """The name of transformers' class of this architecture with the head for its objective, None where there is none.

    None too where one class serves both objectives: which of them a checkpoint was trained for is then not known.
    """
    predicts, fills = _names(config)
    if predicts == fills:
        return None
    return fills if fills_masks(config, whole) else predicts


def _names(config: Any) -> tuple[str | None, str | None]:
    """The classes that predict the next token, and that fill in hidden ones."""
    from transformers.models.auto import modeling_auto

    mappings = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    predicts, fills = (mapping.get(getattr(config, "model_type", "")) for mapping in mappings)
    return predicts, fills
