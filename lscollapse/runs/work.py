"""Work items: one task on one tile of excerpts and variants, measured whole, in halves where the device has no room.

An item's rows do not depend on who computes them. A process that is given items keeps a Worker.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from lscollapse.core import allocation
from lscollapse.core.config import Experiment
from lscollapse.core.progress import SILENT, Progress
from lscollapse.core.table import COLUMNS
from lscollapse.instrument import rounding
from lscollapse.instrument.forward import measure_pass
from lscollapse.instrument.gradients import grad_norm
from lscollapse.instrument.lm_loss import lm_loss
from lscollapse.instrument.stream import Stream
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.runs.devices import set_threads
from lscollapse.runs.loading import Task, load_adapter, needs_head
from lscollapse.runs.memory import MemoryPlanError, in_halves

S = TypeVar("S", range, tuple[int, ...])


@dataclass(frozen=True)
class Item:
    """One task, the `number`-th of its run, on a range of its excerpts and some of its variants, all of one dtype.

    Attributes:
        found: what the probes of the task found; None where this is one of them, on the first excerpts.
    """

    number: int
    task: Task
    excerpts: range
    variants: tuple[int, ...]
    found: rounding.Probed | None = None

    @property
    def key(self) -> str:
        """The name under which the run folder files its rows."""
        e, v = self.excerpts, self.variants
        return f"{self.number:02d}-{e.start:05d}-{e.stop:05d}-{v[0]:03d}-{v[-1] + 1:03d}"

    @property
    def dtype(self) -> torch.dtype:
        """What its variants compute in, of a probe at first."""
        return (self.found.dtypes if self.found else self.task.dtypes)[self.variants[0]]

    @property
    def cost(self) -> float:
        """How much work it is: passes through a block, each as dear as its weight matrices are large."""
        return (rounding.TWINS if self.found is None else 1) * len(self.excerpts) * self.cost_of(len(self.variants))

    def cost_of(self, n_variants: int) -> float:
        """What one excerpt costs in so many variants."""
        return n_variants * self.task.info.n_layers * float(self.task.width) ** 2


def probes(number: int, task: Task) -> list[Item]:
    """The items that come first: the first excerpts, in all variants, each with a twin."""
    excerpts = range(min(rounding.PROBED, len(task.corpus.excerpts)))
    groups = rounding.of_one_dtype(task.dtypes).items()
    parts = [part for dtype, variants in groups for part in _cut(variants, task.tiles(dtype).probe.variants)]
    return [Item(number, task, excerpts, variants) for variants in parts]


def rest(number: int, task: Task, found: rounding.Probed) -> list[Item]:
    """The other excerpts, in the dtypes that the probes found, each item a tile."""
    items = []
    for dtype, variants in rounding.of_one_dtype(found.dtypes).items():
        tile = task.tiles(dtype).rest
        excerpts = _cut(range(rounding.PROBED, len(task.corpus.excerpts)), tile.excerpts)
        parts = itertools.product(excerpts, _cut(variants, tile.variants))
        items += [Item(number, task, *part, found) for part in parts]
    return items


def _cut(whole: S, size: int) -> list[S]:
    return [whole[i : i + size] for i in range(0, len(whole), size)]


def measure_item(item: Item, adapter: Adapter, config: Experiment, progress: Progress) -> pd.DataFrame:
    """The rows of one item; of a probe with the columns that `rounding.probe` adds.

    Raises:
        MemoryPlanError: the device has no room for one excerpt of one variant.
    """
    if item.found is None:
        return _probe(item, adapter, config, progress)

    def tile(excerpts: range, part: range) -> pd.DataFrame:
        variants = item.variants[part.start : part.stop]
        return _measure(item, excerpts, variants, item.dtype, adapter, config, progress)

    parts = in_halves(tile, item.excerpts, range(len(item.variants)))
    return rounding.written(pd.concat(parts, ignore_index=True), item.found.rounding, item.task.resolve)


def _probe(item: Item, adapter: Adapter, config: Experiment, progress: Progress) -> pd.DataFrame:
    task, own = item.task, dict.fromkeys(item.variants, item.dtype)

    def twice(dtypes: dict[int, torch.dtype]) -> pd.DataFrame:
        numbers, dtype, again = tuple(dtypes), next(iter(dtypes.values())), dtypes != own
        if again:  # in float64
            progress.grow(rounding.TWINS * len(item.excerpts) * item.cost_of(len(numbers)))

        def tile(excerpts: range, part: range) -> pd.DataFrame:
            chosen, twins = numbers[part.start : part.stop], rounding.Twins(excerpts)
            rows = _measure(item, excerpts, chosen, dtype, adapter, config, progress, twins)
            return rounding.without_twins(rows, len(excerpts))

        plan = task.tiles(dtype).probe
        tiles = itertools.product(_cut(item.excerpts, plan.excerpts), _cut(range(len(numbers)), plan.variants))
        try:
            return pd.concat([rows for part in tiles for rows in in_halves(tile, *part)], ignore_index=True)
        except MemoryPlanError as error:
            if again:
                raise torch.OutOfMemoryError(str(error)) from None  # then float32 is what there is
            raise

    return rounding.probe(twice, own, task.resolve, task.dtype == "auto" and task.plans.wide is not None)


def _measure(
    item: Item, excerpts: range, variants: tuple[int, ...], dtype: torch.dtype, adapter: Adapter, config: Experiment,
    progress: Progress, twins: rounding.Twins | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The rows of variants of these numbers on a range of excerpts, or on it and their twins."""
    task, info = item.task, item.task.info
    set_threads(task.width)
    ids, arms = task.ids[excerpts.start : excerpts.stop], [task.variants[number] for number in variants]
    ids = ids if twins is None else np.concatenate([ids, ids])
    streams: list[Stream] = []
    finished = streams.append if config.quality else None

    def advance(done: int) -> None:
        progress.advance(done * float(task.width) ** 2)

    options: dict[str, Any] = {"finished": finished, "twins": twins, "chosen": config.measures}
    parts = [measure_pass(adapter, ids, arms, dtype, advance, task.gains, **options)]
    if needs_head(config) and adapter.head is not None:
        hidden: Any = {"seed": config.seed, "first": excerpts.start, "mask_token": task.corpus.mask, "twins": twins}
        if config.quality:
            parts.append(lm_loss(adapter, ids, arms, dtype, streams=streams, **hidden))
        if config.gradients:
            parts.append(grad_norm(adapter, ids, arms, **hidden))
    rows = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    rows = rows.assign(
        subject=item.number,
        variant=rows["variant"].map(dict(enumerate(variants))),
        excerpt=rows["excerpt"] + excerpts.start,
        model=info.name,
        revision=info.revision,
        checkpoint_sha256=info.sha256,
        init=task.init,
        text=task.corpus.source,
        tokenizer=task.corpus.excerpts[0].tokenizer,
        backend=adapter.backend(dtype),
        seed=config.seed,
    )
    return rows[["subject", "variant", *COLUMNS]]


class WorkerError(ValueError):
    """A process that worked came to a sudden end, or sees another model than the one that started it."""


class Worker:
    """One process that measures: its configuration, and the model of the item that it measured last."""

    def __init__(self, config: Experiment) -> None:
        self.config = config
        self.loaded: tuple[int, Adapter] | None = None

    def rows(self, item: Item) -> pd.DataFrame:
        """The rows of `item`.

        Raises:
            WorkerError: the model that this process finds by the item's name is not the one the item was made for.
        """
        task = item.task
        if self.loaded is None or self.loaded[0] != item.number:
            self.loaded = None  # its memory is free before the next one is loaded
            adapter, info = load_adapter(task.name, task.init, self.config, SILENT)
            if info.sha256 != task.info.sha256:
                raise WorkerError(
                    f"the weights of {task.name} are not the same for every process (sha256 {info.sha256[:12]}, and"
                    f" {task.info.sha256[:12]} where the run was started): give all the same --model folder or revision"
                )
            self.loaded = item.number, adapter
        return measure_item(item, self.loaded[1], self.config, SILENT)


_worker: Worker | None = None  # of this process


def worker_for(config: Experiment) -> Worker:
    """The worker of this process, which keeps its model from item to item."""
    global _worker
    if _worker is None or _worker.config != config:
        allocation.keep_freed_memory()
        _worker = Worker(config)
    return _worker


def rows_here(item: Item) -> pd.DataFrame:
    """The rows of an item, by the worker that this process was given."""
    assert _worker is not None
    return _worker.rows(item)
