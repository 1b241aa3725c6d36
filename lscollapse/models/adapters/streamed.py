"""A Mamba-2 checkpoint that stays on disk: one layer in memory while it computes, the next being read meanwhile.

On a GPU the same with one more step: the layer goes from the file through pinned memory to the device, on a CUDA stream
of its own, and is converted there; the stream that computes waits for it only when it needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lscollapse.models.adapters.adapter import Head, UnsupportedModel
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.checkpoints.checkpoint import LayerReader
from lscollapse.models.checkpoints.tensors import forget
from lscollapse.models.kernels.mamba2_block import Mamba2Block
from lscollapse.workers import Workers

Build = Callable[[dict[str, Tensor]], Mamba2Block]
Finish = Callable[[], Mamba2Block]


class Transfer:
    """How a layer's tensors get to where they compute; here they stay, and compute on the CPU."""

    device = torch.device("cpu")

    def begin(self, tensors: dict[str, Tensor], build: Build) -> Finish:
        """Start bringing the mapped `tensors` to `device` and make a block of them there; in the reading thread.

        What is returned is called in the computing thread, before the block is used.
        """
        block = build(tensors)
        return lambda: block


class Upload(Transfer):
    """To a GPU, on a CUDA stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # of torch

    def begin(self, tensors: dict[str, Tensor], build: Build) -> Finish:
        with torch.cuda.stream(self.stream):
            block = build({name: t.pin_memory().to(self.device, non_blocking=True) for name, t in tensors.items()})
            arrived = self.stream.record_event()

        def finish() -> Mamba2Block:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(arrived)
            for tensor in block.parts():
                tensor.record_stream(computing)  # its memory is not given away before `computing` is past its use
            return block

        return finish


class StreamedMamba2(Mamba2Adapter):
    """Blocks are made from the mapped file when they are asked for, in order; `own_block(k)` starts reading k + 1."""

    def __init__(self, reader: LayerReader, transfer: Transfer | None = None) -> None:
        self.reader = reader
        self.config = reader.config
        self.workers = Workers()
        self.transfer = transfer or Transfer()
        self.output = reader.tensors["embeddings.weight"] if reader.config.tie_word_embeddings else None
        self._reading: dict[tuple[int, torch.dtype], Future[Finish]] = {}
        self._pool = ThreadPoolExecutor(1)

    @property
    def model(self) -> Any:
        raise UnsupportedModel("a streamed checkpoint has no modules to put hooks on: use --stream never")

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def embedding(self) -> tuple[str, Tensor]:
        return "embeddings.weight", self.reader.tensors["embeddings.weight"]

    @property
    def head(self) -> Head | None:
        if self.output is None:
            return None
        return Head(self.before_output(), self.output, None, mapped=self.config.tie_word_embeddings)

    def before_output(self) -> nn.Module:
        norm = nn.RMSNorm(self.config.hidden_size, self.config.layer_norm_epsilon)
        norm.load_state_dict({"weight": self.reader.tensors["norm_f.weight"]})
        return norm

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.transfer.device

    def embed(self, ids: Tensor) -> Tensor:
        return self.reader.tensors["embeddings.weight"][ids.cpu()].float().to(self.device)  # (B, N, d)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """In float32 as `dtype` says, whatever the file holds, so that blocks of them are those of the loaded model."""
        return {name: tensor.float() for name, tensor in self.held(layer).items()}

    def held(self, layer: int) -> dict[str, Tensor]:
        return self.reader.layer(layer)

    def own_block(self, layer: int, dtype: torch.dtype) -> Mamba2Block:
        try:
            block = self._ask(layer, dtype).result()()
        except Exception:
            self._reading.clear()  # the next attempt starts anew, in a smaller tile if there was no room
            raise
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

    def _ask(self, layer: int, dtype: torch.dtype) -> Future[Finish]:
        key = (layer, dtype)
        if key not in self._reading:
            self._reading[key] = self._pool.submit(self._make, layer, dtype)
        return self._reading[key]

    def _make(self, layer: int, dtype: torch.dtype) -> Finish:
        with torch.no_grad():
            return self.transfer.begin(self.reader.layer(layer), lambda tensors: self.make_block(tensors, dtype))
