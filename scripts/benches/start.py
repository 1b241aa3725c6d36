"""From the command to its end where there is little to compute: how long starting takes, beside the import of its libraries."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benches.common import timed

IMPORT = "import torch, transformers"
SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}
PROGRAM = [sys.executable, "-m", "lscollapse"]


def seconds(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of whole commands, taken in turn."""
    from transformers import GPT2Config, GPT2Model, Mamba2Config, Mamba2Model

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Mamba2Model(Mamba2Config(**SIZES, vocab_size=30522)).save_pretrained(folder / "mamba2")
        GPT2Model(GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=30522)).save_pretrained(folder / "gpt2")
        sweep = ["sweep-lambda", "--model", str(folder / "mamba2"), "--excerpts", "2"]
        runs = {"import": command([sys.executable, "-c", IMPORT])}
        runs |= {
            f"measure {name}": command([*PROGRAM, "measure", str(folder / name), "--tokenizer", "bert"], folder / "run")
            for name in ("mamba2", "gpt2")
        }
        runs["sweep mamba2"] = command([*PROGRAM, *sweep], folder / "run")
        return timed(runs, args.repeats)


def command(words: Sequence[str], out: Path | None = None) -> Callable[[], Any]:
    """A call that runs a command, a new run folder `out` where it takes one."""

    def run() -> None:
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
        subprocess.run([*words, *([] if out is None else ["--out", str(out)])], check=True, capture_output=True)

    return run


def section_start(args: argparse.Namespace) -> dict[str, Any]:
    found = seconds(args)
    unit = found["import"]["median"]
    found[f"medians over that of {IMPORT!r}"] = {name: s["median"] / unit for name, s in found.items()}
    return found
