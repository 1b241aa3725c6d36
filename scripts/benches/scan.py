"""The scan of one excerpt against its length."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

from benches.common import SIZES, in_process, timed

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
STATE_FROM = 512  # from here on most chunks take over and hand on a state


def side_scan(args: argparse.Namespace) -> dict[str, Any]:
    """The scan of one excerpt for each length, and of the whole batch of the block section."""
    import torch

    from lscollapse.models.kernels import ssd
    from lscollapse.workers import Workspace

    heads, head_dim, state = SIZES["heads"], SIZES["head_dim"], SIZES["state"]
    A, D, dt_bias = -torch.linspace(1.0, 16.0, heads), torch.rand(heads), torch.randn(heads) - 4.0
    workspace = Workspace()

    def run(batch: int, length: int) -> Callable[[], Any]:
        x, dt = torch.randn(batch, length, heads, head_dim), torch.randn(batch, length, heads)
        B, C = torch.randn(2, batch, length, 1, state)
        out = torch.empty_like(x)
        return lambda: ssd.scan(x, dt, A, B, C, D, dt_bias, out=out, workspace=workspace)

    by_length = timed({str(length): run(1, length) for length in LENGTHS}, args.repeats)
    return {"batch": timed({"batch": run(args.excerpts, args.tokens)}, args.repeats)["batch"], "lengths": by_length}


def slope(seconds: dict[int, float]) -> float:
    """Least-squares slope of log seconds in log length: 1 where the time is proportional to the length."""
    return statistics.linear_regression(
        [math.log(length) for length in seconds], [math.log(s) for s in seconds.values()]
    ).slope


def section_scan(args: argparse.Namespace) -> dict[str, Any]:
    found = in_process("scan", args)
    best = {int(length): seconds["best"] for length, seconds in found["lengths"].items()}
    long = {length: s for length, s in best.items() if length >= STATE_FROM}
    found["microseconds a token"] = {length: 1e6 * s / length for length, s in best.items()}
    found["slope"] = {f"{LENGTHS[0]}..{LENGTHS[-1]}": slope(best), f"{STATE_FROM}..{LENGTHS[-1]}": slope(long)}
    return found
