"""How much memory a run takes, and how its excerpts and variants are tiled so that it stays within --max-memory."""

from __future__ import annotations

from dataclasses import dataclass

from lscollapse.models.mamba2_native import Mamba2Shape

BASE = 600 * 2**20  # interpreter, torch, transformers, pandas and the table, measured
LARGEST_TILE = 8  # excerpts; more make the products no faster


class MemoryPlanError(ValueError):
    """The run does not fit into the memory allowed."""


@dataclass(frozen=True)
class Plan:
    """Tiles of a run: `excerpts` x `variants` go through the model together; `bytes` is the predicted peak."""

    excerpts: int
    variants: int
    bytes: int


def streamed(shape: Mamba2Shape, n_tokens: int, n_excerpts: int, n_variants: int, itemsize: int, limit: int) -> Plan:
    """The largest tile of a streamed Mamba-2 within `limit` bytes.

    Args:
        itemsize: bytes of a weight while it is computed with.

    Raises:
        MemoryPlanError: not even one excerpt of one variant fits.
    """
    weights = (shape.inner + shape.conv_dim + shape.heads + shape.inner) * shape.hidden
    layers = weights * (2 * itemsize + 2 * 4)  # this layer and the next, converted, and their mapped pages

    def peak(excerpts: int, variants: int) -> int:
        streams = 4 * n_tokens * shape.hidden * excerpts * (variants + 2)
        buffers = itemsize * n_tokens * excerpts * (2 * shape.inner + shape.conv_dim + shape.heads + shape.hidden)
        measures = 8 * n_tokens * shape.hidden * excerpts * 5
        scan = 4 * n_tokens * (4 * shape.inner + 2 * shape.conv_dim) * 2
        return BASE + layers + streams + buffers + measures + scan

    for variants in _halvings(n_variants):
        for excerpts in _halvings(min(LARGEST_TILE, n_excerpts)):
            if peak(excerpts, variants) <= limit:
                return Plan(excerpts, variants, peak(excerpts, variants))
    needed = peak(1, 1) / 2**30
    raise MemoryPlanError(
        f"--max-memory {limit / 2**30:.2f} GiB is too small: one layer and one excerpt take {needed:.2f} GiB;"
        f" give at least {needed + 0.01:.2f}GiB, or fewer --tokens"
    )


def _halvings(n: int) -> list[int]:
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes
