"""Tiles within a memory limit."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lscollapse.core import config
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
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
