"""Work items in processes of this machine, which end with the one that started them; `cluster` does the same on Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
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
    function: Callable[[T], R], items: Sequence[T], *, on_result: Callable[[T, R], Sequence[T] | None], workers: int
) -> None:
    """Call `function` on each item in one of `workers` processes, and `on_result(item, result)` here as they finish.

    One worker is this process itself; a process of its own computes with one thread.

    Args:
        on_result: what it returns are further items.

    Raises:
        WorkerError: a process was killed. What `function` and `on_result` raise comes through as it is.
    """
    if min(workers, len(items)) > 1:
        _in_pool(
            function,
            items,
            on_result,
            min(workers, len(items)),
            begin,
            (1,),
            "what was finished is kept, the same command continues",
        )
        return
    left = deque(items)
    while left:
        item = left.popleft()
        left.extendleft(reversed(on_result(item, function(item)) or ()))


def measure_on(
    devices: Sequence[str], items: Sequence[Item], config: Experiment, keep: Callable[[Item, pd.DataFrame], Sequence[Item] | None]
) -> None:  # fmt: skip
    """Measure every item, with one process on each of `devices`, and call `keep(item, rows)` here as they finish.

    Args:
        keep: what it returns are further items.

    Raises:
        WorkerError: a process was killed. Errors of the measuring itself come through as they are.
    """
    free: Any = multiprocessing.get_context("spawn").Queue()
    for device in devices:
        free.put(config.model_copy(update={"device": device}))
    kept = "what was measured is kept, the same command continues, with less memory under --set workers=1"
    _in_pool(rows_here, items, keep, len(devices), _start, (free, len(devices)), kept)


def _in_pool(
    function: Callable[[T], R], items: Sequence[T], on_result: Callable[[T, R], Sequence[T] | None], workers: int,
    start: Callable[..., None], arguments: tuple[Any, ...], kept: str,
) -> None:  # fmt: skip
    """As `map_items`, in processes that call `start(*arguments)` first; `kept` ends the line of a WorkerError."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start, arguments)
    try:
        pending = {pool.submit(function, item): item for item in items}
        while pending:
            for done in futures.wait(pending, return_when=futures.FIRST_COMPLETED).done:
                item = pending.pop(done)
                pending |= {pool.submit(function, more): more for more in on_result(item, done.result()) or ()}
    except BrokenProcessPool:
        raise WorkerError(f"a worker process was killed (out of memory?); {kept}") from None
    finally:
        pool.shutdown(cancel_futures=True)


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
