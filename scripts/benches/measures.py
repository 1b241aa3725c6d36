"""The measures of a layer's output: one excerpt at a time, beside each formula over the whole batch, and beside a block."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

from benches.common import SIZES, in_process, random_tensors, timed

WIDTHS = (2560, 768, 256)
BATCHES = (8, 32)
# Standard deviation of the rows around one row, which has 1.
SPREAD = {"spread out": 1.0, "near collapse": 1e-2, "collapsed": 1e-7}


def side_measures(args: argparse.Namespace) -> dict[str, Any]:
    """The default measures of float32 numbers, and one bf16 block at the shape of 2.7B whose output they would be of."""
    import torch

    from lscollapse.core.table import DEFAULT_MEASURES
    from lscollapse.measures import measure_all
    from lscollapse.models.kernels.backends import resolve_kernels
    from lscollapse.models.kernels.cpu_block import CpuBlock
    from lscollapse.models.kernels.mamba2_block import Mamba2Shape

    runs: dict[str, Any] = {}
    with torch.no_grad():
        for width in WIDTHS:
            for batch in BATCHES:
                for name, spread in SPREAD.items():
                    Y = spread * torch.randn(batch, args.tokens, width) + torch.randn(width)
                    found = timed(
                        {"ours": partial(measure_all, Y, DEFAULT_MEASURES), "batched": partial(batched, Y)},
                        args.repeats,
                    )
                    runs[f"{batch} x {args.tokens} x {width}, {name}"] = found
        shape = Mamba2Shape(SIZES["hidden"], SIZES["heads"], SIZES["head_dim"], SIZES["state"])
        kernels = resolve_kernels("auto")
        block = CpuBlock(random_tensors(shape), shape, torch.bfloat16, None, kernels.native, kernels.widens)
        X = torch.randn(args.excerpts, args.tokens, shape.hidden)
        last = torch.randn(args.excerpts, args.tokens, shape.hidden) + torch.randn(shape.hidden)
        runs["block"] = timed(
            {
                "measures of its output": lambda: measure_all(last, DEFAULT_MEASURES),
                "bf16 block, gate off": lambda: block(X, gating=False),
            },
            min(args.repeats, 3),
        )
    return runs


def batched(Y: Any) -> dict[str, Any]:
    """The default measures as they are written down, each pass over all excerpts (B, N, d) in float64; where differences of large
    numbers would lose digits, from the rows themselves."""
    import torch
    from scipy.linalg.lapack import dsyevr
    from threadpoolctl import threadpool_limits

    n = Y.shape[1]
    unit = Y.double()
    R = unit - unit[:, :1]
    for _ in range(2):
        R = R - R.mean(1, keepdim=True)
    size, centred = (torch.linalg.vector_norm(A, dim=(1, 2)) for A in (unit, R))
    gram = unit @ unit.mT
    with threadpool_limits(1, "blas"):
        u = torch.stack([torch.from_numpy(dsyevr(G, range="I", il=n, iu=n)[1][:, 0]) for G in gram.numpy()])[..., None]
    rest = unit - u * (u.mT @ unit)  # (B, N, d)
    rank1 = torch.linalg.vector_norm(rest, dim=(1, 2)) / size
    lengths = torch.linalg.vector_norm(unit, dim=2)
    directions = unit / lengths[..., None]
    aligned = directions.sum(1).square().sum(1)
    angular = torch.linalg.vector_norm(directions - directions.mean(1, keepdim=True), dim=(1, 2)) / math.sqrt(n)
    one_inf = [(A.abs().sum(1).amax(1) * A.abs().sum(2).amax(1)).sqrt() for A in (R, unit)]
    return {
        "mu": centred, "relative_mu": centred / size, "rank1_residual": rank1, "stable_rank": 1 / (1 - rank1**2),
        "mean_cosine": (aligned - n) / (n * (n - 1)), "dong_residual": one_inf[0] / one_inf[1], "angular_mu": angular,
        "row_norm_ratio": lengths.amax(1) / lengths.quantile(0.5, 1), "longest_row": lengths.argmax(1),
    }  # fmt: skip


def section_measures(args: argparse.Namespace) -> dict[str, Any]:
    seconds = in_process("measures", args)
    ratios = {
        name: found["ours"]["best"] / found["batched"]["best"] for name, found in seconds.items() if "ours" in found
    }
    block = seconds["block"]
    ratios["measures / bf16 block, gate off"] = (
        block["measures of its output"]["best"] / block["bf16 block, gate off"]["best"]
    )
    return {"excerpts": args.excerpts, "tokens": args.tokens, "seconds": seconds, "ours / batched": ratios}
