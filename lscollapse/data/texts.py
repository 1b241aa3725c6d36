"""Texts with their provenance, from the packaged summaries, from files, and from the `wikimedia/wikipedia` data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lscollapse.core import assets
from lscollapse.core.config import CC_BY_SA
from lscollapse.core.files import first_line, read_text
from lscollapse.core.outside import shown

DUMP = "20231101"  # the dump of wikimedia/wikipedia that is streamed
DUMP_LICENCE = "CC BY-SA 3.0, GFDL"  # as the data set's card states it
WINDOW = 1000  # rows of a stream that are put into the order of the seed at a time


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
    blocks = [block.strip() for block in re.split(r"\n\s*\n", read_text(path, CorpusError)) if block.strip()]
    titles = {f"{path.stem} {number}": block for number, block in enumerate(blocks, 1)}
    return (Text(title, titles[title]) for title in sampling_order(titles, seed))


def jsonl_file(path: Path, seed: int) -> Iterator[Text]:
    """Texts of a .jsonl file, drawn by `seed`: each object has "text", optionally title, url, revision, licence, ...

    Raises:
        CorpusError: a line that is no JSON object or has no "text".
    """
    texts = {}
    for number, row in json_lines(path):
        if not isinstance(row.get("text"), str):
            raise CorpusError(f'{path}, line {number}: no "text" (a string) in it; its keys are {sorted(row)}')
        texts[f"{number}"] = _from_row(row, title=f"{path.stem} {number}")
    return (texts[number] for number in sampling_order(texts, seed))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a .jsonl file that is not blank, each looked at when it is asked for."""
    for number, line in enumerate(read_text(path, CorpusError).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, line {number}: one JSON object a line is expected, not {type(row).__name__}")
        yield number, row


def parquet_stream(path: Path | None, seed: int, language: str = "en") -> Iterator[Text]:
    """Texts of Parquet rows with columns id, url, title, text, streamed by `datasets`.

    The seed draws the shard (of the many on the hub) and the order within each `WINDOW` rows: little is fetched.

    Args:
        path: a local file, or None for `wikimedia/wikipedia` on the hub (the dump of November 2023 in `language`).

    Raises:
        CorpusError: the hub or the file cannot be read, or a column is missing.
    """
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or its successor

    from lscollapse.core.hub_client import watched

    name = str(path) if path else f"wikimedia/wikipedia {DUMP}.{language}"
    revision, licence = ("", "") if path else (f"{DUMP}.{language}", DUMP_LICENCE)
    try:
        with watched() as watch:
            if path:
                rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            else:
                rows = datasets.load_dataset("wikimedia/wikipedia", f"{DUMP}.{language}", split="train", streaming=True)
            shard = sampling_order(map(str, range(rows.num_shards)), seed)[0]
            for row in _in_windows(watch.each(rows.shard(rows.num_shards, int(shard))), seed):
                if not isinstance(row.get("text"), str):
                    raise CorpusError(f'{name}: no column "text" of strings; its columns are {sorted(row)}')
                yield _from_row(row, title=str(row.get("id", "")), revision=revision, licence=licence)
    except CorpusError:
        raise
    except (OSError, ValueError, HTTPError) as error:
        mend = "" if path else "; try later, or use --source packaged or a frozen file"
        raise CorpusError(f"{name} cannot be read: {shown(first_line(error), 200)}{mend}") from error


def _in_windows(rows: Iterator[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    while window := {str(number): row for number, row in enumerate(islice(rows, WINDOW))}:
        yield from (window[number] for number in sampling_order(window, seed))


def _from_row(row: dict[str, Any], **defaults: str) -> Text:
    """A row of a file as a Text; null counts as absent."""
    names = ("title", "url", "revision", "licence", "retrieved", "page_id")
    page = {"page_id": row.get("id", "")}
    known = {**defaults, **{name: row[name] for name in names if row.get(name) is not None}}
    return Text(text=row["text"], **{name: str(value) for name, value in {**page, **known}.items()})
