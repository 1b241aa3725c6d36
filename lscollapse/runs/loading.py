"""The models of a configuration, loaded, each with the excerpts that it reads and the variants it is put through."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lscollapse.core import hub, registry
from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.progress import Progress
from lscollapse.data.corpus import Corpus
from lscollapse.instrument import early_exit
from lscollapse.instrument.engines import dtypes_of
from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.gradients import check_chain
from lscollapse.instrument.surgery import Variant, check
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters import heads
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.adapters.streamed import StreamedMamba2, Upload
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.checkpoint import ModelInfo
from lscollapse.models.checkpoints.located import Where
from lscollapse.models.kernels import fused_measures
from lscollapse.models.kernels.backends import resolve_kernels
from lscollapse.runs.devices import device, set_threads
from lscollapse.runs.excerpts import excerpts_for
from lscollapse.runs.memory import Plan, Plans, Tiles, is_streamed, plan_run, room_for


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
    plans: Plans
    gains: list[float] | None
    dtype: str
    resolve: float

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What every arm computes in; None: each its own default (see forward.measure)."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def dtypes(self) -> dict[int, torch.dtype]:
        """What each variant computes in before anything is known of its rounding."""
        return dict(enumerate(dtypes_of(self.variants, self.compute_dtype, torch.float32)))

    @property
    def plan(self) -> Plan:
        """Tiles of excerpts that no probe is made of."""
        return self.plans.own.rest

    def tiles(self, dtype: torch.dtype) -> Tiles:
        """Those of the arms that compute in `dtype`."""
        return self.plans.wide if self.plans.wide and dtype == torch.float64 else self.plans.own

    @property
    def ids(self) -> np.ndarray:
        """The token ids of the excerpts, (excerpts, N)."""
        return np.array([excerpt.ids for excerpt in self.corpus.excerpts])

    @property
    def identity(self) -> dict[str, Any]:
        """What the run folder knows the task by: everything about model and text that decides the rows."""
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()
        per_layer = [list(v.lam) for v in self.variants if isinstance(v.lam, tuple)]
        known = {
            "model": self.info.name,
            "init": self.init,
            "sha256": self.info.sha256,
            "per_layer": per_layer,
            "text": self.corpus.source,
            "excerpts_sha256": digest,
        }
        # Then arms that float32 does not resolve are not widened, and a run that has begun so goes on so.
        return known | ({"float64": "no room"} if self.dtype == "auto" and self.plans.wide is None else {})


@dataclass(frozen=True)
class LoadedTask(Task):
    """A task with its model loaded."""

    adapter: Adapter

    @property
    def alone(self) -> Task:
        """The task without its model."""
        return Task(**{field.name: getattr(self, field.name) for field in fields(Task)})


Variants = Callable[[Adapter, Experiment], list[Variant]]


def load_tasks(config: Experiment, variants: Variants, progress: Progress) -> Iterator[LoadedTask]:
    """Every model of `config`, trained and, if asked for, freshly initialised, with its excerpts and variants."""
    inits = ("trained", "random") if config.random_init else ("trained",)
    scored = not needs_head(config)
    unscored: dict[str, str] = {}  # why, by model
    for name, init in itertools.product(config.models, inits):
        adapter, info = load_adapter(name, init, config, progress)
        arms = tuple(variants(adapter, config))
        for arm in arms:
            check(adapter, arm)
        corpus = excerpts_for(info, adapter, config, progress)
        _try(adapter, checked_ids(adapter, [corpus.excerpts[0].ids]))
        scored = scored or adapter.head is not None
        if needs_head(config) and adapter.head is None:
            unscored[name] = heads.missing(adapter)
        plans = plan_run(adapter, info, corpus, arms, config, progress)
        gains = early_exit.gains(adapter, info.sha256, config.cache_dir) if config.certified_exit else None
        width = adapter.config.hidden_size
        yield LoadedTask(name, init, info, width, corpus, arms, plans, gains, config.dtype, config.resolve, adapter)
    if not scored:
        raise ConfigError(f"nothing to score: {'; '.join(dict.fromkeys(unscored.values()))}")
    for name, why in unscored.items():
        progress.note(f"{name}: {why}; its loss and gradients are not measured")


def _try(adapter: Adapter, tokens: Tensor) -> None:
    """Embed one excerpt, so that what cannot be measured is refused before anything is written."""
    with torch.no_grad(), room_for("the device has no room for one excerpt: use fewer --tokens or --device cpu"):
        adapter.embed(tokens)


def needs_head(config: Experiment) -> bool:
    """Whether something is asked for that a language-model head is needed for."""
    return config.quality or config.gradients


def load_adapter(name: str, init: str, config: Experiment, progress: Progress) -> tuple[Adapter, ModelInfo]:
    """A model on the configured device with its kernels chosen; streamed where its weights do not fit there."""
    where, on = _where(config), device(config)
    if on.startswith("cuda:"):
        torch.cuda.set_device(on)  # kernels run on the current device, whatever that of their tensors
    architecture, n_parameters = checkpoint.outline(name, **where)
    if init == "trained":
        _announce(name, config, progress)
    if is_streamed(architecture, n_parameters, config) and init == "trained":
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
    seed = config.seed if init == "random" else None
    with room_for(f"{name} does not fit on {on}: use --stream always (Mamba-2) or --device cpu"):
        loaded = checkpoint.load(name, dtype=dtype, device=on, as_stored=on != "cpu", random_init=seed, **where)
        adapter = adapt(loaded.held)
    if isinstance(adapter, Mamba2Adapter):
        adapter.computes_in = dtype
    set_threads(adapter.config.hidden_size)
    _choose_kernels(adapter, config, progress)
    _attach_head(adapter, name, init, config)
    return adapter, loaded.info


def _announce(name: str, config: Experiment, progress: Progress) -> None:
    """Say that a model is fetched, which may take long, where it is not in the cache."""
    entry = registry.resolve(name)
    if entry.source != "hub" or config.offline:
        return
    from huggingface_hub import constants  # not above: a run from local files does without it

    if constants.HF_HUB_OFFLINE:
        return
    try:
        revision, cache = config.revision or entry.revision or None, hub.storage(config.cache_dir)
        hub.fetch(entry.location, revision=revision, cache_dir=cache, offline=True)
    except hub.HubError:
        progress.note(f"fetching {entry.location} from the hub")


def _where(config: Experiment) -> Where:
    return {"revision": config.revision, "cache_dir": config.cache_dir, "offline": config.offline}


def _attach_head(adapter: Adapter, name: str, init: str, config: Experiment) -> None:
    """Give the adapter its language-model head where the configuration asks for what needs one."""
    if not needs_head(config):
        return
    if config.gradients:
        check_chain(adapter)
    heads.attach(adapter, name, config.seed if init == "random" else None, **_where(config))


def _choose_kernels(adapter: Adapter, config: Experiment, progress: Progress) -> None:
    notes = [fused_measures.fault(adapter.device) if adapter.device.type == "cuda" else ""]
    if isinstance(adapter, Mamba2Adapter):
        adapter.kernels = resolve_kernels(config.kernels, adapter.device, products=config.products)
        notes.append(adapter.kernels.note)
    for note in filter(None, notes):
        progress.note(note)
