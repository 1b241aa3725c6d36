"""Threads that each take one excerpt at a time through everything, and the scratch buffers that they reuse."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


class Workspace:
    """Named scratch buffers that grow to the largest size asked for and are reused; not for two threads at once."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._taken: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor. It shares memory with every earlier one of that name and dtype."""
        key = name, dtype, tuple(shape)
        if key not in self._taken:
            size = math.prod(shape)
            flat = self._flat.get((name, dtype))
            if flat is None or flat.numel() < size:
                flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype)
                # frees what was smaller
                self._taken = {other: t for other, t in self._taken.items() if other[:2] != key[:2]}
            self._taken[key] = flat[:size].view(*shape)
        return self._taken[key]


class Workers:
    """Threads that each work on one excerpt at a time, in scratch buffers of their own.

    A thread runs its torch operations alone: nothing waits for another core inside an excerpt, which on a busy machine
    costs far more than the work, and results do not depend on the number of threads. Where torch has one thread, that
    is the calling one.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()  # of the calling thread
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, initializer=self._start)  # which start with the first task
        self._local = threading.local()

    def _start(self) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self._local.workspace = Workspace()

    def each(self, function: Callable[..., None], *columns: Iterable[Any]) -> None:
        """function(workspace, *row) for every row of the columns, in any order."""
        if self._threads == 1:
            self.here(function, *columns)
            return
        for _ in self._pool.map(lambda *row: function(self._local.workspace, *row), *columns):
            pass
        torch.set_num_threads(self._threads)  # threads of others would otherwise start with the setting above

    def here(self, function: Callable[..., None], *columns: Iterable[Any]) -> None:
        """The same by the calling thread alone, where a row is over before another thread has woken up."""
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                for row in zip(*columns, strict=True):
                    function(self._local.workspace, *row)
        finally:
            torch.set_num_threads(self._threads)


def workers_here() -> Workers:
    """Those of this process for as many threads as torch has now."""
    return _workers(os.getpid(), torch.get_num_threads())


@lru_cache(maxsize=1)
def _workers(process: int, threads: int) -> Workers:  # a process that was forked has none of its parent's threads
    return Workers()
