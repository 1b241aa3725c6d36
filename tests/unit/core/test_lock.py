"""One process writes to a folder; the next is told who, and takes over from one that was killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lscollapse.core.lock import LOCK, LockError, locked
from lscollapse.core.run_folder import RunFolder
from tests.unit.core.test_run_folder import IDENTITY, finished


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(LockError) as caught, locked(tmp_path / "run"):
            pass
        said = str(caught.value)
        assert f"{tmp_path / 'run'} is being written by process {os.getpid()} on {os.uname().nodename}, since 2" in said
        assert said.endswith("wait for it, or give another folder with --out")
    assert not list((tmp_path / "run").iterdir())
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()


def test_a_run_is_one_process_at_a_time(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY), pytest.raises(LockError, match="is being written by process"):
        RunFolder(tmp_path, IDENTITY)
    with RunFolder(tmp_path, IDENTITY):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_what_a_killed_process_held_is_free(tmp_path: Path) -> None:
    """Its lock file stays, whatever is in it, and is taken over."""
    child = os.fork()
    if not child:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass
    for content in ("", "\x1b[31m" * 400, '{"pid": "x"}'):
        (tmp_path / LOCK).write_text(content)
        with locked(tmp_path), pytest.raises(LockError, match=f"by process {os.getpid()} on"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        assert folder.complete
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_a_name_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(LockError, match="is a pipe: remove it"), locked(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    (tmp_path / "precious").write_text("all")
    (tmp_path / LOCK).symlink_to("precious")
    with pytest.raises(LockError, match="is a link: remove it"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "all"
