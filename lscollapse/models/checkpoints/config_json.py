"""What a config.json says, before a model is built of it: sizes that can be, names that are known, no key that overrides code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lscollapse.core.outside import shown
from lscollapse.models.checkpoints.tensors import CheckpointError

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "double", "float", "half")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
GIB = 2**30


class Kind(NamedTuple):
    """The whole numbers of which the names match: what they may be, and how many of what they make."""

    names: re.Pattern[str]
    least: int
    most: int
    unit: str = ""


# In this order: the first that matches counts. A limit is far over what was ever released, and far under what hangs.
KINDS = (
    Kind(re.compile(r"n_layers?|num_(hidden_)?layers"), 1, 1000, "layers"),
    Kind(re.compile(r"n_blocks|depths?|(\w+_)?num_(\w+_)?(layers|blocks)|(encoder|decoder)_layers"), 0, 1000, "layers"),
    Kind(re.compile(r"(\w+_)?vocab_size|n_vocab"), 0, 2**24, "ids"),
    Kind(re.compile(r"num_labels"), 0, 2**20),
    Kind(re.compile(r"(mamba_)?chunk_size"), 1, 2048),  # transformers' Mamba-2 pads a text to it, and squares it
    Kind(re.compile(r"(\w+_)?(num|n)_(\w+_)?experts(_\w+)?"), 0, 2**16),
    Kind(re.compile(r"(\w+_)?(num|n)_(\w+_)?heads?"), 0, 2**14),
    Kind(re.compile(r"max_position_embeddings|n_positions|n_ctx|(num|n)_\w+"), -1, 2**27),
    Kind(re.compile(r"n_embd|n_inner|d_model|d_ff|d_inner|d_intermediate|d_kv|dim|(\w+_)?(hidden|intermediate|embedding|"
                    r"state|head|ffn|conv|proj|projection)_(size|dim)|expand|conv_kernel"), 0, 2**18, "width"),
)  # fmt: skip


def refuse_said(raw: Mapping[str, Any], described: str, place: str = "") -> None:
    """Raise a CheckpointError for what no architecture can mean; the configs of its parts are looked at too.

    Args:
        described: what holds it, for the message: "config.json of FOLDER".
        place: of a part, its key and a dot.
    """
    width = next((raw[name] for name in ("hidden_size", "d_model", "n_embd") if type(raw.get(name)) is int), None)
    for key, value in raw.items():
        where = f"{described} is not valid: {place}{shown(key)}"
        for number in _leaves(value):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise CheckpointError(f"{where} holds {shown(number)}, which 64 bits do not")
            if number != number:
                raise CheckpointError(f"{where} holds NaN, which is no number")
        _refuse_size(key, value, width, where)
        if key == "time_step_limit" and value is not None and not _is_range(value):
            raise CheckpointError(f"{where} must be two numbers, the least and the most, got {shown(value)}")
        if key == "model_type" and not isinstance(value, str):
            raise CheckpointError(f"{where} must be the name of an architecture, got {shown(value)}")
        if key in ("dtype", "torch_dtype") and value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise CheckpointError(f"{where} must be one of {', '.join(DTYPES)}, got '{shown(value)}'")
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            refuse_said(value, described, f"{place}{shown(key)}.")


def _leaves(value: Any) -> Iterator[Any]:
    """What a value is made of in the end."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _is_range(value: Any) -> bool:
    ends = value if isinstance(value, list | tuple) else ()
    return len(ends) == 2 and all(type(end) in (int, float) for end in ends) and 0 <= ends[0] <= ends[1]


def _refuse_size(key: str, value: Any, width: int | None, where: str) -> None:
    kind = next((kind for kind in KINDS if kind.names.fullmatch(key)), None)
    if kind is None or value is None or isinstance(value, dict):
        return
    for number in value if isinstance(value, list) else (value,):
        whole = type(number) is int or (isinstance(number, float) and number.is_integer())
        if whole and kind.least <= number <= kind.most:
            continue
        needs = ""
        if type(number) is int and number > kind.most:
            numbers = {"width": number * number, "ids": number * (width or 0), "layers": number * (width or 0) ** 2}
            needs = _needs(numbers.get(kind.unit, 0), kind.unit)
        raise CheckpointError(
            f"{where} must be a whole number from {kind.least} to {kind.most:,}, got {shown(number)!s}{needs}"
        )


def _needs(numbers: int, unit: str) -> str:
    """What so many numbers would take in float32, as a message ends with it."""
    what = {"width": "a square matrix of it", "ids": "their embedding", "layers": "a matrix of each"}.get(unit)
    return f": {what} would need {4 * numbers // GIB:,} GiB" if what and numbers else ""


def refuse_code(raw: Mapping[str, Any], kind: type, described: str) -> None:
    """Raise a CheckpointError where a key is the name of a method of the config class `kind`: it would take its place."""
    for key in raw:
        held = inspect.getattr_static(kind, key, None)
        if key.startswith("__") or inspect.isroutine(held) or isinstance(held, classmethod | staticmethod):
            raise CheckpointError(f"{described} is not valid: {shown(key)} is no setting but code of {kind.__name__}")


def refuse_activations(raw: Mapping[str, Any], described: str) -> None:
    """Raise a CheckpointError where a function between the layers has a name that transformers does not know."""
    from transformers.activations import ACT2FN  # not above: a Mamba-2 is read without it

    for key in ACTIVATIONS:
        if isinstance(name := raw.get(key), str) and name not in ACT2FN:
            raise CheckpointError(
                f"{described} is not valid: {key} is '{shown(name)}', known are {', '.join(sorted(ACT2FN))}"
            )
