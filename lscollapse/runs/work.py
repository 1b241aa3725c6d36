"""Work items: one task on one tile of excerpts and variants, measured whole, in halves where the device has no room.

An item's rows do not depend on who computes them. A process that is given items keeps a Worker.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lscollapse.core import allocation
from lscollapse.core.config import Experiment
from lscollapse.core.progress import SILENT, Progress
from lscollapse.core.table import COLUMNS
from lscollapse.instrument.forward import measure
from lscollapse.instrument.gradients import grad_norm
from lscollapse.instrument.lm_loss import lm_loss
from lscollapse.instrument.stream import Stream
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.runs.devices import set_threads
from lscollapse.runs.loading import Task, load_adapter, needs_head
from lscollapse.runs.memory import in_halves


@dataclass(frozen=True)
class Item:
    """One task, the `number`-th of its run, on a range of its excerpts and one of its variants."""

    number: int
    task: Task
    excerpts: range
    variants: range

    @property
    def key(self) -> str:
        """The name under which the run folder files its rows."""
        e, v = self.excerpts, self.variants
        return f"{self.number:02d}-{e.start:05d}-{e.stop:05d}-{v.start:03d}-{v.stop:03d}"

    @property
    def cost(self) -> float:
        """How much work it is: passes through a block, each as dear as its weight matrices are large."""
        passes = len(self.excerpts) * len(self.variants) * self.task.info.n_layers
        return passes * float(self.task.width) ** 2


def items(number: int, task: Task) -> Iterator[Item]:
    """Cut a task into its items, in order, each a tile of its plan."""
    excerpts, variants, tile = range(len(task.corpus.excerpts)), range(len(task.variants)), task.plan
    for i, j in itertools.product(excerpts[:: tile.excerpts], variants[:: tile.variants]):
        yield Item(number, task, excerpts[i : i + tile.excerpts], variants[j : j + tile.variants])


def measure_item(item: Item, adapter: Adapter, config: Experiment, progress: Progress) -> pd.DataFrame:
    """The rows of one item.

    Raises:
        MemoryPlanError: the device has no room for one excerpt of one variant.
    """

    def tile(excerpts: range, variants: range) -> pd.DataFrame:
        return _measure(item, excerpts, variants, adapter, config, progress)

    parts = in_halves(tile, item.excerpts, item.variants)
    return pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]


def _measure(
    item: Item, excerpts: range, variants: range, adapter: Adapter, config: Experiment, progress: Progress
) -> pd.DataFrame:
    task, info = item.task, item.task.info
    set_threads(task.width)
    ids, arms = task.ids[excerpts.start : excerpts.stop], task.variants[variants.start : variants.stop]
    dtype = task.compute_dtype
    streams: list[Stream] = []
    finished = streams.append if config.quality else None

    def advance(done: int) -> None:
        progress.advance(done * float(task.width) ** 2)

    parts = [measure(adapter, ids, arms, dtype, advance, task.gains, finished)]
    if needs_head(config) and adapter.head is not None:
        hidden: Any = {"seed": config.seed, "first": excerpts.start, "mask_token": task.corpus.mask}
        if config.quality:
            parts.append(lm_loss(adapter, ids, arms, dtype, streams=streams, **hidden))
        if config.gradients:
            parts.append(grad_norm(adapter, ids, arms, **hidden))
    rows = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    rows = rows.assign(
        subject=item.number,
        variant=rows["variant"] + variants.start,
        excerpt=rows["excerpt"] + excerpts.start,
        model=info.name,
        revision=info.revision,
        checkpoint_sha256=info.sha256,
        init=task.init,
        text=task.corpus.source,
        tokenizer=task.corpus.excerpts[0].tokenizer,
        backend=adapter.backend,
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
