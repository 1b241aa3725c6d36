"""What weights are refused when they are read, with the tensor's name; and what beside them is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.refusals import PIECE, refuse_values, zero_rows
from lscollapse.models.checkpoints.tensors import CheckpointError
from tests.equivalence.layouts import D_MODEL, PADDED, hf_state, original_state, write_hf, write_original

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
BIAS, MATRIX = "backbone.layers.1.mixer.dt_bias", "backbone.layers.1.mixer.out_proj.weight"
READERS = [checkpoint.load, checkpoint.open_layers]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))


def refusal(read: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gpt2(folder: Path, change: Callable[[dict[str, Tensor]], None] = lambda state: None) -> Any:
    """A tiny GPT-2 as transformers saves it, its tensors changed on disk; what it was before is returned."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        (BIAS, 3, float("nan"), "layers.1.mixer.dt_bias holds 1 NaN and 0 infinite of its 8 values"),
        (MATRIX, (-1, -1), float("inf"), "layers.1.mixer.out_proj.weight holds 0 NaN and 1 infinite"),
        (MATRIX, (0, slice(2)), -float("inf"), "layers.1.mixer.out_proj.weight holds 0 NaN and 2 infinite"),
    ],
)
def test_values_that_are_not_finite(
    tmp_path: Path, read: Callable[[Path], Any], dtype: torch.dtype, name: str, place: Any, value: float, says: str
) -> None:
    for write, state in ((write_hf, hf_state(dtype=dtype)), (write_original, original_state(dtype=dtype))):
        state[name][place] = value
        assert says in refusal(read, write(tmp_path / write.__name__, state))


def test_a_bad_value_is_found_wherever_it_lies() -> None:
    """In a tensor that is looked at in pieces, and where finite values would add up to infinity."""
    large = torch.full((2 * PIECE + 5,), 6e4, dtype=torch.float16)
    refuse_values({"large": large}, "here")
    for place in (0, PIECE - 1, PIECE, 2 * PIECE + 4):
        spoilt = large.clone()
        spoilt[place] = float("nan")
        with pytest.raises(CheckpointError, match="large holds 1 NaN and 0 infinite of its 16,777,221 values"):
            refuse_values({"large": spoilt}, "here")
    refuse_values({"none": torch.zeros(0), "counter": torch.tensor(3), "scalar": torch.tensor(1.0)}, "here")


def test_values_of_an_architecture_that_transformers_reads(tmp_path: Path) -> None:
    gpt2(tmp_path, lambda state: state["transformer.h.1.mlp.c_fc.weight"][0, :3].fill_(float("nan")))
    assert "h.1.mlp.c_fc.weight holds 3 NaN and 0 infinite of its 1,024 values" in refusal(checkpoint.load, tmp_path)


def test_a_value_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    state = hf_state(dtype=torch.float32)
    state[MATRIX][0, 0] = 1e6
    folder = write_hf(tmp_path, state)
    checkpoint.load(folder)
    message = refusal(lambda path: checkpoint.load(path, dtype=torch.float16), folder)
    assert "out_proj.weight holds 0 NaN and 1 infinite" in message and "in float16" in message


def test_what_is_not_read_may_hold_anything(tmp_path: Path) -> None:
    """A head is looked at when it is asked for, a pooler never."""
    state = {**hf_state(), "lm_head.weight": torch.full((PADDED, D_MODEL), float("nan"), dtype=torch.float16)}
    folder = write_hf(tmp_path, state)
    checkpoint.load(folder)
    assert f"lm_head.weight holds {PADDED * D_MODEL} NaN" in refusal(checkpoint.open_head, folder)
    save_file({**hf_state(), "pooler.dense.weight": torch.tensor([float("nan")])}, folder / "model.safetensors")
    assert set(checkpoint.open_head(folder)) == {"pooler.dense.weight"}


KINDS = [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", KINDS)
def test_tensors_that_are_no_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    for read in [*READERS, checkpoint.inspect]:
        for write, state in ((write_hf, hf_state()), (write_original, original_state())):
            state[MATRIX] = state[MATRIX].to(dtype)
            message = refusal(read, write(tmp_path / write.__name__, state))
            assert f"layers.1.mixer.out_proj.weight is of dtype {kind}, readable are float64" in message
    assert not (tmp_path / "cache").exists()
    name = "transformer.h.1.mlp.c_fc.weight"
    gpt2(tmp_path / "gpt2", lambda state: state.update({name: state[name].to(dtype)}))
    for read in (checkpoint.load, checkpoint.inspect):
        assert f"h.1.mlp.c_fc.weight is of dtype {kind}" in refusal(read, tmp_path / "gpt2")


def test_an_embedding_of_zeros(tmp_path: Path) -> None:
    name = "backbone.embeddings.weight"
    state = {**hf_state(), name: torch.zeros(PADDED, D_MODEL, dtype=torch.float16)}
    for read in READERS:
        message = refusal(read, write_hf(tmp_path / "mamba2", state))
        assert f"embeddings.weight ({PADDED}, {D_MODEL}) holds zeros only" in message
    gpt2(tmp_path / "gpt2", lambda state: state["transformer.wte.weight"].zero_())
    assert "wte.weight (40, 16) holds zeros only" in refusal(checkpoint.load, tmp_path / "gpt2")
    state[name][7, 3] = 1e-3
    for read in READERS:
        read(write_hf(tmp_path / "mamba2", state))


def test_zero_rows_are_those_of_the_tokens_used() -> None:
    embedding = torch.ones(6, 2)
    embedding[[0, 2, 4]] = 0.0
    embedding[4, 1] = 1e-30
    assert zero_rows(embedding, [0, 1, 2, 2, 4], padding=None) == [0, 2]
    assert zero_rows(embedding, [0, 1, 2, 2, 4], padding=0) == [2]
    assert zero_rows(embedding, [0], padding=0) == []


def test_old_buffers_are_ignored_by_name(tmp_path: Path) -> None:
    """Masks as old versions of transformers saved them; hidden states against the model they were added to."""

    def old(state: dict[str, Tensor]) -> None:
        for i in range(2):
            state[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 16, 16)).bool()
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-float("inf"))

    model = gpt2(tmp_path, old)
    loaded = checkpoint.load(tmp_path).model
    with torch.no_grad():
        assert torch.equal(loaded(IDS).last_hidden_state, model.transformer(IDS).last_hidden_state)
    assert checkpoint.inspect(tmp_path) == ("gpt2", sum(p.numel() for p in model.transformer.parameters()))
    gpt2(tmp_path, lambda state: state.update({"transformer.h.0.attn.extra": torch.ones(3)}))
    assert "1 unexpected (transformer.h.0.attn.extra)" in refusal(checkpoint.load, tmp_path)


def test_headers_tell_what_is_missing_or_of_another_shape(tmp_path: Path) -> None:
    """`inspect` reads no values, and agrees with `load` on names and shapes."""
    gpt2(tmp_path, lambda state: state.pop("transformer.h.1.ln_2.weight"))
    for read in (checkpoint.load, checkpoint.inspect):
        assert "1 missing (h.1.ln_2.weight)" in refusal(read, tmp_path)
    gpt2(tmp_path, lambda state: state.update({"transformer.ln_f.bias": torch.ones(3)}))
    assert "ln_f.bias (3,) instead of (16,)" in refusal(checkpoint.inspect, tmp_path)
    refusal(checkpoint.load, tmp_path)
