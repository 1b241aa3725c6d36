"""Texts that are none, by the record that is wrong: nulls, halves of characters, files without rows, pipes, titles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lscollapse.core.outside import plain
from lscollapse.data import corpus, texts
from lscollapse.data.texts import LONGEST_TEXT, CorpusError, parquet_file, read_titles
from lscollapse.data.tokenizers import Tokenizer

WORDS = Tokenizer("words", 1000, lambda batch: [[len(word) for word in text.split()] for text in batch])
GOOD = {"text": "A text of some words."}
FROZEN = {"title": "T", "ids": [3, 4, 5], "text_sha256": "0" * 64, "tokenizer": "elsewhere", "source": "s"}


def refused(source: Path, n: int = 1) -> str:
    with pytest.raises(CorpusError) as caught:
        corpus.draw_excerpts(str(source), n, 2, tokenizer=None if "frozen" in source.name else WORDS)
    message = str(caught.value)
    assert "\n" not in message and plain(message) == message and str(source) in message
    return message


def jsonl(folder: Path, *rows: Any, name: str = "a.jsonl") -> Path:
    """The rows, of which those that are text stand as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "broken \ud83d text"}, r"line 2: \ud83d is half of a character"),
        ({**GOOD, "title": "a \udc00"}, r"line 2: \udc00 is half of a character"),
        ({"text": None}, 'line 2: no "text" (a string) in it; it is null'),
        ({"text": 3}, 'line 2: no "text" (a string) in it; it is 3'),
        ({"\x1b[31m": 1}, r"its keys are ['\x1b[31m']"),
        ({**GOOD, "title": "\x1b[31mred"}, r'line 2: "title" holds \x1b'),
        ({**GOOD, "url": ["a"]}, 'line 2: "url" is a list: text is expected'),
        ({**GOOD, "a": "[" * 5}, None),
        ('{"text": ' + "[" * 50_000, "line 2: values inside values without end"),
        ('{"text": "a", "b": ' + "[" * 100 + "]" * 100 + "}", "line 2: values inside values without end"),
        ({"text": "x" * (LONGEST_TEXT + 1)}, "line 2: a text of 8,388,609 characters, at most 8,388,608 are read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_line_of_json(tmp_path: Path, row: Any, says: str | None) -> None:
    file = jsonl(tmp_path, GOOD, row)
    if says is None:
        assert len(corpus.draw_excerpts(str(file), 2, 2, tokenizer=WORDS).excerpts) == 2
    else:
        assert says in refused(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": [2**70]}, "line 1: ids.0: input should be less than 9223372036854775808"),
        ({"ids": [-1]}, "line 1: ids.0: input should be greater than or equal to 0"),
        ({"ids": [True]}, "line 1: ids.0: input should be a valid integer"),
        ({"ids": [1.0]}, "line 1: ids.0: input should be a valid integer"),
        ({"ids": []}, "line 1: ids: "),
        ({"ids": None}, "line 1: ids: "),
        ({"ids": {"a": 1}}, "line 1: ids: "),
        ({"n_tokens": 4}, "line 1: n_tokens is 4, and there are 3 ids"),
        ({"unknown_id": -1}, "line 1: unknown_id: "),
        ({"mask_id": 2**63}, "line 1: mask_id: "),
        ({"title": ["T"]}, "line 1: title: input should be a valid string"),
        ({"title": "\x9b31m"}, r'line 1: "title" holds \x9b'),
        ({"tokenizer": ""}, "line 1: tokenizer: "),
        ({"source": None}, "line 1: source: "),
        ({"title": "\ud83d"}, "line 1: \\ud83d is half of a character"),
    ],
    ids=str,
)
def test_a_line_of_a_frozen_file(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    assert says in refused(jsonl(tmp_path, FROZEN | change, name="frozen.jsonl"))


def parquet(folder: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def test_rows_of_parquet(tmp_path: Path) -> None:
    many = ["A text of some words."] * 1500
    file = parquet(tmp_path, text=[*many, None])
    with pytest.raises(CorpusError, match=r'row 1501: no "text" \(a string\) in it; it is null'):
        list(parquet_file(file, 0))
    assert "holds no rows" in refused(parquet(tmp_path, text=pyarrow.array([], pyarrow.string())))
    assert "(a string) in it; it is b'a'" in refused(parquet(tmp_path, text=[b"a"]))
    assert 'row 1: "title" is a list' in refused(parquet(tmp_path, text=["a"], title=[["b"]]))
    assert r"its columns are ['\x1b[31m']" in refused(parquet(tmp_path, **{"\x1b[31m": ["a"]}))
    whole = parquet(tmp_path, text=many, id=[None] * 1500).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as Parquet" in refused(tmp_path / "a.parquet")


def test_null_counts_as_absent(tmp_path: Path) -> None:
    file = parquet(tmp_path, text=["A text of words."], id=[None], title=[None], url=[None])
    (text,) = parquet_file(file, 0)
    assert (text.title, text.url, text.page_id) == ("", "", "")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_pipe_is_no_source(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a{suffix}")
    assert "cannot be read: it is a " in refused(tmp_path / f"a{suffix}")


def test_a_text_that_is_too_long_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n\n" + "x" * (LONGEST_TEXT + 1))
    assert "text 2: a text of 8,388,609 characters" in refused(tmp_path / "a.txt")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as handle:
        handle.truncate(texts.LARGEST_TEXTS + 1)  # takes no room on the disk
    assert "is 268,435,457 bytes, at most 268,435,456 are read" in refused(tmp_path / "a.txt")


def test_titles(tmp_path: Path) -> None:
    file = tmp_path / "titles.txt"
    file.write_bytes(b"\xef\xbb\xbfCaf\xc3\xa9\r\n\r\n  Lamp \r\n")
    assert read_titles(file) == ["Café", "Lamp"]
    for content, says in (
        (b"", "names no article"),
        (b" \n\n", "names no article"),
        (b"Lamp\n\x1b[31m\n", r"line 2: \\x1b\[31m is no title"),
        (b"a" * 256, "line 1: a+... is no title: up to 255 bytes"),
        (b"\xed\xa0\xbd", "is not UTF-8 text"),
    ):
        file.write_bytes(content)
        with pytest.raises(CorpusError, match=says):
            read_titles(file)
