"""What the sections of bench.py share: the shapes, timing in turn, a process for each side, the machine's record."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent / "bench.py"
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
SIZES = {"hidden": 2560, "heads": 80, "head_dim": 64, "state": 128}  # a block of Mamba-2 2.7B
LAMBDAS = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


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


def in_process(
    side: str, args: argparse.Namespace, tuned: bool = True, bf16: bool = False, beside: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """Runs one side in a process of its own, with or without the malloc setting, with the packages of a folder `beside` its own."""
    command = [sys.executable, str(BENCH), "--side", side, "--repeats", str(args.repeats), "--layers", str(args.layers)]
    command += ["--excerpts", str(args.excerpts), "--tokens", str(args.tokens)] + ["--bf16"] * bf16
    command += ["--sweep-excerpts", str(args.sweep_excerpts), "--any-excerpts", str(args.any_excerpts)]
    environment = {name: value for name, value in os.environ.items() if name not in TUNED} | (TUNED if tuned else {})
    if beside is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(beside)]))
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": " ".join(name for name in ("avx512_bf16", "amx_bf16") if name in flags) or False,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
