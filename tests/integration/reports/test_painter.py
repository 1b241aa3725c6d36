"""Figures drawn by a second process: the files and errors are those of drawing here, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lscollapse.core.config import Experiment
from lscollapse.experiments.paper import sweep_lambda
from lscollapse.reports import painter
from lscollapse.reports.figures.points import FigureError
from lscollapse.reports.painter import Painter, draw_run
from tests import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painter") / "run"
    sweep_lambda(Experiment(models=["mamba2-tiny"], excerpts=1, tokens=8, lambdas=[0.0, 1.0], gating=True), folder)
    return folder


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[Painter]:
    """A painter with a second process, though torch is loaded here."""
    monkeypatch.setattr(painter, "_cores", lambda: 2)
    monkeypatch.delitem(sys.modules, "torch")
    with Painter() as started:
        monkeypatch.undo()
        assert started._process is not None
        yield started
    assert started._process.returncode is not None


def test_the_files_are_those_of_drawing_here(run: Path, second: Painter, tmp_path: Path) -> None:
    second.begin(run, "log")
    found = second.written()
    expected = draw_run(run, tmp_path, "log")
    assert [path.name for path in found] == [path.name for path in expected]
    assert {path.parent for path in found} == {run}
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]


def test_its_error_is_that_of_drawing_here(run: Path, second: Painter, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.parquet").write_bytes((run / "rows.parquet").read_bytes())
    (other / "manifest.json").write_text('{"identity": {"experiment": "check-identity"}}')
    with pytest.raises(FigureError) as here:
        draw_run(other, other)
    second.begin(other)
    with pytest.raises(FigureError) as there:
        second.written()
    assert str(there.value) == str(here.value) and "in draw_run" in "".join(there.value.__notes__)


def test_a_second_process_that_was_killed_is_done_without(run: Path, second: Painter) -> None:
    assert second._process is not None
    os.kill(second._process.pid, signal.SIGKILL)
    second._process.wait()
    second.begin(run)
    assert [path.name for path in second.written()] == [f"{n}.{k}" for n in ("figure1", "figure2") for k in ("csv", "png", "pdf")]  # fmt: skip


def test_it_ends_with_a_run_that_asks_for_nothing(second: Painter) -> None:
    """What a process that was killed leaves is a closed pipe."""
    assert second._process is not None and second._process.stdin is not None
    second._process.stdin.close()
    assert second._process.wait(timeout=60) == 0


def test_one_core_or_a_loaded_torch_draws_here(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores in (1, 2):
        monkeypatch.setattr(painter, "_cores", lambda cores=cores: cores)
        if cores == 1:
            monkeypatch.delitem(sys.modules, "torch")
        with Painter() as here:
            monkeypatch.undo()
            assert here._process is None
            here.begin(run)
            assert [path.suffix for path in here.written()] == [".csv", ".png", ".pdf"] * 2


@pytest.mark.parametrize("words", [["--version"], ["nonsense"], ["measure", "./nowhere"]])
def test_the_program_ends_with_the_code_of_its_verb(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "lscollapse", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if words == ["--version"] else 2)
    assert (done.stdout.startswith("lscollapse ")) == (words == ["--version"])
    assert "Traceback" not in done.stderr
