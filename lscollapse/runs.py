"""A configuration and a set of variants become a run folder: models loaded, excerpts drawn, work items measured.

A work item is one model on one tile of excerpts and variants; each is stored whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lscollapse import corpus as corpora
from lscollapse import plan
from lscollapse.config import ConfigError, Experiment, parse_memory
from lscollapse.models import registry
from lscollapse.results import COLUMNS, RunFolder, read_rows
from lscollapse.variants import Variant, check

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.corpus import Corpus, Tokenizer
    from lscollapse.models import Adapter
    from lscollapse.models.checkpoint import ModelInfo

THREADED_WIDTH = 1024  # narrower models run on one thread: faster there, and the same bits whatever the number of cores


class Progress(Protocol):
    """What `run` tells while it works; the CLI draws it."""

    def note(self, message: str) -> None: ...

    def start(self, total: float) -> None: ...

    def advance(self, amount: float) -> None: ...


@dataclass(frozen=True)
class Silent:
    """A Progress that says nothing."""

    def note(self, message: str) -> None:
        return None

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        return None


SILENT = Silent()


@dataclass(frozen=True)
class Subject:
    """A loaded model with the excerpts that it reads, the variants it is put through, and how these are tiled."""

    info: ModelInfo
    adapter: Adapter
    corpus: Corpus
    variants: tuple[Variant, ...]
    init: str
    plan: plan.Plan
    gains: list[float] | None

    @property
    def ids(self) -> np.ndarray:
        return np.array([excerpt.ids for excerpt in self.corpus.excerpts])

    @property
    def width(self) -> int:
        return self.adapter.config.hidden_size

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
        excerpts = self.corpus.excerpts
        return {
            "source": self.corpus.source,
            "too_short": self.corpus.skipped,
            **self.corpus.counts,
            "titles": [excerpt.title for excerpt in excerpts],
            "text_sha256": [excerpt.text_sha256 for excerpt in excerpts],
        }


@dataclass(frozen=True)
class Item:
    """One subject on excerpts [first, last) and variants [low, high)."""

    number: int
    subject: Subject
    first: int
    last: int
    low: int
    high: int

    @property
    def key(self) -> str:
        return f"{self.number:02d}-{self.first:05d}-{self.last:05d}-{self.low:03d}-{self.high:03d}"

    @property
    def cost(self) -> float:
        passes = (self.last - self.first) * (self.high - self.low) * self.subject.adapter.n_layers
        return passes * float(self.subject.width) ** 2


Variants = Callable[["Adapter", Experiment], list[Variant]]


def run(name: str, config: Experiment, out: Path, variants: Variants, progress: Progress) -> pd.DataFrame:
    """Measure `variants` of every model of `config` and return the finished table of the run folder `out`.

    The rows do not depend on how the run was tiled, killed and continued.
    """
    subjects = list(load_subjects(config, variants, progress))
    decisive = config.model_dump(
        mode="json", exclude={"cache_dir", "offline", "device", "models", "stream", "max_memory"}
    )
    identity = {"experiment": name, "config": decisive, "subjects": [subject.identity for subject in subjects]}
    folder = RunFolder(out, identity)
    if folder.complete:
        progress.note(f"{out} is complete: nothing to compute")
        return read_rows(out)
    items = [item for number, subject in enumerate(subjects) for item in _items(number, subject)]
    missing = [item for item in items if not folder.has(item.key)]
    if len(missing) < len(items):
        progress.note(f"{out} is continued: {len(items) - len(missing)} of {len(items)} work items are there")
    progress.start(sum(item.cost for item in missing))
    for item in missing:
        folder.add(item.key, _measure(item, config, progress))
    facts = {"excerpts": {s.info.name: s.record for s in subjects}, "device": device(config)}
    return folder.finish([item.key for item in items], facts)


def _items(number: int, subject: Subject) -> Iterator[Item]:
    tiles = range(0, len(subject.corpus.excerpts), subject.plan.excerpts)
    groups = range(0, len(subject.variants), subject.plan.variants)
    for first, low in itertools.product(tiles, groups):
        last = min(first + subject.plan.excerpts, len(subject.corpus.excerpts))
        yield Item(number, subject, first, last, low, min(low + subject.plan.variants, len(subject.variants)))


def load_subjects(config: Experiment, variants: Variants, progress: Progress) -> Iterator[Subject]:
    """Every model of `config`, trained and, if asked for, freshly initialised, with its excerpts and variants."""
    from lscollapse import certify

    inits = ("trained", "random") if config.random_init else ("trained",)
    for name, init in itertools.product(config.models, inits):
        adapter, info = _load(name, init, config)
        _choose_kernels(adapter, config, progress)
        arms = tuple(variants(adapter, config))
        for arm in arms:
            check(adapter, arm)
        corpus = excerpts_for(info, adapter, config, progress)
        tiles = _plan(adapter, info, arms, config, progress)
        gains = certify.gains(adapter, info.sha256, config.cache_dir) if config.certified_exit else None
        yield Subject(info, adapter, corpus, arms, init, tiles, gains)


def _load(name: str, init: str, config: Experiment) -> tuple[Adapter, ModelInfo]:
    import torch

    from lscollapse.models import adapt, checkpoint
    from lscollapse.models.streamed import StreamedMamba2

    where: Any = {"revision": config.revision, "cache_dir": config.cache_dir, "offline": config.offline}
    entry = registry.resolve(name)
    whole_bytes = 4 * (entry.n_parameters or 0)
    wanted = config.stream == "always" or (config.stream == "auto" and whole_bytes > parse_memory(config.max_memory))
    streamable = entry.architecture == "mamba2" and init == "trained" and device(config) == "cpu"
    if wanted and streamable:
        reader = checkpoint.open_layers(name, **where)
        return StreamedMamba2(reader), reader.info
    # The package's own blocks round the weights themselves; the modules of other models are loaded in the dtype.
    own = entry.architecture in ("mamba2", "") or config.dtype == "auto"
    dtype = torch.float32 if own else getattr(torch, config.dtype)
    loaded = checkpoint.load(name, dtype=dtype, random_init=config.seed if init == "random" else None, **where)
    _set_threads(loaded.model.config.hidden_size)
    return adapt(loaded.model.to(device(config))), loaded.info


def _choose_kernels(adapter: Adapter, config: Experiment, progress: Progress) -> None:
    from lscollapse.kernels import resolve
    from lscollapse.models.mamba2 import Mamba2Adapter

    if isinstance(adapter, Mamba2Adapter):
        adapter.kernels = resolve(config.kernels, adapter.device)
        if adapter.kernels.note:
            progress.note(adapter.kernels.note)


def _plan(
    adapter: Adapter, info: ModelInfo, arms: tuple[Variant, ...], config: Experiment, progress: Progress
) -> plan.Plan:
    from lscollapse.models.streamed import StreamedMamba2

    if not isinstance(adapter, StreamedMamba2):
        return plan.Plan(plan.LARGEST_TILE, len(arms), 0)
    itemsize = {"float64": 8, "bfloat16": 2}.get(config.dtype, 4)
    if config.dtype == "auto" and any(arm.removes_block_norm for arm in arms):
        itemsize += 8  # those arms compute in float64, beside the float32 ones
    limit = parse_memory(config.max_memory)
    tiles = plan.streamed(adapter.shape, config.tokens, config.excerpts, len(arms), itemsize, limit)
    progress.note(
        f"{info.name} is streamed: {info.n_layers} layers, {tiles.excerpts} excerpts x {tiles.variants} variants at a time,"
        f" predicted peak {tiles.bytes / 2**30:.2f} GiB (--max-memory {config.max_memory})"
    )
    return tiles


def excerpts_for(info: ModelInfo, adapter: Adapter, config: Experiment, progress: Progress) -> Corpus:
    """The excerpts that a model reads: reactions for the SMILES model, else the configured text and tokenizer.

    Deviation: a model whose vocabulary is smaller than the chosen tokenizer's (ALBERT's 30,000 against BERT's 30,522) is
    given text in its own tokens, since some of the ids would not exist.
    """
    if info.text == "smiles":
        return corpora.load("smiles", config.excerpts, config.tokens, config.seed)
    native = native_tokenizer(info)
    tokenizer = (
        corpora.tokenizer(config.tokenizer, native) if config.tokenizer else None
    )  # None: BERT's, or a frozen file's
    size = (tokenizer or corpora.bert_tokenizer()).vocab_size
    if size > adapter.config.vocab_size and not config.source.endswith(".jsonl"):
        progress.note(
            f"{info.name} has {adapter.config.vocab_size} token ids, the {config.tokenizer or 'bert'} tokenizer {size}:"
            " the model's own tokenizer is used"
        )
        tokenizer = corpora.tokenizer("native", native)
    return load_corpus(config, tokenizer)


def load_corpus(config: Experiment, tokenizer: Tokenizer | None) -> Corpus:
    """The excerpts that `config` draws from its source."""
    wiki = config.wikipedia
    titles = None
    if wiki.titles:
        if not wiki.titles.is_file():
            raise ConfigError(f"no titles file {wiki.titles}")
        titles = wiki.titles.read_text(encoding="utf-8").split("\n")
        titles = [title.strip() for title in titles if title.strip()]
    settings = corpora.WikiSettings(
        language=wiki.language, contact=wiki.contact, endpoint=wiki.endpoint, cache_dir=wiki.cache_dir
    )
    return corpora.load(config.source, config.excerpts, config.tokens, config.seed, tokenizer, titles, settings)


def native_tokenizer(info: ModelInfo) -> str:
    """The tokenizer a model was trained with, as a spec for `corpus.tokenizer`."""
    if info.text == "smiles":
        return "smiles"
    if info.location.startswith("state-spaces/"):
        return "EleutherAI/gpt-neox-20b"
    embedded = {entry.location for entry in registry.ENTRIES.values() if entry.embedded}
    return "bert" if info.location in embedded else info.location


def _measure(item: Item, config: Experiment, progress: Progress) -> pd.DataFrame:
    import torch

    from lscollapse.forward import measure

    subject, info = item.subject, item.subject.info
    _set_threads(subject.width)
    rows = measure(
        subject.adapter,
        subject.ids[item.first : item.last],
        subject.variants[item.low : item.high],
        None if config.dtype == "auto" else getattr(torch, config.dtype),
        lambda done: progress.advance(done * float(subject.width) ** 2),
        subject.gains,
    )
    rows = rows.assign(
        subject=item.number,
        variant=rows["variant"] + item.low,
        excerpt=rows["excerpt"] + item.first,
        model=info.name,
        revision=info.revision,
        checkpoint_sha256=info.sha256,
        init=subject.init,
        text=subject.corpus.source,
        tokenizer=subject.corpus.excerpts[0].tokenizer,
        backend=subject.adapter.backend,
        seed=config.seed,
    )
    return rows[["subject", "variant", *COLUMNS]]


def _set_threads(width: int) -> None:
    import torch

    threads = _all_threads()  # asked before it is changed
    torch.set_num_threads(1 if width < THREADED_WIDTH else threads)


@cache
def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def device(config: Experiment) -> str:
    import torch

    cuda = torch.cuda.is_available()
    if config.device == "auto":
        return "cuda" if cuda else "cpu"
    if config.device.startswith("cuda") and not cuda:
        raise ConfigError("--device cuda, but torch sees no GPU: install a CUDA build of torch, or use --device cpu")
    if not config.device.startswith(("cpu", "cuda")):
        raise ConfigError(f"--device {config.device!r} is not known: use auto, cpu or cuda")
    return config.device
