"""What is known of the rows of a pass: their numbers, brought from where they are computed in one copy a layer.

A GPU works on while the host waits for nothing: the numbers of a layer are asked for when the work on the next one has been
handed over. On a CPU they are there at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.core.table import LOST

if TYPE_CHECKING:
    from lscollapse.instrument.stream import Stream

HOW = np.array(["ok", *LOST], dtype=object)
STATE = ("exponent", "lost", "bound", "next_bound")  # the columns after the measures


@dataclass
class Known:
    """The rows (arm, excerpt) of a stream as they were in the last layer that was read, (R,) each.

    Attributes:
        values: the measures of X, (R, measures).
        exponent: the stream is X * 2^exponent; of a certified row, times `sign` * 2^`skipped` besides.
        status: `ok` or how the row left the range.
        bound: of certified rows, how far the values can be off: what the weights prove, and rounding; NaN of others.
        next_bound: the same from the next layer on.
        skipped, sign: log2 and sign of the product of the lambdas since a row was certified.
    """

    values: np.ndarray
    exponent: np.ndarray
    status: np.ndarray
    bound: np.ndarray
    next_bound: np.ndarray
    skipped: np.ndarray
    sign: np.ndarray

    @classmethod
    def of(cls, n: int) -> Known:
        """Of n rows, before the embedding is read."""
        unknown = np.full((3, n), np.nan)
        values = np.full((n, len(measures.MEASURES)), np.nan)
        exponent = np.zeros(n, dtype=np.int64)
        return cls(values, exponent, np.full(n, "ok", dtype=object), unknown[0], unknown[1], np.zeros(n), np.ones(n))

    @property
    def settled(self) -> np.ndarray:
        """Which rows are certified, so that their X stands still."""
        settled: np.ndarray = ~np.isnan(self.bound)
        return settled

    @property
    def running(self) -> np.ndarray:
        """Which rows the next layer has to be computed for: finite and not certified."""
        running: np.ndarray = (self.status == "ok") & np.isnan(self.next_bound)
        return running

    @property
    def power(self) -> np.ndarray:
        """log2 of the size of the stream over that of X."""
        power: np.ndarray = self.exponent + self.skipped
        return power

    def learn(self, rows: np.ndarray, found: np.ndarray, lams: np.ndarray | None) -> None:
        """Take the columns `found` of some rows in the layer after the last; of the others X stands still.

        lams: (R,), lambda of the block before; None for the embedding.
        """
        self.bound = self.next_bound.copy()
        self.values[rows] = found[:, : -len(STATE)]
        exponent, lost, bound, next_bound = found[:, -len(STATE) :].T
        self.exponent[rows], self.bound[rows], self.next_bound[rows] = exponent, bound, next_bound
        self.status[rows] = HOW[lost.astype(int)]
        if lams is not None and self.settled.any():
            settled = self.settled
            self.skipped[settled] += np.log2(np.abs(lams[settled]))
            self.sign[settled] *= np.sign(lams[settled])


class Readback:
    """The numbers of all streams of a pass, one copy a layer, read when the next `late` layers have been handed over."""

    def __init__(self, streams: Sequence[Stream], late: int) -> None:
        self.streams = streams
        self.late = late
        self._under_way: deque[tuple[int, list[np.ndarray], Callable[[], np.ndarray]]] = deque()

    def send(self, layer: int) -> None:
        """Start to bring what the streams have recorded of `layer`."""
        columns = torch.cat([stream.recorded for stream in self.streams])
        rows = [stream.rows[: len(stream.recorded)] for stream in self.streams]  # none where X is what it was
        self._under_way.append((layer, rows, _brought(columns)))

    def arrived(self, late: int | None = None) -> Iterator[int]:
        """The layers that are there, in order; while one is yielded the streams' `known` is of that layer."""
        while len(self._under_way) > (self.late if late is None else late):
            layer, rows, brought = self._under_way.popleft()
            ends = np.cumsum([len(own) for own in rows])
            parts = np.split(brought(), ends[:-1])
            for stream, own, found in zip(self.streams, rows, parts, strict=True):
                stream.learn(layer, own, found)
            yield layer


def _brought(columns: Tensor) -> Callable[[], np.ndarray]:
    """Start a copy to the host; what is returned waits for it."""
    if columns.device.type == "cpu":
        return lambda: np.asarray(columns.numpy())
    host = torch.empty(columns.shape, dtype=columns.dtype, pin_memory=True)
    host.copy_(columns, non_blocking=True)
    there = torch.cuda.current_stream(columns.device).record_event()

    def wait() -> np.ndarray:
        there.synchronize()
        return np.asarray(host.numpy())

    return wait
