"""Excerpts from the packaged summaries and from files, tokenizers, and frozen files."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from lscollapse.core import assets, config
from lscollapse.core.config import ConfigError
from lscollapse.core.files import OutputError
from lscollapse.data import corpus, tokenizers
from lscollapse.data.corpus import Corpus, CorpusError
from lscollapse.data.tokenizers import Tokenizer

SENTENCES = [
    "The ferry leaves at seven and comes back when the tide allows it.",
    "A drawer full of keys opens nothing in this house any more.",
    "Snow fell on the orchard before anybody had picked the last pears.",
    "Every bridge in the town hums a different note in the wind.",
    "The archive keeps two copies of each letter, one of them unread.",
]
WORDS = Tokenizer("words", 1000, lambda batch: [[len(word) for word in text.split()] for text in batch])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# The packaged summaries


def test_the_default_excerpts_are_the_ones_mamba2_tiny_never_saw() -> None:
    """A test vector: title, ids and text digest of the 32 excerpts that the training of mamba2-tiny held out."""
    excerpts = corpus.draw_excerpts().excerpts
    record = json.dumps([[e.title, list(e.ids), e.text_sha256] for e in excerpts])
    assert digest(record) == "82052cba3980c22c3f379e3b93eb76d651aaba8156bf0381f9a87bc05e5df94e"


def test_packaged_ids_are_those_of_transformers_bert_tokenizer() -> None:
    from transformers import BertTokenizer

    bert = BertTokenizer(vocab=str(assets.locate(assets.BERT_VOCAB)))
    summaries = json.loads(assets.locate(assets.SUMMARIES).read_text(encoding="utf-8"))
    for excerpt in corpus.draw_excerpts(n_excerpts=4, seed=5).excerpts:
        text = summaries[excerpt.title]["extract"]
        assert list(excerpt.ids) == bert.encode(text, add_special_tokens=False, verbose=False)[:128]
        assert excerpt.text_sha256 == digest(text)
        assert excerpt.licence == "CC BY-SA 4.0"


def test_more_excerpts_and_tokens_extend_the_same_draw() -> None:
    small, large = corpus.draw_excerpts(n_excerpts=3, n_tokens=128), corpus.draw_excerpts(n_excerpts=6, n_tokens=128)
    assert large.excerpts[:3] == small.excerpts
    assert large.excerpts != corpus.draw_excerpts(n_excerpts=6, n_tokens=128, seed=1).excerpts


def test_asking_for_more_than_there_is() -> None:
    with pytest.raises(CorpusError, match=r"has 0 texts of at least 5000 tokens \(10033 are shorter\), 1 were asked"):
        corpus.draw_excerpts(n_excerpts=1, n_tokens=5000)


# Files


def test_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(("﻿" + "\r\n \r\n\r\n".join([*SENTENCES, "Too short."])).encode())
    found = corpus.draw_excerpts(str(path), 5, 10, tokenizer=WORDS)
    assert {e.text_sha256 for e in found.excerpts} == {digest(sentence) for sentence in SENTENCES}
    assert {e.title for e in found.excerpts} == {f"notes {number}" for number in range(1, 6)}
    assert {e.source for e in found.excerpts} == {"notes.txt"} and {len(e.ids) for e in found.excerpts} == {10}
    assert found.source == "notes.txt"
    by_title = {e.title: e for e in found.excerpts}
    assert by_title["notes 2"].ids == (1, 6, 4, 2, 4, 5, 7, 2, 4, 5)


def test_the_seed_draws_from_a_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{number} {SENTENCES[0]}"} for number in range(40)])
    draws = [{e.title for e in corpus.draw_excerpts(path, 4, 8, seed, WORDS).excerpts} for seed in range(3)]
    assert draws[0] != draws[1] != draws[2]


def test_jsonl_keeps_provenance(tmp_path: Path) -> None:
    row = {
        "text": SENTENCES[0],
        "title": "Fähre",
        "url": "https://example.org/1",
        "revision": 17,
        "licence": "CC0",
        "id": 3,
    }
    excerpt = corpus.draw_excerpts(write_jsonl(tmp_path / "a.jsonl", [row]), 1, 8, tokenizer=WORDS).excerpts[0]
    assert (excerpt.title, excerpt.url, excerpt.revision, excerpt.licence, excerpt.page_id) == (
        "Fähre", "https://example.org/1", "17", "CC0", "3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ('{"text": "a"}\n\n["a"]', "line 3: one JSON object a line is expected, not list"),
        ('{"body": "a"}', """line 1: no "text" (a string) in it; its keys are ['body']"""),
        ("", "has 0 texts"),
    ],
)
def test_jsonl_that_cannot_be_read(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(CorpusError) as caught:
        corpus.draw_excerpts(str(path), 1, 1, tokenizer=WORDS)
    assert line in str(caught.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"is not UTF-8 text \(byte 3\)"):
        corpus.draw_excerpts(str(tmp_path / "a.txt"), 1, 1)


def test_parquet_of_the_wikipedia_data_set(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": str(n), "url": f"https://example.org/{n}", "title": f"Page {n}", "text": text}
        for n, text in enumerate(SENTENCES)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "wiki.parquet")
    excerpts = corpus.draw_excerpts(str(tmp_path / "wiki.parquet"), 5, 8, tokenizer=WORDS).excerpts
    assert sorted((e.page_id, e.url, e.title, e.text_sha256) for e in excerpts) == sorted(
        (row["id"], row["url"], row["title"], digest(row["text"])) for row in rows
    )


def test_parquet_without_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"no column \"text\" of strings; its columns are \['body'\]"):
        corpus.draw_excerpts(str(tmp_path / "a.parquet"), 1, 1, tokenizer=WORDS)
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(CorpusError, match="cannot be read"):
        corpus.draw_excerpts(str(tmp_path / "b.parquet"), 1, 1, tokenizer=WORDS)


def test_a_stream_is_drawn_by_seed_and_loses_no_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": str(n), "url": "", "title": "same title", "text": f"{n} {SENTENCES[0]}"} for n in range(2300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    draws = [
        [e.page_id for e in corpus.draw_excerpts(str(tmp_path / "a.parquet"), 2300, 2, seed, WORDS).excerpts]
        for seed in (0, 1)
    ]
    assert sorted(map(int, draws[0])) == sorted(map(int, draws[1])) == list(range(2300))
    assert set(draws[0][:20]) != set(draws[1][:20])


def test_the_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(CorpusError, match=r"wikimedia/wikipedia 20231101\.en cannot be read: ") as caught:
        corpus.draw_excerpts("datasets", 1, 8, tokenizer=WORDS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "line"),
    [
        ("wikpedia", {}, "unknown source 'wikpedia': give one of packaged, wikipedia, datasets, smiles, or a file"),
        ("gone.jsonl", {}, "the source file 'gone.jsonl' does not exist"),
        ("packaged", {"titles": ["A"]}, "titles choose articles of the source 'wikipedia'"),
    ],
)
def test_requests_that_make_no_sense(source: str, options: dict[str, object], line: str) -> None:
    with pytest.raises(CorpusError, match=line):
        corpus.draw_excerpts(source, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "least"), [("excerpts", 1), ("tokens", 2)])
def test_too_few_are_refused_by_the_configuration(name: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}: input should be greater than or equal to {least}, got 0"):
        config.configure(config.Experiment, settings=[f"{name}=0"])


# Frozen files


@pytest.fixture
def drawn(tmp_path: Path) -> Corpus:
    rows = [
        {"text": text, "title": f"Seite „{n}“\u2028", "revision": n, "licence": "CC0"}
        for n, text in enumerate(SENTENCES)
    ]
    return corpus.draw_excerpts(write_jsonl(tmp_path / "texts.jsonl", rows), 5, 10, seed=3, tokenizer=WORDS)


def test_freezing_and_loading_gives_the_same_excerpts(tmp_path: Path, drawn: Corpus) -> None:
    corpus.freeze(drawn, tmp_path / "frozen.jsonl")
    again = corpus.draw_excerpts(str(tmp_path / "frozen.jsonl"), 5, 10, seed=99)
    assert again.excerpts == drawn.excerpts
    assert again.source == "texts.jsonl"
    assert [path.name for path in tmp_path.iterdir() if "frozen" in path.name] == ["frozen.jsonl"]
    corpus.freeze(again, tmp_path / "twice.jsonl")
    assert (tmp_path / "twice.jsonl").read_bytes() == (tmp_path / "frozen.jsonl").read_bytes()


def test_a_frozen_line_says_everything(tmp_path: Path, drawn: Corpus) -> None:
    corpus.freeze(drawn, tmp_path / "frozen.jsonl")
    lines = (tmp_path / "frozen.jsonl").read_text().splitlines()
    assert len(lines) == 5
    names = {
        "title",
        "revision",
        "url",
        "licence",
        "retrieved",
        "source",
        "tokenizer",
        "text_sha256",
        "n_tokens",
        "ids",
        "page_id",
    }
    for line in lines:
        row = json.loads(line)
        assert set(row) == names and row["n_tokens"] == len(row["ids"]) == 10


def test_a_smaller_request_takes_the_first(tmp_path: Path, drawn: Corpus) -> None:
    corpus.freeze(drawn, tmp_path / "frozen.jsonl")
    found = corpus.draw_excerpts(str(tmp_path / "frozen.jsonl"), 2, 7, tokenizer=WORDS)
    assert [e.ids for e in found.excerpts] == [e.ids[:7] for e in drawn.excerpts[:2]]


@pytest.mark.parametrize(("excerpts", "tokens", "line"), [(6, 10, "--excerpts 6"), (5, 11, "--tokens 11")])
def test_a_larger_request_is_refused(tmp_path: Path, drawn: Corpus, excerpts: int, tokens: int, line: str) -> None:
    corpus.freeze(drawn, tmp_path / "frozen.jsonl")
    with pytest.raises(CorpusError, match=f"holds 5 excerpts of 10 tokens: {line}"):
        corpus.draw_excerpts(str(tmp_path / "frozen.jsonl"), excerpts, tokens)


def test_another_tokenizer_is_refused(tmp_path: Path, drawn: Corpus) -> None:
    corpus.freeze(drawn, tmp_path / "frozen.jsonl")
    with pytest.raises(CorpusError, match="frozen with the tokenizer 'words', 'bert-base-uncased' was asked"):
        corpus.draw_excerpts(str(tmp_path / "frozen.jsonl"), 5, 10, tokenizer=tokenizers.bert())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ids": [1, -2]}, "line 2: ids.1: input should be greater than or equal to 0, got -2"),
        ({"ids": "12"}, "line 2: ids: input should be a valid list, got '12'"),
        ({"tokenizer": "other"}, "mixes the tokenizers"),
        ({"text_sha256": None}, "line 2: text_sha256: field required"),
    ],
)
def test_a_spoilt_frozen_file(tmp_path: Path, drawn: Corpus, change: dict[str, object], line: str) -> None:
    corpus.freeze(drawn, tmp_path / "frozen.jsonl")
    rows = [json.loads(text) for text in (tmp_path / "frozen.jsonl").read_text().splitlines()]
    rows[1] |= change
    rows[1] = {name: value for name, value in rows[1].items() if value is not None}
    with pytest.raises(CorpusError, match=line):
        corpus.draw_excerpts(write_jsonl(tmp_path / "spoilt.jsonl", rows), 5, 10)


def test_a_freeze_that_fails_leaves_the_old_file(tmp_path: Path, drawn: Corpus) -> None:
    with pytest.raises(CorpusError, match="cannot be written"):
        corpus.freeze(drawn, tmp_path / "no such folder" / "frozen.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot be written: it is a folder"):
        corpus.freeze(replace(drawn), tmp_path / "folder.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.jsonl", "texts.jsonl"]


# Tokenizers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer as people publish them: adds [CLS], cuts to 4 tokens, pads to 6, and warns above 4."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[PAD]": 2, "salt": 3, "on": 4, "the": 5, "road": 6}
    inner = Inner(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])  # type: ignore[assignment]
    inner.enable_truncation(4)
    inner.enable_padding(length=6, pad_id=2, pad_token="[PAD]")
    path = tmp_path / "published"
    path.mkdir()
    inner.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4,
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_published_tokenizer_neither_adds_cuts_nor_pads(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = tokenizers.named(str(folder))
    with caplog.at_level(logging.DEBUG, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        ids = found.encode_batch(["salt on the salt road on the road", "on ice"])
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert ids == [[3, 4, 5, 3, 6, 4, 5, 6], [4, 0]]
    assert found.vocab_size == 7
    assert caplog.records == []


def test_a_folders_name_does_not_depend_on_where_it_is(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "published"
    elsewhere.parent.mkdir()
    name = tokenizers.named(str(folder)).name
    folder.rename(elsewhere)
    assert tokenizers.named(str(elsewhere)).name == name
    assert str(tmp_path) not in name and name.startswith("published:")
    content = (elsewhere / "tokenizer.json").read_text()
    (elsewhere / "tokenizer.json").write_text(content.replace('"road"', '"roads"'))
    assert tokenizers.named(str(elsewhere)).name != name


def test_native_is_what_the_model_says(folder: Path) -> None:
    assert tokenizers.named("native", str(folder)).encode_batch(["the road"]) == [[5, 6]]
    assert tokenizers.named("native", "smiles").name == "rxnmapper-smiles"
    with pytest.raises(CorpusError, match="names no tokenizer of its own"):
        tokenizers.named("native")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be loaded") as caught:
        tokenizers.named(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_bert_is_not_cut_at_512() -> None:
    bert = tokenizers.named("bert")
    assert (bert.name, bert.vocab_size) == ("bert-base-uncased", 30522)
    ids = bert.encode_batch(["the " * 1000])[0]
    assert ids == [1996] * 1000  # "the" in bert-base-uncased
