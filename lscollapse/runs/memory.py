"""How much memory a run takes, and how its excerpts and variants are tiled so that it stays within --max-memory."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.config import Experiment
from lscollapse.core.progress import Progress
from lscollapse.data.corpus import Corpus
from lscollapse.instrument import precision
from lscollapse.instrument.rounding import PROBED, TWINS
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.adapters.streamed import StreamedMamba2
from lscollapse.models.checkpoints.checkpoint import ModelInfo
from lscollapse.models.kernels import ssd
from lscollapse.models.kernels.cpu_block import WIDENED
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.runs.devices import allowed_memory, worker_devices

T = TypeVar("T")

BASE = 600 * 2**20  # interpreter, torch, transformers, pandas and the table, measured
KEPT = 3  # times what a tile uses: freed blocks that the allocator keeps (core/allocation.py), measured at the shape of 2.7B
LARGEST_TILE = 8  # excerpts on a CPU; more make the products no faster
SATURATED = 352 * 128  # rows of a batch on a GPU, tokens of all its texts; more make the products no faster


class MemoryPlanError(ValueError):
    """The run does not fit into the memory allowed."""


@dataclass(frozen=True)
class Plan:
    """Tiles: `excerpts` (each with its twins) x `variants` go through the model together; `bytes` is the predicted peak."""

    excerpts: int
    variants: int
    bytes: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of a run: of its first excerpts, each with a twin (instrument/rounding.py), and of the others."""

    probe: Plan
    rest: Plan

    @property
    def bytes(self) -> int:
        """The predicted peak."""
        return max(self.probe.bytes, self.rest.bytes)


@dataclass(frozen=True)
class Plans:
    """The tiles of the arms in the dtype of a run, and under dtype auto of those in float64.

    `wide` is None where no arm is to run in float64, or where there is no memory for it.
    """

    own: Tiles
    wide: Tiles | None


def is_streamed(architecture: str, n_parameters: int, config: Experiment) -> bool:
    """Whether trained weights are read layer by layer in every pass: asked for, or their float32 do not fit; Mamba-2 only."""
    if architecture != "mamba2":
        return False
    return config.stream == "always" or (config.stream == "auto" and 4 * n_parameters > allowed_memory(config))


def bytes_of_a_weight(config: Experiment) -> int:
    """How many bytes one weight takes while it is computed with."""
    return {"float64": 8, "bfloat16": 2}.get(config.dtype, 4)


def plan_run(
    adapter: Adapter, info: ModelInfo, corpus: Corpus, arms: tuple[Variant, ...], config: Experiment, progress: Progress
) -> Plans:
    """The tiles of a model's run on the configured device; where memory limits them, the progress says how.

    Raises:
        MemoryPlanError: as `plan_streamed`.
    """
    n_tokens, n_excerpts = len(corpus.excerpts[0].ids), len(corpus.excerpts)
    limit, how = allowed_memory(config), "streamed" if isinstance(adapter, StreamedMamba2) else "resident"
    on_gpu = adapter.device.type == "cuda"
    share = -(-n_excerpts // len(worker_devices(config))) if on_gpu else n_excerpts  # so that every GPU has some
    probed = min(PROBED, n_excerpts)
    together = max(Counter(arm.gating for arm in arms).values())

    def tile(excerpts: int, itemsize: int, copies: int = 1) -> Plan:
        if on_gpu:
            shape = adapter.shape if isinstance(adapter, Mamba2Adapter) else None
            room = limit - (layer_bytes(shape, itemsize) if shape else 0)
            width = adapter.config.hidden_size
            own = isinstance(adapter, Mamba2Adapter) and adapter.kernels.own is not None
            return plan_on_gpu(width, shape, n_tokens, excerpts, len(arms), together, itemsize, room, copies, own)
        if isinstance(adapter, StreamedMamba2):
            return plan_streamed(adapter.shape, n_tokens, excerpts, len(arms), itemsize, limit, copies)
        return Plan(min(LARGEST_TILE, excerpts), len(arms), 0)

    def tiles(itemsize: int) -> Tiles:
        probe = tile(probed, itemsize, TWINS)
        each = -(-len(arms) // len(worker_devices(config)))  # so that every process has some
        return Tiles(replace(probe, variants=min(probe.variants, each)), tile(share, itemsize))

    own, wide = tiles(bytes_of_a_weight(config)), None
    if config.dtype == "auto":
        try:
            wide = tiles(torch.float64.itemsize) if _may_widen(adapter, arms, config) else None
        except MemoryPlanError:
            if any(arm.removes_block_norm for arm in arms):
                raise
    if own.bytes:
        progress.note(
            f"{info.name} is {how} on {adapter.device}: {info.n_layers} layers, {own.rest.excerpts} excerpts x"
            f" {own.rest.variants} variants at a time, predicted peak {own.bytes / 2**30:.2f} GiB of {limit / 2**30:.2f}"
        )
    return Plans(own, wide)


def _may_widen(adapter: Adapter, arms: tuple[Variant, ...], config: Experiment) -> bool:
    """Whether arms may run in float64: some do in any case, or there is room for a copy of the model in every process."""
    processes = config.workers or 1 if adapter.device.type == "cpu" else 1  # those on GPUs have one each
    return any(arm.removes_block_norm for arm in arms) or precision.fits(adapter, torch.float64, processes)


def plan_streamed(
    shape: Mamba2Shape, n_tokens: int, n_excerpts: int, n_variants: int, itemsize: int, limit: int, copies: int = 1
) -> Plan:
    """The largest tile of a streamed Mamba-2 within `limit` bytes.

    Args:
        itemsize: bytes of a weight while it is computed with.
        copies: of each excerpt, with its twin.

    Raises:
        MemoryPlanError: not even one excerpt of one variant fits.
    """
    layers, number = layer_bytes(shape, itemsize), _bytes_of_an_entry(itemsize)

    def peak(excerpts: int, variants: int) -> int:
        streams = number * n_tokens * shape.hidden * (variants + 2)  # X of every variant, and two in the making
        buffers = itemsize * n_tokens * (2 * shape.inner + shape.conv_dim + shape.heads + shape.hidden)
        if itemsize == 2:  # factors and results in float32, where the CPU has no products of bfloat16
            buffers += 4 * n_tokens * (shape.inner + WIDENED)
        measures = 8 * n_tokens * shape.hidden * 4  # float64 copies of one X
        scan = 4 * n_tokens * (4 * shape.inner + 2 * shape.conv_dim)
        each = min(excerpts, torch.get_num_threads()) * (measures + scan)  # of every thread
        return BASE + layers + each + KEPT * excerpts * (streams + buffers)

    for variants in _halvings(n_variants):
        for excerpts in _halvings(min(LARGEST_TILE, n_excerpts)):
            if peak(copies * excerpts, variants) <= limit:
                return Plan(excerpts, variants, peak(copies * excerpts, variants))
    needed = peak(copies, 1) / 2**30
    raise MemoryPlanError(
        f"--max-memory {limit / 2**30:.2f} GiB is too small: one layer and one excerpt{' with its twin' if copies > 1 else ''}"
        f" take {needed:.2f} GiB;"
        f" give at least {needed + 0.01:.2f}GiB, or fewer --tokens"
    )


def _bytes_of_an_entry(itemsize: int) -> int:
    """Of a stream: float64 where weights are, else float32."""
    return 8 if itemsize >= 8 else 4


def layer_bytes(shape: Mamba2Shape, itemsize: int) -> int:
    """What is made of the weights while they are used: this layer and the next, converted, and as they are in the file."""
    weights = (shape.inner + shape.conv_dim + shape.heads + shape.inner) * shape.hidden
    return weights * (2 * itemsize + 2 * 4)


def plan_on_gpu(
    hidden: int, shape: Mamba2Shape | None, n_tokens: int, n_excerpts: int, n_variants: int, together: int, itemsize: int,
    limit: int, copies: int = 1, own: bool = True,
) -> Plan:  # fmt: skip
    """The largest tile within `limit` bytes of device memory beside the weights; one of everything if none is.

    Of two tiles the one whose batches are larger, up to SATURATED rows, then the one of more work. An estimate
    (`in_halves` mends it): the streams, and of one batch two more in the making, what its block computes on the way, and
    float64 copies for the measures where they are not fused.

    Args:
        together: how many variants of one gate setting there are at most; they go through a block as one batch.
        own: whether the package's own kernels compute the blocks of Mamba-2, where they can.
    """
    entry = _bytes_of_an_entry(itemsize)
    text = itemsize * n_tokens * 32 * hidden if shape is None else _block_bytes(shape, n_tokens, entry, own)
    text += entry * n_tokens * 2 * hidden + (8 * n_tokens * 5 * hidden if entry == 8 else 0)

    def peak(excerpts: int, variants: int) -> int:
        streams = entry * n_tokens * hidden * variants
        return copies * excerpts * (streams + text * min(variants, together))

    def worth(size: tuple[int, int]) -> tuple[int, int, int]:
        excerpts, variants = size
        rows = copies * excerpts * min(variants, together) * n_tokens
        return min(rows, SATURATED), excerpts * variants, variants

    sizes = itertools.product(_halvings(n_excerpts), _halvings(n_variants))
    excerpts, variants = max((size for size in sizes if peak(*size) <= limit), key=worth, default=(1, 1))
    return Plan(excerpts, variants, peak(excerpts, variants))


def _block_bytes(shape: Mamba2Shape, n_tokens: int, entry: int, own: bool) -> int:
    """What a block of Mamba-2 computes on the way of one text: in_proj's output, the mixer's twice, the normed X, and O.

    Texts of one chunk are scanned in one own kernel; longer ones, and float64, by torch's operations, which keep what goes into
    the convolution and the scan three times, and the decays of a chunk in float64 and twice as they are used.
    """
    numbers = 3 * shape.inner + shape.conv_dim + shape.heads + 2 * shape.hidden
    if own and entry < 8 and n_tokens <= ssd.CHUNK:
        return entry * n_tokens * numbers
    decays = shape.heads * min(n_tokens, ssd.CHUNK) ** 2
    return entry * n_tokens * (numbers + 3 * (shape.inner + shape.conv_dim)) + (8 + 2 * entry) * decays


def in_halves(tile: Callable[[range, range], T], excerpts: range, variants: range) -> list[T]:
    """`tile(excerpts, variants)`, or its results on halves, and halves of these, where the device runs out of memory.

    Excerpts are halved first, then variants. Results come in the order of their ranges.

    Raises:
        MemoryPlanError: one excerpt of one variant is too much, or a Triton kernel needs more than the GPU has.
    """
    try:
        return [tile(excerpts, variants)]
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise MemoryPlanError(f"this GPU cannot run a Triton kernel ({error}): use --kernels torch") from None
        if not is_out_of_memory(error):
            raise  # else what the failed pass held is let go of with the exception, before the halves run
    release()
    if len(excerpts) > 1:
        middle = len(excerpts) // 2
        halves = [(excerpts[:middle], variants), (excerpts[middle:], variants)]
    elif len(variants) > 1:
        middle = len(variants) // 2
        halves = [(excerpts, variants[:middle]), (excerpts, variants[middle:])]
    else:
        raise MemoryPlanError(
            "the device has no room for one excerpt of one variant: use fewer --tokens, --stream always, or --device cpu"
        )
    return [result for half in halves for result in in_halves(tile, *half)]


@contextmanager
def room_for(message: str) -> Iterator[None]:
    """Allocations that fail inside are a MemoryPlanError of this message."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryPlanError(message) from None
        raise


def release() -> None:
    """Give GPU memory that nothing uses back, so that other processes and larger blocks can have it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _halvings(n: int) -> list[int]:
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes
