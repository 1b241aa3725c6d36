"""Whether token ids are those of the model that is to read them: a tokenizer's entries, and the embedding's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lscollapse.data.texts import CorpusError

if TYPE_CHECKING:
    from lscollapse.data.corpus import Corpus
    from lscollapse.data.tokenizers import Tokenizer
    from lscollapse.models.adapters.adapter import Adapter
    from lscollapse.models.checkpoints.checkpoint import ModelInfo

ENTRIES_REFUSED, ENTRIES_SAID = 0.1, 0.5  # of a model's own tokenizer, as a share of the model's token ids


def check_entries(info: ModelInfo, tokenizer: Tokenizer, vocabulary: int) -> str:
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


def check_ids(info: ModelInfo, adapter: Adapter, corpus: Corpus) -> None:
    """Raise where the model has no row, or a row of zeros, for an id of the excerpts.

    A row of zeros is a token that was never trained, or lost: it has no direction, and two of them are one and the same. The
    row of the model's padding token is zero by definition and may be.

    Raises:
        CorpusError, CheckpointError: one line each.
    """
    from lscollapse.models.checkpoints.refusals import some_of, zero_rows
    from lscollapse.models.checkpoints.tensors import CheckpointError

    ids = set().union(*(excerpt.ids for excerpt in corpus.excerpts))
    name = corpus.excerpts[0].tokenizer
    if max(ids) >= adapter.vocabulary:
        raise CorpusError(
            f"the excerpts of {corpus.source} hold token id {max(ids)} of the tokenizer {name!r}, {info.name} has ids 0 to"
            f" {adapter.vocabulary - 1}: tokenise with a tokenizer whose ids it has (--tokenizer)"
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
