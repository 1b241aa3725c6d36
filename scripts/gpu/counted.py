"""What a pass hands to a GPU, counted without one: the engine's own code on tensors of the meta device, at full size.

Triton is replaced by a stand-in whose kernels note that they are launched (`stand_in`), so that everything that launches
them runs as it is. torch's operations are noted as they are dispatched: bytes of what they read and write. Of the kernels
the bytes and operations are formulas, one each in PRICES. A read of the host from the device would raise, as tensors of
the meta device hold no numbers; the one copy a layer is noted and answered.
"""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARED_MEMORY = 232_448  # bytes a program may have on an H100 or H200
# No launch; of these only the last makes a view without saying so.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
PRODUCTS = ("mm", "addmm")


@dataclass
class Cost:
    """Launches, bytes from and to memory, and floating-point operations by the unit that makes them."""

    launches: int = 0
    bytes: int = 0
    work: dict[str, float] = field(default_factory=dict)

    def add(self, bytes: int, work: dict[str, float]) -> None:
        self.launches += 1
        self.bytes += bytes
        for unit, operations in work.items():
            self.work[unit] = self.work.get(unit, 0.0) + operations


def size(tensor: Tensor) -> int:
    """Bytes of the different numbers of a tensor: what is expanded is read once."""
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


class Counts(TorchDispatchMode):
    """Costs by name: a Triton kernel, or `torch NAME`.

    Attributes:
        copies: host to device, without their number of launches.
        reads: device to host.
        host_seconds: of what the host does with the numbers that it reads, on this machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = {}
        self.copies = self.reads = 0
        self.host_seconds = 0.0

    def note(self, name: str, bytes: int, work: dict[str, float]) -> None:
        self.costs.setdefault(name, Cost()).add(bytes, work)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        viewed = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        there = [tensor for tensor in made if tensor.is_meta]
        if viewed or name in FREE or not there:
            return out
        if given and all(tensor.is_cpu for tensor in given):
            self.copies += 1
            return out
        work: dict[str, float] = {}
        if name in PRODUCTS:
            X, W = given[-2:]
            work = {str(X.dtype).removeprefix("torch."): 2.0 * X.shape[0] * X.shape[1] * W.shape[1]}
        self.note(f"torch {name}", sum(map(size, [*given, *there])), work)
        return out


# --- the kernels: what each reads, writes and computes, of the arguments that it is launched with ---


def _rows(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    y, gate, weight, out, low, scale = a[:6]
    parts = [y, out] + [gate] * k["GATE"] + [weight] * k["NORM"] + [low, scale] * k["HALVES"]
    return sum(map(size, parts)), {}


def _scores(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    xBC, scores, length = a[0], a[3], a[6]
    read = grid[0] * length * 2 * k["STATE"] * xBC.element_size()  # B and C of an excerpt and group
    across = k["LENGTH"] // k["ROWS"]
    tiles = grid[0] * across * (across + 1) // 2
    return read + size(scores), {"tf32": 3 * 2.0 * tiles * k["ROWS"] ** 2 * k["STATE"]}


def _decays(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    dt, written = a[0], a[3:6]
    return size(dt) + sum(map(size, written)), {"float64 alone": 40.0 * grid[0] * k["LENGTH"]}


def _scan(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    xBC, scores, step, high, low, y = *a[:5], a[8]
    read = y.numel() * xBC.element_size() + sum(
        map(size, (scores, step, high, low))
    )  # x alone; scores stay in the cache
    pairs = float(grid[0] * k["LENGTH"] ** 2)
    # M is made anew for every head: exp, two sums, three products, two choices.
    return read + size(y), {"tf32": 3 * 2.0 * pairs * k["HEAD_DIM"], "float32 alone": 12.0 * pairs}


def _product(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    high, low, scale, w_high, w_low = a[:5]
    out, m, n, depth = a[8:12]
    parts = [high, low, scale, w_high, out] + [w_low] * k["LOW"]
    passes = 3 if k["LOW"] else 2
    once = 2.0 * m * n * depth
    return sum(map(size, parts)), {"float16": passes * once, "float32 alone": once / 2 / k["BK"]}


def _combine(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    X, O, Y = a[0], a[1], a[4]
    return sum(map(size, (X, O, Y))), {}


def _sums(grid: Any, a: Sequence[Any], k: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Of all kernels of the measures, by the formula that stands beside them."""
    from lscollapse.models.kernels.fused_measures import cost

    each = cost(*a[3:5])
    return grid[0] * each.reads, {
        "float64": float(grid[0] * each.products),
        "float64 alone": float(grid[0] * each.arithmetic),
    }


PRICES: dict[str, Callable[..., tuple[int, dict[str, float]]]] = {
    "rows_kernel": _rows, "scores_kernel": _scores, "decays_kernel": _decays, "scan_kernel": _scan,
    "product_kernel": _product, "combine_kernel": _combine, "sums_kernel": _sums,
}  # fmt: skip
WITH_SUMS = ("gram_kernel", "leading_kernel", "rest_kernel")  # priced there

counts = Counts()  # of the pass that is counted


class _Kernel:
    """A kernel that notes its launch."""

    def __init__(self, function: Any) -> None:
        self.name = function.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            price = (0, {}) if self.name in WITH_SUMS else PRICES[self.name](grid, args, constants)
            counts.note(self.name, *price)

        return launch


def stand_in() -> None:
    """Put the stand-in where Triton would be imported from, for this process, which can run no Triton afterwards."""
    from transformers import Mamba2Model  # noqa: F401  # it asks for the real one while it is imported

    language: Any = types.ModuleType("triton.language")
    language.constexpr = int
    triton: Any = types.ModuleType("triton")
    triton.jit, triton.language, triton.__version__ = _Kernel, language, "stand-in"
    triton.cdiv = lambda n, d: -(-n // d)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    properties = types.SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": SHARED_MEMORY})
    triton.runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=types.SimpleNamespace(utils=properties)))
    sys.modules |= {"triton": triton, "triton.language": language}


# --- one pass ---


def counted(
    config: Any, arms: Sequence[Any], ids: np.ndarray, precision: str, n_layers: int | None = None
) -> tuple[Counts, int]:
    """What `measure_pass` of these arms hands over, of a Mamba-2 with float16 weights; and the rows of its table.

    Args:
        config: of transformers' Mamba-2.
        ids: token ids, (excerpts, N).
        precision: `split`, `ieee` or `bfloat16`.
    """
    global counts
    from transformers import Mamba2Model

    from lscollapse.instrument import forward, readback
    from lscollapse.instrument.rows import Table
    from lscollapse.models.adapt import adapt
    from lscollapse.models.kernels.backends import own_kernels
    from lscollapse.models.kernels.fused_measures import Fused

    with torch.device("meta"):
        model = Mamba2Model(config).half().eval()
    adapter: Any = adapt(model)
    adapter.computes_in = torch.float32
    adapter.kernels = own_kernels("meta", split=precision == "split")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    counts = Counts()

    def brought(columns: Tensor) -> Callable[[], np.ndarray]:
        counts.reads += 1
        found = np.full(columns.shape, 0.5)
        found[:, -4:] = 0.0, 0.0, np.nan, np.nan  # not rescaled, not lost, not certified
        return lambda: found

    table_add = Table.add

    def add(self: Any, streams: Any, layers: Any) -> None:
        start = time.process_time()
        table_add(self, streams, layers)
        counts.host_seconds += time.process_time() - start

    before = forward.shared_of, readback._brought
    forward.shared_of, readback._brought, Table.add = Fused, brought, add  # type: ignore[assignment, method-assign]
    try:
        with counts:
            frame = forward.measure_pass(adapter, ids, arms, dtype)
    finally:
        forward.shared_of, readback._brought = before
        Table.add = table_add  # type: ignore[method-assign]
    return counts, len(frame)
