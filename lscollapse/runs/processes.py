"""Work items in processes of this machine, which end with the one that started them; `cluster` does the same on Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

import pandas as pd
import torch

from lscollapse.core import allocation
from lscollapse.core.config import Experiment
from lscollapse.runs.work import Item, WorkerError, rows_here, worker_for

T = TypeVar("T")
R = TypeVar("R")


def map_items(
    function: Callable[[T], R], items: Sequence[T], *, on_result: Callable[[T, R], None], workers: int,
    start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = (1,),
    kept: str = "what was finished is kept, the same command continues",
) -> None:  # fmt: skip
    """Call `function` on each item in one of `workers` processes, and `on_result(item, result)` here as they finish.

    One worker is this process itself.

    Args:
        start: what a new process calls first, with `arguments`; the default is `begin`, with one thread.
        kept: how the line of a WorkerError ends.

    Raises:
        WorkerError: a process was killed. What `function` and `on_result` raise comes through as it is.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            on_result(item, function(item))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start or begin, arguments)
    try:
        pending = {pool.submit(function, item): item for item in items}
        for done in as_completed(pending):
            on_result(pending[done], done.result())
    except BrokenProcessPool:
        raise WorkerError(f"a worker process was killed (out of memory?); {kept}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def measure_on(
    devices: Sequence[str], items: Sequence[Item], config: Experiment, keep: Callable[[Item, pd.DataFrame], None]
) -> None:
    """Measure every item, with one process on each of `devices`, and call `keep(item, rows)` here as they finish.

    Raises:
        WorkerError: a process was killed. Errors of the measuring itself come through as they are.
    """
    free: Any = multiprocessing.get_context("spawn").Queue()
    for device in devices:
        free.put(config.model_copy(update={"device": device}))
    kept = "what was measured is kept, the same command continues, with less memory under --set workers=1"
    arguments = free, len(devices)
    map_items(rows_here, items, on_result=keep, workers=len(devices), start=_start, arguments=arguments, kept=kept)


def _start(free: Any, n_workers: int) -> None:
    begin(max(1, torch.get_num_threads() // n_workers))
    worker_for(free.get())


def begin(threads: int) -> None:
    """What a new process does first: end with the one that started it, keep freed memory, compute with `threads`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that started this one tells the user
    threading.Thread(target=_end_with_parent, daemon=True).start()
    allocation.keep_freed_memory()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Wait until the process that started this one ends, then end too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
