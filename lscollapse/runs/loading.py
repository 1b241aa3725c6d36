"""The models of a configuration, loaded, each with the excerpts that it reads and the variants it is put through."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lscollapse.core import registry
from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.files import cache_folder, read_text
from lscollapse.core.progress import Progress
from lscollapse.data import corpus as corpora
from lscollapse.data import images, pictures, tokenizers
from lscollapse.data.texts import CorpusError
from lscollapse.instrument.surgery import Variant, check
from lscollapse.runs import memory as plan
from lscollapse.runs.devices import device, memory, set_threads, worker_devices
from lscollapse.runs.token_checks import check_entries, check_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lscollapse.data.corpus import Corpus
    from lscollapse.data.tokenizers import Tokenizer
    from lscollapse.models.adapters.adapter import Adapter
    from lscollapse.models.checkpoints.checkpoint import ModelInfo

PROVENANCE = {
    "title": "titles", "page_id": "page_ids", "revision": "revisions", "url": "urls", "licence": "licences",
    "retrieved": "retrieved", "text_sha256": "text_sha256",
}  # of an excerpt -> in the manifest  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is measured on one model and how it is tiled: what another process needs to load the model and measure it.

    `name` and `dtype` are as the configuration gives them.
    """

    name: str
    init: str
    info: ModelInfo
    width: int
    corpus: Corpus
    variants: tuple[Variant, ...]
    plan: plan.Plan
    gains: list[float] | None
    dtype: str

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What every arm computes in; None: each its own default (see forward.measure)."""
        import torch

        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def ids(self) -> np.ndarray:
        return np.array([excerpt.ids for excerpt in self.corpus.excerpts])

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()
        source = {"text": self.corpus.source, "excerpts_sha256": digest}
        per_layer = [list(v.lam) for v in self.variants if isinstance(v.lam, tuple)]
        return {
            "model": self.info.name,
            "init": self.init,
            "sha256": self.info.sha256,
            "per_layer": per_layer,
            **source,
        }

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps of the excerpts: where they came from, not their text."""
        columns = {name: [getattr(excerpt, name) for excerpt in self.corpus.excerpts] for name in PROVENANCE}
        return {
            "source": self.corpus.source,
            "too_short": self.corpus.skipped,
            **self.corpus.counts,
            **({"unknown_share": self.corpus.unknown_share} if self.corpus.unknown_share else {}),
            **({"repeated": self.corpus.repeated} if self.corpus.repeated else {}),
            "drawn": list(self.corpus.titles),
            **{PROVENANCE[name]: column for name, column in columns.items() if any(column)},
        }


@dataclass(frozen=True)
class Subject(Task):
    """A task with its model loaded."""

    adapter: Adapter

    @property
    def task(self) -> Task:
        """The task alone, which lets go of the model."""
        return Task(**{field.name: getattr(self, field.name) for field in fields(Task)})


Variants = Callable[["Adapter", Experiment], list[Variant]]


def load_subjects(config: Experiment, variants: Variants, progress: Progress) -> Iterator[Subject]:
    """Every model of `config`, trained and, if asked for, freshly initialised, with its excerpts and variants."""
    from lscollapse.instrument import early_exit
    from lscollapse.instrument.forward import checked_ids
    from lscollapse.models.adapters.heads import missing

    inits = ("trained", "random") if config.random_init else ("trained",)
    scored: list[bool] = []
    unscored: dict[str, str] = {}  # why, by model
    for name, init in itertools.product(config.models, inits):
        adapter, info = load_adapter(name, init, config, progress)
        arms = tuple(variants(adapter, config))
        for arm in arms:
            check(adapter, arm)
        corpus = excerpts_for(info, adapter, config, progress)
        _try(adapter, checked_ids(adapter, [corpus.excerpts[0].ids]))
        if needs_head(config):
            scored.append(adapter.head is not None)
            if not scored[-1]:
                unscored[name] = missing(adapter)
        tiles = _plan(adapter, info, corpus, arms, config, progress)
        gains = early_exit.gains(adapter, info.sha256, config.cache_dir) if config.certified_exit else None
        width = adapter.config.hidden_size
        yield Subject(name, init, info, width, corpus, arms, tiles, gains, config.dtype, adapter)
    if scored and not any(scored):
        raise ConfigError(f"nothing to score: {'; '.join(dict.fromkeys(unscored.values()))}")
    for name, why in unscored.items():
        progress.note(f"{name}: {why}; its loss and gradients are not measured")


def _try(adapter: Adapter, tokens: Tensor) -> None:
    """Embed one excerpt, so that what cannot be measured is refused before anything is written."""
    import torch

    try:
        with torch.no_grad():
            adapter.embed(tokens)
    except torch.OutOfMemoryError:
        raise plan.MemoryPlanError(
            "the device has no room for one excerpt: use fewer --tokens or --device cpu"
        ) from None


def needs_head(config: Experiment) -> bool:
    """Whether something is asked for that a language-model head is needed for."""
    return config.quality or config.gradients


def load_adapter(name: str, init: str, config: Experiment, progress: Progress) -> tuple[Adapter, ModelInfo]:
    """A model on the configured device with its kernels chosen; streamed where its weights do not fit there."""
    import torch

    from lscollapse.models.adapt import adapt
    from lscollapse.models.adapters.streamed import StreamedMamba2, Upload
    from lscollapse.models.checkpoints import checkpoint

    where: Any = {"revision": config.revision, "cache_dir": config.cache_dir, "offline": config.offline}
    on = device(config)
    if on.startswith("cuda:"):
        torch.cuda.set_device(on)  # kernels run on the current device, whatever that of their tensors
    architecture, n_parameters = checkpoint.describe(name, **where)
    wanted = config.stream == "always" or (config.stream == "auto" and 4 * n_parameters > memory(config))
    if wanted and architecture == "mamba2" and init == "trained":
        if config.gradients:
            raise ConfigError(f"gradients need all of {name} in memory, and it is streamed: use --stream never")
        reader = checkpoint.open_layers(name, **where)
        streamed = StreamedMamba2(reader, Upload(torch.device(on))) if on != "cpu" else StreamedMamba2(reader)
        _choose_kernels(streamed, config, progress)
        _attach_head(streamed, name, init, config)
        return streamed, reader.info
    # The package's own blocks round the weights themselves; the modules of other models are loaded in the dtype.
    own = architecture == "mamba2" or config.dtype == "auto"
    dtype = torch.float32 if own else getattr(torch, config.dtype)
    loaded = checkpoint.load(name, dtype=dtype, random_init=config.seed if init == "random" else None, **where)
    try:
        adapter = adapt(loaded.model.to(on))
    except torch.OutOfMemoryError:
        raise plan.MemoryPlanError(
            f"{name} does not fit on {on}: use --stream always (Mamba-2) or --device cpu"
        ) from None
    set_threads(adapter.config.hidden_size)
    _choose_kernels(adapter, config, progress)
    _attach_head(adapter, name, init, config)
    return adapter, loaded.info


def _attach_head(adapter: Adapter, name: str, init: str, config: Experiment) -> None:
    """Where the configuration asks for what needs a language-model head."""
    if not needs_head(config):
        return
    from lscollapse.instrument.gradients import check_chain
    from lscollapse.models.adapters import heads

    if config.gradients:
        check_chain(adapter)
    where: Any = {"revision": config.revision, "cache_dir": config.cache_dir, "offline": config.offline}
    seed = config.seed if init == "random" else None
    heads.attach(adapter, name, seed, **where)


def _choose_kernels(adapter: Adapter, config: Experiment, progress: Progress) -> None:
    from lscollapse.models.adapters.mamba2 import Mamba2Adapter
    from lscollapse.models.kernels.backends import resolve

    if isinstance(adapter, Mamba2Adapter):
        adapter.kernels = resolve(config.kernels, adapter.device)
        if adapter.kernels.note:
            progress.note(adapter.kernels.note)


def _plan(
    adapter: Adapter,
    info: ModelInfo,
    corpus: Corpus,
    arms: tuple[Variant, ...],
    config: Experiment,
    progress: Progress,
) -> plan.Plan:
    from lscollapse.models.adapters.mamba2 import Mamba2Adapter
    from lscollapse.models.adapters.streamed import StreamedMamba2

    itemsize = {"float64": 8, "bfloat16": 2}.get(config.dtype, 4)
    if config.dtype == "auto" and any(arm.removes_block_norm for arm in arms):
        itemsize += 8  # those arms compute in float64, beside the float32 ones
    size = len(corpus.excerpts[0].ids), len(corpus.excerpts)
    streamed, limit = isinstance(adapter, StreamedMamba2), memory(config)
    if adapter.device.type == "cuda":
        shape = adapter.shape if isinstance(adapter, Mamba2Adapter) else None
        weights = plan.layer_bytes(adapter.shape, itemsize) if isinstance(adapter, StreamedMamba2) else 0
        share = -(-size[1] // len(worker_devices(config)))  # so that every GPU has some
        width, room = adapter.config.hidden_size, limit - weights
        tiles = plan.on_gpu(width, shape, size[0], share, len(arms), itemsize, room)
    elif isinstance(adapter, StreamedMamba2):
        tiles = plan.streamed(adapter.shape, *size, len(arms), itemsize, limit)
    else:
        return plan.Plan(plan.LARGEST_TILE, len(arms), 0)
    progress.note(
        f"{info.name} is {'streamed' if streamed else 'resident'} on {adapter.device}: {info.n_layers} layers,"
        f" {tiles.excerpts} excerpts x {tiles.variants} variants at a time, predicted peak {tiles.bytes / 2**30:.2f} GiB"
        f" of {limit / 2**30:.2f}"
    )
    return tiles


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
    check_ids(info, adapter, corpus)
    for remark in corpus.remarks:
        progress.note(f"{info.name}: {remark}")
    return corpus


def _drawn(info: ModelInfo, adapter: Adapter, config: Experiment, progress: Progress) -> Corpus:
    from lscollapse.models.adapters.vit import VitAdapter

    if info.architecture == "s4d":
        source = adapter.config.data if config.source in corpora.SOURCES else config.source
        return images.excerpts(source, adapter.config, config.excerpts, config.seed)
    if info.text == "smiles":
        return corpora.load("smiles", config.excerpts, config.tokens, config.seed)
    if isinstance(adapter, VitAdapter):
        return pictures.excerpts(config.source, adapter.size, config.excerpts, config.seed)
    native = native_tokenizer(info)
    where: Any = {"cache_dir": config.cache_dir, "offline": config.offline}
    tokenizer = (
        tokenizers.named(config.tokenizer, native, **where) if config.tokenizer else None
    )  # None: BERT's, or a frozen file's
    own, frozen = config.tokenizer == "native", corpora.is_frozen(config.source)
    size = (tokenizer or tokenizers.bert()).vocab_size
    if size > adapter.vocabulary and not frozen and not own:
        progress.note(
            f"{info.name} has {adapter.vocabulary} token ids, the {config.tokenizer or 'bert'} tokenizer {size}:"
            " the model's own tokenizer is used"
        )
        tokenizer, own = tokenizers.named("native", native, **where), True
    if own and tokenizer is not None and (remark := check_entries(info, tokenizer, adapter.vocabulary)):
        progress.note(remark)
    return load_corpus(config, tokenizer)


def load_corpus(config: Experiment, tokenizer: Tokenizer | None) -> Corpus:
    """The excerpts that `config` draws from its source."""
    wiki = config.wikipedia
    titles = None
    if wiki.titles:
        titles = [title.strip() for title in read_text(wiki.titles, CorpusError).split("\n") if title.strip()]
    kept = wiki.cache_dir or cache_folder(config.cache_dir) / "wikipedia"
    settings = wiki.model_copy(update={"cache_dir": kept})
    return corpora.load(config.source, config.excerpts, config.tokens, config.seed, tokenizer, titles, settings)


def native_tokenizer(info: ModelInfo) -> str:
    """The tokenizer a model was trained with, as a spec for `tokenizers.named`."""
    if info.text == "smiles":
        return "smiles"
    if info.location.startswith("state-spaces/"):
        return "EleutherAI/gpt-neox-20b@main"
    embedded = {entry.location for entry in registry.ENTRIES.values() if entry.embedded}
    if info.location in embedded:
        return "bert"
    return f"{info.location}@{info.revision}" if info.revision else info.location
