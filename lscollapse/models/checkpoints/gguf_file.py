"""GGUF files, as llama.cpp writes them: what their header says, and their tensors under transformers' names, dequantised.

The file is read by the packages gguf and transformers; nothing in it is code. What transformers would skip without a word
(tensors that its model has no place for, scaled rotary positions, parts of a file that was split) is refused here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as reading
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.files import first_line
from lscollapse.core.outside import shown
from lscollapse.models.checkpoints.refusals import other_shapes, refuse_misfits
from lscollapse.models.checkpoints.tensors import CheckpointError, size_hint

ORIGINAL = "give the checkpoint that it was made from"
_FREQUENCIES = "rope_freqs.weight"  # what the rotary frequencies of Llama 3 are divided by
_PLAIN_ROPE = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its numbers.

    Attributes:
        architecture: in the words of llama.cpp.
        config: that of transformers, as in a config.json.
        stored: how most of the numbers are stored, such as "GGUF Q4_1, dequantised".
        tensors: those that become weights, mapped: `name` in the words of llama.cpp, `data`, `tensor_type`, ...
    """

    architecture: str
    config: Mapping[str, Any]
    stored: str
    tensors: tuple[Any, ...]


def read_header(file: Path) -> Header:
    """The header of a GGUF file; read once as long as the file does not change.

    Raises:
        CheckpointError: the file is damaged or a part of one, of an architecture that transformers does not read from GGUF,
            or says of rotary positions what transformers does not read.
    """
    stat = file.stat()
    return _header(file, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=4)
def _header(file: Path, version: tuple[int, ...]) -> Header:
    from gguf import GGUFReader  # not above: reading any other checkpoint does without it

    with _explained(f"{file} cannot be read{size_hint(file)}"):
        reader: Any = GGUFReader(os.fspath(file))
        said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        sizes: Counter[str] = Counter()
        for tensor in reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        factors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == _FREQUENCIES}
    with _explained(f"the metadata of {file} cannot be read"):
        _refuse(said, file)
        load: Any = reading.load_gguf_checkpoint
        config = load(os.fspath(file))["config"]
        rope = _llama3(config, factors[_FREQUENCIES]) if factors and config["model_type"] == "llama" else None
    if rope is not None:
        del config["rope_theta"]
        config["rope_parameters"] = rope
    kind = max(sizes, key=lambda name: sizes[name], default="F32")
    stored = f"GGUF {kind}" + ("" if kind in ("F32", "F16", "BF16") else ", dequantised")
    tensors = (tensor for tensor in reader.tensors if rope is None or tensor.name != _FREQUENCIES)
    return Header(said["general.architecture"], config, stored, tuple(tensors))


def _refuse(said: Mapping[str, Any], file: Path) -> None:
    """Raise a CheckpointError where these entries of a header say what transformers would pass over."""
    architecture = said.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{file} names no architecture (general.architecture): {ORIGINAL}")
    if (parts := said.get("split.count", 1)) != 1:
        raise CheckpointError(
            f"{file} is a part of {shown(parts)}: join them with `llama-gguf-split --merge` and give the whole"
        )
    for key, plain in _PLAIN_ROPE.items():
        value = said.get(f"{architecture}.{key}", plain)
        if value != plain:
            raise CheckpointError(
                f"{file} scales its rotary positions ({key} {shown(value)}), which transformers does not read from GGUF: {ORIGINAL}"
            )


def _llama3(config: Mapping[str, Any], factors: Tensor) -> dict[str, Any] | None:
    """The rotary settings of Llama 3 whose frequencies are the plain ones over `factors`; None where they are others.

    A GGUF file holds the quotients (head_dim / 2,), not the settings. All released Llama 3 differ in `factor` alone.
    """
    settings = {
        "rope_type": "llama3", "rope_theta": config["rope_theta"], "factor": float(factors.max()),
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    shape = {name: value for name, value in config.items() if name != "rope_theta"}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](CONFIG_MAPPING["llama"].from_dict({**shape, "rope_parameters": settings}))
    places = torch.arange(len(scaled)) / len(scaled)
    plain = settings["rope_theta"] ** -places
    agree = factors.shape == scaled.shape and torch.allclose(plain / scaled, factors, rtol=1e-4)
    return settings if agree else None


def inspect(file: Path, model: Any, where: str) -> tuple[Any, dict[str, str]]:
    """What undoes llama.cpp's own order of a tensor's numbers, and the names in `model` of the tensors of the file.

    Args:
        model: on the meta device, with its head where the architecture has one; the file may lack the head.

    Raises:
        CheckpointError: the file does not hold a tensor for every weight of the base model, or holds another.
    """
    header = read_header(file)
    with _explained(f"the tensors of {where} are not known by their names"):
        processors: Any = reading.TENSOR_PROCESSORS
        processor = processors.get(header.architecture, reading.TensorProcessor)(config=header.config)
        names: Any = reading.get_gguf_hf_weights_map
        known: dict[str, str] = names(_without_parts(model), processor)
    there = {known[tensor.name] for tensor in header.tensors if tensor.name in known}
    base = {id(parameter) for parameter in model.base_model.parameters()}
    missing = [name for name, p in model.named_parameters() if id(p) in base and name not in there]
    unexpected = [tensor.name for tensor in header.tensors if tensor.name not in known]
    refuse_misfits({"missing": missing, "unexpected": unexpected}, where)
    return processor, known


def _without_parts(model: Any) -> Any:
    """`model` as transformers looks for names in it, down to the base model: of every part it would make a table anew."""
    inner = {
        name: SimpleNamespace(state_dict=part.state_dict, named_children=list)
        for name, part in model.named_children()
        if name == model.base_model_prefix
    }
    return SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=inner.items)


def read_tensors(file: Path, model: Any, where: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a GGUF file under the names that they have in `model`, dequantised in float32, then of `dtype`.

    Raises:
        CheckpointError: as `inspect`, or a tensor is of another shape or of a kind that gguf does not dequantise.
    """
    from gguf import dequantize

    processor, known = inspect(file, model, where)
    read: dict[str, Tensor] = {}
    for tensor in read_header(file).tensors:
        what = f"{shown(tensor.name)} of {where} cannot be read as {tensor.tensor_type.name}"
        with _explained(what), np.errstate(all="ignore"):  # what is not finite then is refused later, by name
            numbers = dequantize(tensor.data, tensor.tensor_type)
            so_far = {"tensors": read}  # where experts are put together
            done = processor.process(
                weights=numbers, name=tensor.name, tensor_key_mapping=known, parsed_parameters=so_far
            )
            if done.name in known:
                read[known[done.name]] = torch.from_numpy(np.copy(done.weights)).to(dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    refuse_misfits({"of another shape": other_shapes(read, expected)}, where)
    return read


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Where a reader fails in the block, a CheckpointError that says `what` happened, and why; ours stay as they are."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{what}: {shown(first_line(error), 200)}") from error
