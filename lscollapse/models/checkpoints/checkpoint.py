"""Reading checkpoints: HF layout of all architectures, and the original mamba_ssm layout of Mamba-2.

Every way in ends in the same two things: a transformers config built here, and the tensors of the base model under
transformers' names, memory mapped. Heads and poolers are left out; of the rest nothing may be missing, left over, or of
another shape, and every value must be a finite floating-point number. Code from a repository is never run, pickles are
read with `weights_only=True`. Other architectures than those of `_classes` are read by transformers (auto.py) under the
same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lscollapse.core import hub, registry
from lscollapse.core.registry import Entry
from lscollapse.models.checkpoints import auto, mamba_ssm
from lscollapse.models.checkpoints.refusals import (
    refuse_kinds,
    refuse_misfits,
    refuse_values,
    refuse_zeros,
    token_embedding,
)
from lscollapse.models.checkpoints.tensors import (
    CheckpointError,
    base_tensors,
    head_tensors,
    is_mapped,
    is_old_buffer,
    read_json,
    read_tensors,
    sha256,
)


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from, for the record.

    Attributes:
        sha256: of the weights file; of several, that of the lines "<sha256>  <name>" as sha256sum prints them; of
            random weights, "random-init-SEED".
        n_parameters: of the base model, without pooler and heads.
    """

    name: str
    architecture: str
    location: str
    revision: str
    sha256: str
    text: str
    n_layers: int
    n_parameters: int


@dataclass(frozen=True)
class Checkpoint:
    """A transformers base model (eval mode) or an S4D, and its origin."""

    model: Any
    info: ModelInfo


@dataclass(frozen=True)
class LayerReader:
    """A Mamba-2 checkpoint of which only what is asked for is read from disk, in the dtype of the file."""

    config: Any
    info: ModelInfo
    tensors: dict[str, Tensor]

    def globals(self) -> dict[str, Tensor]:
        """What belongs to no layer: `embeddings.weight` (V, d) and `norm_f.weight` (d,)."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith("layers.")}

    def layer(self, k: int) -> dict[str, Tensor]:
        """Tensors of block `k` (0-based), named as in Mamba2Block: `norm.weight`, `mixer.in_proj.weight`, ..."""
        prefix = f"layers.{k}."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    random_init: int | None = None,
) -> Checkpoint:
    """A model by short name (see registry.ENTRIES), local folder, or hub id.

    Args:
        revision: of a hub repository, instead of the one that the registry pins.
        dtype: of the loaded weights, whatever the file holds.
        cache_dir: for what is fetched; the default is the hub's cache.
        offline: make no call.
        random_init: a seed; no weights are read, and the model of this config is initialised afresh by transformers.

    Raises:
        CheckpointError, ModelNameError, HubError, AssetError: one line each.
    """
    found = _locate(registry.resolve(name_or_path), revision, cache_dir, offline, random_init is not None)
    config = _config(found)
    if random_init is None:
        if config.model_type in _classes():
            tensors = _tensors(found)
            _match(found, config, tensors)
            model = _filled(config, tensors, dtype)
        else:
            model = auto.filled(config, found.weights, found.where, dtype)
        _check_values(model, found.where)
        digest = sha256(found.weights)
    else:
        model = _random(config, random_init, dtype)
        digest = f"random-init-{random_init}"
    return Checkpoint(model.eval(), _info(found, config, digest))


def open_layers(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> LayerReader:
    """A Mamba-2 checkpoint to be read layer by layer; arguments and errors as for `load`."""
    found = _locate(registry.resolve(name_or_path), revision, cache_dir, offline, config_only=False)
    config = _config(found)
    if config.model_type != "mamba2":
        raise CheckpointError(f"{found.where} is {config.model_type}: only Mamba-2 checkpoints are read layer by layer")
    whole = next((file for file in found.weights if not is_mapped(file)), None)
    if whole is not None:
        raise CheckpointError(
            f"{whole} is a pickle from before PyTorch 1.6, which is read whole or not at all: use --stream never, or save"
            " its tensors as model.safetensors"
        )
    tensors = _tensors(found)
    _match(found, config, tensors)
    refuse_values(tensors, found.where, mapped=True)
    refuse_zeros("embeddings.weight", tensors["embeddings.weight"], found.where)
    return LayerReader(config, _info(found, config, sha256(found.weights)), tensors)


def open_head(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> dict[str, Tensor]:
    """The tensors of heads and poolers, which `load` leaves out, memory mapped; arguments and errors as for `load`."""
    found = _locate(registry.resolve(name_or_path), revision, cache_dir, offline, config_only=False)
    heads = {name: tensor for file in found.weights for name, tensor in head_tensors(read_tensors(file)).items()}
    scoring = {name: tensor for name, tensor in heads.items() if "lm_head" in name or "predictions" in name}
    refuse_kinds(scoring, found.where)
    refuse_values(scoring, found.where)
    return heads


def load_with_head(
    name_or_path: str | Path,
    kind: Any,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> Any:
    """The whole model as transformers' class `kind` reads it; None where the checkpoint lacks the head.

    For heads whose tensors have other names in the file than in the model; `open_head` knows those of `_classes`. Other
    arguments and errors as for `load`.
    """
    found = _locate(registry.resolve(name_or_path), revision, cache_dir, offline, config_only=False)
    config = _config(found)
    if config.model_type in _classes():
        return None
    return auto.with_head(kind, config, found.weights[0].parent, found.where, dtype)


def describe(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> tuple[str, int]:
    """Architecture and number of parameters, from the registry or from config.json alone."""
    entry = registry.resolve(name_or_path)
    if entry.architecture and entry.n_parameters:
        return entry.architecture, entry.n_parameters
    config = _config(_locate(entry, revision, cache_dir, offline, config_only=True))
    return config.model_type, _n_parameters(config)


def inspect(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> tuple[str, int]:
    """Architecture and number of parameters of a checkpoint whose files are here, after their headers were read.

    Arguments and errors as for `load`; of what `load` refuses, values that are not finite are found only there.
    """
    found = _locate(registry.resolve(name_or_path), revision, cache_dir, offline, config_only=False)
    config = _config(found)
    if config.model_type in _classes():
        _match(found, config, _tensors(found))
    else:
        auto.inspect(config, found.weights, found.where)
    return config.model_type, _n_parameters(config)


@dataclass(frozen=True)
class _Found:
    """The files of a checkpoint on this machine. `where` names them in errors."""

    entry: Entry
    where: str
    revision: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]


def _locate(
    entry: Entry, revision: str | None, cache_dir: str | Path | None, offline: bool, config_only: bool
) -> _Found:
    if revision and entry.source != "hub":
        raise CheckpointError(f"{entry.name} is not on the hub: a revision ({revision}) cannot be chosen")
    revision = revision or entry.revision
    if config_only and entry.config is not None:
        return _Found(entry, entry.name, "", entry.config, ())
    if entry.source == "package":
        config, file = registry.embedded_files(entry)
        return _Found(entry, entry.name, revision, read_json(config), (file,))
    if entry.source == "hub":
        cache = Path(cache_dir).expanduser() / "hub" if cache_dir else None
        files = ["config.json"] if config_only else None
        folder = hub.fetch(entry.location, revision=revision, files=files, cache_dir=cache, offline=offline)
        where, revision = entry.location, folder.name
    else:
        folder = Path(entry.location).expanduser()
        where = str(folder)
    weight_files = () if config_only else _weights(folder, where)
    return _Found(entry, where, revision, read_json(folder / "config.json"), weight_files)


def _weights(folder: Path, where: str) -> tuple[Path, ...]:
    names = hub.weights_files([path.name for path in folder.iterdir()])
    if hub.INDEX in names:
        names = sorted(set(read_json(folder / hub.INDEX).get("weight_map", {}).values()))
    files = tuple(folder / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        wanted = ", ".join(missing) or f"model.safetensors, {hub.INDEX} or pytorch_model.bin"
        raise CheckpointError(f"no weights in {where}: expected {wanted}")
    return files


def _classes() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """model_type -> (config class, base model class, arguments that leave out its pooler)."""
    from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, Mamba2Config, Mamba2Model

    from lscollapse.models.nets.s4d import S4D, S4DConfig

    return {
        "mamba2": (Mamba2Config, Mamba2Model, {}),
        "albert": (AlbertConfig, AlbertModel, {"add_pooling_layer": False}),
        "bert": (BertConfig, BertModel, {"add_pooling_layer": False}),
        "s4d": (S4DConfig, S4D, {}),
    }


def _config(found: _Found) -> Any:
    """The transformers config, from either layout of config.json."""
    from huggingface_hub.errors import StrictDataclassError

    raw, classes = found.config, _classes()
    model_type = raw.get("model_type")
    try:
        if mamba_ssm.is_own_layout(raw, found.where):
            config = mamba_ssm.read_config(raw, found.where)
        elif model_type in classes:
            config = classes[model_type][0].from_dict(dict(raw))
        else:
            config = auto.config(raw, found.where)
    except CheckpointError:
        raise
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError) as error:  # transformers' own validation
        raise CheckpointError(f"config.json of {found.where} is not valid: {' '.join(str(error).split())}") from error
    if found.entry.architecture not in ("", config.model_type):
        raise CheckpointError(f"{found.where} holds {config.model_type}, expected {found.entry.architecture}")
    return config


def _tensors(found: _Found) -> dict[str, Tensor]:
    """Tensors of the base model under transformers' names, memory mapped: nothing is read before it is used."""
    return {name: tensor for file in found.weights for name, tensor in base_tensors(read_tensors(file)).items()}


def _match(found: _Found, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the tensors are those of the config's base model in name, shape and number of parameters."""
    expected = {name: tuple(tensor.shape) for name, tensor in _on_meta(config).state_dict().items()}
    refuse_kinds({name: tensor for name, tensor in tensors.items() if name in expected}, found.where)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    refuse_misfits(wrong, found.where)
    n_parameters, published = _n_parameters(config), found.entry.n_parameters
    if published not in (None, n_parameters):
        raise CheckpointError(
            f"{found.where} has {n_parameters:,} parameters, {found.entry.name} should have {published:,}"
        )


def _check_values(model: Any, where: str) -> None:
    """Raise unless every weight that the blocks see is finite and the embedding tells tokens apart."""
    state = model.state_dict()
    refuse_values(
        {name: t for name, t in state.items() if not name.startswith("pooler.") and not is_old_buffer(name)}, where
    )
    embedding = token_embedding(model)
    if embedding is not None:
        refuse_zeros(*embedding, where)


def _on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return _built(config)


def _built(config: Any) -> Any:
    if config.model_type not in _classes():
        return auto.built(config)
    _, model_class, arguments = _classes()[config.model_type]
    return model_class(config, **arguments)


def _n_parameters(config: Any) -> int:
    named = _on_meta(config).named_parameters()
    return sum(parameter.numel() for name, parameter in named if not name.startswith("pooler."))


def _filled(config: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    _, model_class, arguments = _classes()[config.model_type]
    if config.model_type == "s4d":
        model = model_class(config)
        model.load_state_dict(tensors)
        return model.to(dtype)
    with auto.quietly():
        return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **arguments)


def _random(config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(config).to(dtype)


def _info(found: _Found, config: Any, digest: str) -> ModelInfo:
    return ModelInfo(
        name=found.entry.name,
        architecture=config.model_type,
        location=found.entry.location,
        revision=found.revision,
        sha256=digest,
        text=found.entry.text,
        n_layers=getattr(config, "num_hidden_layers", 0),
        n_parameters=_n_parameters(config),
    )
