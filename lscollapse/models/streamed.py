"""A Mamba-2 checkpoint that stays on disk: one layer in memory while it computes, the next being read meanwhile."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lscollapse.models.adapter import UnsupportedModel
from lscollapse.models.checkpoint import LayerReader
from lscollapse.models.mamba2 import Mamba2Adapter
from lscollapse.models.mamba2_native import NativeBlock, Workers

MADV_DONTNEED = 4


class StreamedMamba2(Mamba2Adapter):
    """Blocks are made from the mapped file when they are asked for, in order; `native_block(k)` starts reading k + 1."""

    def __init__(self, reader: LayerReader) -> None:
        self.reader = reader
        self.config = reader.config
        self.workers = Workers()
        self._reading: dict[tuple[int, torch.dtype], Future[NativeBlock]] = {}
        self._pool = ThreadPoolExecutor(1)

    @property
    def model(self) -> Any:
        raise UnsupportedModel("a streamed checkpoint has no modules to put hooks on: use --stream never")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def embed(self, ids: Tensor) -> Tensor:
        return self.reader.tensors["embeddings.weight"][ids].float()

    def tensors(self, layer: int) -> dict[str, Tensor]:
        return self.reader.layer(layer)

    def native_block(self, layer: int, dtype: torch.dtype) -> NativeBlock:
        block = self._ask(layer, dtype).result()
        for old in [key for key in self._reading if key[1] == dtype and key[0] != layer]:
            self._reading.pop(old).cancel()
        if layer > 0:
            forget(self.reader.layer(layer - 1))
        if layer + 1 < self.n_layers:
            self._ask(layer + 1, dtype)
        return block

    def mixer_bound(self, layer: int, spectral_bound: Any) -> float:
        bound = super().mixer_bound(layer, spectral_bound)
        forget(self.reader.layer(layer))
        return bound

    def _ask(self, layer: int, dtype: torch.dtype) -> Future[NativeBlock]:
        key = (layer, dtype)
        if key not in self._reading:
            self._reading[key] = self._pool.submit(self._make, layer, dtype)
        return self._reading[key]

    def _make(self, layer: int, dtype: torch.dtype) -> NativeBlock:
        with torch.no_grad():
            return NativeBlock(self.tensors(layer), self.shape, dtype, self.workers)


def forget(tensors: dict[str, Tensor]) -> None:
    """Give the mapped pages of these tensors back to the system; they are read again from the file when needed."""
    libc = ctypes.CDLL(None)
    for tensor in tensors.values():
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(libc, "madvise"):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
