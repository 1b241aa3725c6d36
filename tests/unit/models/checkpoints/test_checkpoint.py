"""Both layouts of a checkpoint give the model of transformers, and what cannot be read is one line."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lscollapse.core import assets
from lscollapse.core.registry import ENTRIES
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.checkpoint import CheckpointError
from tests.equivalence.layouts import D_MODEL, N_LAYER, PADDED, hf_state, original_state, write_hf, write_original
from tests.unit.core.test_registry import SIZES, mamba2_parameters

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
PARAMETERS = mamba2_parameters(D_MODEL, N_LAYER, vocab=PADDED, state=8, head=4, groups=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))


def reference(state=None):
    """The model that transformers itself builds from the HF layout, in float32."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from tests.equivalence.layouts import HF_CONFIG

    model = Mamba2ForCausalLM(Mamba2Config(**HF_CONFIG)).eval()
    state = hf_state(dtype=torch.float32) if state is None else state
    model.load_state_dict({**state, "lm_head.weight": state["backbone.embeddings.weight"]}, strict=True)
    return model.backbone


def output(model):
    with torch.no_grad():
        return model(IDS).last_hidden_state


@pytest.mark.parametrize("write", [write_original, write_hf])
def test_both_layouts_give_the_model_of_transformers(tmp_path, write):
    loaded = checkpoint.load(write(tmp_path / "model"))
    state = {name: tensor.float() for name, tensor in hf_state().items()}
    assert torch.equal(output(loaded.model), output(reference(state)))
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    info = loaded.info
    assert (info.name, info.architecture, info.n_layers, info.n_parameters) == ("model", "mamba2", N_LAYER, PARAMETERS)


def test_config_of_the_original_layout(tmp_path):
    config = checkpoint.load(write_original(tmp_path)).model.config
    assert (config.vocab_size, config.num_heads, config.n_groups, config.state_size) == (PADDED, 8, 2, 8)
    assert config.tie_word_embeddings and config.residual_in_fp32
    assert (config.conv_kernel, config.expand, config.layer_norm_epsilon) == (4, 2, 1e-5)


@pytest.mark.parametrize("model_type", ["mamba2", "mamba"])
def test_original_config_with_a_model_type_beside_it(tmp_path, model_type):
    """transformers' own reading ignores every key and takes its defaults, Mamba-2's 7B."""
    loaded = checkpoint.load(write_original(tmp_path, model_type=model_type))
    assert torch.equal(output(loaded.model), output(reference(_float(hf_state()))))
    assert loaded.info.n_parameters == PARAMETERS


def test_sizes_of_both_layouts(tmp_path):
    message = _error(write_original(tmp_path, model_type="mamba2", hidden_size=32))
    assert "mixes two layouts: mamba_ssm's d_model and n_layer, and transformers' hidden_size" in message


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
def test_config_with_a_byte_order_mark(tmp_path, start):
    file = write_hf(tmp_path) / "config.json"
    file.write_bytes(start + file.read_bytes())
    assert checkpoint.load(tmp_path).info.n_parameters == PARAMETERS
    file.write_bytes(b'{"model_type": "\xe9"}')
    assert f"{file} is not UTF-8 text (byte 16)" in _error(tmp_path)


def test_sha256_is_that_of_the_file_and_nothing_is_written(tmp_path):
    folder = write_original(tmp_path / "model")
    expected = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    before = sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*"))
    assert checkpoint.load(folder).info.sha256 == expected
    assert checkpoint.open_layers(folder).info.sha256 == expected
    assert sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*")) == before


def test_original_layout_in_safetensors(tmp_path):
    folder = write_original(tmp_path / "model")
    state = original_state()
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    assert torch.equal(output(checkpoint.load(folder).model), output(reference(_float(hf_state()))))
    assert not (tmp_path / "cache").exists()


def _float(state):
    return {name: tensor.float() for name, tensor in state.items()}


def test_sharded(tmp_path):
    folder = write_hf(tmp_path)
    (folder / "model.safetensors").unlink()
    names = list(hf_state())
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, keys in parts.items():
        save_file({key: hf_state()[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = checkpoint.load(folder)
    assert torch.equal(output(loaded.model), output(reference(_float(hf_state()))))
    printed = subprocess.run(["sha256sum", *parts], cwd=folder, check=True, capture_output=True).stdout
    assert loaded.info.sha256 == hashlib.sha256(printed).hexdigest()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected model-00002-of-00002"):
        checkpoint.load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype(tmp_path, dtype):
    model = checkpoint.load(write_hf(tmp_path), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.embeddings.weight, hf_state()["backbone.embeddings.weight"].to(dtype))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_as_stored(tmp_path, kind):
    """Matrices of 16 bits stay what they are in the file, also beside others; all else comes in the dtype asked for."""
    folder, wide = write_hf(tmp_path), "backbone.layers.0.mixer.in_proj.weight"
    stored = {name: tensor.to(kind) for name, tensor in hf_state().items()} | {wide: hf_state()[wide].float()}
    save_file(stored, folder / "model.safetensors")
    model = checkpoint.load(folder, as_stored=True).model
    expected = torch.float32 if kind == torch.float64 else kind
    for name, parameter in model.named_parameters():
        kept = parameter.ndim == 2 and f"backbone.{name}" != wide
        assert parameter.dtype == (expected if kept else torch.float32)
        assert torch.equal(parameter.float(), stored[f"backbone.{name}"].float()) and not parameter.is_meta


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux tells what is mapped")
def test_weights_of_the_dtype_asked_for_stay_in_their_file(tmp_path):
    """So that loading takes no memory for them: each storage is the mapped file, or its part of one."""
    folder = write_hf(tmp_path)
    save_file(_float(hf_state()), folder / "model.safetensors")
    model = checkpoint.load(folder).model
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0] for line in maps if line.endswith(str(folder / "model.safetensors"))]
    ranges = [tuple(int(end, 16) for end in part.split("-")) for part in mapped]
    for parameter in model.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges)


@pytest.mark.parametrize("size", SIZES)
def test_built_in_configs_give_the_published_count(size):
    from transformers import Mamba2Model

    from lscollapse.models.checkpoints.mamba2_config import as_transformers
    from lscollapse.models.checkpoints.mamba_ssm import read_config

    with torch.device("meta"):
        model = Mamba2Model(as_transformers(read_config(ENTRIES[f"mamba2-{size}"].config, size)))
    assert sum(p.numel() for p in model.parameters()) == mamba2_parameters(*SIZES[size])


def test_random_init_is_seeded_and_leaves_the_global_generator(tmp_path):
    folder = write_hf(tmp_path)
    (folder / "model.safetensors").unlink()
    before = torch.random.get_rng_state()
    one, same, other = (checkpoint.load(folder, random_init=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(output(one.model), output(same.model))
    assert not torch.equal(output(one.model), output(other.model))
    assert torch.isfinite(output(one.model)).all()
    assert one.info.sha256 == "random-init-1"
    assert torch.allclose(one.model.layers[0].mixer.A_log, torch.arange(1, 9).float().log())  # the S4D-real start


def test_layer_reader(tmp_path):
    reader = checkpoint.open_layers(write_original(tmp_path))
    state = hf_state()
    assert {name for name in reader.tensors if not name.startswith("layers.")} == {"embeddings.weight", "norm_f.weight"}
    assert torch.equal(reader.tensors["embeddings.weight"], state["backbone.embeddings.weight"])
    block = checkpoint.load(tmp_path).model.layers[1]
    assert set(reader.layer(1)) == set(block.state_dict())
    assert torch.equal(reader.layer(1)["mixer.in_proj.weight"], state["backbone.layers.1.mixer.in_proj.weight"])
    assert reader.config.num_hidden_layers == N_LAYER
    assert reader.info.n_parameters == PARAMETERS


def test_layer_reader_is_for_mamba2():
    with pytest.raises(CheckpointError, match="is bert: only Mamba-2"):
        checkpoint.open_layers("minilm-l6")


def test_embedded_bert_is_that_of_transformers():
    from transformers import BertModel

    loaded = checkpoint.load("minilm-l6")
    folder = assets.locate(assets.MINILM_CONFIG).parent
    assert loaded.model.pooler is None
    plain = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert torch.equal(output(loaded.model), output(plain))
    assert loaded.info.sha256 == assets.MINILM_WEIGHTS.sha256
    assert (loaded.info.architecture, loaded.info.n_layers, loaded.info.text) == ("bert", 6, "english")


def test_embedded_albert_is_that_of_transformers():
    from transformers import AlbertConfig, AlbertForMaskedLM

    loaded = checkpoint.load("albert-smiles")
    config = AlbertConfig.from_json_file(assets.locate(assets.SMILES_CONFIG))
    plain = AlbertForMaskedLM(config).eval()
    state = torch.load(assets.locate(assets.SMILES_WEIGHTS), weights_only=True, map_location="cpu")
    plain.load_state_dict(state, strict=False)
    assert torch.equal(output(loaded.model), output(plain.albert))
    assert (loaded.info.architecture, loaded.info.n_layers, loaded.info.text) == ("albert", 12, "smiles")


def test_names_of_old_bert_checkpoints(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    config.save_pretrained(tmp_path)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    state |= {"bert.embeddings.position_ids": torch.arange(512)[None], "bert.pooler.dense.bias": torch.zeros(8)}
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(output(checkpoint.load(tmp_path).model), output(model.bert))


def _error(folder, **arguments):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("write", [write_original, write_hf])
def test_missing_unexpected_and_misshapen_tensors(tmp_path, write):
    state = original_state() if write is write_original else hf_state()
    state["backbone.layers.0.mixer.extra"] = torch.zeros(1)
    del state["backbone.layers.2.norm.weight"]
    state["backbone.norm_f.weight"] = torch.zeros(D_MODEL + 1)
    message = _error(write(tmp_path, state))
    assert "1 missing (layers.2.norm.weight)" in message
    assert "1 unexpected (layers.0.mixer.extra)" in message
    assert f"norm_f.weight ({D_MODEL + 1},) instead of ({D_MODEL},)" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ssm_cfg": {}}, "ssm_cfg.layer='Mamba1'"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate=True"),
        ({"ssm_cfg": {"layer": "Mamba2", "invented": 1}}, "ssm_cfg.invented"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx=[1]"),
        ({"d_intermediate": 32}, "d_intermediate=32"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 5}}, "must equal num_heads * head_dim"),
        ({"d_model": "sixteen"}, "not valid"),
        ({"model_type": "their_own"}, "model_type 'their_own'"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, changes, says):
    assert says in _error(write_original(tmp_path, **changes))


def test_config_of_another_depth_than_the_weights(tmp_path):
    assert "9 missing (layers.3.norm.weight, " in _error(write_original(tmp_path, n_layer=N_LAYER + 1))


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_broken_config(tmp_path, text):
    folder = write_hf(tmp_path)
    (folder / "config.json").write_text(text)
    assert "config.json" in _error(folder)


def test_nothing_to_read(tmp_path):
    assert "no weights in" in _error(tmp_path)
    write_hf(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "no config.json" in _error(tmp_path)


@pytest.mark.parametrize(("write", "name"), [(write_original, "pytorch_model.bin"), (write_hf, "model.safetensors")])
def test_damaged_files(tmp_path, write, name):
    file = write(tmp_path) / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{len(whole) // 2:,} bytes" in _error(tmp_path)
    file.write_bytes(b"")
    assert "cannot be read" in _error(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in _error(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_runs_no_code(tmp_path, capsys):
    assert "cannot be read" in _error(write_original(tmp_path, {"x": Evil()}))
    assert "must not run" not in capsys.readouterr().out


def test_a_pickle_of_something_else(tmp_path):
    assert "not a state dict" in _error(write_original(tmp_path, {"model": original_state()}))


def test_no_place_to_write_is_needed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "file"))
    folder = write_original(tmp_path / "model")
    loaded = checkpoint.load(folder).model.layers[1].mixer.D
    assert torch.equal(checkpoint.open_layers(folder).layer(1)["mixer.D"].float(), loaded)


def test_a_pickle_of_old_is_read_whole_or_not_at_all(tmp_path):
    """From before PyTorch 1.6, when a .bin was no zip archive."""
    folder = write_original(tmp_path / "model")
    expected = output(checkpoint.load(folder).model)
    torch.save(original_state(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(output(checkpoint.load(folder).model), expected)
    with pytest.raises(
        CheckpointError, match="read whole or not at all: use --stream never, or save its tensors"
    ) as caught:
        checkpoint.open_layers(folder)
    assert "\n" not in str(caught.value)


def test_revision_is_for_the_hub(tmp_path):
    assert "not on the hub" in _error(write_hf(tmp_path), revision="main")
