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
    from lscollapse.models import Adapter


class WorkerError(ValueError):
    """A process that measured came to a sudden end."""


class Worker:
    """One process: its device, the run folder, and the model of the item that it measured last."""

    def __init__(self, config: Experiment, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.loaded: tuple[int, Adapter] | None = None

    def measure(self, item: Item) -> float:
        """Store the rows of `item`; returns its cost."""
        if self.loaded is None or self.loaded[0] != item.number:
            self.loaded = None  # its memory is free before the next one is loaded
            self.loaded = item.number, load_adapter(item.task.name, item.task.init, self.config, SILENT)[0]
        self.folder.add(item.key, measure_item(item, self.loaded[1], self.config, SILENT))
        return item.cost


_worker: Worker | None = None


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

    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that started this one tells the user
    threading.Thread(target=_end_with_parent, daemon=True).start()
    allocation.keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // n_workers))
    _worker = Worker(config.model_copy(update={"device": free.get()}), RunFolder(path, identity))


def _measure(item: Item) -> float:
    assert _worker is not None
    return _worker.measure(item)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
