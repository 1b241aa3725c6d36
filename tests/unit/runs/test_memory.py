"""Tiles within a memory limit."""

from __future__ import annotations

import math
import re
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lscollapse.core import config
from lscollapse.measures import measure_all
from lscollapse.models.kernels.backends import Kernels
from lscollapse.models.kernels.chunked import causal_conv, chunked_scan, gated_norm
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.passes import Shared
from lscollapse.runs import memory

SHAPE_27B = Mamba2Shape(2560, 80, 64, 128)
GIB = 2**30


def test_the_default_sweep_of_2_7b_fits_the_default_limit() -> None:
    """11 lambdas, gate on and off, 32 excerpts of 128 tokens, float32: within 2 GiB and so within 2.5."""
    limit = config.parse_memory(config.Experiment().max_memory)
    for itemsize in (2, 4):
        tiles = memory.plan_streamed(SHAPE_27B, 128, 32, 22, itemsize, limit)
        assert tiles.bytes <= limit == 2 * GIB
        assert tiles.variants == 22 and tiles.excerpts >= 4


def test_two_layers_of_weights_are_counted() -> None:
    """An independent count: out_proj, and in_proj without z and with it, of this layer and the next."""
    entries = 2560 * (5120 + 5120 + 5120 + 2 * 128 + 80)
    for itemsize in (2, 4, 8):
        assert memory.plan_streamed(SHAPE_27B, 1, 1, 1, itemsize, 10 * GIB).bytes > memory.BASE + 2 * entries * itemsize


@given(
    tokens=st.integers(1, 4096), excerpts=st.integers(1, 100), variants=st.integers(1, 40),
    itemsize=st.sampled_from([2, 4, 8]), limit=st.floats(0.5, 40.0),
)  # fmt: skip
def test_what_is_planned_fits_or_is_refused_with_what_would(
    tokens: int, excerpts: int, variants: int, itemsize: int, limit: float
) -> None:
    size = SHAPE_27B, tokens, excerpts, variants, itemsize
    try:
        tiles = memory.plan_streamed(*size, int(limit * GIB))
    except memory.MemoryPlanError as error:
        assert "\n" not in str(error)
        enough = re.search(r"give at least ([\d.]+GiB)", str(error))
        assert enough is not None
        assert config.parse_memory(enough[1]) > limit * GIB
        tiles = memory.plan_streamed(*size, config.parse_memory(enough[1]))
        limit = config.parse_memory(enough[1]) / GIB
    assert 1 <= tiles.excerpts <= min(excerpts, memory.LARGEST_TILE) and 1 <= tiles.variants <= variants
    assert tiles.bytes <= limit * GIB


def test_more_memory_never_makes_smaller_tiles() -> None:
    areas = [
        (tiles.variants, tiles.excerpts)
        for limit in range(12, 160)
        for tiles in [memory.plan_streamed(SHAPE_27B, 128, 32, 22, 4, limit * GIB // 8)]
    ]
    assert areas == sorted(areas)
    assert areas[-1] == (22, memory.LARGEST_TILE)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 22, 33])
def test_tiles_cover_a_dimension_in_few_sizes(n: int) -> None:
    sizes = {memory.plan_streamed(SHAPE_27B, 4096, 1, n, 2, limit * GIB // 16).variants for limit in range(80, 1600, 4)}
    assert n in sizes and len(sizes) <= 1 + math.ceil(math.log2(n))


# --- on a GPU -------------------------------------------------------------------------------------

MIB = 2**20


def test_streams_and_one_batch_in_closed_form() -> None:
    """A block of 4 channels, so that every term is seen: 3 texts of 2 tokens, 5 variants, of which 2 share their gate."""
    shape = Mamba2Shape(hidden=4, heads=2, head_dim=3, state=5)  # inner 6, conv_dim 16
    streams = 4 * (3 * 5 * 2 * 4)
    batch = 4 * (3 * 2 * 2) * (2 * 4 + (6 + 16 + 2) + 2 * 6 + 4 + 4)  # two X in the making; in_proj; mixer; normed X; O
    assert memory.plan_on_gpu(4, shape, 2, 3, 5, 2, 4, GIB) == memory.Plan(3, 5, streams + batch)
    assert memory.plan_on_gpu(4, shape, 2, 3, 5, 2, 2, GIB).bytes == streams + batch  # bfloat16 streams are float32
    assert memory.plan_on_gpu(4, shape, 2, 3, 5, 2, 4, GIB, copies=2).bytes == 2 * (streams + batch)
    double = 3 * 2 * 8 * (2 * 3 * (6 + 16) + 2 * 5 * 4) + 3 * 2 * 24 * (2 * 2**2)  # torch's scan, 5 copies of X; decays
    assert memory.plan_on_gpu(4, shape, 2, 3, 5, 2, 8, GIB).bytes == 2 * (streams + batch) + double


def test_long_texts_have_the_decays_of_a_chunk() -> None:
    """Over 128 tokens the scan is torch's: heads x 128 x 128 decays of 8 + 2 x 4 bytes for each text of a batch."""
    grown = [memory.plan_on_gpu(2560, SHAPE_27B, n, 1, 1, 1, 4, 80 * GIB).bytes for n in (128, 129, 256, 384)]
    assert grown[1] - grown[0] > 16 * 80 * 128 * 128
    assert grown[3] - grown[2] == 128 * 4 * (3 * 2560 + 3 * 5120 + 5376 + 80 + 2 * 2560 + 3 * (5120 + 5376))


@pytest.mark.parametrize(("itemsize", "least", "most"), [(2, 6, 8), (4, 6, 8), (8, 20, 40)])
def test_the_default_sweep_of_2_7b_is_one_tile_on_80_gb(itemsize: int, least: float, most: float) -> None:
    """11 lambdas with the gate and 11 without: 352 texts, 45,056 rows in each batch; float64 too fits beside the weights."""
    tile = memory.plan_on_gpu(2560, SHAPE_27B, 128, 32, 22, 11, itemsize, int(0.8 * 74 * GIB))
    assert (tile.excerpts, tile.variants) == (32, 22)
    assert least * GIB < tile.bytes < most * GIB


class Held(TorchDispatchMode):
    """The most bytes that tensors held at a time, of those that were made while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: list[tuple[weakref.ref[torch.Tensor], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage()
            self._alive.append((weakref.ref(tensor), storage._cdata, storage.nbytes()))
        self._alive = [one for one in self._alive if one[0]() is not None]
        self.most = max(self.most, sum({place: size for _, place, size in self._alive}.values()))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_tokens", [128, 300])
def test_what_torch_operations_hold_is_planned(n_tokens: int, dtype: torch.dtype) -> None:
    """Counted on tensors without numbers, with the measures that follow."""
    weights = {name: torch.empty(size, device="meta") for name, size in SHAPE_27B.tensors().items()}
    kernels = Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "meta")
    block = GpuBlock(weights, SHAPE_27B, kernels, dtype)
    X = torch.empty(4, n_tokens, 2560, device="meta").to(block.stream)
    with torch.no_grad(), Held() as held:
        measure_all(Shared(block(X, lam=2.0)))
    sizes = 2560, SHAPE_27B, n_tokens, 4, 1, 1, dtype.itemsize, 80 * GIB
    planned = memory.plan_on_gpu(*sizes, own=False).bytes
    assert held.most + X.nbytes < planned < 3 * held.most


def test_other_models_take_32_times_their_width() -> None:
    tile = memory.plan_on_gpu(768, None, 128, 32, 11, 11, 4, 80 * GIB)
    assert tile == memory.Plan(32, 11, 4 * 128 * 768 * 32 * 11 * (1 + 2 + 32))


def test_batches_stay_large_where_memory_is_short() -> None:
    """One gate setting after the other leaves them as they are, and more rows than saturate the products are not sought."""
    whole = memory.plan_on_gpu(2560, SHAPE_27B, 128, 32, 22, 11, 4, 80 * GIB)
    one_gate = memory.plan_on_gpu(2560, SHAPE_27B, 128, 32, 22, 11, 4, whole.bytes - 1)
    assert (one_gate.excerpts, one_gate.variants) == (32, 11)  # still 45,056 rows
    more = memory.plan_on_gpu(2560, SHAPE_27B, 128, 1000, 22, 11, 4, whole.bytes)
    assert more.excerpts * min(more.variants, 11) * 128 >= 40_000 and more.bytes <= whole.bytes
    small = memory.plan_on_gpu(2560, SHAPE_27B, 128, 32, 22, 11, 4, 300 * MIB)
    assert (
        small.bytes
        <= 300 * MIB
        < memory.plan_on_gpu(2560, SHAPE_27B, 128, small.excerpts * 2, small.variants, 11, 4, 80 * GIB).bytes
    )
    none = memory.plan_on_gpu(2560, SHAPE_27B, 128, 32, 22, 11, 4, 0)
    assert (none.excerpts, none.variants) == (1, 1)


@given(
    tokens=st.integers(1, 1024), excerpts=st.integers(1, 100), variants=st.integers(1, 40), itemsize=st.sampled_from([2, 4, 8]),
    limit=st.floats(0.1, 80.0), split=st.integers(1, 3),
)  # fmt: skip
def test_what_is_planned_on_a_gpu_fits(
    tokens: int, excerpts: int, variants: int, itemsize: int, limit: float, split: int
) -> None:
    together = -(-variants // split)
    size = 2560, SHAPE_27B, tokens, excerpts, variants, together, itemsize
    tile, least = memory.plan_on_gpu(*size, int(limit * GIB)), memory.plan_on_gpu(*size, 0)
    assert 1 <= tile.excerpts <= excerpts and 1 <= tile.variants <= variants
    assert tile.bytes <= limit * GIB or tile == least
    twice = memory.plan_on_gpu(*size, int(2 * limit * GIB))
    assert min(twice.excerpts * min(twice.variants, together) * tokens, memory.SATURATED) >= min(
        tile.excerpts * min(tile.variants, together) * tokens, memory.SATURATED
    )
