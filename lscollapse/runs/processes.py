"""Work items of any kind in processes of this machine, one thread each; `cluster.map_items` does the same on Ray."""

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

T = TypeVar("T")
R = TypeVar("R")


class WorkerError(ValueError):
    """A process that worked came to a sudden end, or sees another model than the one that started it."""


def map_items(
    function: Callable[[T], R], items: Sequence[T], *, on_result: Callable[[T, R], None], workers: int
) -> None:
    """Call `function` on each item in one of `workers` processes, and `on_result(item, result)` here as they finish.

    One worker is this process itself.

    Raises:
        WorkerError: a process was killed. What `function` and `on_result` raise comes through as it is.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        for item in items:
            on_result(item, function(item))
    else:
        in_processes(
            function, items, on_result, workers, begin, (1,), "what was finished is kept, the same command continues"
        )


def in_processes(
    function: Callable[[T], R], items: Sequence[T], on_result: Callable[[T, R], None], workers: int,
    start: Callable[..., None], arguments: tuple[Any, ...], kept: str,
) -> None:  # fmt: skip
    """`map_items` in new processes, each of which first calls `start(*arguments)`; `kept` ends the line of a WorkerError."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start, arguments)
    try:
        pending = {pool.submit(function, item): item for item in items}
        for done in as_completed(pending):
            on_result(pending[done], done.result())
    except BrokenProcessPool:
        raise WorkerError(f"a worker process was killed (out of memory?); {kept}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def begin(threads: int) -> None:
    """What a new process does first: end with the one that started it, keep freed memory, compute with `threads`."""
    import torch

    from lscollapse.core import allocation

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the process that started this one tells the user
    threading.Thread(target=_end_with_parent, daemon=True).start()
    allocation.keep_freed_memory()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """Wait for the process that started this one to end, then end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
