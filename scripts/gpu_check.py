"""What one card says of this package: each step a process of its own, one table at the end.

    bash scripts/gpu_check.sh smoke              versions, ceilings, kernels against float64: within 200 s
    bash scripts/gpu_check.sh full               the default sweep of the 2.7B shape and what may happen to it: within 440 s
    bash scripts/gpu_check.sh full --dry-run     every step in small on the CPU

Steps stand in the order of their worth; one that fails, or takes longer than it may, does not stop those after it, and what no
time is left for is not run. Results are in $OUT (results/gpu-check): NAME.txt what a step printed, NAME.json its
numbers, table.json all of them, and gpu-check.tar all files in one, up to date after every step. Exit 1 where a step
failed or took too long.

A card's step starts a new interpreter; a dry one is a copy of this process, which has imported what all steps need.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gpu import runs, smoke, sweeps
from gpu.setting import NotRun, Setting

Result = dict[str, Any]  # status, headline, numbers, seconds
LARGEST_TAR = 16 * 2**20


class Step(NamedTuple):
    """A function of gpu/ and the seconds that it may take."""

    run: Callable[[Setting], tuple[str, dict[str, Any]]]
    limit: int


STEPS = {
    "smoke": {
        "versions": Step(smoke.versions, 30),
        "ceilings": Step(smoke.ceilings, 30),
        "verify-kernels": Step(smoke.verify_kernels, 90),
        "poisoned": Step(smoke.poisoned, 60),
        "product-error": Step(smoke.product_error, 40),
        "measures": Step(smoke.measures, 40),
        "tiny-rows": Step(smoke.tiny_rows, 60),
    },
    "full": {
        "ceilings": Step(smoke.ceilings, 30),
        "checkpoint": Step(sweeps.checkpoint, 60),
        "split": Step(sweeps.split, 90),
        "bfloat16": Step(sweeps.bfloat16, 60),
        "ieee": Step(sweeps.ieee, 90),
        "peer": Step(sweeps.peer, 60),
        "out-of-memory": Step(runs.out_of_memory, 60),
        "streaming": Step(runs.streaming, 60),
        "killed": Step(runs.killed, 90),
        "command": Step(runs.command, 90),
        "ablate": Step(runs.ablate, 60),
        "by-turns": Step(sweeps.by_turns, 60),
        "monitor": Step(runs.monitor, 40),
        "mamba-ssm": Step(sweeps.mamba_ssm, 60),
    },
}
SECONDS = {"smoke": 200, "full": 440}


def inside(mode: str, name: str, setting: Setting) -> None:
    """One step, in its process: what it prints goes to a file, what it found to another."""
    os.setsid()  # so that what it starts can be ended with it
    with (setting.out / f"{name}.txt").open("w", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        try:
            headline, numbers = STEPS[mode][name].run(setting)
            found: Result = {"status": "ok", "headline": headline, "numbers": numbers}
        except NotRun as reason:
            found = {"status": "not run", "headline": str(reason)}
        except BaseException as error:
            traceback.print_exc()
            line = " ".join(str(error).split())[:300]
            found = {"status": "failed", "headline": f"{type(error).__name__}: {line}"}
        (setting.out / f"{name}.json").write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")


def outside(mode: str, name: str, setting: Setting, left: float) -> Result:
    """One step, as the driver sees it: within its limit and what is left of the whole."""
    limit = min(float(STEPS[mode][name].limit), left)
    if limit < 5:
        return {"status": "not run", "headline": "no time was left", "seconds": 0.0}
    start = time.monotonic()
    process = multiprocessing.get_context("fork" if setting.dry else "spawn").Process(
        target=inside, args=(mode, name, setting)
    )
    process.start()
    process.join(limit)
    late = process.is_alive()
    assert process.pid is not None
    with suppress(ProcessLookupError):  # where all that it started has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    file = setting.out / f"{name}.json"
    if late:
        found: Result = {"status": "timed out", "headline": f"after {limit:.0f} s"}
    elif file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    else:
        found = {"status": "failed", "headline": f"the process ended with {process.exitcode}"}
    return found | {"seconds": time.monotonic() - start}


def pack(out: Path) -> None:
    """All files of `out` in one; the largest are left out where it would be larger than it may."""
    files = sorted((path for path in out.iterdir() if path.suffix in (".txt", ".json")), key=lambda p: p.stat().st_size)
    total = 0
    with tarfile.open(out / "gpu-check.tar", "w") as tar:
        for path in files:
            total += path.stat().st_size + 1024
            if total < LARGEST_TAR - 10240:
                tar.add(path, path.name)


def table(results: dict[str, Result]) -> str:
    lines = [f"{'step':15} {'seconds':>7}  {'':9}  headline"]
    for name, found in results.items():
        lines.append(f"{name:15} {found['seconds']:7.1f}  {found['status']:9}  {found['headline']}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("mode", choices=list(STEPS))
    parser.add_argument("--dry-run", action="store_true", help="every step in small on the CPU")
    given = parser.parse_args()
    out = Path(os.environ.get("OUT") or "results/gpu-check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.txt"), *out.glob("*.json")]:
        old.unlink()
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    setting, start, results = Setting(given.dry_run, out, scratch), time.monotonic(), {}
    if given.dry_run:
        import lscollapse.experiments.paper
        import lscollapse.instrument.trainer  # noqa: F401  # and with it the Trainer of transformers
    try:
        for name in STEPS[given.mode]:
            left = SECONDS[given.mode] - (time.monotonic() - start)
            results[name] = outside(given.mode, name, setting, left)
            print(f"{name}: {results[name]['status']}", file=sys.stderr, flush=True)
            (out / "table.json").write_text(
                json.dumps({"mode": given.mode, "dry": given.dry_run, "steps": results}, indent=1), encoding="utf-8"
            )
            pack(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(results))
    return int(any(found["status"] in ("failed", "timed out") for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
