"""Random weights of the whole 2.7B in a temporary folder, and the default sweep's gate-off arms streamed from it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benches.common import BENCH, LAMBDAS, SIZES, random_tensors

WHOLE = {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "vocab_size": 50288}  # Mamba-2 2.7B


def write_checkpoint(folder: Path) -> int:
    """Mamba-2 2.7B with random weights in bfloat16, one safetensors file a layer; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file

    from lscollapse.models.kernels.mamba2_block import Mamba2Shape

    shape = Mamba2Shape(SIZES["hidden"], SIZES["heads"], SIZES["head_dim"], SIZES["state"])
    layers, vocabulary = WHOLE["num_hidden_layers"], WHOLE["vocab_size"]
    one_layer = sum(math.prod(size) for size in shape.tensors().values()) + shape.conv_dim
    parameters = layers * one_layer + (vocabulary + 1) * shape.hidden
    free = shutil.disk_usage(folder).free
    if free < 2 * parameters + 2**30:
        sys.exit(f"bench: {folder} has {free:,} bytes free, the checkpoint takes {2 * parameters:,}: set TMPDIR")
    config = {"model_type": "mamba2", "head_dim": 64, "state_size": 128, "n_groups": 1, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | WHOLE))
    torch.manual_seed(0)
    weight_map = {}

    def save(number: int, tensors: dict[str, Any]) -> None:
        file = f"model-{number:05d}-of-{layers:05d}.safetensors"
        save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    embedding, norm = torch.randn(vocabulary, shape.hidden), torch.ones(shape.hidden)
    save(0, {"backbone.embeddings.weight": embedding, "backbone.norm_f.weight": norm})
    tensors = random_tensors(shape)
    for k in range(layers):  # the same numbers in every layer, in another order
        save(k + 1, {f"backbone.layers.{k}.{name}": tensor.roll(37 * k, 0) for name, tensor in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def section_stream(args: argparse.Namespace) -> dict[str, Any]:
    """The gate-off arms of the default sweep on a streamed 2.7B, in a process of its own."""
    from lscollapse.core.registry import ENTRIES

    entry = ENTRIES["mamba2-2.7b"]
    with tempfile.TemporaryDirectory(prefix="bench-2.7b-") as name:
        folder = Path(name)  # with the checkpoint where a download of the hub's would be
        snapshot = folder / "hub" / f"models--{entry.location.replace('/', '--')}" / "snapshots" / entry.revision
        snapshot.mkdir(parents=True)
        parameters = write_checkpoint(snapshot)
        found: dict[str, Any] = {
            "parameters": parameters,
            "transformers holds in float32, bytes": 4 * parameters,
            "excerpts": args.stream_excerpts,
            "tokens": args.tokens,
        }
        for dtype in args.stream_dtypes:
            for exit in args.stream_exits:
                found[f"{dtype}, certified exit {exit}"] = streamed_sweep(folder, dtype, exit, args)
                shutil.rmtree(folder / "run")
    return found


class Split:
    """Seconds of one thread in named calls, each without those of the named calls inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []  # of every named call that is running

    def watch(self, name: str, owner: Any, function: str) -> None:
        """Time `owner.function` under `name` from here on."""
        original = getattr(owner, function)

        def timed(*args: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, function, timed)


def watched() -> Split:
    """What a streamed sweep is made of. A layer is read and converted beside the work on the one before: only waiting counts."""
    from lscollapse.instrument.rows import Table
    from lscollapse.instrument.stream import Stream
    from lscollapse.models.adapters.streamed import StreamedMamba2
    from lscollapse.models.kernels import cpu_block
    from lscollapse.runs import run

    split = Split()
    for name, owner, function in (
        ("reading, waited for", StreamedMamba2, "own_block"),
        ("products", cpu_block, "_linear"),
        ("between the products", cpu_block.CpuBlock, "__call__"),
        ("measures", Stream, "record"),
        ("table", Table, "add"),
        ("table", Table, "frame"),
        ("all else of the items", run, "measure_item"),
    ):
        split.watch(name, owner, function)
    return split


class Said:
    """A core.progress.Progress that prints the notes."""

    def note(self, message: str) -> None:
        print(message, flush=True)

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        return None


def side_streamed(args: argparse.Namespace) -> dict[str, Any]:
    """The sweep as the command line runs it, without its tables and figures."""
    from lscollapse.core import allocation
    from lscollapse.core.config import Experiment
    from lscollapse.experiments.paper import sweep_lambda

    allocation.keep_freed_memory()
    split = watched()
    config = Experiment(
        models=["mamba2-2.7b"],
        lambdas=list(LAMBDAS),
        gating=False,
        stream="always",
        dtype=args.stream_dtypes[0],
        certified_exit=args.stream_exits[0] == "on",
        workers=1,  # the split is of this process
        device="cpu",
        offline=True,
        excerpts=args.stream_excerpts,
        tokens=args.tokens,
        cache_dir=args.folder,
    )
    sweep_lambda(config, args.folder / "run", Said())
    return split.seconds


def streamed_sweep(folder: Path, dtype: str, exit: str, args: argparse.Namespace) -> dict[str, Any]:
    import pandas as pd

    command = [sys.executable, str(BENCH), "--side", "streamed", "--stream-dtypes", dtype, "--stream-exits", exit]
    command += ["--folder", str(folder)]
    command += ["--stream-excerpts", str(args.stream_excerpts), "--tokens", str(args.tokens)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        sys.exit(f"bench: the streamed run failed: {printed[-2000:]}")
    split = json.loads(printed.splitlines()[-1])
    sweep = json.loads((folder / "run" / "manifest.json").read_text())["wall_seconds"]
    rows = pd.read_parquet(folder / "run" / "rows.parquet")
    rows = rows[(rows["measure"] == "relative_mu") & (rows["layer"] > 0)]
    decided = rows["bound"].notna()
    return {
        "wall seconds": wall,
        "seconds of the sweep": sweep,
        "of which": split | {"waiting, run folder": sweep - sum(split.values())},
        "seconds before it (sha256, bounds of the layers)": wall - sweep,
        "block passes of one lambda and excerpt": len(rows),
        "of which certified, not computed": int(decided.sum()),
        "seconds a computed pass": sweep / int((~decided).sum()),
        "peak RSS, bytes": usage.ru_maxrss * 1024,
        "predicted peak": next(iter(re.findall(r"predicted peak ([\d.]+ GiB)", " ".join(printed.split()))), ""),
    }
