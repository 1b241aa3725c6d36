"""Manifests: what this and earlier versions wrote is read, anything else is one line that names the file and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lscollapse.core.manifest import SCHEMA, RunFolderError, read_manifest
from tests import ROOT

IDENTITY = {"experiment": "sweep-lambda", "config": {"seed": 0}, "subjects": [{"model": "a", "init": "trained"}]}
OLD = {
    "complete": True,
    "identity": IDENTITY,
    "versions": {"torch": "2.6", "gguf": None},
    "wall_seconds": 12,
    "odd": [1],
}


def read(folder: Path, content: Any) -> dict[str, Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return read_manifest(folder)


def refused(folder: Path, content: Any) -> str:
    with pytest.raises(RunFolderError) as caught:
        read(folder, content)
    said = str(caught.value)
    assert said.startswith(str(folder / "manifest.json")) and "\n" not in said and said.isprintable()
    return said.removeprefix(str(folder / "manifest.json")).removeprefix(": ")


def test_manifests_of_earlier_versions_are_read_as_they_are(tmp_path: Path) -> None:
    """A file without a version is of version 0, which had no digests; what nobody knows is kept."""
    assert read(tmp_path, OLD) == OLD | {"files": {}}
    assert read(tmp_path, {"identity": {}}) == {"identity": {}, "files": {}}
    shipped = read_manifest(ROOT / "results" / "table1")
    assert shipped["identity"]["experiment"] == "table1" and shipped["complete"] is True and shipped["files"] == {}


def test_what_this_version_writes(tmp_path: Path) -> None:
    now = OLD | {"schema": SCHEMA, "files": {"rows.parquet": "0a" * 32}, "git": {"commit": "abc", "dirty": True}}
    assert read(tmp_path, now) == now


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "input should be a valid dictionary or instance of Manifest, got [1]"),
        ("3", "got 3"),
        ('"text"', "got 'text'"),
        ("{", "not JSON"),
        ("[" * 10**5, "values inside values"),
        ("{}", "identity: field required"),
        ('{"identity": "\\ud800"}', "half of a character"),
        (OLD | {"identity": None}, "identity: "),
        (OLD | {"identity": []}, "identity: "),
        (OLD | {"identity": {"experiment": {}}}, "identity.experiment: input should be a valid string"),
        (OLD | {"identity": IDENTITY | {"config": "x"}}, "identity.config: "),
        (OLD | {"identity": IDENTITY | {"subjects": {}}}, "identity.subjects: input should be a valid list"),
        (OLD | {"identity": IDENTITY | {"subjects": ["a"]}}, "identity.subjects.0: "),
        (OLD | {"identity": IDENTITY | {"subjects": [{"init": "trained"}]}}, "identity.subjects.0.model: field required"),
        (OLD | {"excerpts": [1]}, "excerpts: "),
        (OLD | {"excerpts": {"a": {"titles": "T"}}}, "excerpts.a.titles: "),
        (OLD | {"versions": "2.6"}, "versions: "),
        (OLD | {"versions": {"\x1b[31m": 3}}, "versions.\\x1b[31m: input should be a valid string, got 3"),
        (OLD | {"git": "main"}, "git: "),
        (OLD | {"wall_seconds": "long"}, "wall_seconds: input should be a valid number, got 'long'"),
        (OLD | {"wall_seconds": -1}, "wall_seconds: input should be greater than or equal to 0, got -1"),
        (OLD | {"peak_rss_bytes": 1.5}, "peak_rss_bytes: "),
        (OLD | {"complete": "yes"}, "complete: "),
        (OLD | {"schema": 1, "files": {"rows.parquet": "../x"}}, "files.rows.parquet: string should match pattern"),
        (OLD | {"schema": "new"}, "schema: "),
        (OLD | {"schema": -1}, "schema: "),
        (OLD | {"schema": SCHEMA + 1}, f" is of version {SCHEMA + 1}, this lscollapse reads up to {SCHEMA}: update it"),
    ],
)  # fmt: skip
def test_another_shape_is_one_line_with_the_place(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refused(tmp_path, content)


def test_what_is_no_manifest(tmp_path: Path) -> None:
    for make in (lambda file: file.write_bytes(b"\xff{}"), lambda file: file.mkdir()):
        with pytest.raises(RunFolderError, match=r"manifest\.json is missing or unreadable"):
            read_manifest(tmp_path)
        (tmp_path / "manifest.json").unlink(missing_ok=True)
        make(tmp_path / "manifest.json")
        with pytest.raises(RunFolderError, match=r"manifest\.json is missing or unreadable"):
            read_manifest(tmp_path)
