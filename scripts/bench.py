"""Speed of the Mamba-2 block and scan on this machine, at the shapes of Mamba-2 2.7B, with random weights.

    OMP_NUM_THREADS=2 python scripts/bench.py                 every section, some minutes on two cores
    OMP_NUM_THREADS=2 python scripts/bench.py --sections scan

    block   one block (and a stack of them), 32 excerpts of 128 tokens: transformers, ours in fp32 and with bf16
            weights, gate on and off, and the two matrix products of the block alone, timed in turn with it
    scan    the scan of one excerpt against its length, and the slope of log time in log length

Each side runs in a process of its own. `default` and `tuned` say which malloc it had: glibc's own settings, or large
blocks kept by the process (lscollapse's command line sets this for itself). Times are seconds, the best of the repeats;
the medians are beside them. Numbers of a busy machine are worth little: `load` is the load average at the start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
SIZES = {"hidden": 2560, "heads": 80, "head_dim": 64, "state": 128}
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
STATE_FROM = 512  # from here on most chunks take over and hand on a state


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Best and median seconds of each, taken in turn so that a slow spell of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if attempt:  # the first round warms caches and buffers
                seconds[name].append(time.perf_counter() - start)
    return {name: {"best": min(s), "median": statistics.median(s)} for name, s in seconds.items()}


def random_tensors(shape: Any) -> dict[str, Any]:
    """One layer's tensors, of the size that a trained layer has."""
    import torch

    tensors = {}
    for name, size in (shape.tensors() | {"mixer.conv1d.bias": (shape.conv_dim,)}).items():
        tensors[name] = torch.randn(size).mul_(0.5 if "conv1d" in name else size[-1] ** -0.5)
        if name.endswith("norm.weight"):
            tensors[name].add_(1.0)
    tensors["mixer.A_log"] = torch.log(torch.linspace(1.0, 16.0, shape.heads))
    tensors["mixer.dt_bias"].sub_(4.0)
    return tensors


def side_native(args: argparse.Namespace) -> dict[str, Any]:
    """Our block, its matrix products, and a stack, in one dtype."""
    import torch

    from lscollapse.models.mamba2_native import Mamba2Shape, NativeBlock, Workers

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    shape, workers = Mamba2Shape(SIZES["hidden"], SIZES["heads"], SIZES["head_dim"], SIZES["state"]), Workers()
    layers = [NativeBlock(random_tensors(shape), shape, dtype, workers) for _ in range(args.layers)]
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


def side_scan(args: argparse.Namespace) -> dict[str, Any]:
    """The scan of one excerpt for each length, and of the whole batch of the block section."""
    import torch

    from lscollapse import ssd

    heads, head_dim, state = SIZES["heads"], SIZES["head_dim"], SIZES["state"]
    A, D, dt_bias = -torch.linspace(1.0, 16.0, heads), torch.rand(heads), torch.randn(heads) - 4.0
    workspace = ssd.Workspace()

    def run(batch: int, length: int) -> Callable[[], Any]:
        x, dt = torch.randn(batch, length, heads, head_dim), torch.randn(batch, length, heads)
        B, C = torch.randn(2, batch, length, 1, state)
        out = torch.empty_like(x)
        return lambda: ssd.scan(x, dt, A, B, C, D, dt_bias, out=out, workspace=workspace)

    by_length = timed({str(length): run(1, length) for length in LENGTHS}, args.repeats)
    return {"batch": timed({"batch": run(args.excerpts, args.tokens)}, args.repeats)["batch"], "lengths": by_length}


SIDES = {"native": side_native, "transformers": side_transformers, "scan": side_scan}


def measure(side: str, args: argparse.Namespace, tuned: bool = True, bf16: bool = False) -> dict[str, Any]:
    """Runs one side in a process of its own, with or without the malloc setting."""
    command = [sys.executable, __file__, "--side", side, "--repeats", str(args.repeats), "--layers", str(args.layers)]
    command += ["--excerpts", str(args.excerpts), "--tokens", str(args.tokens)] + ["--bf16"] * bf16
    environment = {name: value for name, value in os.environ.items() if name not in TUNED} | (TUNED if tuned else {})
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def section_block(args: argparse.Namespace) -> dict[str, Any]:
    sides = {
        "transformers, default": measure("transformers", args, tuned=False),
        "transformers, tuned": measure("transformers", args),
        "fp32, default": measure("native", args, tuned=False),
        "fp32, tuned": measure("native", args),
        "bf16, tuned": measure("native", args, bf16=True),
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


def slope(seconds: dict[int, float]) -> float:
    """Least-squares slope of log seconds in log length: 1 where the time is proportional to the length."""
    return statistics.linear_regression(
        [math.log(length) for length in seconds], [math.log(s) for s in seconds.values()]
    ).slope


def section_scan(args: argparse.Namespace) -> dict[str, Any]:
    found = measure("scan", args)
    best = {int(length): seconds["best"] for length, seconds in found["lengths"].items()}
    long = {length: s for length, s in best.items() if length >= STATE_FROM}
    found["microseconds a token"] = {length: 1e6 * s / length for length, s in best.items()}
    found["slope"] = {f"{LENGTHS[0]}..{LENGTHS[-1]}": slope(best), f"{STATE_FROM}..{LENGTHS[-1]}": slope(long)}
    return found


SECTIONS = {"block": section_block, "scan": section_scan}


def machine() -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": any("avx512_bf16" in line or "amx_bf16" in line for line in lines),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def show(tree: dict[str, Any], indent: int = 0) -> None:
    for name, value in tree.items():
        if not isinstance(value, dict):
            print(
                f"{' ' * indent}{name}: {value:.4g}" if isinstance(value, float) else f"{' ' * indent}{name}: {value}"
            )
        elif "best" in value:
            print(f"{' ' * indent}{name}: {value['best']:.4f} s (median {value['median']:.4f})")
        else:
            print(f"{' ' * indent}{name}")
            show(value, indent + 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--excerpts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="per excerpt")
    parser.add_argument("--layers", type=int, default=8, help="blocks in the stack")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.sections:
        report[name] = {"machine": machine()} | SECTIONS[name](args)
        print(f"\n== {name}")
        show(report[name])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
