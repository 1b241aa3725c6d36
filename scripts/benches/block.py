"""One block of Mamba-2 2.7B, and a stack of them: transformers, ours, and the matrix products alone."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benches.common import SIZES, in_process, random_tensors, timed


def side_native(args: argparse.Namespace) -> dict[str, Any]:
    """Our block by the package's C++ and by torch operations, its matrix products, and a stack, in one dtype."""
    import torch

    from lscollapse.models.kernels.backends import resolve_kernels
    from lscollapse.models.kernels.cpu_block import CpuBlock, Workers
    from lscollapse.models.kernels.mamba2_block import Mamba2Shape

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    shape, workers = Mamba2Shape(SIZES["hidden"], SIZES["heads"], SIZES["head_dim"], SIZES["state"]), Workers()
    kernels = resolve_kernels("native")
    if kernels.native is None:
        sys.exit(kernels.note)
    layers = [
        CpuBlock(random_tensors(shape), shape, dtype, workers, kernels.native, kernels.widens)
        for _ in range(args.layers)
    ]
    by_torch = CpuBlock(random_tensors(shape), shape, dtype, workers)
    X = torch.randn(args.excerpts, args.tokens, shape.hidden)
    rows = X.flatten(0, 1).to(dtype)
    out_proj = torch.randn(shape.hidden, shape.inner).to(dtype)

    def products(block: CpuBlock, gating: bool) -> Callable[[], Any]:
        """The two of a block as it makes them, with weights of its size."""
        width = shape.conv_dim + shape.heads + (shape.inner if gating else 0)
        in_proj, between = torch.randn(width, shape.hidden).to(dtype), torch.empty(len(rows), width, dtype=dtype)
        after = torch.empty(len(rows), shape.hidden, dtype=dtype)

        def run() -> None:
            block._product(rows, in_proj, None, between)
            block._product(between[:, : shape.inner], out_proj, None, after)

        return run

    def stack() -> None:
        Y = X
        for layer in layers:
            Y = layer(Y, gating=False)

    runs: dict[str, Callable[[], Any]] = {}
    for name, block in (("native", layers[0]), ("torch", by_torch)):
        for gating in (False, True):
            what = f"{name}, gate {'on' if gating else 'off'}"
            runs[what] = partial(block, X, gating=gating)
            if name == "native" or (kernels.widens and args.bf16):  # else torch's are the same
                runs[f"{what}, products"] = products(block, gating)
    return timed(runs, args.repeats) | timed({"native, stack, gate off": stack}, 2)


def side_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' block. Hooks that take the gate out would not shorten it: z is computed all the same."""
    import torch
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

    config = Mamba2Config(
        hidden_size=SIZES["hidden"],
        num_heads=SIZES["heads"],
        head_dim=SIZES["head_dim"],
        state_size=SIZES["state"],
        n_groups=1,
        num_hidden_layers=args.layers,
    )
    layers = [Mamba2Block(config, layer_idx=k).eval() for k in range(args.layers)]
    for layer in layers:
        layer.mixer.init_mamba2_weights()
    X = torch.randn(args.excerpts, args.tokens, SIZES["hidden"])

    def run(depth: int) -> Callable[[], Any]:
        def forward() -> None:
            Y = X
            for layer in layers[:depth]:
                Y = layer(Y)

        return forward

    with torch.no_grad():
        found = timed({"block": run(1)}, min(args.repeats, 3))
        start = time.perf_counter()
        run(args.layers)()
        seconds = time.perf_counter() - start
    return found | {"stack": {"best": seconds, "median": seconds}}


def section_block(args: argparse.Namespace) -> dict[str, Any]:
    sides = {
        "transformers, default": in_process("transformers", args, tuned=False),
        "transformers, tuned": in_process("transformers", args),
        "fp32, default": in_process("native", args, tuned=False),
        "fp32, tuned": in_process("native", args),
        "bf16, tuned": in_process("native", args, bf16=True),
    }
    ratios = {}
    for name in ("fp32, default", "fp32, tuned", "bf16, tuned"):
        ours = {what: seconds["best"] for what, seconds in sides[name].items()}
        ratios[name] = {}
        for path, gate in itertools.product(("native", "torch"), ("off", "on")):
            products = f"{path}, gate {gate}, products"
            products = products if products in ours else f"native, gate {gate}, products"
            ratios[name][f"gate {gate}: {path} / products"] = ours[f"{path}, gate {gate}"] / ours[products]
            ratios[name][f"gate {gate}: {path} / products, medians"] = (
                sides[name][f"{path}, gate {gate}"]["median"] / sides[name][products]["median"]
            )
        for malloc in ("default", "tuned"):
            theirs = sides[f"transformers, {malloc}"]
            for gate in ("off", "on"):
                ratios[name][f"gate {gate}: transformers {malloc} / native"] = (
                    theirs["block"]["best"] / ours[f"native, gate {gate}"]
                )
            ratios[name][f"stack, gate off: transformers {malloc} / native"] = (
                theirs["stack"]["best"] / ours["native, stack, gate off"]
            )
    return {"excerpts": args.excerpts, "tokens": args.tokens, "stack": args.layers, "seconds": sides, "ratios": ratios}
