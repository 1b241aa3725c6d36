"""Tokenizers, packaged or of a folder or the hub: text -> token ids, named by what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lscollapse.core import assets, hub, registry
from lscollapse.core.files import expanded, first_line, is_gguf, read_mapping, refuse_pipes
from lscollapse.core.outside import plain, shown
from lscollapse.data.smiles import tokens
from lscollapse.data.texts import CorpusError

BERT_NAME, SMILES_NAME = "bert-base-uncased", "rxnmapper-smiles"  # of the packaged tokenizers
ANOTHER = "name another with --tokenizer"
LARGEST = 2**26  # bytes of a file of a tokenizer
# What is said of a tokenizer beside its entries, and a model's config, in which transformers looks for the kind.
DESCRIBING = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


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


def named(spec: str, native: str | None = None, *, cache_dir: Path | None = None, offline: bool = False) -> Tokenizer:
    """The tokenizer that `spec` names: `bert`, `smiles`, `native`, or a folder, GGUF file or hub name that transformers can load.

    Args:
        spec: a hub name may end in @REVISION; the commit that it stood for becomes part of the tokenizer's name.
        native: what `native` stands for: the model's own tokenizer, as a spec.
        cache_dir, offline: as for `core.hub.fetch`.

    Raises:
        CorpusError: there is no such tokenizer, or it needs code from the hub (which is never run).
    """
    if spec == "native":
        if native is None:
            raise CorpusError("this model names no tokenizer of its own: choose bert, or a folder or hub name")
        return named(native, cache_dir=cache_dir, offline=offline)
    if spec == "bert":
        return bert()
    if spec == "smiles":
        return smiles()
    return _loaded(spec, cache_dir, offline)


def _loaded(spec: str, cache_dir: Path | None, offline: bool) -> Tokenizer:
    path = expanded(spec)
    local = os.path.exists(path)
    with _explained(f"tokenizer '{shown(spec)}' cannot be loaded"):
        if not local and "@" not in spec:
            registry.hub_id(spec)
        place = path if local else _files(spec, cache_dir, offline)
        inner = _read(place)
        name = f"{spec.partition('@')[0]}@{place.name}"
        if local:  # a path says nothing on another machine, its vocabulary does
            vocabulary = json.dumps(sorted(inner.get_vocab().items()))
            name = f"{plain(place.resolve().name)}:{hashlib.sha256(vocabulary.encode()).hexdigest()[:12]}"
        size, mask, unknown = len(inner), inner.mask_token_id, inner.unk_token_id
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}

    def encode(batch: list[str]) -> list[list[int]]:
        with _explained(f"tokenizer '{shown(spec)}' cannot cut this text"):
            ids: list[list[int]] = inner(batch, **options)["input_ids"]
            return ids

    return Tokenizer(name, size, encode, mask, unknown)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Where a tokenizer fails in the block, a CorpusError that says `what` happened, and why."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # whatever a damaged file makes the library raise, which has a kind beside Exception
        raise CorpusError(f"{what}: {shown(first_line(error), 320)}") from error


def _read(place: Path) -> Any:
    """What transformers makes of a folder or a GGUF file.

    Raises:
        ValueError and others: there is no tokenizer in it (of a folder transformers would make an empty one), or a damaged one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if is_gguf(place):
        try:  # not by AutoTokenizer, which reads the file's config too, and slowly
            return PreTrainedTokenizerFast.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True)
        except Exception as error:  # of tokenizers too, which raises no other kind
            raise ValueError(f"the file has none that can be read ({first_line(error)}); {ANOTHER}") from error
    if not any(os.path.isfile(place / name) for name in hub.TOKENIZER_FILES):
        raise ValueError(f"it has no files of one; {ANOTHER}")
    refuse_pipes(place, CorpusError)
    for name in hub.TOKENIZER_FILES:
        if os.path.isfile(place / name) and (size := (place / name).stat().st_size) > LARGEST:
            raise ValueError(f"{name} is {size:,} bytes, at most {LARGEST:,} are read; {ANOTHER}")
    for name in DESCRIBING:
        if os.path.lexists(place / name):
            read_mapping(place / name, CorpusError)
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)


def _files(spec: str, cache_dir: Path | None, offline: bool) -> Path:
    """The folder of a hub repository's tokenizer, named by its commit."""
    repo_id, _, revision = spec.partition("@")
    return hub.fetch(
        repo_id,
        revision=revision,
        files=["config.json"],
        cache_dir=hub.storage(cache_dir),
        offline=offline,
        tokenizer=True,
    )


def bert() -> Tokenizer:
    """bert-base-uncased's WordPiece tokenizer from the embedded vocab.txt; no network, no truncation, no padding."""
    from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

    inner = BertWordPieceTokenizer(str(assets.locate(assets.BERT_VOCAB)), lowercase=True)
    return Tokenizer(
        BERT_NAME,
        inner.get_vocab_size(),
        lambda batch: [encoding.ids for encoding in inner.encode_batch(batch, add_special_tokens=False)],
        inner.token_to_id("[MASK]"),
        inner.token_to_id("[UNK]"),
    )


def smiles() -> Tokenizer:
    """The embedded SMILES ALBERT's tokenizer: a token an atom, bond, bracket or ring number, else [UNK]."""
    vocabulary = assets.locate(assets.SMILES_VOCAB).read_text(encoding="utf-8").split()
    index = {token: number for number, token in enumerate(vocabulary)}
    unknown = index["[UNK]"]
    return Tokenizer(
        SMILES_NAME,
        len(vocabulary),
        lambda batch: [[index.get(token, unknown) for token in tokens(text)] for text in batch],
        index["[MASK]"],
        unknown,
    )
