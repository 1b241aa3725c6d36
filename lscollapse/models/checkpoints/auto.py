"""Checkpoints of any architecture of transformers, read by its Auto classes; no code from a repository is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, FiniteFloat
from transformers import AutoModel
from transformers.utils import logging

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.files import first_line, is_gguf
from lscollapse.core.hub import PICTURES
from lscollapse.core.outside import checked, shown
from lscollapse.models.checkpoints import gguf_file
from lscollapse.models.checkpoints.architectures import on_meta, whole_on_meta
from lscollapse.models.checkpoints.refusals import other_shapes, refuse_kinds, refuse_misfits, refuse_values
from lscollapse.models.checkpoints.tensors import CheckpointError, is_old_buffer, read_json, read_tensors


def filled(config: Any, files: Sequence[Path], where: str, dtype: torch.dtype) -> Any:
    """The base model with the weights in `files`, which lie in one folder, or are one GGUF file.

    Raises:
        CheckpointError: the weights are damaged, some are missing, left over or of another shape, or are no floats.
    """
    model, report = _read(AutoModel, config, files, where, dtype)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    left_over = sorted(name for name in report["unexpected_keys"] if _in_a_block(name, model))
    refuse_misfits({"missing": missing, "unexpected": left_over}, where)
    if is_gguf(files[0]):
        return model
    read = {
        name: t for file in files for name, t in read_tensors(file).items() if name not in report["unexpected_keys"]
    }
    refuse_kinds(_weights(read, model), where)
    _note_pixels(model.config, files[0].parent / PICTURES)
    return model


def with_head(kind: Any, config: Any, files: Sequence[Path], where: str, dtype: torch.dtype) -> Any:
    """The model of class `kind`, with its head, from `files`; None where the weights of the head are missing.

    Raises:
        CheckpointError: the weights are damaged.
    """
    model, report = _read(kind, config, files, where, dtype)
    inside = f"{model.base_model_prefix}."
    if not all(name.startswith(inside) for name in report["missing_keys"]):
        return None
    refuse_values({n: p for n, p in model.named_parameters() if not n.startswith(inside)}, where)
    return model


def _read(kind: Any, config: Any, files: Sequence[Path], where: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model of class `kind` from local files, and what transformers reports of its tensors."""
    folder: Path | None = files[0].parent
    given: dict[str, Any] = {"local_files_only": True}
    if is_gguf(files[0]):
        whole = whole_on_meta(config)
        folder, given = None, {"state_dict": gguf_file.read_tensors(files[0], whole, where, dtype)}
        kind = type(whole.base_model) if kind is AutoModel else kind
    with quietly():
        try:
            model, report = kind.from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True, **given
            )
            return model, report
        except Exception as error:  # whatever a damaged file makes the readers raise
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"the weights of {where} cannot be read: {shown(first_line(error), 200)}") from error


def inspect_headers(config: Any, files: Sequence[Path], where: str) -> None:
    """What the headers of `files` tell of whether `filled` will succeed.

    transformers renames and joins tensors of some architectures while it reads them, so that a name which the model
    does not know tells nothing; a missing one does where no such name is there.

    Raises:
        CheckpointError: tensors are missing, of another shape, or are no floats.
    """
    if is_gguf(files[0]):
        gguf_file.inspect(files[0], whole_on_meta(config), where)
        return
    model = on_meta(config)
    read = {_own_name(name, model): t for file in files for name, t in read_tensors(file).items()}
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("pooler.")}
    refuse_misfits({"of another shape": other_shapes(read, expected)}, where)
    known = set(model.state_dict())
    absent_by_design = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [n for n in expected if n not in read and not any(p.search(n) for p in absent_by_design)]
    if not any(_is_numbered(name) for name in read if name not in known):
        refuse_misfits({"missing": missing}, where)
    refuse_kinds(_weights(read, model), where)


def _weights(read: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Of the tensors of a file those that become weights of the base model: what is a number in it is a float there."""
    state = model.state_dict()
    counters = {name.rpartition(".")[2] for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    weights = {}
    for name, tensor in read.items():
        weight = state.get(_own_name(name, model))  # None where transformers renames or joins it while it reads
        renamed = weight is None and tensor.ndim >= 2 and name.rpartition(".")[2] not in counters
        if (renamed or (weight is not None and weight.is_floating_point())) and not is_old_buffer(name):
            weights[name] = tensor
    return weights


def _own_name(name: str, model: Any) -> str:
    """The name of a file's tensor within the base model."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _in_a_block(name: str, model: Any) -> bool:
    """Whether a tensor of a file belongs to a numbered part of the base model, no head."""
    name = _own_name(name, model)
    return _is_numbered(name) and hasattr(model, name.partition(".")[0])


def _is_numbered(name: str) -> bool:
    """Whether a tensor of a file is of one of several parts that are alike."""
    return re.search(r"\.\d+\.", name) is not None and not is_old_buffer(name)


class Pixels(BaseModel):
    """What is read of preprocessor_config.json: how the values of a colour, in [0, 1], are normalised."""

    image_mean: list[FiniteFloat] | None = Field(default=None, min_length=1, max_length=4)
    image_std: list[Annotated[FiniteFloat, Field(gt=0)]] | None = Field(default=None, min_length=1, max_length=4)


def _note_pixels(config: Any, file: Path) -> None:
    """How pictures are normalised, noted in the config, where adapters/vit.py looks for it."""
    if file.is_file():
        for name, value in checked(Pixels, read_json(file), CheckpointError, str(file)).model_dump().items():
            if value is not None:
                setattr(config, name, value)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of unused heads, which are left out on purpose."""
    library: Any = logging  # parts of it have no types
    shown, verbosity = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()
