"""Work items of any kind in processes of this machine, one thread each; `cluster.map_items` does the same on Ray."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lscollapse.workers import WorkerError, end_with_parent

T = TypeVar("T")
R = TypeVar("R")


def map_items(
    function: Callable[[T], R], items: Sequence[T], *, on_result: Callable[[T, R], None], workers: int
) -> None:
    """Call `function` on each item in one of `workers` processes, and `on_result(item, result)` here as they finish.

    One worker is this process itself.

    Raises:
        WorkerError: a process was killed. What `function` and `on_result` raise comes through as it is.
    """
    if min(workers, len(items)) <= 1:
        for item in items:
            on_result(item, function(item))
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), multiprocessing.get_context("spawn"), _start)
    try:
        pending = {pool.submit(function, item): item for item in items}
        for done in as_completed(pending):
            on_result(pending[done], done.result())
    except BrokenProcessPool:
        raise WorkerError(
            "a worker process was killed (out of memory?); what was finished is kept, the same command continues"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    import torch

    from lscollapse import allocation

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that started this one tells the user
    threading.Thread(target=end_with_parent, daemon=True).start()
    allocation.keep_freed_memory()
    torch.set_num_threads(1)
