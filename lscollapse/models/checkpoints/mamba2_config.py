"""What a config.json says of a Mamba-2, read without transformers, whose import takes longer than a small run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_type_hints

from lscollapse.models.kernels.mamba2_block import Mamba2Shape


@dataclass(frozen=True, kw_only=True)
class Mamba2Settings:
    """The settings of transformers' Mamba2Config that decide what is computed or measured, under its names, with its defaults."""

    model_type: ClassVar[str] = "mamba2"

    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    expand: int = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    chunk_size: int = 256
    tie_word_embeddings: bool = False
    architectures: tuple[str, ...] | None = None


_KINDS = get_type_hints(Mamba2Settings)
_SIZES = ("num_heads", "head_dim", "vocab_size", "hidden_size", "state_size", "num_hidden_layers", "expand", "conv_kernel",
          "n_groups", "chunk_size")  # fmt: skip
# Keys that say nothing of what is computed: from whom the file is, and switches that Mamba2Config does not have.
_INERT: dict[str, tuple[type, ...]] = {
    "transformers_version": (str,), "_name_or_path": (str,), "norm_before_gate": (bool,), "rms_norm": (bool,),
}  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_settings(raw: Mapping[str, Any]) -> Mamba2Settings | None:
    """The settings in a config.json of transformers' layout; None where only transformers can say what it means.

    That is where a key is not known here, a value is not of the plain type that it has in every released checkpoint, or the
    sizes do not fit: transformers then reads the file, or says why it refuses it.
    """
    given = {name: value for name, value in raw.items() if name in _KINDS and name != "model_type"}
    rest = {name: value for name, value in raw.items() if name not in _KINDS}
    for name in ("architectures", "time_step_limit"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if not all(_is_plain(name, value) for name, value in given.items()):
        return None
    if not all(_says_nothing(name, value) for name, value in rest.items()):
        return None
    settings = Mamba2Settings(**given)
    return settings if _fits(settings) else None


def read_mamba2(raw: Mapping[str, Any]) -> Any:
    """Mamba2Settings of a config.json, or transformers' Mamba2Config; errors are those of transformers."""
    settings = read_settings(raw)
    if settings is not None:
        return settings
    from transformers import Mamba2Config  # not above: that is what this module is for

    return Mamba2Config.from_dict(dict(raw))


def _is_plain(name: str, value: Any) -> bool:
    if name == "architectures":
        return value is None or (isinstance(value, tuple) and all(type(entry) is str for entry in value))
    if name == "time_step_limit":
        return isinstance(value, tuple) and len(value) == 2 and all(type(entry) is float for entry in value)
    if name in _SIZES:
        return type(value) is int and value > 0
    kind = _KINDS[name]
    return type(value) is kind if isinstance(kind, type) else value is None or type(value) is int  # ids of tokens


def _says_nothing(name: str, value: Any) -> bool:
    if name in ("dtype", "torch_dtype"):
        return value is None or value in _DTYPES
    if name == "time_step_rank":
        return value == "auto" or type(value) is int
    return type(value) in _INERT.get(name, ())


def _fits(s: Mamba2Settings) -> bool:
    """Whether transformers would take these settings without a word."""
    tokens = (s.pad_token_id, s.bos_token_id, s.eos_token_id)
    known = all(token is None or 0 <= token < s.vocab_size for token in tokens)
    return known and s.hidden_size * s.expand == s.num_heads * s.head_dim


def as_transformers(config: Any) -> Any:
    """The Mamba2Config of these settings; any other config as it is."""
    if not isinstance(config, Mamba2Settings):
        return config
    from transformers import Mamba2Config  # not above, as in `read_mamba2`

    named = asdict(config)
    return Mamba2Config(**named | {"architectures": config.architectures and list(config.architectures)})


def block_shape(config: Any) -> Mamba2Shape:
    """The sizes of a block, by the names of Mamba2Config."""
    return Mamba2Shape(
        config.hidden_size, config.num_heads, config.head_dim, config.state_size, config.n_groups, config.conv_kernel,
        config.layer_norm_epsilon, tuple(config.time_step_limit),
    )  # fmt: skip


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name (transformers' layout) -> shape of every tensor of the base model."""
    shape = block_shape(config)
    has = {"conv1d.bias": config.use_conv_bias, "in_proj.bias": config.use_bias, "out_proj.bias": config.use_bias}
    biases = {name: size for name, size in shape.optional_tensors().items() if has[name.removeprefix("mixer.")]}
    block = shape.tensors() | biases
    ends = {"embeddings.weight": (config.vocab_size, config.hidden_size), "norm_f.weight": (config.hidden_size,)}
    layers = range(config.num_hidden_layers)
    return ends | {f"layers.{k}.{name}": size for k in layers for name, size in block.items()}
