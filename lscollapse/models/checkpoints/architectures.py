"""What a config.json says: the architecture's config, and its base model before the weights are read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.outside import shown
from lscollapse.models.checkpoints import mamba_ssm
from lscollapse.models.checkpoints.config_json import refuse_activations, refuse_code, refuse_said
from lscollapse.models.checkpoints.located import Located
from lscollapse.models.checkpoints.mamba2_config import as_transformers, read_settings, tensor_shapes
from lscollapse.models.checkpoints.tensors import CheckpointError, read_tensors
from lscollapse.models.nets.s4d import S4D, S4DConfig

# transformers is imported where it is needed: a Mamba-2 and an S4D are measured without it, in half the time of a small run.

DEEP = 64  # layers over which a config is not believed before the weights are looked at
MOST_PER_BYTE = 8  # parameters of a weights file: a quantised one has up to 4
# model_type -> what leaves out the pooler of its base model.
CLASSES: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "albert": {"add_pooling_layer": False},
    "bert": {"add_pooling_layer": False},
    "s4d": {},
}


def config_of(files: Located) -> Any:
    """The transformers config, from either layout of config.json.

    Raises:
        CheckpointError: it is not valid, or not of the architecture that the registry names.
    """
    raw = files.config
    refuse_said(raw, files.described)
    model_type = raw.get("model_type")
    try:
        if mamba_ssm.is_own_layout(raw, files.where):
            config = mamba_ssm.read_config(raw, files.where)
        elif model_type == "mamba2":
            if raw.get("hidden_act", "silu") != "silu":  # then the blocks are transformers'
                refuse_activations(raw, files.described)
            config = read_settings(raw) or _read(raw, files)
        elif model_type == "s4d":
            config = S4DConfig.from_dict(dict(raw))
        elif model_type in CLASSES:
            config = _read(raw, files)
        else:
            config = _transformers_config(raw, files)
    except CheckpointError:
        raise
    except Exception as error:  # whatever makes the reader of an architecture stumble
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{files.described} is not valid: {_reason(error)}") from error
    if files.entry.architecture not in ("", config.model_type):
        raise CheckpointError(f"{files.where} holds {config.model_type}, expected {files.entry.architecture}")
    return config


def _reason(error: Exception) -> str:
    """What an error says, in one line; with its kind where the words alone tell little."""
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__} {said}".strip()


def _read(raw: Mapping[str, Any], files: Located) -> Any:
    """The config as transformers reads it, which then names where it is from; what it logs of a wrong one is not shown.

    Raises:
        CheckpointError and others: it is not valid.
    """
    kind, logger = _mapping()[raw["model_type"]], logging.getLogger("transformers")
    refuse_code(raw, kind, files.described)
    refuse_activations(raw, files.described)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        config = kind.from_dict(dict(raw))
    finally:
        logger.setLevel(level)
    config.name_or_path = files.described
    return config


def _transformers_config(raw: Mapping[str, Any], files: Located) -> Any:
    """The transformers config of a config.json, or of what a GGUF file says in its place.

    Raises:
        CheckpointError: no architecture of the installed transformers, or quantised weights.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    known, model_type = _mapping(), str(raw.get("model_type", ""))
    if model_type not in known or known[model_type] not in MODEL_MAPPING:
        came = f"model_type '{shown(model_type)}'" if model_type else "neither model_type nor d_model and n_layer"
        code = "; it needs code from its repository, which is never run" if "auto_map" in raw else ""
        raise CheckpointError(
            f"{files.described} has {came}: readable are the architectures of the installed transformers and"
            f" mamba_ssm's own layout{code}"
        )
    if "quantization_config" in raw:
        raise CheckpointError(f"{files.where} holds quantised weights: give the checkpoint they were made from")
    return _read(raw, files)


def _mapping() -> Any:
    """model_type -> config class of transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


def built(config: Any) -> Any:
    """The base model with its initial weights, float32; of those in `CLASSES` without the pooler.

    Raises:
        CheckpointError: no such model can be built.
    """
    with _explained(config):
        if config.model_type == "s4d":
            return S4D(config)
        if config.model_type in CLASSES:
            return class_of(config)(as_transformers(config), **CLASSES[config.model_type])
        from transformers import AutoModel

        from_config: Callable[..., Any] = AutoModel.from_config
        return from_config(config, dtype=torch.float32)


@contextmanager
def _explained(config: Any) -> Iterator[None]:
    """Where a model cannot be built in the block, a CheckpointError that names its config."""
    try:
        yield
    except Exception as error:  # whatever the code of an architecture stumbles over
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        named = getattr(config, "name_or_path", "") or f"the config of a {config.model_type}"
        raise CheckpointError(f"{named} describes no model that can be built: {_reason(error)}") from error


def class_of(config: Any) -> Any:
    """transformers' class of the base model of this config."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return MODEL_MAPPING[type(as_transformers(config))]


def on_meta(config: Any) -> Any:
    """The base model, of which no tensor takes memory."""
    with torch.device("meta"):
        return built(config)


def whole_on_meta(config: Any) -> Any:
    """The model with its language-model head, where the architecture has one; no tensor takes memory."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return on_meta(config)
    from_config: Callable[..., Any] = AutoModelForCausalLM.from_config
    with torch.device("meta"), _explained(config):
        return from_config(config, dtype=torch.float32)


def count_parameters(config: Any) -> int:
    """How many numbers the weights of the base model are, without its pooler."""
    if config.model_type == "mamba2":
        return sum(math.prod(shape) for shape in tensor_shapes(config).values())
    named = on_meta(config).named_parameters()
    return sum(parameter.numel() for name, parameter in named if not name.startswith("pooler."))


def refuse_depth(files: Located, config: Any) -> None:
    """Raise a CheckpointError where a deep model has more layers than its files have tensors: building it takes a while."""
    n_layers = getattr(config, "num_hidden_layers", 0)
    if files.stored or not isinstance(n_layers, int) or n_layers <= DEEP:
        return
    held = sum(len(read_tensors(file)) for file in files.weights)
    if n_layers > held:
        raise CheckpointError(
            f"{files.described} describes {n_layers:,} layers, and the weights are {held:,} tensors: they do not belong together"
        )


def check_count(files: Located, config: Any) -> None:
    """Raise a CheckpointError unless the base model has as many parameters as were published, and can be in the files."""
    n_parameters, published = count_parameters(config), files.entry.n_parameters
    if published not in (None, n_parameters):
        raise CheckpointError(
            f"{files.where} has {n_parameters:,} parameters, {files.entry.name} should have {published:,}"
        )
    held = sum(file.stat().st_size for file in files.weights)
    if n_parameters > MOST_PER_BYTE * held:
        raise CheckpointError(
            f"{files.described} describes {n_parameters:,} parameters, {4 * n_parameters / 2**30:,.1f} GiB in float32, and the"
            f" weights are {held:,} bytes: they do not belong together"
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, torch draws on the CPU from this seed; the generator is then where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
