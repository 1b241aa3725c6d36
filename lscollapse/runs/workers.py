"""Work items on several GPUs, or on several CPU processes: each process loads the models and writes its items' rows.

An item's rows do not depend on who computes them, and the run folder holds them whole or not at all, so nothing has to be
agreed on. A process ends with the one that started it, however that ends.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lscollapse.core.config import Experiment
from lscollapse.core.progress import SILENT, Progress
from lscollapse.core.run_folder import RunFolder
from lscollapse.runs.loading import load_adapter
from lscollapse.runs.processes import WorkerError, begin, in_processes
from lscollapse.runs.work import Item, measure_item

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.models.adapters.adapter import Adapter


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


_worker: Worker | None = None
_folder: RunFolder | None = None


def measure_items(
    items: Sequence[Item], devices: Sequence[str], config: Experiment, folder: RunFolder, progress: Progress
) -> None:
    """Measure every item into `folder`, with one process on each of `devices`.

    Raises:
        WorkerError: a process was killed. Errors of the measuring itself come through as they are.
    """
    free: Any = multiprocessing.get_context("spawn").Queue()
    for device in devices:
        free.put(device)
    arguments = (free, len(devices), config, folder.path, folder.identity)
    kept = "what was measured is kept, the same command continues, with less memory under --set workers=1"
    in_processes(_measure, items, lambda _, cost: progress.advance(cost), len(devices), _start, arguments, kept)


def _start(free: Any, n_workers: int, config: Experiment, path: Path, identity: dict[str, Any]) -> None:
    import torch

    global _worker, _folder
    begin(max(1, torch.get_num_threads() // n_workers))
    _worker = Worker(config.model_copy(update={"device": free.get()}))
    _folder = RunFolder(path, identity)


def _measure(item: Item) -> float:
    assert _worker is not None and _folder is not None
    _folder.add(item.key, _worker.rows(item))
    return item.cost
