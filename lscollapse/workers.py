"""Work items on several GPUs, or on several CPU processes: each process loads the models and writes its items' rows.

An item's rows do not depend on who computes them, and the run folder holds them whole or not at all, so nothing has to be
agreed on. A process ends with the one that started it, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lscollapse.config import Experiment
from lscollapse.items import Item, measure_item
from lscollapse.results import RunFolder
from lscollapse.subjects import SILENT, Progress, load_adapter

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.models import Adapter


class WorkerError(ValueError):
    """A process that measured came to a sudden end, or sees another model than the one that started it."""


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
    context = multiprocessing.get_context("spawn")
    free: Any = context.Queue()
    for device in devices:
        free.put(device)
    arguments = (free, len(devices), config, folder.path, folder.identity)
    pool = ProcessPoolExecutor(len(devices), context, _start, arguments)
    try:
        for done in as_completed([pool.submit(_measure, item) for item in items]):
            progress.advance(done.result())
    except BrokenProcessPool:
        raise WorkerError(
            "a worker process was killed (out of memory?); what was measured is kept, the same command continues,"
            " with less memory under --set workers=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(free: Any, n_workers: int, config: Experiment, path: Path, identity: dict[str, Any]) -> None:
    import torch

    from lscollapse import allocation

    global _worker, _folder
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that started this one tells the user
    threading.Thread(target=end_with_parent, daemon=True).start()
    allocation.keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // n_workers))
    _worker = Worker(config.model_copy(update={"device": free.get()}))
    _folder = RunFolder(path, identity)


def _measure(item: Item) -> float:
    assert _worker is not None and _folder is not None
    _folder.add(item.key, _worker.rows(item))
    return item.cost


def end_with_parent() -> None:
    """Wait for the process that started this one to end, then end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
