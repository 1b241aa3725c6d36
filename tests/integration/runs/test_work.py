"""Work items in several processes, in halves where memory runs out, and with weights that arrive from elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from lscollapse.core import allocation
from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.progress import SILENT
from lscollapse.core.table import ORDER
from lscollapse.experiments import paper
from lscollapse.instrument import forward, rounding
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.adapters.streamed import StreamedMamba2, Transfer
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.kernels import backends, chunked
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Block
from lscollapse.runs import devices, memory, processes, work
from lscollapse.runs.loading import load_tasks
from tests.equivalence import plain_models, tiny
from tests.equivalence.compare import assert_rows_match

EXCERPTS, TOKENS = 9, 6  # two tiles


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("models")
    tiny.mamba2(2, 2).save_pretrained(folder / "little-mamba")
    tiny.albert(2, 1, 1).save_pretrained(folder / "little-albert")
    common = {"text_sha256": "0" * 64, "tokenizer": "made up", "source": "by hand"}
    rows = [common | {"title": f"T{n}", "ids": row} for n, row in enumerate(tiny.ids(EXCERPTS, TOKENS).tolist())]
    (folder / "excerpts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return Experiment(
        models=[str(folder / "little-mamba"), str(folder / "little-albert")], lambdas=[-2.0, 0.0, 1.0],
        excerpts=EXCERPTS, tokens=TOKENS, source=str(folder / "excerpts.jsonl"), offline=True, cache_dir=folder,
    )  # fmt: skip


# --- several processes ----------------------------------------------------------------------------


class Advances:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.total = 0.0
        self.amounts: list[float] = []

    def note(self, message: str) -> None:
        assert "float64" in message, message

    def grow(self, amount: float) -> None:
        raise AssertionError(amount)

    def start(self, total: float) -> None:
        self.total = total

    def advance(self, amount: float) -> None:
        self.amounts.append(amount)


def test_rows_of_two_workers_are_those_of_one(config: Experiment, tmp_path: Path) -> None:
    paper.sweep_lambda(config, tmp_path / "one")
    shared = Advances()
    paper.sweep_lambda(config.model_copy(update={"workers": 2}), tmp_path / "two", shared)
    # Of each model two probes, a share for each process, and a tile; a second tile in float64. Whole items are reported.
    assert len(shared.amounts) == 7
    assert sum(shared.amounts) == shared.total
    for name in ("rows.parquet", "rows.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "two" / "parts").exists()


class Deadly:
    """Ends the process that unpickles it, as the system does with one that takes too much memory."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (9,)


def test_a_worker_that_is_killed_is_one_line(config: Experiment) -> None:
    line = "what was measured is kept, the same command continues, with less memory under --set workers=1"
    with pytest.raises(work.WorkerError, match=line):
        processes.measure_on(["cpu", "cpu"], [Deadly(), Deadly()], config, print)  # type: ignore[list-item]


def test_a_worker_for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    found = {on: devices.worker_devices(Experiment(device=on)) for on in ("auto", "cuda", "cuda:1", "cpu")}
    every = ["cuda:0", "cuda:1", "cuda:2"]
    assert found == {"auto": every, "cuda": every, "cuda:1": ["cuda:1"], "cpu": ["cpu"]}
    assert devices.worker_devices(Experiment(device="cuda", workers=2)) == every[:2]
    assert devices.worker_devices(Experiment(device="cpu", workers=2)) == ["cpu", "cpu"]
    for on, n in (("cuda", 4), ("cuda:1", 2)):
        with pytest.raises(ConfigError, match=f"{n} were asked for"):
            devices.worker_devices(Experiment(device=on, workers=n))
    with pytest.raises(ConfigError, match="cuda:2"):
        devices.device(Experiment(device="cuda:3"))


# --- out of memory --------------------------------------------------------------------------------


class Cramped(Mamba2Adapter):
    """A model on a device with room for the activations of `room` excerpts."""

    def __init__(self, model: Any, room: int) -> None:
        super().__init__(model)
        self.room = room
        self.sizes: list[int] = []

    def own_block(self, layer: int, dtype: torch.dtype) -> Any:
        block = super().own_block(layer, dtype)

        def call(X: Tensor, **variant: Any) -> Tensor:
            self.sizes.append(len(X))
            if len(X) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return block(X, **variant)

        return call


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values([*ORDER], kind="stable").reset_index(drop=True)


@pytest.mark.parametrize("room", [1, 3, 7])
def test_out_of_memory_halves_the_tile(config: Experiment, room: int) -> None:
    task = next(load_tasks(config, paper.sweep_variants, SILENT))
    (first,) = work.probes(0, task.alone)
    found = rounding.probed(work.measure_item(first, task.adapter, config, SILENT))
    item = work.Item(0, task.alone, range(8), tuple(range(len(task.variants))), found)
    cramped = Cramped(task.adapter.model, room)
    found = work.measure_item(item, cramped, config, SILENT)
    whole = work.measure_item(item, task.adapter, config, SILENT)
    pd.testing.assert_frame_equal(in_order(found), in_order(whole), check_exact=True)
    assert max(cramped.sizes) == 8 and min(cramped.sizes) <= room
    with pytest.raises(memory.MemoryPlanError, match="fewer --tokens"):
        work.measure_item(item, Cramped(task.adapter.model, 0), config, SILENT)


@pytest.mark.parametrize("room", [2, 3])
def test_out_of_memory_halves_the_probe(config: Experiment, room: int) -> None:
    """To one excerpt and its twin, which are never parted; rows and what is known of their rounding stay the same."""
    task = next(load_tasks(config, paper.sweep_variants, SILENT))
    (first,) = work.probes(0, task.alone)
    cramped = Cramped(task.adapter.model, room)
    found = work.measure_item(first, cramped, config, SILENT)
    whole = work.measure_item(first, task.adapter, config, SILENT)
    pd.testing.assert_frame_equal(in_order(found), in_order(whole), check_exact=True)
    assert set(cramped.sizes) == {2, 4} and found["rounding"].notna().all()
    with pytest.raises(memory.MemoryPlanError, match="fewer --tokens"):
        work.measure_item(first, Cramped(task.adapter.model, 1), config, SILENT)


@pytest.mark.parametrize("room", range(1, 8))
def test_halves_cover_everything_once(room: int) -> None:
    def tile(excerpts: range, variants: range) -> list[tuple[int, int]]:
        if len(excerpts) * len(variants) > room:
            raise torch.OutOfMemoryError
        return [(e, v) for e in excerpts for v in variants]

    parts = memory.in_halves(tile, range(3, 8), range(2, 7))
    assert sorted(pair for part in parts for pair in part) == [(e, v) for e in range(3, 8) for v in range(2, 7)]
    assert max(map(len, parts)) <= room


def test_a_real_failure_of_the_allocator_halves_too() -> None:
    """2^60 bytes for more than one excerpt of one variant, which no CPU has."""
    sizes = []

    def tile(excerpts: range, variants: range) -> int:
        sizes.append(len(excerpts) * len(variants))
        return torch.empty(2**60 if sizes[-1] > 1 else 1, dtype=torch.uint8).numel()

    assert memory.in_halves(tile, range(2), range(2)) == [1] * 4
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_a_kernel_that_the_gpu_cannot_run_is_one_line() -> None:
    """As Triton words it (triton/runtime/errors.py), whose errors are no RuntimeErrors."""

    class OutOfResources(Exception):
        def __str__(self) -> str:
            return "out of resource: shared memory, Required: 262144, Hardware limit: 232448."

    def tile(excerpts: range, variants: range) -> None:
        raise OutOfResources

    with pytest.raises(memory.MemoryPlanError, match=r"Required: 262144.*--kernels torch") as caught:
        memory.in_halves(tile, range(4), range(2))
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def tile(excerpts: range, variants: range) -> None:
        calls.append(excerpts)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        memory.in_halves(tile, range(4), range(2))
    assert len(calls) == 1


# --- weights that arrive while the layer before computes ------------------------------------------


class Late(Transfer):
    """Tensors are NaN until the transfer is finished, as memory that a copy has not reached yet may be anything."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.begun = self.finished = 0
        self.fail_at = 0

    def begin(self, tensors: dict[str, Tensor], build: Callable[[dict[str, Tensor]], Mamba2Block]) -> Any:
        self.begun += 1
        if self.begun == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        block = build({name: tensor.clone() for name, tensor in tensors.items()})
        assert isinstance(block, GpuBlock)
        arriving = {name: tensor.clone() for name, tensor in vars(block).items() if isinstance(tensor, Tensor)}
        for name in arriving:
            getattr(block, name).fill_(torch.nan)

        def finish() -> Mamba2Block:
            self.finished += 1
            for name, tensor in arriving.items():
                getattr(block, name).copy_(tensor)
            return block

        return finish


@pytest.fixture
def late(config: Experiment) -> StreamedMamba2:
    adapter = StreamedMamba2(checkpoint.open_layers(config.models[0]), Late())
    # A GpuBlock with torch operations: what a GPU runs, without the GPU.
    adapter.kernels = replace(
        backends.resolve_kernels("torch", "cpu"), scan=chunked.chunked_scan, conv=chunked.causal_conv, triton=True
    )
    return adapter


def test_a_layer_is_used_when_it_has_arrived(late: StreamedMamba2) -> None:
    model, ids = tiny.mamba2(2, 2), tiny.ids(4, TOKENS, seed=3)
    weights = plain_models.weights_of(model)
    lams = [-2.0, 0.0, 1.0]
    rows = forward.measure_pass(late, ids, [Variant(lam, gating) for gating in (True, False) for lam in lams], None)
    for gating in (True, False):
        for lam in lams:
            found = rows[(rows["gating"] == gating) & (rows["lam"] == lam)]
            assert_rows_match(found, plain_models.mamba2(weights, model.config, ids, lam, gating))
    assert late.transfer.begun == late.transfer.finished == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_no_room_for_a_layer_then_room(late: StreamedMamba2, fail_at: int) -> None:
    """An allocation that fails while a layer is read comes out where it is needed, and the next attempt reads again."""
    ids = tiny.ids(4, TOKENS, seed=3)
    late.transfer.fail_at = fail_at  # type: ignore[attr-defined]
    halves = memory.in_halves(
        lambda e, _: forward.measure_pass(late, ids[e.start : e.stop], [Variant()], None), range(4), range(1)
    )
    assert len(halves) == 2
    resident = forward.measure_pass(adapt(tiny.mamba2(2, 2)), ids, [Variant()], None)
    for half, excerpts in zip(halves, ((0, 1), (2, 3)), strict=True):
        expected = resident[resident["excerpt"].isin(excerpts)]
        np.testing.assert_allclose(half["value"], expected["value"], rtol=1e-4, atol=1e-6)


# --- what a probe finds -------------------------------------------------------------------------


class Told(Advances):
    """A Progress that keeps its notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def grow(self, amount: float) -> None:
        self.total += amount


def test_what_runs_in_float64_is_said_before_and_kept(config: Experiment, tmp_path: Path) -> None:
    """In the little ALBERT mu at lambda = 0 is less than float32 knows of it."""
    told = Told()
    rows = paper.sweep_lambda(config, tmp_path, told)
    wide = rows[rows["dtype"] == "float64"]
    assert set(wide["model"]) == {"little-albert"} and set(wide["lam"]) == {0.0}
    assert set(wide["excerpt"]) == set(range(EXCERPTS))  # also those that no probe saw
    (note,) = (note for note in told.notes if "run in float64" in note)
    assert (
        note.startswith("little-albert: 1 of 3 arms run in float64, each at about twice the time")
        and "lambda 0 (" in note
    )
    kept = read_manifest(tmp_path)["rounding"]
    assert kept["little-mamba"] == [] and kept["little-albert"][0].startswith(
        "LN, lambda 0: float64, for float32 leaves "
    )
    assert sum(told.amounts) == pytest.approx(told.total)


def test_a_dtype_that_is_given_is_only_flagged(config: Experiment, tmp_path: Path) -> None:
    told = Told()
    rows = paper.sweep_lambda(config.model_copy(update={"dtype": "float32"}), tmp_path, told)
    assert set(rows["dtype"]) == {"float32"}
    left = rows[rows["status"] == "unresolved"]
    assert set(left["lam"]) == {0.0}
    (note,) = (note for note in told.notes if "unresolved" in note)
    assert "1 of 3 arms" in note and "in float32 from layer" in note


def test_the_tolerance_is_a_setting(config: Experiment, tmp_path: Path) -> None:
    strict = config.model_copy(update={"dtype": "float32", "resolve": 1e-7, "models": config.models[:1]})
    rows = paper.sweep_lambda(strict, tmp_path)
    relative = rows[rows["measure"] == "relative_mu"]
    assert ((relative["rounding"] > 1e-7) == (relative["status"] == "unresolved")).all()
    assert (relative["status"] == "unresolved").any()


def test_where_there_is_no_room_for_float64_it_is_said(
    config: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "available_memory", lambda: 1000)
    told = Told()
    rows = paper.sweep_lambda(config, tmp_path, told)
    assert set(rows["dtype"]) == {"float32"} and "unresolved" in set(rows["status"])
    (note,) = (note for note in told.notes if "unresolved" in note)
    assert "little-albert" in note and "(there is no room for float64)" in note
    monkeypatch.undo()
    pd.testing.assert_frame_equal(paper.sweep_lambda(config, tmp_path), rows)  # continued as it was begun
    roomy = paper.sweep_lambda(config, tmp_path.with_name("roomy"))
    assert "float64" in set(roomy["dtype"])
    monkeypatch.setattr(allocation, "available_memory", lambda: 1000)
    with pytest.raises(RunFolderError, match=r"subjects\.2\.float64: null, now \"no room\""):
        paper.sweep_lambda(config, tmp_path.with_name("roomy"))
