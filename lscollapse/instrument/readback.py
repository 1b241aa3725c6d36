"""The numbers of a pass, brought from where they are computed in one copy a layer.

A GPU works on while the host waits for nothing: the numbers of a layer are asked for when the work on the next one has been
handed over. On a CPU they are there at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lscollapse.instrument.stream import Stream


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
