"""Speed of the Mamba-2 block and scan on this machine, at the shapes of Mamba-2 2.7B, with random weights.

    OMP_NUM_THREADS=2 python scripts/bench.py                 every section, some minutes on two cores
    OMP_NUM_THREADS=2 python scripts/bench.py --sections scan

    block   one block (and a stack of them), 32 excerpts of 128 tokens: transformers, ours in fp32 and with bf16
            weights, gate on and off, and the two matrix products of the block alone, timed in turn with it
    scan    the scan of one excerpt against its length, and the slope of log time in log length
    sweep   eleven lambdas, gate off, at the shape of Mamba-2 130m: ours with and without the certified exit, and a plain
            loop of transformers forwards with hooks and output_hidden_states, reduced to relative mu
    stream  (opt-in, --stream-2.7b) random weights of the whole 2.7B in bfloat16, 5.4 GB in a temporary folder, and the
            default sweep's gate-off arms with --stream always, as the command line runs them: peak memory, time

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
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
SIZES = {"hidden": 2560, "heads": 80, "head_dim": 64, "state": 128}
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SWEEP = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "vocab_size": 1024}  # Mamba-2 130m, few words
LAMBDAS = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
WHOLE = {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "vocab_size": 50288}  # Mamba-2 2.7B
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


def sweep_model() -> Any:
    """Mamba-2 of the shape of the 130m, fresh from transformers' initialisation."""
    import torch
    from transformers import Mamba2Config, Mamba2Model

    torch.manual_seed(0)
    config = Mamba2Config(**SWEEP, head_dim=64, state_size=128, n_groups=1, pad_token_id=0)
    return Mamba2Model(config).eval()


def sweep_ids(args: argparse.Namespace) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(SWEEP["vocab_size"], (args.sweep_excerpts, args.tokens), generator=generator)


def side_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """All lambdas through `forward.measure`: every block computed, and up to where the weights decide the rest."""
    from lscollapse import certify
    from lscollapse.forward import measure
    from lscollapse.models import adapt
    from lscollapse.variants import Variant

    adapter, ids = adapt(sweep_model()), sweep_ids(args)
    variants = [Variant(lam=lam, gating=False) for lam in LAMBDAS]
    start = time.perf_counter()
    gains = certify.gains(adapter, "")
    seconds = {"gains, once a checkpoint": time.perf_counter() - start}
    measure(adapter, ids[:1], variants[:1])  # warms
    for name, bounds in (("whole", None), ("certified exit", gains)):
        start = time.perf_counter()
        rows = measure(adapter, ids, variants, gains=bounds)
        seconds[name] = time.perf_counter() - start
    saved = rows[rows["measure"] == "relative_mu"]["bound"].notna()
    return {"seconds": seconds, "passes saved": float(saved.sum() / len(saved))}


def side_hook_loop(args: argparse.Namespace) -> dict[str, Any]:
    """What a user of transformers writes: hooks, one forward a lambda, the hidden states of all layers, relative mu."""
    import torch

    model, ids = sweep_model(), sweep_ids(args)
    with torch.no_grad():
        model(ids[:1])
        start = time.perf_counter()
        for lam in LAMBDAS:
            hooks = []
            for block in model.layers:
                hooks.append(
                    block.register_forward_hook(lambda _, inputs, output, lam=lam: output + (lam - 1.0) * inputs[0])
                )
                hooks.append(block.mixer.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0], None)))
            for Y in model(ids, output_hidden_states=True, use_cache=False).hidden_states:
                _ = (Y - Y.mean(-2, keepdim=True)).flatten(1).norm(dim=1) / Y.flatten(1).norm(dim=1)
            for hook in hooks:
                hook.remove()
        seconds = time.perf_counter() - start
    return {"seconds": seconds}


def measure(side: str, args: argparse.Namespace, tuned: bool = True, bf16: bool = False) -> dict[str, Any]:
    """Runs one side in a process of its own, with or without the malloc setting."""
    command = [sys.executable, __file__, "--side", side, "--repeats", str(args.repeats), "--layers", str(args.layers)]
    command += ["--excerpts", str(args.excerpts), "--tokens", str(args.tokens)] + ["--bf16"] * bf16
    command += ["--sweep-excerpts", str(args.sweep_excerpts)]
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


def section_sweep(args: argparse.Namespace) -> dict[str, Any]:
    ours = measure("sweep", args)
    theirs = {malloc: measure("hook loop", args, tuned=malloc == "tuned")["seconds"] for malloc in ("default", "tuned")}
    ratios = {
        f"transformers {malloc} / ours, {name}": seconds / ours["seconds"][name]
        for malloc, seconds in theirs.items()
        for name in ("whole", "certified exit")
    }
    shape = {**SWEEP, "lambdas": len(LAMBDAS), "excerpts": args.sweep_excerpts, "tokens": args.tokens}
    return {"of": shape, "ours, tuned": ours, "hook loop, seconds": theirs, "ratios": ratios}


def write_checkpoint(folder: Path) -> int:
    """Mamba-2 2.7B with random weights in bfloat16, one safetensors file a layer; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file

    from lscollapse.models.mamba2_native import Mamba2Shape

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
    from lscollapse.models.registry import ENTRIES

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
            found[dtype] = streamed_sweep(folder, dtype, args)
            shutil.rmtree(folder / "run")
    return found


class Said:
    """An experiments.Progress that prints the notes."""

    def note(self, message: str) -> None:
        print(message, flush=True)

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        return None


def side_streamed(args: argparse.Namespace) -> dict[str, Any]:
    """The sweep as the command line runs it, without its tables and figures."""
    from lscollapse import allocation, experiments
    from lscollapse.config import Experiment

    allocation.keep_freed_memory()
    config = Experiment(
        models=["mamba2-2.7b"],
        lambdas=list(LAMBDAS),
        gating=False,
        stream="always",
        dtype=args.stream_dtypes[0],
        device="cpu",
        offline=True,
        excerpts=args.stream_excerpts,
        tokens=args.tokens,
        cache_dir=args.folder,
    )
    experiments.sweep_lambda(config, args.folder / "run", Said())
    return {}


def streamed_sweep(folder: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    import pandas as pd

    command = [sys.executable, __file__, "--side", "streamed", "--stream-dtypes", dtype, "--folder", str(folder)]
    command += ["--stream-excerpts", str(args.stream_excerpts), "--tokens", str(args.tokens)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        sys.exit(f"bench: the streamed run failed: {printed[-2000:]}")
    sweep = json.loads((folder / "run" / "manifest.json").read_text())["wall_seconds"]
    rows = pd.read_parquet(folder / "run" / "rows.parquet")
    rows = rows[(rows["measure"] == "relative_mu") & (rows["layer"] > 0)]
    decided = rows["bound"].notna()
    return {
        "wall seconds": wall,
        "seconds of the sweep": sweep,
        "seconds before it (sha256, bounds of the layers)": wall - sweep,
        "block passes of one lambda and excerpt": len(rows),
        "of which certified, not computed": int(decided.sum()),
        "seconds a computed pass": sweep / int((~decided).sum()),
        "peak RSS, bytes": usage.ru_maxrss * 1024,
        "predicted peak": next(iter(re.findall(r"predicted peak ([\d.]+ GiB)", " ".join(printed.split()))), ""),
    }


SIDES = {
    "streamed": side_streamed,
    "sweep": side_sweep,
    "hook loop": side_hook_loop,
    "native": side_native,
    "transformers": side_transformers,
    "scan": side_scan,
}
SECTIONS = {"block": section_block, "scan": section_scan, "sweep": section_sweep}


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
    parser.add_argument("--sweep-excerpts", type=int, default=4)
    parser.add_argument("--stream-2.7b", dest="stream", action="store_true", help="only the streamed 2.7B")
    parser.add_argument("--stream-excerpts", type=int, default=32)
    parser.add_argument("--stream-dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in ["stream"] if args.stream else args.sections:
        section = section_stream if name == "stream" else SECTIONS[name]
        report[name] = {"machine": machine()} | section(args)
        print(f"\n== {name}")
        show(report[name])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
