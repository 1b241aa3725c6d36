"""The config.json of mamba_ssm, as released with state-spaces/mamba2-*, in the words of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lscollapse.core.config import Layers, Width
from lscollapse.core.outside import checked, shown
from lscollapse.models.checkpoints.mamba2_config import read_mamba2
from lscollapse.models.checkpoints.tensors import CheckpointError

# mamba_ssm's Mamba2 arguments: name -> (name in Mamba2Config, default).
_SSM_ARGUMENTS = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "chunk_size": ("chunk_size", 256),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))),
}
# Arguments that transformers' Mamba2 knows at one value only, and those that only matter when training starts.
_SSM_FIXED = {"layer": "Mamba2", "d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
_SSM_IGNORED = {"A_init_range", "conv_init", "use_mem_eff_path"}


class _SsmCfg(BaseModel):
    """What is read of `ssm_cfg`."""

    model_config = ConfigDict(strict=True)

    layer: str = "Mamba1"
    d_state: Width = 128
    d_conv: Width = 4
    expand: Width = 2
    headdim: Width = 64
    ngroups: Width = 1
    chunk_size: Width = 256
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = Field(default=0.001, ge=0)
    dt_max: float = Field(default=0.1, ge=0)
    dt_init_floor: float = Field(default=1e-4, ge=0)
    dt_limit: list[float] | None = Field(default=None, min_length=2, max_length=2)


class _Config(BaseModel):
    """What is read of mamba_ssm's config.json."""

    model_config = ConfigDict(strict=True)

    d_model: Width
    n_layer: Layers
    vocab_size: int = Field(default=50277, ge=1, le=2**24)
    pad_vocab_size_multiple: int = Field(default=8, ge=1, le=2**16)
    ssm_cfg: _SsmCfg | None = None
    rms_norm: bool = True
    residual_in_fp32: bool = True
    tie_embeddings: bool = True


_SIZES = {"hidden_size", "num_hidden_layers"}  # of transformers' layout


def is_own_layout(raw: Mapping[str, Any], where: str) -> bool:
    """Whether a config.json is mamba_ssm's own, also where a `model_type` was added to it.

    transformers would ignore every key of it and take the sizes of its defaults, Mamba-2's 7B.

    Raises:
        CheckpointError: it gives the sizes of both layouts.
    """
    is_own = "d_model" in raw and "n_layer" in raw and raw.get("model_type") in (None, "mamba", "mamba2")
    both = sorted(_SIZES & set(raw))
    if is_own and both:
        raise CheckpointError(
            f"config.json of {where} mixes two layouts: mamba_ssm's d_model and n_layer, and transformers'"
            f" {', '.join(both)}: leave those of one"
        )
    return is_own


def read_config(raw: Mapping[str, Any], where: str) -> Any:
    """The config of a Mamba-2 from the contents of mamba_ssm's config.json; `where` names it in errors.

    `Mamba2Config.from_pretrained` would accept such a file, ignore every key of it, and return its 7B defaults.

    Raises:
        CheckpointError: Mamba-1, hybrids with attention or MLPs, and options that transformers' Mamba-2 does not have.
    """
    said = checked(_Config, raw, CheckpointError, f"config.json of {where} is not valid")
    ssm = dict(raw.get("ssm_cfg") or {})
    ssm.setdefault("layer", "Mamba1")  # mamba_ssm's default
    refused = [
        f"ssm_cfg.{key}={shown(repr(ssm[key]))}" for key, value in _SSM_FIXED.items() if ssm.get(key, value) != value
    ]
    refused += [f"ssm_cfg.{shown(key)}" for key in ssm if key not in {*_SSM_ARGUMENTS, *_SSM_FIXED, *_SSM_IGNORED}]
    refused += [f"{key}={shown(repr(raw[key]))}" for key in ("attn_layer_idx", "d_intermediate") if raw.get(key)]
    refused += ["rms_norm=False"] if not said.rms_norm else []
    if refused:
        raise CheckpointError(f"{where} is not a pure Mamba-2 of the released kind: cannot read {', '.join(refused)}")
    arguments = {name: ssm.get(key, default) for key, (name, default) in _SSM_ARGUMENTS.items()}
    return read_mamba2(
        {
            "hidden_size": said.d_model,
            "num_hidden_layers": said.n_layer,
            "num_heads": arguments["expand"] * said.d_model // arguments["head_dim"],
            "vocab_size": said.vocab_size + -said.vocab_size % said.pad_vocab_size_multiple,
            "residual_in_fp32": said.residual_in_fp32,
            "tie_word_embeddings": said.tie_embeddings,
            "layer_norm_epsilon": 1e-5,
            "pad_token_id": None,
            **arguments,
        }
    )
