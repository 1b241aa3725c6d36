"""Outputs: a link is followed, what is no file is refused, and what a kill left half-written goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lscollapse.core.files import OutputError, atomic, clear_partials, read_text, write_text
from tests.unit.core.test_run_folder import GONE


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file.txt").write_text("old")
    (tmp_path / "link").symlink_to("far/file.txt")
    (tmp_path / "second").symlink_to("link")
    (tmp_path / "to nothing").symlink_to("far/new.txt")
    write_text(tmp_path / "second", "new")
    write_text(tmp_path / "to nothing", "new")
    assert all((tmp_path / name).is_symlink() for name in ("link", "second", "to nothing"))
    assert {file.name: file.read_text() for file in (tmp_path / "far").iterdir()} == {
        "file.txt": "new",
        "new.txt": "new",
    }
    assert {file.name for file in tmp_path.iterdir()} == {"far", "link", "second", "to nothing"}


def test_what_is_no_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for path, kind in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "folder", "a folder"),
        (tmp_path / "link", "a device"),
        (Path("/dev/null"), "a device"),
    ):
        with pytest.raises(OutputError) as caught:
            write_text(path, "x")
        assert str(caught.value) == f"{path} cannot be written: it is {kind}, give the name of a file"
    assert {file.name for file in tmp_path.iterdir()} == {"pipe", "folder", "link"}
    assert Path("/dev/null").is_char_device()


def test_reading_what_is_no_file_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(OverflowError, match=f"{path} cannot be read: it is {kind}, no file"):
            read_text(path, OverflowError)  # type: ignore[arg-type]


def test_what_a_kill_left_of_the_same_name_goes(tmp_path: Path) -> None:
    """Not what a process that is alive writes, nor another program's or another file's."""
    others = [f".b.txt.{GONE}.partial", f".a.txt.{os.getppid()}.partial", f".other.a.txt.{GONE}.partial", "a.txt.partial",
              f"a.txt.{GONE}.partial", ".a.txt.partial", ".a.txt.x.partial"]  # fmt: skip
    for name in (*others, f".a.txt.{GONE}.partial"):
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert {file.name for file in tmp_path.iterdir()} == {*others, "a.txt"}
    clear_partials(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*others, "a.txt"} - {others[0], others[2]}


def test_an_error_in_between_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        1 / 0  # noqa: B018
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}
