"""Text files of a person, whatever room reads them, are read by one rule: UTF-8, with or without a byte order mark, and the file's name in the error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lscollapse.core import config
from lscollapse.core.config import Experiment
from lscollapse.core.files import changes, read_text
from lscollapse.data import corpus, tokenizers
from lscollapse.data.texts import CorpusError
from lscollapse.experiments import own_model, paper
from lscollapse.runs.excerpts import load_corpus
from tests.servers.mediawiki import MediaWikiServer, Page

BOM = b"\xef\xbb\xbf"
FROZEN = {"title": "é", "ids": [3, 4, 5], "text_sha256": "0" * 64, "tokenizer": "elsewhere", "source": "é"}
WORDS = tokenizers.Tokenizer("words", 1000, lambda batch: [[len(word) for word in text.split()] for text in batch])


@pytest.fixture
def wiki() -> Iterator[MediaWikiServer]:
    with MediaWikiServer(
        {"Café": Page("A house of coffee by the sea."), "Lamp": Page("A lamp is lit here.")}
    ) as server:
        yield server


def titles(file: Path, wiki: MediaWikiServer) -> Any:
    settings = {"endpoint": wiki.endpoint, "contact": "a@example.org", "titles": file, "cache_dir": file.parent / "c"}
    experiment = Experiment.model_validate({"source": "wikipedia", "excerpts": 2, "tokens": 3, "wikipedia": settings})
    return [e.title for e in load_corpus(experiment, WORDS).excerpts]


KINDS: dict[str, tuple[str, str, Callable[[Path, MediaWikiServer], Any], Any]] = {
    "titles": ("titles.txt", "Café\r\nLamp\r\n", titles, ["Café", "Lamp"]),
    "text": ("a.txt", "Café by the sea", lambda file, _: corpus.draw_excerpts(str(file), 1, 4, tokenizer=WORDS).excerpts[0].ids,
             (4, 2, 3, 3)),
    "jsonl": ("a.jsonl", '{"text": "Café by the sea", "title": "é"}',
              lambda file, _: corpus.draw_excerpts(str(file), 1, 4, tokenizer=WORDS).excerpts[0].title, "é"),
    "frozen": ("a.jsonl", json.dumps(FROZEN, ensure_ascii=False),
               lambda file, _: (corpus.draw_excerpts(str(file), 1, 3).excerpts[0].ids,
                                own_model.reads_own_tokens(Experiment(source=str(file)))), ((3, 4, 5), False)),
    "lambdas": ("a.csv", "layer,lam,é\n1,0.5,\n2,-2,\n", lambda file, _: paper.read_lambdas(file, 2), (0.5, -2.0)),
    "configuration": ("a.yaml", "models: [é]\n", lambda file, _: config.configure(Experiment, file).models, ["é"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path, wiki: MediaWikiServer, kind: str) -> None:
    name, text, read, expected = KINDS[kind]
    for start in (b"", BOM):
        (tmp_path / name).write_bytes(start + text.encode())
        assert read(tmp_path / name, wiki) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_one_line_with_the_file(
    tmp_path: Path, wiki: MediaWikiServer, kind: str, encoding: str
) -> None:
    name, text, read, _ = KINDS[kind]
    (tmp_path / name).write_bytes(text.encode(encoding))
    place = text.encode("latin-1").index(b"\xe9") if encoding == "latin-1" else 0
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name, wiki)
    assert str(caught.value) == f"{tmp_path / name} is not UTF-8 text (byte {place}): convert it first"


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OverflowError, match="gone cannot be read: there is no such file"):
        read_text(tmp_path / "gone", OverflowError)  # type: ignore[arg-type]
    with pytest.raises(CorpusError, match="cannot be read: it is a folder, no file"):
        read_text(tmp_path, CorpusError)


def test_lists_that_differ_beyond_what_is_shown_say_by_what() -> None:
    names = [f"measure-{n}" for n in range(9)]
    said = changes({"measures": names}, {"measures": [*names[:7], "another"]})
    assert said == ['measures: less ["measure-7", "measure-8"], plus ["another"]']
    assert changes({"measures": names}, {"measures": list(names)}) == []
