"""One block of Mamba-2 2.7B, and a stack of them: transformers, ours, and the matrix products alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benches.common import SIZES, in_process, random_tensors, timed


def side_native(args: argparse.Namespace) -> dict[str, Any]:
    """Our block, its matrix products, and a stack, in one dtype."""
    import torch

    from lscollapse.models.kernels.cpu_block import CpuBlock, Workers
    from lscollapse.models.kernels.mamba2_block import Mamba2Shape

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    shape, workers = Mamba2Shape(SIZES["hidden"], SIZES["heads"], SIZES["head_dim"], SIZES["state"]), Workers()
    layers = [CpuBlock(random_tensors(shape), shape, dtype, workers) for _ in range(args.layers)]
    X = torch.randn(args.excerpts, args.tokens, shape.hidden)
    rows = X.flatten(0, 1).to(dtype)
    out_proj = torch.randn(shape.hidden, shape.inner).to(dtype)

    def products(gating: bool) -> Callable[[], Any]:
        width = shape.conv_dim + shape.heads + (shape.inner if gating else 0)
        in_proj, between = torch.randn(width, shape.hidden).to(dtype), torch.empty(len(rows), width, dtype=dtype)
        after = torch.empty(len(rows), shape.hidden, dtype=dtype)

        def run() -> None:
            torch.mm(rows, in_proj.T, out=between)
            torch.mm(between[:, : shape.inner], out_proj.T, out=after)

        return run

    def stack() -> None:
        Y = X
        for layer in layers:
            Y = layer(Y, gating=False)

    found = timed(
        {
            "gate off": lambda: layers[0](X, gating=False),
            "gate off, products": products(gating=False),
            "gate on": lambda: layers[0](X, gating=True),
            "gate on, products": products(gating=True),
        },
        args.repeats,
    )
    return found | timed({"stack, gate off": stack}, 2)


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
        ratios[name] = {
            f"gate {gate}: ours / products": ours[f"gate {gate}"] / ours[f"gate {gate}, products"]
            for gate in ("off", "on")
        }
        for malloc in ("default", "tuned"):
            theirs = sides[f"transformers, {malloc}"]
            ratios[name][f"gate off: transformers {malloc} / ours"] = theirs["block"]["best"] / ours["gate off"]
            ratios[name][f"gate on: transformers {malloc} / ours"] = theirs["block"]["best"] / ours["gate on"]
            ratios[name][f"stack, gate off: transformers {malloc} / ours"] = (
                theirs["stack"]["best"] / ours["stack, gate off"]
            )
    return {"excerpts": args.excerpts, "tokens": args.tokens, "stack": args.layers, "seconds": sides, "ratios": ratios}
