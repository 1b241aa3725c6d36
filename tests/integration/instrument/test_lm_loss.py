"""Losses of a run: of loaded and of streamed checkpoints, with and without a head, against transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AlbertForMaskedLM, BertForMaskedLM, BertModel, Mamba2ForCausalLM

from lscollapse.core.config import ConfigError, Experiment
from lscollapse.experiments import paper
from lscollapse.instrument.lm_loss import lm_loss
from lscollapse.models.checkpoints import checkpoint
from tests.equivalence import tiny
from tests.equivalence.layouts import PADDED, hf_state, original_state, write_hf, write_original
from tests.unit.instrument.test_lm_loss import SIZE, bert, hidden, with_head


def frozen(folder: Path, tokenizer: str = "made up", n_tokens: int = 8, size: int = 37) -> Path:
    file = folder / "frozen.jsonl"
    record = {"text_sha256": "0" * 64, "tokenizer": tokenizer, "source": "by hand"}
    rows = [{"title": f"T{n}", "ids": [(5 * n + k * k + 1) % size for k in range(n_tokens)]} for n in range(11)]
    file.write_text("".join(json.dumps(record | row) + "\n" for row in rows))
    return file


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    def start(self, total: float) -> None:
        pass

    def advance(self, amount: float) -> None:
        pass


def sweep(tmp_path: Path, model: Path, out: str, **changes: Any) -> tuple[pd.DataFrame, list[str]]:
    notes = Notes()
    settings = {
        "models": [str(model)], "lambdas": [-1000.0, 0.0, 1.0], "excerpts": 11, "tokens": 8, "offline": True,
        "device": "cpu", "quality": True, "cache_dir": tmp_path / "cache", "source": str(tmp_path / "frozen.jsonl"),
    }  # fmt: skip
    rows = paper.sweep_lambda(Experiment(**settings | changes), tmp_path / out, notes)
    return rows[rows["measure"] == "lm_loss"], notes.lines


@pytest.mark.parametrize("write", ["original", "huggingface", "untied"])
def test_a_streamed_checkpoint_has_the_losses_of_the_loaded_one(tmp_path: Path, write: str) -> None:
    frozen(tmp_path)
    if write == "original":
        model = write_original(tmp_path / "model", original_state(dtype=torch.float32))
    elif write == "huggingface":
        model = write_hf(tmp_path / "model", hf_state(dtype=torch.float32))
    else:
        output = torch.randn(PADDED, 16, generator=torch.Generator().manual_seed(4))
        state = hf_state(dtype=torch.float32) | {"lm_head.weight": output}
        model = write_hf(tmp_path / "model", state, tie_word_embeddings=False)
    loaded, _ = sweep(tmp_path, model, "loaded", stream="never")
    streamed, _ = sweep(tmp_path, model, "streamed", stream="always")
    assert len(loaded) == 2 * 3 * 11
    pd.testing.assert_frame_equal(loaded.reset_index(drop=True), streamed.reset_index(drop=True), rtol=1e-6)
    whole = Mamba2ForCausalLM(checkpoint.load(model).model.config).eval()
    whole.backbone = checkpoint.load(model).model
    whole.tie_weights()
    if write == "untied":
        whole.lm_head.weight.data = output
    ids = torch.tensor([json.loads(line)["ids"] for line in (tmp_path / "frozen.jsonl").read_text().splitlines()])
    with torch.no_grad():
        theirs = [float(whole(input_ids=row[None], labels=row[None]).loss) for row in ids]
    full = streamed[(streamed["lam"] == 1) & streamed["gating"]]
    np.testing.assert_allclose(full["value"], theirs, rtol=2e-5)
    assert set(streamed.loc[streamed["lam"] == -1000, "status"]) == {"certified"}
    within = (full["value"] - np.array(theirs)).abs() <= full["rounding"] + 2e-6  # theirs are float32 too
    assert within.all() and (full["rounding"] < 1e-3).all()


def test_an_encoder_checkpoint_with_and_without_its_head(tmp_path: Path) -> None:
    """The mask token is that of the tokenizer of the excerpts; a sentence encoder has no head: a run says so, and one that
    has nothing else to score is refused."""
    frozen(tmp_path, "bert-base-uncased", size=113)
    config = tiny.bert(vocab_size=113).config
    model = with_head(BertForMaskedLM, config)
    model.save_pretrained(tmp_path / "whole")
    rows, notes = sweep(tmp_path, tmp_path / "whole", "a", lambdas=[1.0])
    assert not [line for line in notes if "head" in line]
    assert rows["rounding"].between(0, 1e-4, inclusive="neither").all()  # a twin fills in what its original does
    ids = torch.tensor([json.loads(line)["ids"] for line in (tmp_path / "frozen.jsonl").read_text().splitlines()])
    for number, value in enumerate(rows["value"]):
        at = hidden(0, number, 8)
        masked, labels = ids[number].clone(), torch.full((8,), -100)
        masked[at], labels[at] = 103, ids[number][at]  # [MASK] of bert-base-uncased
        with torch.no_grad():
            assert math.isclose(value, float(model(masked[None], labels=labels[None]).loss), rel_tol=1e-5)

    BertModel(config).save_pretrained(tmp_path / "base")
    reason = "no language-model head came with this bert: give it as BertForMaskedLM"
    with pytest.raises(ConfigError, match=f"^nothing to score: {reason}$"):
        sweep(tmp_path, tmp_path / "base", "b", lambdas=[1.0])
    assert not (tmp_path / "b").exists()
    both = [str(tmp_path / "base"), str(tmp_path / "whole")]
    rows, notes = sweep(tmp_path, tmp_path / "whole", "c", lambdas=[1.0], models=both)
    assert set(rows["model"]) == {"whole"}
    assert [line for line in notes if reason in line]


def test_an_albert_checkpoint_of_another_layout(tmp_path: Path) -> None:
    """With prefixes, a pooler, and decoder weights written out beside the embedding they are tied to."""
    frozen(tmp_path, "bert-base-uncased", size=113)
    model = with_head(AlbertForMaskedLM, tiny.albert(vocab_size=113).config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = tmp_path / "albert"
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(state | {"albert.pooler.weight": torch.zeros(16, 16)}, folder / "model.safetensors")
    rows, _ = sweep(tmp_path, folder, "a", lambdas=[1.0])
    ids = np.array([json.loads(line)["ids"] for line in (tmp_path / "frozen.jsonl").read_text().splitlines()])
    direct = lm_loss(model, ids, mask_token=103)
    np.testing.assert_allclose(rows["value"], direct["value"], rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["BertLMHeadModel", "GPTNeoXForCausalLM", "DistilBertForMaskedLM", "RobertaForMaskedLM"]
)
def test_a_checkpoint_is_scored_as_the_class_it_was_saved_as(tmp_path: Path, name: str) -> None:
    """Whatever the configuration says beside: the RoBERTa has is_decoder set."""
    kind = getattr(transformers, name)
    changes: dict[str, Any] = {"max_position_embeddings": 40, "vocab_size": 113}
    changes |= {"is_decoder": True} if "Bert" in name[:4] or "Rob" in name else {}
    model = with_head(kind, kind.config_class(**SIZE | changes))
    model.save_pretrained(tmp_path / "model")
    frozen(tmp_path, "bert-base-uncased", size=113)
    rows, _ = sweep(tmp_path, tmp_path / "model", "a", lambdas=[1.0])
    ids = torch.tensor([json.loads(line)["ids"] for line in (tmp_path / "frozen.jsonl").read_text().splitlines()])
    theirs = []
    for number, row in enumerate(ids):
        inputs, labels = row.clone(), row.clone()
        if "Masked" in name:
            at, labels = hidden(0, number, 8), torch.full((8,), -100)
            inputs[at], labels[at] = 103, row[at]
        with torch.no_grad():
            theirs.append(float(model(inputs[None], labels=labels[None]).loss))
    np.testing.assert_allclose(rows.sort_values("excerpt")["value"], theirs, rtol=1e-5)


def test_an_encoder_whose_tokenizer_has_no_mask_is_refused(tmp_path: Path) -> None:
    frozen(tmp_path, "nobody's", size=61)
    bert().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizer"):
        sweep(tmp_path, tmp_path / "model", "out")
