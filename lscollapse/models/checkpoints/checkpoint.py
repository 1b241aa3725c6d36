"""Reading checkpoints: HF layout of all architectures, GGUF files, and the original mamba_ssm layout of Mamba-2.

Every way in ends in the same two things: a transformers config built here, and the tensors of the base model under
transformers' names, memory mapped. Heads and poolers are left out; of the rest nothing may be missing, left over, or of
another shape, and every value must be a finite floating-point number. Code from a repository is never run, pickles are
read with `weights_only=True`. Other architectures than those of `architectures.CLASSES` are read by transformers
(auto.py) under the same rules; it is imported where it is needed, as architectures.py says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from lscollapse.core import registry
from lscollapse.core.files import is_gguf
from lscollapse.models.checkpoints.architectures import (
    CLASSES,
    built,
    check_count,
    class_of,
    config_of,
    count_parameters,
    on_meta,
    refuse_depth,
    seeded,
)
from lscollapse.models.checkpoints.held import HeldMamba2, with_modules
from lscollapse.models.checkpoints.located import Located, Where, locate_checkpoint
from lscollapse.models.checkpoints.mamba2_config import tensor_shapes
from lscollapse.models.checkpoints.refusals import (
    other_shapes,
    refuse_kinds,
    refuse_misfits,
    refuse_values,
    refuse_zeros,
    token_embedding,
)
from lscollapse.models.checkpoints.tensors import (
    CheckpointError,
    base_tensors,
    hashing,
    head_tensors,
    is_mapped,
    is_old_buffer,
    read_tensors,
)


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from, for the record.

    Attributes:
        sha256: of the weights file; of several, that of the lines "<sha256>  <name>" as sha256sum prints them; of
            random weights, "random-init-SEED".
        n_parameters: of the base model, without pooler and heads.
        stored: how the numbers are stored where that says something of them, such as "GGUF Q4_1, dequantised".
    """

    name: str
    architecture: str
    location: str
    revision: str
    sha256: str
    text: str
    n_layers: int
    n_parameters: int
    stored: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A transformers base model (eval mode) or an S4D, and its origin.

    Attributes:
        held: the model, of Mamba-2 its parameters without transformers' modules: what `adapt` takes.
    """

    held: Any
    info: ModelInfo

    @cached_property
    def model(self) -> Any:
        """The model with its modules."""
        return with_modules(self.held)


@dataclass(frozen=True)
class LayerReader:
    """A Mamba-2 checkpoint of which only what is asked for is read from disk, in the dtype of the file.

    Attributes:
        tensors: of all layers, `embeddings.weight` (V, d) and `norm_f.weight` (d,).
    """

    config: Any
    info: ModelInfo
    tensors: dict[str, Tensor]

    def layer(self, k: int) -> dict[str, Tensor]:
        """Tensors of block `k` (0-based), named as in Mamba2Block: `norm.weight`, `mixer.in_proj.weight`, ..."""
        prefix = f"layers.{k}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    as_stored: bool = False,
    random_init: int | None = None,
    **where: Unpack[Where],
) -> Checkpoint:
    """A model by short name (see registry.ENTRIES), local folder, GGUF file, or hub id.

    Args:
        dtype: of the loaded weights, whatever the file holds.
        device: where they are loaded to; those of Mamba-2 go there in the dtype of the file and are converted there.
        as_stored: matrices of Mamba-2 in 16 bits keep the dtype of the file.
        random_init: a seed; no weights are read, and the model of this config is initialised afresh by transformers.
        where: revision, cache_dir and offline (see Where).

    Raises:
        CheckpointError, ModelNameError, HubError, AssetError: one line each.
    """
    files = locate_checkpoint(registry.resolve(name_or_path), config_only=random_init is not None, **where)
    config = config_of(files)
    if random_init is not None:
        with seeded(random_init):
            fresh = built(config).to(device, dtype)
        info = _info(files, config, f"random-init-{random_init}")
        return Checkpoint(fresh.eval(), replace(info, stored=""))
    refuse_depth(files, config)
    with hashing(files.weights) as digest:
        if config.model_type == "mamba2":
            model: Any = _mamba2(config, _matching(files, config), dtype, device, as_stored)
        elif config.model_type in CLASSES:
            model = _filled(config, _matching(files, config), dtype).to(device)
        else:
            from lscollapse.models.checkpoints import auto

            if not files.stored:  # a GGUF file is looked at while it is read
                auto.inspect_headers(config, files.weights, files.where)
            check_count(files, config)
            model = auto.filled(config, files.weights, files.where, dtype).to(device)
        _check_values(model, files.where)
        return Checkpoint(model.eval(), _info(files, config, digest.result()))


def open_layers(name_or_path: str | Path, **where: Unpack[Where]) -> LayerReader:
    """A Mamba-2 checkpoint to be read layer by layer; arguments and errors as for `load`."""
    files = locate_checkpoint(registry.resolve(name_or_path), **where)
    config = config_of(files)
    if config.model_type != "mamba2":
        raise CheckpointError(f"{files.where} is {config.model_type}: only Mamba-2 checkpoints are read layer by layer")
    whole = next((file for file in files.weights if not is_mapped(file)), None)
    if whole is not None:
        raise CheckpointError(
            f"{whole} is a pickle from before PyTorch 1.6, which is read whole or not at all: use --stream never, or save"
            " its tensors as model.safetensors"
        )
    tensors = _matching(files, config)
    with hashing(files.weights) as digest:
        refuse_values(tensors, files.where, mapped=True)
        refuse_zeros("embeddings.weight", tensors["embeddings.weight"], files.where)
        return LayerReader(config, _info(files, config, digest.result()), tensors)


def open_head(name_or_path: str | Path, **where: Unpack[Where]) -> dict[str, Tensor]:
    """The tensors of heads and poolers, which `load` leaves out, memory mapped; arguments and errors as for `load`."""
    files = locate_checkpoint(registry.resolve(name_or_path), **where)
    named = [read_tensors(file) for file in files.weights if not is_gguf(file)]  # there they have other names
    heads = {name: tensor for tensors in named for name, tensor in head_tensors(tensors).items()}
    scoring = {name: tensor for name, tensor in heads.items() if "lm_head" in name or "predictions" in name}
    refuse_kinds(scoring, files.where)
    refuse_values(scoring, files.where)
    return heads


def load_with_head(name_or_path: str | Path, kind: Any, *, dtype: torch.dtype, **where: Unpack[Where]) -> Any:
    """The whole model as transformers' class `kind` reads it; None where the checkpoint lacks the head.

    For heads whose tensors have other names in the file than in the model; `open_head` knows those of `CLASSES`. Other
    arguments and errors as for `load`.
    """
    files = locate_checkpoint(registry.resolve(name_or_path), **where)
    config = config_of(files)
    if config.model_type in CLASSES:
        return None
    from lscollapse.models.checkpoints import auto

    return auto.with_head(kind, config, files.weights, files.where, dtype)


def outline(name_or_path: str | Path, **where: Unpack[Where]) -> tuple[str, int]:
    """Architecture and number of parameters, from the registry or from config.json alone."""
    entry = registry.resolve(name_or_path)
    if entry.architecture and entry.n_parameters:
        return entry.architecture, entry.n_parameters
    config = config_of(locate_checkpoint(entry, config_only=True, **where))
    return config.model_type, count_parameters(config)


def inspect(name_or_path: str | Path, **where: Unpack[Where]) -> tuple[str, int]:
    """Architecture and number of parameters of a checkpoint whose files are here, after their headers were read.

    Arguments and errors as for `load`; of what `load` refuses, values that are not finite are found only there.
    """
    files = locate_checkpoint(registry.resolve(name_or_path), **where)
    config = config_of(files)
    refuse_depth(files, config)
    if config.model_type in CLASSES:
        _matching(files, config)
    else:
        from lscollapse.models.checkpoints import auto

        auto.inspect_headers(config, files.weights, files.where)
    return config.model_type, count_parameters(config)


def _matching(files: Located, config: Any) -> dict[str, Tensor]:
    """Tensors of the base model under transformers' names, memory mapped: nothing is read before it is used.

    Raises:
        CheckpointError: they are not those of the config's base model in name, shape and number of parameters.
    """
    tensors = {name: tensor for file in files.weights for name, tensor in base_tensors(read_tensors(file)).items()}
    if config.model_type == "mamba2":
        expected = tensor_shapes(config)
    else:
        expected = {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}
    refuse_kinds({name: tensor for name, tensor in tensors.items() if name in expected}, files.where)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = other_shapes(tensors, expected)
    refuse_misfits({"missing": missing, "unexpected": unexpected, "of another shape": shapes}, files.where)
    check_count(files, config)
    return tensors


def _check_values(model: Any, where: str) -> None:
    """Raise unless every weight that the blocks see is finite and the embedding tells tokens apart."""
    state = model.state_dict()
    refuse_values(
        {name: t for name, t in state.items() if not name.startswith("pooler.") and not is_old_buffer(name)}, where
    )
    embedding = token_embedding(model)
    if embedding is not None:
        refuse_zeros(*embedding, where)


def _mamba2(
    config: Any, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str, as_stored: bool
) -> HeldMamba2:  # fmt: skip
    """Mamba-2 with these tensors; on a CPU those that are of the dtype asked for stay in their file."""

    def placed(tensor: Tensor) -> Tensor:
        there = tensor.to(device)  # before it is converted: half the bytes of a file in 16 bits
        matrix = there.ndim == 2  # of all else the block needs every number in float32 for every tile
        return there if as_stored and matrix and there.dtype.itemsize == 2 else there.to(dtype)

    return HeldMamba2(config, {name: placed(tensor) for name, tensor in tensors.items()})


def _filled(config: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    if config.model_type == "s4d":
        model = built(config)
        model.load_state_dict(tensors)
        return model.to(dtype)
    from lscollapse.models.checkpoints import auto

    arguments = CLASSES[config.model_type]
    with auto.quietly():
        return class_of(config).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **arguments)


def _info(files: Located, config: Any, digest: str) -> ModelInfo:
    return ModelInfo(
        name=files.entry.name,
        architecture=config.model_type,
        location=str(files.weights[0]) if files.stored else files.entry.location,
        revision=files.revision,
        sha256=digest,
        text=files.entry.text,
        n_layers=getattr(config, "num_hidden_layers", 0),
        n_parameters=count_parameters(config),
        stored=files.stored,
    )
