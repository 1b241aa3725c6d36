"""The excerpts that a model of a configuration reads, in whose tokens, and whether it knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lscollapse.core import registry
from lscollapse.core.config import Experiment
from lscollapse.core.files import cache_folder, is_gguf
from lscollapse.core.progress import Progress
from lscollapse.data import tokenizers
from lscollapse.data.corpus import SOURCES, Corpus, draw_excerpts, is_frozen
from lscollapse.data.images import image_excerpts
from lscollapse.data.pictures import picture_excerpts
from lscollapse.data.texts import CorpusError, read_titles
from lscollapse.data.tokenizers import Tokenizer
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.vit import VitAdapter
from lscollapse.models.checkpoints.checkpoint import ModelInfo
from lscollapse.models.checkpoints.refusals import some_of, zero_rows
from lscollapse.models.checkpoints.tensors import CheckpointError

PROVENANCE = {
    "title": "titles", "page_id": "page_ids", "revision": "revisions", "url": "urls", "licence": "licences",
    "retrieved": "retrieved", "text_sha256": "text_sha256",
}  # of an excerpt -> in the manifest  # fmt: skip
ENTRIES_REFUSED, ENTRIES_SAID = 0.1, 0.5  # of a model's own tokenizer, as a share of the model's token ids


def excerpts_for(info: ModelInfo, adapter: Adapter, config: Experiment, progress: Progress) -> Corpus:
    """The excerpts that a model reads: whole images for S4D and ViT, reactions for the SMILES model, else the configured text.

    Images are the held-out ones of the data that the net was trained on, unless the source is a folder or data set of
    images.

    Deviation: a model whose vocabulary is smaller than the chosen tokenizer's (ALBERT's 30,000 against BERT's 30,522) is
    given text in its own tokens, since some of the ids would not exist.

    Raises:
        CorpusError: the tokens are not the model's, or mostly unknown ones.
        CheckpointError: the model's embedding has rows of zeros for some of them.
    """
    corpus = _drawn(info, adapter, config, progress)
    _check_ids(info, adapter, corpus, config)
    for remark in corpus.remarks:
        progress.note(f"{info.name}: {remark}")
    return corpus


def _drawn(info: ModelInfo, adapter: Adapter, config: Experiment, progress: Progress) -> Corpus:
    if info.architecture == "s4d":
        source = adapter.config.data if config.source in SOURCES else config.source
        return image_excerpts(source, adapter.config, config.excerpts, config.seed)
    if info.text == "smiles":
        return draw_excerpts("smiles", config.excerpts, config.tokens, config.seed)
    if isinstance(adapter, VitAdapter):
        return picture_excerpts(config.source, adapter.size, config.excerpts, config.seed)
    return load_corpus(config, _tokenizer(info, adapter, config, progress))


def _tokenizer(info: ModelInfo, adapter: Adapter, config: Experiment, progress: Progress) -> Tokenizer | None:
    """The tokenizer of a model's text; None stands for BERT's, or for a frozen file's."""
    native = native_tokenizer(info)
    where: Any = {"cache_dir": config.cache_dir, "offline": config.offline}
    tokenizer = tokenizers.named(config.tokenizer, native, **where) if config.tokenizer else None
    own, frozen = config.tokenizer == "native", is_frozen(config.source)
    size = (tokenizer or tokenizers.bert()).vocab_size
    if size > adapter.vocabulary and not frozen and not own:
        progress.note(
            f"{info.name} has {adapter.vocabulary} token ids, the {config.tokenizer or 'bert'} tokenizer {size}:"
            " the model's own tokenizer is used"
        )
        tokenizer, own = tokenizers.named("native", native, **where), True
    if own and tokenizer is not None and (remark := _check_entries(info, tokenizer, adapter.vocabulary)):
        progress.note(remark)
    return tokenizer


def _check_entries(info: ModelInfo, tokenizer: Tokenizer, vocabulary: int) -> str:
    """Whether a model's own tokenizer can be its own; a remark where it has few entries for `vocabulary` ids, else "".

    transformers makes a tokenizer of a handful of entries where files are missing or of a kind that it does not look for.
    This is about a model's own tokenizer only: by design the paper feeds BERT's ids to models with other vocabularies.

    Raises:
        CorpusError: under ENTRIES_REFUSED of the ids have an entry.
    """
    said = f"the own tokenizer of {info.name} has {tokenizer.vocab_size:,} entries, the model {vocabulary:,} token ids"
    if tokenizer.vocab_size < ENTRIES_REFUSED * vocabulary:
        raise CorpusError(
            f"{said}: it was not loaded from the files that belong to the model; put its tokenizer.json beside the weights,"
            " or name a tokenizer with --tokenizer"
        )
    return f"{said}: is it the right one?" if tokenizer.vocab_size < ENTRIES_SAID * vocabulary else ""


def _check_ids(info: ModelInfo, adapter: Adapter, corpus: Corpus, config: Experiment) -> None:
    """Raise where the model has no row, or a row of zeros, for an id of the excerpts.

    A row of zeros is a token that was never trained, or lost: it has no direction, and two of them are one and the same. The
    row of the model's padding token is zero by definition and may be.

    Raises:
        CorpusError, CheckpointError: one line each.
    """
    ids = set().union(*(excerpt.ids for excerpt in corpus.excerpts))
    name = corpus.excerpts[0].tokenizer
    if max(ids) >= adapter.vocabulary:
        mend = "tokenise with a tokenizer whose ids it has (--tokenizer)"
        if config.tokenizer == "native":
            mend = "these files of a tokenizer do not belong to these weights; name another with --tokenizer"
        elif is_frozen(config.source):
            mend = "freeze the texts again, with a tokenizer whose ids it has"
        raise CorpusError(
            f"the excerpts of {corpus.source} hold token id {max(ids)} of the tokenizer {name!r}, {info.name} has ids 0 to"
            f" {adapter.vocabulary - 1}: {mend}"
        )
    if adapter.embedding is None:
        return
    where, weight = adapter.embedding
    zero = zero_rows(weight, ids, getattr(adapter.config, "pad_token_id", None))
    if zero:
        some = some_of([str(row) for row in zero])
        raise CheckpointError(
            f"{where} of {info.name} has rows of zeros for {len(zero)} of the {len(ids)} token ids in these excerpts ({some}):"
            " the model does not know these tokens; give another checkpoint, or other tokens with --tokenizer"
        )


def load_corpus(config: Experiment, tokenizer: Tokenizer | None) -> Corpus:
    """The excerpts that `config` draws from its source."""
    wiki = config.wikipedia
    titles = read_titles(wiki.titles) if wiki.titles else None
    kept = wiki.cache_dir or cache_folder(config.cache_dir) / "wikipedia"
    settings = wiki.model_copy(update={"cache_dir": kept})
    return draw_excerpts(config.source, config.excerpts, config.tokens, config.seed, tokenizer, titles, settings)


def native_tokenizer(info: ModelInfo) -> str:
    """The tokenizer a model was trained with, as a spec for `tokenizers.named`."""
    if info.text == "smiles":
        return "smiles"
    if info.location.startswith("state-spaces/"):
        return "EleutherAI/gpt-neox-20b@main"
    embedded = {entry.location for entry in registry.ENTRIES.values() if entry.embedded}
    if info.location in embedded:
        return "bert"
    at_revision = info.revision and not is_gguf(Path(info.location))
    return f"{info.location}@{info.revision}" if at_revision else info.location


def provenance(corpus: Corpus) -> dict[str, Any]:
    """What the manifest keeps of the excerpts: where they came from, not their text."""
    columns = {name: [getattr(excerpt, name) for excerpt in corpus.excerpts] for name in PROVENANCE}
    return {
        "source": corpus.source,
        "too_short": corpus.skipped,
        **corpus.counts,
        **({"unknown_share": corpus.unknown_share} if corpus.unknown_share else {}),
        **({"repeated": corpus.repeated} if corpus.repeated else {}),
        "drawn": list(corpus.titles),
        **{PROVENANCE[name]: column for name, column in columns.items() if any(column)},
    }
