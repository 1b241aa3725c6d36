"""Texts with their provenance, from the packaged summaries, from files, and from the `wikimedia/wikipedia` data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lscollapse.core import assets
from lscollapse.core.config import CC_BY_SA
from lscollapse.core.files import first_line, read_text, refuse_no_file
from lscollapse.core.outside import parse_json, refuse_half_characters, shown, unwritten

T = TypeVar("T")
DUMP = "20231101"  # the dump of wikimedia/wikipedia that is streamed
DUMP_LICENCE = "CC BY-SA 3.0, GFDL"  # as the data set's card states it
WINDOW = 1000  # rows of a stream that are put into the order of the seed at a time
LARGEST_TEXTS = 2**28  # bytes of a file of texts, which is read whole
LONGEST_TEXT = 2**23  # characters of one text, of which a few hundred are measured: more than any novel has
LONGEST_TITLE = 255  # bytes of a MediaWiki title
SPACES = str.maketrans("\n\r\t", "   ")
FACTS = ("title", "url", "revision", "licence", "retrieved", "page_id")  # what may be said of a text


class CorpusError(ValueError):
    """A text source cannot give what was asked of it."""


@dataclass(frozen=True)
class Text:
    """One text with its provenance, not yet tokenised. `retrieved` is a UTC time in ISO 8601."""

    title: str
    text: str
    url: str = ""
    revision: str = ""
    licence: str = ""
    retrieved: str = ""
    page_id: str = ""


def sampling_order(titles: Iterable[str], seed: int) -> list[str]:
    """Titles in the order in which a seed draws them: by sha256 of seed and title.

    The same on every machine and library version, and adding an article moves no other.
    """
    return sorted(titles, key=lambda title: hashlib.sha256(f"{seed}:{title}".encode()).digest())


def packaged_articles() -> list[tuple[str, str]]:
    """(title, text) of the 10,033 packaged English Wikipedia summaries."""
    summaries = json.loads(assets.locate(assets.SUMMARIES).read_text(encoding="utf-8"))
    return [(title, entry["extract"]) for title, entry in summaries.items()]


def packaged(seed: int) -> Iterator[Text]:
    """The packaged summaries in the order in which `seed` draws them."""
    articles = dict(packaged_articles())
    for title in sampling_order(articles, seed):
        yield Text(title, articles[title], f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}", "", CC_BY_SA)


def plain_file(path: Path, seed: int) -> Iterator[Text]:
    """Texts of a .txt file, separated by blank lines, drawn by `seed`; titled by file name and place in the file."""
    text = read_text(path, CorpusError, LARGEST_TEXTS)
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    titles = {f"{path.stem} {number}": block for number, block in enumerate(blocks, 1)}
    for number, block in enumerate(blocks, 1):
        _refuse_long(block, f"{path}, text {number}")
    return (Text(title, titles[title]) for title in sampling_order(titles, seed))


def jsonl_file(path: Path, seed: int) -> Iterator[Text]:
    """Texts of a .jsonl file, drawn by `seed`: each object has "text", optionally title, url, revision, licence, ...

    Raises:
        CorpusError: a line that is no JSON object or has no "text".
    """
    texts = {f"{number}": text_of(row, f"{path}, line {number}", f"{path.stem} {number}")
             for number, row in json_lines(path)}  # fmt: skip
    return (texts[number] for number in sampling_order(texts, seed))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a .jsonl file that is not blank, each looked at when it is asked for."""
    for number, line in enumerate(read_text(path, CorpusError, LARGEST_TEXTS).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}", CorpusError)
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, line {number}: one JSON object a line is expected, not {type(row).__name__}")
        yield number, row


def parquet_file(path: Path, seed: int) -> Iterator[Text]:
    """Texts of a .parquet file with a column text, optionally id, url, title, ...; drawn by `seed` within each `WINDOW` rows.

    Raises:
        CorpusError: it cannot be read, has no rows or no texts.
    """
    refuse_no_file(path, CorpusError)
    try:
        yield from _in_parquet(path, seed)
    except CorpusError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise CorpusError(f"{path} cannot be read as Parquet: {shown(first_line(error), 200)}") from error


def _in_parquet(path: Path, seed: int) -> Iterator[Text]:
    from pyarrow import parquet  # not above: a run of other texts does without it

    file: Any = parquet.ParquetFile(path)
    there = list(file.schema_arrow.names)
    if "text" not in there:
        raise CorpusError(f'{path}: no column "text" of strings; its columns are {shown(there, 200)}')
    if not file.metadata.num_rows:
        raise CorpusError(f"{path} holds no rows: give a file with texts")
    columns = [name for name in ("text", "id", *FACTS) if name in there]
    rows = (row for batch in file.iter_batches(WINDOW, columns=columns) for row in batch.to_pylist())
    for number, row in _in_windows(enumerate(rows, 1), seed):
        yield text_of(row, f"{path}, row {number}", "" if row.get("id") is None else str(row["id"]))


def read_titles(path: Path) -> list[str]:
    """Titles of articles, one a line; blank lines are passed over.

    Raises:
        CorpusError: the file cannot be read, names nothing, or has a line that is no title.
    """
    titles = []
    for number, line in enumerate(read_text(path, CorpusError).split("\n"), 1):
        title = line.strip()
        if unwritten(title) or len(title.encode()) > LONGEST_TITLE:
            raise CorpusError(
                f"{path}, line {number}: {shown(title)} is no title: up to {LONGEST_TITLE} bytes of printable characters"
            )
        titles += [title] if title else []
    if not titles:
        raise CorpusError(f"{path} names no article: give one title a line")
    return titles


def parquet_stream(seed: int, language: str = "en") -> Iterator[Text]:
    """Texts of `wikimedia/wikipedia` on the hub (the dump of November 2023 in `language`), streamed by `datasets`.

    The seed draws one of its many shards and the order within each `WINDOW` rows: little is fetched.

    Raises:
        CorpusError: the hub cannot be read, or a column is missing.
    """
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or its successor

    from lscollapse.core.hub_client import watched

    revision = f"{DUMP}.{language}"
    name = f"wikimedia/wikipedia {revision}"
    try:
        with watched() as watch:
            rows = datasets.load_dataset("wikimedia/wikipedia", revision, split="train", streaming=True)
            shard = sampling_order(map(str, range(rows.num_shards)), seed)[0]
            for row in _in_windows(watch.each(rows.shard(rows.num_shards, int(shard))), seed):
                if not isinstance(row.get("text"), str):
                    raise CorpusError(f'{name}: no column "text" of strings; its columns are {sorted(row)}')
                yield _from_row(row, title=str(row.get("id", "")), revision=revision, licence=DUMP_LICENCE)
    except CorpusError:
        raise
    except (OSError, ValueError, HTTPError) as error:
        mend = "try later, or use --source packaged or a frozen file"
        raise CorpusError(f"{name} cannot be read: {shown(first_line(error), 200)}; {mend}") from error


def _in_windows(rows: Iterator[T], seed: int) -> Iterator[T]:
    while window := {str(number): row for number, row in enumerate(islice(rows, WINDOW))}:
        yield from (window[number] for number in sampling_order(window, seed))


def _from_row(row: dict[str, Any], **defaults: str) -> Text:
    """A row of a file as a Text; null counts as absent."""
    page = {"page_id": "" if row.get("id") is None else row["id"]}
    known = {**defaults, **{name: row[name] for name in FACTS if row.get(name) is not None}}
    return Text(text=row["text"], **{name: str(value) for name, value in {**page, **known}.items()})


def text_of(row: dict[str, Any], where: str, title: str) -> Text:
    """A row of a file as a Text, titled `title` where it says nothing of it.

    Raises:
        CorpusError: its text is none, or what it says of it is neither text nor number; `where` names the row.
    """
    text = row.get("text")
    if not isinstance(text, str):
        what = f"it is {'null' if text is None else shown(text)}" if "text" in row else (
            f"its keys are {shown(sorted(row), 200)}"
        )  # fmt: skip
        raise CorpusError(f'{where}: no "text" (a string) in it; {what}')
    _refuse_long(text, where)
    refuse_half_characters(text, where, CorpusError)
    for name in ("id", *FACTS):
        fact = row.get(name)
        if isinstance(fact, str):
            refuse_unwritten(name, fact, where)
        if isinstance(fact, list | dict | bytes):
            raise CorpusError(f'{where}: "{name}" is a {type(fact).__name__}: text is expected')
    return _from_row(row, title=title)


def refuse_unwritten(name: str, fact: str, where: str) -> None:
    """Raise a CorpusError where what is said of a text, and goes into tables and pages, holds more control than a new line."""
    if found := unwritten(fact.translate(SPACES)):
        raise CorpusError(f'{where}: "{name}" holds {shown(found)}, which is no character that can be printed')


def _refuse_long(text: str, where: str) -> None:
    if len(text) > LONGEST_TEXT:
        raise CorpusError(
            f"{where}: a text of {len(text):,} characters, at most {LONGEST_TEXT:,} are read: cut it into several"
        )
