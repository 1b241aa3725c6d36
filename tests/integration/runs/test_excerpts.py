"""Token ids that are not the model's: tokenizers of other files, unknown text, ids without a row, repeated excerpts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lscollapse.core import assets
from lscollapse.core.config import Experiment
from lscollapse.core.progress import Silent
from lscollapse.data import corpus, tokenizers
from lscollapse.data.corpus import Corpus, CorpusError, Excerpt
from lscollapse.data.tokenizers import Tokenizer
from lscollapse.experiments import paper
from lscollapse.models.checkpoints.tensors import CheckpointError
from lscollapse.runs import loading
from tests.equivalence.layouts import VOCAB, write_hf

UNKNOWN = 1
WORDS = Tokenizer("words", 99, lambda batch: [[int(word) for word in text.split()] for text in batch], None, UNKNOWN)


class Notes(Silent):
    def __init__(self) -> None:
        object.__setattr__(self, "said", [])

    def note(self, message: str) -> None:
        self.said.append(message)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))


def drawn(model: str, **settings: Any) -> tuple[Corpus, list[str]]:
    """The excerpts of a model, as every verb draws them, and what was said meanwhile."""
    notes, options = Notes(), {"excerpts": 2, "tokens": 8, "offline": True} | settings
    (task,) = loading.load_tasks(Experiment(models=[model], lambdas=[1.0], **options), paper.sweep_variants, notes)
    return task.corpus, notes.said  # type: ignore[attr-defined]


def text_of(n_unknown: int, length: int = 100, first: int = 2) -> str:
    return " ".join(["1"] * n_unknown + [str(first + i % 90) for i in range(length - n_unknown)])


# --- unknown text, in every source ---------------------------------------------------------------


def as_text(texts: list[str]) -> str:
    Path("a.txt").write_text("\n\n".join(texts))
    return "a.txt"


def as_jsonl(texts: list[str]) -> str:
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return "a.jsonl"


def as_parquet(texts: list[str]) -> str:
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": str(n), "url": "", "title": str(n), "text": text} for n, text in enumerate(texts)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    return "a.parquet"


def as_frozen(texts: list[str]) -> str:
    rows = [
        {"title": str(n), "ids": WORDS.encode_batch([text])[0], "text_sha256": "0" * 64, "tokenizer": "words", "source": "s",
         "unknown_id": UNKNOWN}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    Path("frozen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "frozen.jsonl"


@pytest.mark.parametrize("write", [as_text, as_jsonl, as_parquet, as_frozen])
def test_the_share_of_unknown_ids(write: Callable[[list[str]], str]) -> None:
    """Of 200 ids 40 (20 %) are allowed and said, 41 refused; 4 (2 %) are not said, 5 are."""
    tokenizer = None if write is as_frozen else WORDS

    def load(first: int, second: int) -> Corpus:
        return corpus.draw_excerpts(write([text_of(first), text_of(second, first=3)]), 2, 100, tokenizer=tokenizer)

    assert load(4, 0).remarks == []
    (remark,) = load(4, 1).remarks
    assert remark.startswith("2.5% of the ids of ") and "unknown to the tokenizer 'words'" in remark
    assert load(10, 30).unknown_share == 0.2
    with pytest.raises(
        CorpusError, match=r"^20% of the ids of .* are the unknown token \(id 1\) of the tokenizer 'words'"
    ):
        load(11, 30)


def test_a_frozen_file_says_what_is_unknown() -> None:
    found = corpus.draw_excerpts(as_text([text_of(10), text_of(5, first=3)]), 2, 100, tokenizer=WORDS)
    corpus.freeze(found, "mine.jsonl")
    assert all(json.loads(line)["unknown_id"] == UNKNOWN for line in Path("mine.jsonl").read_text().splitlines())
    again = corpus.draw_excerpts("mine.jsonl", 2, 100)
    assert (again.unknown, again.unknown_share, again.excerpts) == (UNKNOWN, 0.075, found.excerpts)
    with pytest.raises(CorpusError, match="38% of the ids"):
        corpus.draw_excerpts("mine.jsonl", 2, 20)  # of the ids that are read
    rows = [json.loads(line) for line in Path("mine.jsonl").read_text().splitlines()]
    for wrong, says in (
        ([{**rows[0], "unknown_id": 2}, rows[1]], '"unknown_id" must be one token number'),
        ([{**row, "unknown_id": "1"} for row in rows], "line 1: unknown_id: input should be a valid integer, got '1'"),
    ):
        Path("wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
        with pytest.raises(CorpusError, match=says):
            corpus.draw_excerpts("wrong.jsonl", 2, 20)


def test_frozen_files_of_berts_tokens_without_that_entry() -> None:
    """bert-base-uncased's [UNK] is 100, by its vocab.txt."""
    unknown = assets.locate(assets.BERT_VOCAB).read_text(encoding="utf-8").split("\n").index("[UNK]")
    record = {"title": "T", "text_sha256": "0" * 64, "tokenizer": "bert-base-uncased", "source": "s"}
    Path("old.jsonl").write_text(json.dumps({**record, "ids": [unknown, unknown, 2000, 2001]}) + "\n")
    with pytest.raises(CorpusError, match=r"50% of the ids of s are the unknown token \(id 100\)"):
        corpus.draw_excerpts("old.jsonl", 1, 4)
    assert unknown == 100
    assert tokenizers.bert().unknown == tokenizers.bert().encode_batch(["\U00010400"])[0][0] == 100


def test_repeated_excerpts_are_counted_and_said() -> None:
    found = corpus.draw_excerpts(as_frozen([text_of(0), text_of(0, first=3), text_of(0), text_of(0)]), 4, 100)
    assert found.repeated == 2
    assert found.remarks == [
        "2 of the 4 excerpts of s hold the same ids as one before them: the mean counts them again, and the spread is too small"
    ]
    write_hf(Path("net"))
    line = {"title": "T", "text_sha256": "0" * 64, "tokenizer": "elsewhere", "source": "s", "ids": list(range(8))}
    Path("same.jsonl").write_text((json.dumps(line) + "\n") * 2)
    found, said = drawn("net", source="same.jsonl")
    assert [note for note in said if note.startswith("net: 1 of the 2 excerpts of s hold the same ids")]


def test_rows_that_are_equal_by_construction() -> None:
    same = Excerpt("T", (7,) * 5, "0" * 64, "elsewhere", "s")
    with pytest.raises(CorpusError, match=r"every excerpt of s repeats one token id \(the first: 7\)"):
        Corpus((same, replace(same, ids=(8,) * 5)), 0, "s")
    assert Corpus((same, replace(same, ids=(8, 8, 8, 8, 9))), 0, "s").repeated == 0


# --- the tokenizer's entries and the model's vocabulary ------------------------------------------


def albert(folder: str, vocabulary: int = 30522) -> None:
    config = transformers.AlbertConfig(
        vocab_size=vocabulary, embedding_size=4, hidden_size=8, intermediate_size=8, num_attention_heads=2,
        num_hidden_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AlbertModel(config).save_pretrained(folder)


def test_a_tokenizer_that_was_made_of_nothing() -> None:
    """ALBERT's tokenizer does not read vocab.txt: transformers makes one of its special tokens, and every id is [UNK]."""
    albert("net")
    shutil.copy(assets.locate(assets.BERT_VOCAB), "net/vocab.txt")
    entries = len(transformers.AutoTokenizer.from_pretrained("net"))
    assert entries < 10
    with pytest.raises(
        CorpusError, match=f"the own tokenizer of net has {entries} entries, the model 30,522 token ids"
    ):
        drawn("net", tokenizer="native")
    with pytest.raises(
        CorpusError, match=r"100% of the ids of .* are the unknown token \(id 1\) of the tokenizer 'net:"
    ):
        drawn("net", tokenizer=str(Path("net").resolve()))  # chosen, not the model's own: the text tells
    assert drawn("net", tokenizer="bert")[1] == []


def test_few_entries_are_said() -> None:
    """At a tenth of the ids a model's own tokenizer is taken with a remark, at half without."""
    transformers.BertTokenizer(vocab=str(assets.locate(assets.BERT_VOCAB))).save_pretrained("tokenizer")
    for vocabulary, remarks in ((61044, 0), (61045, 1)):
        albert("net", vocabulary)
        shutil.copytree("tokenizer", "net", dirs_exist_ok=True)
        said = drawn("net", tokenizer="native")[1]
        assert len(said) == remarks and all("has 30,522 entries" in note for note in said)
    albert("net", 305221)
    shutil.copytree("tokenizer", "net", dirs_exist_ok=True)
    with pytest.raises(CorpusError, match="has 30,522 entries, the model 305,221 token ids"):
        drawn("net", tokenizer="native")


def test_berts_ids_go_to_the_vocabulary_of_gpt_neox() -> None:
    """By design: 30,522 entries for 50,288 ids, and nothing is remarked."""
    albert("net", 50288)
    found, said = drawn("net")
    assert found.excerpts[0].tokenizer == "bert-base-uncased" and said == []


def test_ids_that_the_model_does_not_have() -> None:
    write_hf(Path("net"))
    line = {"title": "T", "text_sha256": "0" * 64, "tokenizer": "elsewhere", "source": "s", "ids": [*range(7), 2**62]}
    Path("frozen.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(
        CorpusError, match=f"hold token id {2**62} of the tokenizer 'elsewhere', net has ids 0 to 47: freeze"
    ):
        drawn("net", source="frozen.jsonl", excerpts=1)


# --- rows of zeros -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["never", "always"])
def test_tokens_whose_row_is_zero(stream: str) -> None:
    """Refused where the excerpts use them; the padding token's row, and those of tokens that do not occur, may be zero."""
    line = {
        "title": "T",
        "text_sha256": "0" * 64,
        "tokenizer": "elsewhere",
        "source": "s",
        "ids": [0, 9, 4, 1, 7, 30, 4, 2],
    }
    Path("frozen.jsonl").write_text(json.dumps(line) + "\n")
    options: dict[str, Any] = {"source": "frozen.jsonl", "excerpts": 1, "stream": stream}
    name = "backbone.embeddings.weight"

    def spoil(*rows: int) -> None:
        write_hf(Path("net"), pad_token_id=0)
        state = load_file("net/model.safetensors")
        state[name][list(rows)] = 0.0
        save_file(state, "net/model.safetensors", {"format": "pt"})

    spoil(0, 3, VOCAB)
    drawn("net", **options)
    spoil(0, 4, 30)
    with pytest.raises(
        CheckpointError, match=r"embeddings.weight of net has rows of zeros for 2 of the 7 .* \(4, 30\)"
    ):
        drawn("net", **options)


def test_a_zero_row_of_an_encoder_that_adds_positions() -> None:
    """X is not zero there, the token still is none."""
    line = {"title": "T", "text_sha256": "0" * 64, "tokenizer": "elsewhere", "source": "s", "ids": list(range(8))}
    Path("frozen.jsonl").write_text(json.dumps(line) + "\n")
    albert("net", 50)
    state = load_file("net/model.safetensors")
    state["embeddings.word_embeddings.weight"][5] = 0.0
    save_file(state, "net/model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"word_embeddings.weight of net has rows of zeros for 1 of the 8 .* \(5\)"
    ):
        drawn("net", source="frozen.jsonl", excerpts=1)
