"""Streaming from disk: the rows of the in-memory run, within the memory predicted, through kills, damage and full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lscollapse.core import registry
from lscollapse.core.config import Experiment
from lscollapse.experiments import paper
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.adapters.streamed import StreamedMamba2
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.tensors import forget
from lscollapse.runs import memory
from tests.equivalence.layouts import N_LAYER, VOCAB, hf_state, original_state, write_hf, write_original

NAME, TOKENS, EXCERPTS = "a-mamba2", 8, 11
LAMBDAS = [-1000.0, 0.0, 1.0]
CHILD = """
import json, os, signal, sys
from lscollapse.core import registry
folder, *arguments = sys.argv[1:]
registry.ENTRIES["a-mamba2"] = registry.Entry("a-mamba2", "mamba2", "folder", folder)
"""
RUN = """
from pathlib import Path
from lscollapse.core.config import Experiment
from lscollapse.experiments import paper

class Killed:
    def __init__(self, passes): self.left = passes
    def note(self, message): print(message, flush=True)
    def start(self, total): pass
    def advance(self, amount):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

settings, out, passes = arguments
paper.sweep_lambda(Experiment(**json.loads(settings)), Path(out), Killed(int(passes)))
"""
COMMAND = """
from lscollapse.cli.app import main
sys.argv[1:] = arguments
main()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frozen(folder: Path) -> Path:
    file = folder / "frozen.jsonl"
    record = {"text_sha256": "0" * 64, "tokenizer": "made up", "source": "by hand"}
    rows = [{"title": f"T{n}", "ids": [(5 * n + k * k + 1) % VOCAB for k in range(TOKENS)]} for n in range(EXCERPTS)]
    file.write_text("".join(json.dumps(record | row) + "\n" for row in rows))
    return file


def write_sharded(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    write_hf(folder, state)
    (folder / "model.safetensors").unlink()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def original(folder: Path, dtype: torch.dtype) -> Path:
    return write_original(folder, original_state(dtype=dtype))


WRITERS: dict[str, Callable[[Path, torch.dtype], Path]] = {
    "original": original,
    "safetensors": lambda folder, dtype: write_hf(folder, hf_state(dtype=dtype)),
    "sharded": lambda folder, dtype: write_sharded(folder, hf_state(dtype=dtype)),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the checkpoint that the name stands for."""
    path = tmp_path / "model"
    monkeypatch.setitem(registry.ENTRIES, NAME, registry.Entry(NAME, "mamba2", "folder", str(path)))
    return path


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "models": [NAME], "lambdas": LAMBDAS, "excerpts": EXCERPTS, "tokens": TOKENS, "source": str(frozen(tmp_path)),
        "offline": True, "device": "cpu",
    }  # fmt: skip
    return base | changes


def smallest(folder: Path) -> int:
    """Bytes in which one excerpt of one variant, and its twin, just fit."""
    shape = StreamedMamba2(checkpoint.open_layers(folder)).shape
    return memory.plan_streamed(shape, TOKENS, 1, 1, 4, 2**40, 2).bytes


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def start(self, total: float) -> None:
        return None

    def grow(self, amount: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", WRITERS)
def test_rows_are_those_of_the_loaded_model(tmp_path: Path, folder: Path, layout: str, dtype: torch.dtype) -> None:
    """Byte for byte, in tiles of every size, with bounds taken from the file each time and from the cache."""
    WRITERS[layout](folder, dtype)
    runs = {
        "loaded": ({"stream": "never"}, ""),
        "large tiles": ({"stream": "always"}, "8 excerpts x 6 variants"),
        "single": ({"stream": "always", "max_memory": str(smallest(folder))}, "1 excerpts x 6 variants"),
    }
    for name, (changes, tiles) in runs.items():
        notes, cache = Notes(), tmp_path / "cache" / name
        config = Experiment(**settings(tmp_path, cache_dir=cache, **changes))
        rows = paper.sweep_lambda(config, tmp_path / name, notes)
        assert any(tiles in said for said in notes.said) if tiles else not notes.said, notes.said
        assert (rows["status"] == "certified").any()
    expected = (tmp_path / "loaded" / "rows.parquet").read_bytes()
    for name in ("large tiles", "single"):
        assert (tmp_path / name / "rows.parquet").read_bytes() == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_rows_of_other_precisions(tmp_path: Path, folder: Path, dtype: str) -> None:
    write_hf(folder)
    for stream in ("never", "always"):
        paper.sweep_lambda(Experiment(**settings(tmp_path, dtype=dtype, stream=stream)), tmp_path / stream)
    assert (tmp_path / "never" / "rows.parquet").read_bytes() == (tmp_path / "always" / "rows.parquet").read_bytes()


def test_a_folder_is_streamed_when_asked_for(tmp_path: Path) -> None:
    write_hf(tmp_path / "model")
    notes = Notes()
    config = Experiment(**settings(tmp_path, models=[str(tmp_path / "model")], stream="always"))
    paper.sweep_lambda(config, tmp_path / "run", notes)
    assert any("is streamed" in said for said in notes.said)


def child(script: str, folder: Path, *arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own on the checkpoint in `folder`; `limit` is the size in bytes that none of its files may pass."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", CHILD + script, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict, check=False)


def cli(folder: Path, tmp_path: Path, *arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    values = settings(tmp_path, stream="always")
    flags = ["--model", NAME, "--lambdas", ",".join(map(str, LAMBDAS)), "--source", values["source"], "--offline"]
    flags += ["--excerpts", str(EXCERPTS), "--tokens", str(TOKENS), "--stream", "always", "--device", "cpu"]
    out = ["--out", str(tmp_path / "run")]
    return child(COMMAND, folder, "sweep-lambda", *flags, *out, *arguments, limit=limit)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error, which is all that was said beside the notes on the plan."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "predicted peak" not in line and "is continued" not in line]
    (line,) = lines
    assert line.startswith("lscollapse: ")
    return line


def killed_run(tmp_path: Path, folder: Path) -> list[Path]:
    """A run killed in its fourth item; returns the parts that it leaves."""
    values = settings(tmp_path, stream="always", max_memory=str(smallest(folder)), cache_dir=str(tmp_path / "cache"))
    values["gating"] = False
    done = child(RUN, folder, json.dumps(values), str(tmp_path / "run"), str(3 * 2 * N_LAYER + 2))
    assert done.returncode == -signal.SIGKILL, done.stderr
    parts = sorted((tmp_path / "run" / "parts").glob("*.parquet"))
    assert len(parts) == 3
    return parts


def test_killed_in_the_middle_and_continued_on_a_full_disk(tmp_path: Path, folder: Path) -> None:
    """What is finished is kept by a kill -9 and by a disk that takes no further part."""
    original(folder, torch.float16)
    parts = killed_run(tmp_path, folder)
    before = {part: part.read_bytes() for part in parts}
    memory = ["--max-memory", str(smallest(folder)), "--no-gating", "--set", f"cache_dir={tmp_path / 'cache'}"]

    said = refusal(cli(folder, tmp_path, *memory, limit=4096))
    assert "File too large" in said and "the same command continues" in said
    assert {part: part.read_bytes() for part in (tmp_path / "run" / "parts").glob("*.parquet")} == before

    notes = Notes()
    for out, changes in (("run", {"stream": "always", "max_memory": memory[1]}), ("whole", {"stream": "never"})):
        config = Experiment(**settings(tmp_path, gating=False, cache_dir=tmp_path / "cache", **changes))
        paper.sweep_lambda(config, tmp_path / out, notes)
    assert any("3 of 12 work items are there" in said for said in notes.said), notes.said
    assert (tmp_path / "run" / "rows.parquet").read_bytes() == (tmp_path / "whole" / "rows.parquet").read_bytes()


def test_truncated_checkpoint(tmp_path: Path, folder: Path) -> None:
    file = write_hf(folder) / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    assert "cut off or damaged?" in refusal(cli(folder, tmp_path))
    assert not (tmp_path / "run").exists()


def test_too_little_memory(tmp_path: Path, folder: Path) -> None:
    write_hf(folder)
    said = refusal(cli(folder, tmp_path, "--max-memory", str(smallest(folder) - 1)))
    assert "--max-memory" in said and "is too small" in said and "give at least" in said
    assert not (tmp_path / "run").exists()


def test_streaming_writes_no_weights(tmp_path: Path, folder: Path) -> None:
    """Those of a zipped .bin stay where they are; the cache gets what was found of them, a number a layer."""
    original(folder, torch.float16)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}
    done = cli(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()} == before
    cache = tmp_path / "cache"
    written = [file for file in cache.rglob("*") if file.is_file() and file.parent != cache / "native"]  # no library
    assert {file.suffix for file in written} <= {".json"} and sum(file.stat().st_size for file in written) < 1000


def test_a_pickle_of_old_is_refused_before_anything_is_written(tmp_path: Path, folder: Path) -> None:
    original(folder, torch.float16)
    torch.save(original_state(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    said = refusal(cli(folder, tmp_path))
    assert "is a pickle from before PyTorch 1.6" in said and "use --stream never" in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["bin", "safetensors"])
def test_what_is_read_are_the_bytes_saved(tmp_path: Path, zipped: bool) -> None:
    """Weights of several dtypes, odd sizes, tied and transposed tensors; before and after they are forgotten."""
    state = original_state()
    state["backbone.layers.0.mixer.A_log"] = state["backbone.layers.0.mixer.A_log"].float()
    state["backbone.layers.1.mixer.D"] = state["backbone.layers.1.mixer.D"].double()
    if zipped:
        state["backbone.layers.1.norm.weight"] = state["backbone.layers.0.norm.weight"]
        product = "backbone.layers.1.mixer.out_proj.weight"
        state[product] = state[product].T.contiguous().T
    folder = write_original(tmp_path / "model", state)
    if not zipped:
        (folder / "pytorch_model.bin").unlink()
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    reader = checkpoint.open_layers(folder)
    for _ in range(2):
        for name, tensor in state.items():
            if name != "lm_head.weight":
                ours = reader.tensors[name.removeprefix("backbone.").replace("embedding.", "embeddings.")]
                assert ours.dtype == tensor.dtype and torch.equal(ours, tensor), name
        assert torch.equal(reader.layer(1)["mixer.D"], state["backbone.layers.1.mixer.D"])
        forget(reader.tensors)


def test_bounds_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    """Taken in float32 from a file in half precision, where their product would overflow."""
    from lscollapse.instrument import early_exit

    state = hf_state()
    for k in range(N_LAYER):
        state[f"backbone.layers.{k}.mixer.norm.weight"].fill_(6e4)
        state[f"backbone.layers.{k}.mixer.out_proj.weight"].mul_(1e3)
    folder = write_hf(tmp_path / "model", state)
    loaded = early_exit.gains(Mamba2Adapter(checkpoint.load(folder).model), "")
    streamed = early_exit.gains(StreamedMamba2(checkpoint.open_layers(folder)), "")
    assert streamed == loaded and loaded is not None and max(loaded) < 1e12
