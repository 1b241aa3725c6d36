"""GGUF files: the numbers of a Llama written by llama.cpp's package against the same Llama without a file, and what is refused."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import GPT2Config, GPT2LMHeadModel

from lscollapse.core import assets, registry
from lscollapse.core.registry import ENTRIES, ModelNameError
from lscollapse.data import tokenizers
from lscollapse.data.corpus import CorpusError
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters import heads
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.checkpoint import CheckpointError
from tests.equivalence.gguf_layout import BASE, HEADS, HIDDEN, TOKENS, reference, weights, write_gguf

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])


def refused(place: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(place, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(model: Any, expected: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, expected(IDS).last_hidden_state)


def test_a_file_gives_the_model_of_transformers(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.Q4_1.gguf")
    loaded = checkpoint.load(file)
    expected = reference().model
    for name, weight in expected.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), weight), name
    same(loaded.model, expected)
    info = loaded.info
    assert (info.name, info.architecture, info.n_layers, info.revision) == ("tiny.Q4_1", "llama", 2, "")
    assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert info.n_parameters == sum(weight.numel() for weight in expected.parameters())
    assert info.stored == "GGUF Q4_1, dequantised"
    assert checkpoint.inspect(file) == checkpoint.outline(file) == ("llama", info.n_parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_run(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = checkpoint.load(write_gguf(tmp_path / "tiny.gguf"), dtype=dtype).model
    for name, weight in reference().model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.to(dtype)), name


def test_a_folder_that_holds_one_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "mine" / "tiny.gguf")
    loaded = checkpoint.load(tmp_path / "mine")
    assert loaded.info.name == "mine"
    same(loaded.model, reference().model)
    write_gguf(tmp_path / "mine" / "other.gguf")
    assert "holds 2 .gguf files (other.gguf, tiny.gguf): give the path of one" in refused(tmp_path / "mine")
    reference().save_pretrained(tmp_path / "mine")  # now it is a folder like any other, with files beside
    assert checkpoint.load(tmp_path / "mine").info.stored == ""


@pytest.mark.parametrize("tied", [True, False])
def test_its_head(tmp_path: Path, tied: bool) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tied=tied)
    adapter = adapt(checkpoint.load(file).model)
    assert heads.attach(adapter, str(file))
    with torch.no_grad():
        assert torch.equal(adapter.whole(IDS).logits, reference(tied)(IDS).logits)


def test_random_weights_of_its_shape(tmp_path: Path) -> None:
    loaded = checkpoint.load(write_gguf(tmp_path / "tiny.gguf"), random_init=3)
    assert (loaded.info.sha256, loaded.info.stored) == ("random-init-3", "")
    assert not torch.equal(loaded.model.embed_tokens.weight, reference().model.embed_tokens.weight)


def llama3_factors(factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1 (factor 8) and 3.2 (32), by its own formula."""
    factors = []
    for place in range(HIDDEN // HEADS // 2):
        wavelength = 2 * math.pi * BASE ** (place / (HIDDEN // HEADS // 2))
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wavelength < 8192 / 4.0 else factor if wavelength > 8192 / 1.0 else between)
    assert 1.0 in factors and factor in factors and len(set(factors)) > 2
    return np.array(factors, dtype=np.float32)


def test_the_rotary_positions_of_llama_3(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", changed={"rope_freqs.weight": llama3_factors(32.0)})
    rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    same(checkpoint.load(file).model, reference(rope_type="llama3", factor=32.0, **rope).model)
    other = write_gguf(tmp_path / "other.gguf", changed={"rope_freqs.weight": llama3_factors(32.0) ** 2})
    assert "1 unexpected (rope_freqs.weight)" in refused(other)


def test_gpt2_in_float32(tmp_path: Path) -> None:
    """An architecture with biases and positions, whose matrices llama.cpp's converter turns around; stored as they are."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 1024}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    parts = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
             "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
    names = {f"blk.{k}.{own}": f"h.{k}.{name}" for k in range(2) for own, name in parts.items()}
    writer = GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    writer.add_token_list([str(number) for number in range(40)])
    state = {name: tensor.numpy() for name, tensor in model.transformer.state_dict().items()}
    for own, name in {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", **names}.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                tensor = state[f"{name}.{kind}"]
                turned = own in names and tensor.ndim == 2
                writer.add_tensor(f"{own}.{kind}", np.ascontiguousarray(tensor.T) if turned else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = checkpoint.load(tmp_path / "gpt2.gguf")
    assert loaded.info.stored == "GGUF F32"
    same(loaded.model, model.transformer)
    adapter = adapt(loaded.model)
    assert heads.attach(adapter, str(tmp_path / "gpt2.gguf"))
    with torch.no_grad():
        assert torch.equal(adapter.whole(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"blk.1.ffn_up.weight": None}, "1 missing (model.layers.1.mlp.up_proj.weight)"),
        ({"blk.0.attn_q.bias": np.zeros(HIDDEN)}, "1 unexpected (blk.0.attn_q.bias)"),
        ({"blk.0.ffn_norm.weight": np.ones(9)}, "post_attention_layernorm.weight (9,) instead of (64,)"),
        ({"output_norm.weight": np.full(HIDDEN, np.nan)}, "norm.weight holds 64 NaN and 0 infinite"),
        ({"token_embd.weight": np.zeros((len(TOKENS), HIDDEN))}, "tell no token from another"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    assert says in refused(write_gguf(tmp_path / "tiny.gguf", changed=changed))


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"split.count": 3}, "is a part of 3: join them with `llama-gguf-split --merge`"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions (rope.scaling.type yarn)"),
        ({"llama.rope.scale_linear": 2.0}, "scales its rotary positions (rope.scale_linear 2.0)"),
    ],
)
def test_what_transformers_would_pass_over(tmp_path: Path, said: dict[str, Any], says: str) -> None:
    assert says in refused(write_gguf(tmp_path / "tiny.gguf", said=said))


def test_another_architecture(tmp_path: Path) -> None:
    message = refused(write_gguf(tmp_path / "tiny.gguf", architecture="rwkv7"))
    assert "the metadata of" in message and "rwkv7" in message


@pytest.mark.parametrize("keep", [0, 3, 30, 400, 9_000, -1])
def test_a_file_that_is_cut_off(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} cannot be read (cut off or damaged? {file.stat().st_size:,} bytes)" in refused(file)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(b"GGML" + file.read_bytes()[4:])
    assert "cannot be read" in refused(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(file)


def test_names_of_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNameError, match=r"there is no file models/tiny\.gguf"):
        registry.resolve("models/tiny.gguf")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelNameError, match=r"give the folder .* or a \.gguf file"):
        registry.resolve(tmp_path / "model.bin")


def test_its_own_tokenizer(tmp_path: Path) -> None:
    tokenizer = tokenizers.named(str(write_gguf(tmp_path / "tiny.gguf")))
    words = ["th", "e", "Ġ", "c", "a", "t"], ["7", "!"]  # bytes, a space as Ġ, and the one merge
    assert tokenizer.encode_batch(["the cat", "7!"]) == [[TOKENS.index(token) for token in word] for word in words]
    assert tokenizer.vocab_size == len(TOKENS) and tokenizer.name.startswith("tiny.gguf:")
    with pytest.raises(CorpusError, match=r"cannot be loaded: the file has none that can be read.*--tokenizer"):
        tokenizers.named(str(write_gguf(tmp_path / "none.gguf", tokens=())))


def test_smollm2_is_named_by_its_verb_where_it_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = assets.SMOLLM2._replace(package="no_such_package")
    monkeypatch.setattr(assets, "SMOLLM2", gone)
    with pytest.raises(assets.AssetError, match="not installed: run `lscollapse fetch smollm2-135m`"):
        checkpoint.load("smollm2-135m")


def llama_parameters(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> int:
    """Closed form of a Llama whose embeddings are its head."""
    attention = 2 * hidden * hidden + 2 * hidden * (hidden * kv_heads // heads)
    return vocab * hidden + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def test_parameters_of_smollm2() -> None:
    assert ENTRIES["smollm2-135m"].n_parameters == llama_parameters(576, 1536, 30, 9, 3, 49152)
    assert not ENTRIES["smollm2-135m"].embedded


def test_every_number_of_the_tests_is_exact() -> None:
    """The reference holds what the file says only as long as the types hold these numbers; by the types' definitions."""
    for name, (_, numbers, kind) in weights().items():
        blocks = numbers.reshape(-1, 32)
        if kind == "Q8_0":  # scale = largest magnitude / 127
            codes = blocks / (np.abs(blocks).max(1, keepdims=True) / 127)
        elif kind == "Q4_1":  # offset = smallest, scale = range / 15
            low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
            codes = (blocks - low) / ((high - low) / 15)
        else:
            codes = numbers * 2**11
        assert np.array_equal(codes, np.round(codes)), name
