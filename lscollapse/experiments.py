"""The paper's experiments as functions: corpus + model + variants -> run folder.

Each is a set of variants; `run` does the rest. A work item is one model on one tile of excerpts, all variants together.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lscollapse import corpus as corpora
from lscollapse.config import ConfigError, Experiment
from lscollapse.models import registry
from lscollapse.results import RunFolder, read_rows
from lscollapse.variants import Variant, check

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.corpus import Corpus, Tokenizer
    from lscollapse.identity import LayerDifference
    from lscollapse.models import Adapter
    from lscollapse.models.checkpoint import ModelInfo

TILE = 8  # excerpts that go through a model together
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


@dataclass(frozen=True)
class Subject:
    """A loaded model with the excerpts that it reads and the variants it is put through."""

    info: ModelInfo
    adapter: Adapter
    corpus: Corpus
    variants: tuple[Variant, ...]
    init: str

    @property
    def ids(self) -> np.ndarray:
        return np.array([excerpt.ids for excerpt in self.corpus.excerpts])

    @property
    def cost(self) -> float:
        """Work of one block pass of one excerpt, relative to the other models of the run."""
        return float(self.adapter.config.hidden_size) ** 2

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()
        return {
            "model": self.info.name,
            "sha256": self.info.sha256,
            "excerpts_sha256": digest,
            "text": self.corpus.source,
        }


Variants = Callable[["Adapter", Experiment], list[Variant]]


def sweep_lambda(config: Experiment, out: Path, progress: Progress = Silent()) -> pd.DataFrame:
    """Figures 1 and 2: every lambda, with the gate removed and (unless `config.gating` chooses) with the full architecture.

    Returns the table (DESIGN of the columns: docs/table.md) and leaves it in the run folder `out`.
    """
    return run("sweep-lambda", config, out, sweep_variants, progress)


def sweep_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    gates = [True] if not adapter.has_gate else [False, True] if config.gating is None else [config.gating]
    lams = _lambdas(adapter, config)
    return [
        Variant(lam=lam, gating=gating, skip_site=config.skip_site, norm_site=_norm_site(adapter, config))
        for gating, lam in itertools.product(gates, lams)
    ]


def ablate_gating(config: Experiment, out: Path, progress: Progress = Silent()) -> pd.DataFrame:
    """Figure 3: gating x LayerNorm at lambda = 1 (or at the per-layer lambdas of `config.lambdas_file`)."""
    return run("ablate-gating", config, out, ablation_variants, progress)


def ablation_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    _needs_gate(adapter)
    lam = read_lambdas(config.lambdas_file, adapter.n_layers) if config.lambdas_file else 1.0
    arms = itertools.product((True, False), (True, False))
    return [Variant(lam, gating, layernorm, config.skip_site, config.norm_site) for gating, layernorm in arms]


def all_readings(config: Experiment, out: Path, progress: Progress = Silent()) -> pd.DataFrame:
    """Figures 1 and 3 under every reading of where lambda acts and which norm goes: skip_site x norm_site x gating."""
    return run("all-readings", config, out, reading_variants, progress)


def reading_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    _needs_gate(adapter)
    variants: dict[Variant, None] = {}
    for skip_site in adapter.skip_sites:
        for norm_site in adapter.norm_sites:
            for gating in (True, False):
                variants[Variant(1.0, gating, False, skip_site, norm_site)] = None
        for gating in (True, False):
            variants[Variant(1.0, gating, True, skip_site)] = None
        for lam in config.lambdas:
            variants[Variant(lam, False, True, skip_site)] = None
    return list(variants)


def with_gated_models(config: Experiment) -> Experiment:
    """The same experiment without the embedded models that have no gate."""
    gated = [name for name in config.models if registry.resolve(name).architecture not in ("albert", "bert")]
    return config.model_copy(update={"models": gated or config.models})


def check_identity(config: Experiment, progress: Progress = Silent()) -> list[LayerDifference]:
    """How far the instrumented model (lambda = 1) is from the untouched one, layer by layer, for every model."""
    from lscollapse.identity import differences

    subjects = _subjects(config, lambda adapter, config: [Variant()], progress)
    return [difference for subject in subjects for difference in differences(subject.adapter, subject.ids)]


def _needs_gate(adapter: Adapter) -> None:
    if not adapter.has_gate:
        raise ConfigError(f"{adapter.config.model_type} has no gate to ablate: choose a Mamba-2 model with --model")


def _lambdas(adapter: Adapter, config: Experiment) -> list[float | tuple[float, ...]]:
    """The sweep's lambdas, and the per-layer ones of `lambdas_file` if given."""
    per_layer = [read_lambdas(config.lambdas_file, adapter.n_layers)] if config.lambdas_file else []
    return [*config.lambdas, *per_layer]


def _norm_site(adapter: Adapter, config: Experiment) -> str:
    return config.norm_site if config.norm_site in adapter.norm_sites else adapter.norm_sites[0]


def read_lambdas(file: Path, n_layers: int) -> tuple[float, ...]:
    """Per-layer lambdas from a CSV with columns layer,lam and one line for each layer 1..K."""
    import pandas as pd

    try:
        table = pd.read_csv(file).sort_values("layer")
        layers, lams = table["layer"].tolist(), table["lam"].astype(float).tolist()
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{file} is not a CSV with the columns layer,lam ({' '.join(str(error).split())})") from None
    if layers != list(range(1, n_layers + 1)):
        raise ConfigError(f"{file} gives layers {layers[:3]}..., expected one line for each of 1..{n_layers}")
    return tuple(lams)


def run(name: str, config: Experiment, out: Path, variants: Variants, progress: Progress) -> pd.DataFrame:
    """Measure `variants` of every model of `config` and return the finished table of the run folder `out`."""
    subjects = list(_subjects(config, variants, progress))
    identity = {
        "experiment": name,
        "config": config.model_dump(mode="json", exclude={"cache_dir", "offline", "device", "models"}),
        "subjects": [subject.identity | {"init": subject.init} for subject in subjects],
    }
    folder = RunFolder(out, identity)
    if folder.complete:
        progress.note(f"{out} is complete: nothing to compute")
        return read_rows(out)
    items = [
        (f"{number:02d}-{start:05d}", subject, start)
        for number, subject in enumerate(subjects)
        for start in range(0, config.excerpts, TILE)
    ]
    missing = [item for item in items if not folder.has(item[0])]
    if len(missing) < len(items):
        progress.note(f"{out} is continued: {len(items) - len(missing)} of {len(items)} work items are there")
    if subjects and max(subject.adapter.config.hidden_size for subject in subjects) < THREADED_WIDTH:
        _single_thread()
    progress.start(sum(_units(subject, start) for _, subject, start in missing))
    for key, subject, start in missing:
        folder.add(key, _measure(subject, start, config, progress))
    facts = {"excerpts": {s.info.name: _excerpt_record(s) for s in subjects}, "device": _device(config)}
    return folder.finish([key for key, _, _ in items], facts)


def _subjects(config: Experiment, variants: Variants, progress: Progress) -> Iterator[Subject]:
    import torch

    from lscollapse.models import adapt, checkpoint

    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    inits = ("trained", "random") if config.random_init else ("trained",)
    for name, init in itertools.product(config.models, inits):
        loaded = checkpoint.load(
            name,
            revision=config.revision,
            dtype=dtype,
            cache_dir=config.cache_dir,
            offline=config.offline,
            random_init=config.seed if init == "random" else None,
        )
        adapter = adapt(loaded.model.to(_device(config)))
        arms = tuple(variants(adapter, config))
        for arm in arms:
            check(adapter, arm)
        yield Subject(loaded.info, adapter, excerpts_for(loaded.info, adapter, config, progress), arms, init)


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
    return "bert" if registry.resolve(info.name).embedded else info.location


def _units(subject: Subject, start: int) -> float:
    excerpts = min(TILE, len(subject.corpus.excerpts) - start)
    return subject.cost * excerpts * subject.adapter.n_layers * len(subject.variants)


def _measure(subject: Subject, start: int, config: Experiment, progress: Progress) -> pd.DataFrame:
    import torch

    from lscollapse.forward import measure
    from lscollapse.results import COLUMNS

    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    ids = subject.ids[start : start + TILE]
    rows = measure(subject.adapter, ids, subject.variants, dtype, lambda done: progress.advance(done * subject.cost))
    rows["excerpt"] += start
    info = subject.info
    rows = rows.assign(
        model=info.name,
        revision=info.revision,
        checkpoint_sha256=info.sha256,
        init=subject.init,
        text=subject.corpus.source,
        tokenizer=subject.corpus.excerpts[0].tokenizer,
        backend="torch",
        seed=config.seed,
    )
    return rows[list(COLUMNS)]


def _excerpt_record(subject: Subject) -> dict[str, Any]:
    return {
        "source": subject.corpus.source,
        "too_short": subject.corpus.skipped,
        "titles": [excerpt.title for excerpt in subject.corpus.excerpts],
        "text_sha256": [excerpt.text_sha256 for excerpt in subject.corpus.excerpts],
    }


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _device(config: Experiment) -> str:
    import torch

    cuda = torch.cuda.is_available()
    if config.device == "auto":
        return "cuda" if cuda else "cpu"
    if config.device.startswith("cuda") and not cuda:
        raise ConfigError("--device cuda, but torch sees no GPU: install a CUDA build of torch, or use --device cpu")
    if not config.device.startswith(("cpu", "cuda")):
        raise ConfigError(f"--device {config.device!r} is not known: use auto, cpu or cuda")
    return config.device
