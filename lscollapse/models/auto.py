"""Checkpoints of any architecture that transformers knows, read by its Auto classes; no code from a repository is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lscollapse.models.hub import PICTURES
from lscollapse.models.tensors import CheckpointError
from lscollapse.texts import first_line


def config(raw: Mapping[str, Any], where: str) -> Any:
    """The transformers config of a config.json; `where` names it in errors.

    Raises:
        CheckpointError: no architecture of the installed transformers, or quantised weights.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    model_type = str(raw.get("model_type", ""))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        came = f"model_type {model_type!r}" if model_type else "neither model_type nor d_model and n_layer"
        own = "; it needs code from its repository, which is never run" if "auto_map" in raw else ""
        raise CheckpointError(
            f"config.json of {where} has {came}: readable are the architectures of the installed transformers and"
            f" mamba_ssm's own layout{own}"
        )
    if "quantization_config" in raw:
        raise CheckpointError(f"{where} holds quantised weights: give the checkpoint they were made from")
    return CONFIG_MAPPING[model_type].from_dict(dict(raw))


def built(config: Any) -> Any:
    """The base model with transformers' initial weights, float32."""
    from transformers import AutoModel

    return AutoModel.from_config(config, dtype=torch.float32)


def filled(config: Any, folder: Path, where: str, dtype: torch.dtype) -> Any:
    """The base model with the weights of a local folder.

    Raises:
        CheckpointError: the weights are damaged, or some are missing, left over or of another shape.
    """
    from transformers import AutoModel

    with quietly():
        try:
            model, report = AutoModel.from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )  # fmt: skip
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise CheckpointError(f"the weights of {where} cannot be read: {first_line(error)}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    left_over = sorted(name for name in report["unexpected_keys"] if _in_a_block(name, model))
    for names, what in ((missing, "missing"), (left_over, "unexpected")):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"the weights of {where} do not fit its config.json: tensors {len(names)} {what} ({some})"
            )
    _note_pixels(model.config, folder / PICTURES)
    return model


def with_head(kind: Any, config: Any, folder: Path, where: str, dtype: torch.dtype) -> Any:
    """The model of class `kind`, which has a head, with the weights of a local folder; None where those of the head are missing.

    Raises:
        CheckpointError: the weights are damaged.
    """
    with quietly():
        try:
            model, report = kind.from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )  # fmt: skip
        except Exception as error:  # as in `filled`
            raise CheckpointError(f"the weights of {where} cannot be read: {first_line(error)}") from error
    inside = f"{model.base_model_prefix}."
    return model if all(name.startswith(inside) for name in report["missing_keys"]) else None


def _in_a_block(name: str, model: Any) -> bool:
    """Whether a tensor of a file belongs to a numbered part of the base model, no head."""
    name = name.removeprefix(f"{model.base_model_prefix}.")
    return re.search(r"\.\d+\.", name) is not None and hasattr(model, name.partition(".")[0])


def _note_pixels(config: Any, file: Path) -> None:
    """How pictures are normalised, noted in the config, where models/vit.py looks for it."""
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        for name in ("image_mean", "image_std"):
            if name in settings:
                setattr(config, name, settings[name])


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of unused heads, which are left out on purpose."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
