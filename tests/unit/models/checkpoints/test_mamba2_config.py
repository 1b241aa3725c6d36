"""Mamba-2 without transformers: its settings and tensors are those of transformers' classes, and nothing of them is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2Model

from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.held import HeldMamba2
from lscollapse.models.checkpoints.mamba2_config import (
    Mamba2Settings,
    as_transformers,
    read_mamba2,
    read_settings,
    tensor_shapes,
)
from lscollapse.models.checkpoints.tensors import read_json
from tests import ROOT
from tests.equivalence.layouts import hf_state, write_hf

INFINITE = float("inf")
SMALL = {"hidden_size": 16, "num_heads": 8, "head_dim": 4, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 8}
PLAIN: list[dict[str, Any]] = [
    {},
    SMALL,
    SMALL | {"n_groups": 2, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-6},
    SMALL | {"hidden_act": "gelu", "tie_word_embeddings": True, "pad_token_id": None, "time_step_limit": [0.1, 2.0]},
    SMALL | {"architectures": ["Mamba2ForCausalLM"], "torch_dtype": "bfloat16", "time_step_rank": 3, "rms_norm": True},
]
ODD: list[dict[str, Any]] = [
    SMALL | {"hidden_size": 17},  # the sizes do not fit
    SMALL | {"hidden_size": "16"},
    SMALL | {"num_hidden_layers": 2.0},
    SMALL | {"use_bias": 1},
    SMALL | {"layer_norm_epsilon": "small"},
    SMALL | {"time_step_limit": 3},
    SMALL | {"head_dim": None},
    SMALL | {"eos_token_id": [2, 3]},
    SMALL | {"pad_token_id": 50},  # outside the vocabulary: transformers says so
    SMALL | {"invented": 1},
    SMALL | {"dtype": "float33"},
    SMALL | {"architectures": "Mamba2Model"},
]


@pytest.mark.parametrize("raw", PLAIN)
def test_settings_are_those_of_transformers(raw: dict[str, Any]) -> None:
    found, expected = read_settings(raw), Mamba2Config.from_dict(dict(raw))
    assert isinstance(found, Mamba2Settings) and found.model_type == expected.model_type
    for name, value in vars(found).items():
        told = getattr(expected, name)
        assert value == (tuple(told) if isinstance(told, list) else told), name
    again = as_transformers(found).to_dict()
    unlike = {"dtype", "torch_dtype", "time_step_rank", "rms_norm"}  # they decide nothing that is computed
    told = expected.to_dict()
    assert all(again[name] == told[name] for name in told if name not in unlike)


@pytest.mark.parametrize("raw", PLAIN[1:])
def test_tensors_are_those_of_transformers(raw: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Mamba2Model(Mamba2Config.from_dict(dict(raw)))
    assert tensor_shapes(read_settings(raw)) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("raw", ODD)
def test_what_is_odd_is_left_to_transformers(raw: dict[str, Any]) -> None:
    assert read_settings(raw) is None
    try:
        expected = Mamba2Config.from_dict(dict(raw))
    except Exception as refusal:
        with pytest.raises(type(refusal)) as caught:
            read_mamba2(raw)
        assert str(caught.value) == str(refusal)
    else:
        assert read_mamba2(raw).to_dict() == expected.to_dict()


def test_modules_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    """Of the very tensors that were held, which the modules then share."""
    loaded = checkpoint.load(write_hf(tmp_path))
    adapter = adapt(loaded.held)
    assert isinstance(adapter, Mamba2Adapter) and isinstance(adapter.held_as, HeldMamba2)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = {name: tensor.data_ptr() for name, tensor in adapter.held_as.named_parameters()}
    embedded, held = adapter.embed(ids), adapter.held(1)
    plain = Mamba2Model(Mamba2Config.from_dict(read_json(tmp_path / "config.json"))).eval()
    plain.load_state_dict({name.removeprefix("backbone."): tensor.float() for name, tensor in hf_state().items()})
    assert torch.equal(embedded, plain.embeddings(ids))
    assert {name: tuple(t.shape) for name, t in held.items()} == {
        name: tuple(t.shape) for name, t in plain.layers[1].state_dict().items()
    }
    assert isinstance(adapter.held_as, HeldMamba2) and adapter.dtype == torch.float32 and adapter.n_layers == 3
    with torch.no_grad():
        assert torch.equal(adapter.forward(ids).last_hidden_state, plain(ids).last_hidden_state)
    assert adapter.whole is adapter.model is adapter.held_as and not adapter.model.training
    assert {name: tensor.data_ptr() for name, tensor in adapter.model.named_parameters()} == before


NATIVE = """
import sys
from lscollapse.core.config import Experiment
from lscollapse.experiments.own_model import measure_own
from pathlib import Path

measure_own(Experiment(models=["mamba2-tiny"], excerpts=1, tokens=8, lambdas=[1.0]), Path(sys.argv[1]))
print(*sorted(set(sys.argv[2:]) & set(sys.modules)))
"""


def test_a_native_run_imports_no_modelling_code(tmp_path: Path) -> None:
    heavy = ["transformers", "huggingface_hub", "torch._dynamo", "sympy", "scipy.optimize", "matplotlib", "sklearn"]
    command = [sys.executable, "-c", NATIVE, str(tmp_path / "run"), *heavy]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert (tmp_path / "run" / "rows.parquet").is_file()
