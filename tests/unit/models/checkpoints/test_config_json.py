"""A config.json, an index, a pickle or a picture's settings that no model can mean are one line that names them."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lscollapse.core import registry
from lscollapse.core.outside import plain
from lscollapse.models.checkpoints import auto, checkpoint
from lscollapse.models.checkpoints.architectures import built, config_of
from lscollapse.models.checkpoints.located import Located, read_index
from lscollapse.models.checkpoints.tensors import CheckpointError, read_json, read_tensors
from tests.equivalence.layouts import HF_CONFIG, ORIGINAL_CONFIG, hf_state, write_hf

BERT = {
    "model_type": "bert", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
S4D = {"model_type": "s4d", "hidden_size": 8, "num_hidden_layers": 2}


def described(raw: dict[str, Any]) -> Located:
    """What a folder of that config.json is read as; of its values also those that JSON has no other way to write."""
    return Located(registry.Entry("net", "", "folder", "net"), "net", "", raw, ())


def refused(raw: dict[str, Any]) -> str:
    """The line that says why a config.json is none, or why no model can be built of it."""
    with pytest.raises(CheckpointError) as caught:
        built(config_of(described(raw)))
    message = str(caught.value)
    assert "\n" not in message and plain(message) == message
    assert "net" in message
    return message


@pytest.mark.parametrize(
    "whole", [HF_CONFIG, ORIGINAL_CONFIG, BERT, GPT2, S4D], ids=["hf", "own", "bert", "gpt2", "s4d"]
)
def test_what_is_right_is_read(whole: dict[str, Any]) -> None:
    assert built(config_of(described(whole))) is not None


@pytest.mark.parametrize(
    ("whole", "changes", "says"),
    [
        (BERT, {"num_hidden_layers": 10**7}, "num_hidden_layers must be a whole number from 1 to 1,000, got 10000000"),
        (HF_CONFIG, {"num_hidden_layers": 10**7}, "a matrix of each would need 9 GiB"),
        (BERT, {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to 1,000, got 0"),
        (BERT, {"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        (GPT2, {"n_layer": "two"}, "n_layer must be a whole number from 1 to 1,000, got two"),
        (ORIGINAL_CONFIG, {"n_layer": 10**7}, "n_layer must be a whole number from 1 to 1,000, got 10000000"),
        (S4D, {"num_hidden_layers": 10**7}, "num_hidden_layers must be a whole number from 1 to 1,000"),
        (S4D, {"levels": 0}, "levels: input should be greater than or equal to 2"),
        (BERT, {"hidden_size": 10**7}, "got 10000000: a square matrix of it would need 372,529 GiB"),
        (BERT, {"hidden_size": -8}, "hidden_size must be a whole number from 0 to 262,144, got -8"),
        (BERT, {"vocab_size": 10**9}, "vocab_size must be a whole number from 0 to 16,777,216, got 1000000000: their embedding"),
        (BERT, {"num_labels": 10**9}, "num_labels must be a whole number"),
        (BERT, {"bos_token_id": 2**70}, "bos_token_id holds 1180591620717411303424, which 64 bits do not"),
        (HF_CONFIG, {"chunk_size": -1}, "chunk_size must be a whole number from 1 to 2,048, got -1"),
        (HF_CONFIG, {"chunk_size": 8000}, "chunk_size must be a whole number from 1 to 2,048, got 8000"),
        (HF_CONFIG, {"time_step_limit": [0.0, 1.0, 2.0]}, "time_step_limit must be two numbers, the least and the most, got [0.0, 1.0, 2.0]"),
        (BERT, {"hidden_dropout_prob": math.nan}, "hidden_dropout_prob holds NaN, which is no number"),
        (BERT, {"rope_parameters": {"a": [2**70]}}, "rope_parameters holds 1180591620717411303424"),
        (BERT, {"num_attention_heads": 0}, "describes no model that can be built: ZeroDivisionError"),
        (BERT, {"num_attention_heads": 3}, "describes no model that can be built"),
        (BERT, {"layer_norm_eps": "small"}, "config.json of net is not valid"),
        (BERT, {"dtype": "evil"}, "dtype must be one of float64, float32"),
        (BERT, {"torch_dtype": "__class__"}, "torch_dtype must be one of float64, float32"),
        (HF_CONFIG, {"torch_dtype": ["float32"]}, "torch_dtype must be one of"),
        (BERT, {"hidden_act": "__class__"}, "hidden_act is '__class__', known are gelu"),
        (HF_CONFIG, {"hidden_act": "__class__"}, "hidden_act is '__class__', known are gelu"),
        (GPT2, {"activation_function": "no\x1b[31m"}, r"activation_function is 'no\x1b[31m', known are gelu"),
        (BERT, {"to_dict": 5}, "to_dict is no setting but code of BertConfig"),
        (HF_CONFIG, {"from_dict": {}}, "from_dict is no setting but code of Mamba2Config"),
        (BERT, {"__class__": "x"}, "__class__ is no setting but code"),
        (BERT, {"use_return_dict": False}, "config.json of net is not valid: AttributeError property 'use_return_dict'"),
        (HF_CONFIG, {"use_return_dict": False}, "config.json of net is not valid: AttributeError property 'use_return_dict'"),
        (BERT, {"model_type": ["bert"]}, "model_type must be the name of an architecture"),
        (BERT, {"model_type": "b\x1b[31m"}, r"model_type 'b\x1b[31m'"),
        (BERT, {"text_config": {"hidden_size": 10**9}}, "text_config.hidden_size must be a whole number"),
        (BERT, {"id2label": ["a"]}, "config.json of net is not valid"),
        (ORIGINAL_CONFIG, {"ssm_cfg": ["Mamba2"]}, "config.json of net is not valid: ssm_cfg: "),
        (ORIGINAL_CONFIG, {"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "ssm_cfg.headdim: input should be greater"),
        (ORIGINAL_CONFIG, {"ssm_cfg": {"layer": "Mamba2", "expand": "2"}}, "ssm_cfg.expand: input should be a valid integer"),
        (ORIGINAL_CONFIG, {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [1]}}, "ssm_cfg.dt_limit"),
        (ORIGINAL_CONFIG, {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple: input should be greater"),
        (ORIGINAL_CONFIG, {"d_model": None}, "d_model"),
        (ORIGINAL_CONFIG, {"attn_layer_idx": ["\x1b[31m"]}, r"attn_layer_idx=['\x1b[31m']"),
    ],
    ids=lambda value: "" if isinstance(value, str) or len(value) > 4 else str(value)[:50],
)  # fmt: skip
def test_a_config_that_no_model_has(whole: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    assert says in refused(whole | changes)


def test_nothing_is_logged_of_a_config_that_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    refused(BERT | {"use_return_dict": False})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ' + "[" * 50_000, "values inside values without end"),
        ('{"a": {"__float__": null}}', '"__float__" must be one of Infinity, -Infinity, NaN, got None'),
        ('{"a": {"__float__": [1]}}', '"__float__" must be one of'),
        ('{"a": "\\ud83d"}', "half of a character"),
        ("[1]", "holds no JSON object"),
        ("", "not JSON"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_json_of_a_checkpoint(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    assert says in str(caught.value) and str(file) in str(caught.value)


def test_infinite_numbers_as_transformers_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [{"__float__": "-Infinity"}, {"__float__": "Infinity"}], "b": NaN}')
    found = read_json(tmp_path / "a.json")
    assert found["a"] == [-math.inf, math.inf] and math.isnan(found["b"])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_a_folder_is_not_opened(tmp_path: Path, name: str) -> None:
    write_hf(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pipe or a device"):
        checkpoint.load(tmp_path)
    with pytest.raises(registry.ModelNameError, match="is a pipe or a device: give the folder"):
        registry.resolve(str(tmp_path / name))


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.inspect])
def test_weights_that_cannot_be_those_of_the_config(tmp_path: Path, read: Any) -> None:
    """Refused before a model of that size is made, which may take longer or more than there is."""
    write_hf(tmp_path, num_hidden_layers=900)
    with pytest.raises(CheckpointError, match="describes 900 layers, and the weights are 29 tensors"):
        read(tmp_path)
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "config.json").write_text(json.dumps(GPT2 | {"n_positions": 2**20}))
    save_file({"h.0.ln_1.weight": torch.ones(8)}, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError,
        match=r"do not fit its config: tensors .*of another shape|do not fit its config: tensors .* missing",
    ):
        read(gpt2)


def test_headers_of_which_transformers_changes_the_names_are_not_called_incomplete(tmp_path: Path) -> None:
    """ViT's blocks have other names in its files than in the model."""
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert checkpoint.inspect(tmp_path)[0] == "vit"


# --- the index ---


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../model-00001-of-00001.safetensors"}}, "only .safetensors files that lie beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd': only .safetensors files"),
        ({"weight_map": {"a": "sub/a.safetensors"}}, "only .safetensors files that lie beside it"),
        ({"weight_map": {"a": "..\\a.safetensors"}}, "only .safetensors files that lie beside it"),
        ({"weight_map": {"a": "a\x1b.safetensors"}}, "only .safetensors files that lie beside it"),
        ({"weight_map": {"a": ".."}}, "only .safetensors files that lie beside it"),
        ({"weight_map": {"a": ""}}, "only .safetensors files that lie beside it"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "only .safetensors files that lie beside it"),
        ({"weight_map": ["a.safetensors"]}, "weight_map: input should be a valid dictionary"),
        ({"weight_map": {"a": 1}}, "weight_map.a: input should be a valid string, got 1"),
        ({"weight_map": {}}, "weight_map: dictionary should have at least 1 item"),
        ({"weight_map": None}, "weight_map: input should be a valid dictionary"),
        ({}, "weight_map: field required"),
        ([], "holds no JSON object"),
    ],
    ids=str,
)
def test_an_index_that_names_no_files_beside_it(tmp_path: Path, index: Any, says: str) -> None:
    file = write_hf(tmp_path / "net") / "model.safetensors.index.json"
    (tmp_path / "net" / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "net")
    assert says in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(CheckpointError):
        read_index(file)


# --- tensors ---


def test_names_of_tensors_are_shown_not_obeyed(tmp_path: Path) -> None:
    write_hf(tmp_path)
    save_file({**hf_state(), "backbone.layers.0.\x1b[2J": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(layers\.0\.\\x1b\[2J\)"):
        checkpoint.load(tmp_path)


def test_a_header_longer_than_its_file_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(tmp_path / "a.safetensors")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


@pytest.mark.parametrize("name", ["zip", "plain"])
def test_the_refusal_of_a_pickle_is_no_advice_to_read_it(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pytorch_model.bin"
    if name == "zip":
        torch.save({"a": Evil()}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(CheckpointError) as caught:
        read_tensors(file)
    assert "is never run: give its tensors as model.safetensors" in str(caught.value)
    assert "weights_only" not in str(caught.value) and "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [{1: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}, [torch.zeros(2)]], ids=str)
def test_a_pickle_of_no_names_or_no_dense_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="expected names and dense tensors only"):
        read_tensors(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "settings", [{"image_mean": "x"}, {"image_std": [0.5, 0.0, 0.5]}, {"image_mean": [math.inf]}], ids=str
)
def test_settings_of_pictures(tmp_path: Path, settings: dict[str, Any]) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"{file}: image_"):
        auto._note_pixels(None, file)
