"""manifest.json of a run folder: its schema, what earlier versions wrote, and what a run says of its machine."""

from __future__ import annotations

import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lscollapse.core.files import odd_kind
from lscollapse.core.outside import LARGEST, Sha256, checked, parse_json

MANIFEST = "manifest.json"
SCHEMA = 1  # 0: without `schema` and `files`
RECORDED_PACKAGES = (
    "lscollapse",
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "tokenizers",
    "gguf",
    "mamba-ssm",
    "causal-conv1d",
)


class RunFolderError(ValueError):
    """A run folder cannot be read or written, is damaged, or belongs to another configuration."""


class _Record(BaseModel):
    """An object of a manifest: of the keys that are read the types are known, others may be there."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, populate_by_name=True)


class Loaded(_Record):
    """A model that was loaded; `init` is `trained` or `random`."""

    model: str
    init: str = "trained"
    excerpts_sha256: str | None = None


class Identity(_Record):
    """Everything that decides the rows. `subjects` is what run folders have always called the models."""

    experiment: str = ""
    config: dict[str, Any] = {}
    subjects: list[Loaded] = []


class Excerpts(_Record):
    """Where the excerpts of a model came from."""

    titles: list[str] = []


class Git(_Record):
    """The state of the code."""

    commit: str | None = None
    dirty: bool = False


class Manifest(_Record):
    """What a run folder says of itself.

    Attributes:
        version: of this schema, `schema` in the file.
        complete: whether the rows are there.
        files: sha256 of the files of rows, by their name.
    """

    version: int = Field(default=0, alias="schema", ge=0)
    complete: bool = False
    identity: Identity
    files: dict[str, Sha256] = {}
    versions: dict[str, str | None] = {}
    python: str | None = None
    machine: str | None = None
    device: str | None = None
    git: Git | None = None
    peak_rss_bytes: int | None = Field(default=None, ge=0)
    wall_seconds: float | None = Field(default=None, ge=0, lt=math.inf)
    excerpts: dict[str, Excerpts] = {}
    weights: dict[str, str] = {}
    rounding: dict[str, list[str]] = {}


# The n-th takes what version n wrote to what version n + 1 writes; `schema` stays what it was.
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    lambda old: {**old, "files": {}},  # nothing says which rows they were
)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a run folder says of itself, as `Manifest` describes it: of the keys that it reads those that are there.

    Raises:
        RunFolderError: it is none, or its manifest was cut off, is of another shape or of a later version.
    """
    file = path / MANIFEST
    try:
        if odd_kind(file) or file.stat().st_size > LARGEST:
            raise OSError
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise RunFolderError(f"{file} is missing or unreadable: {path} is not a run folder") from None
    values = parse_json(text, str(file), RunFolderError)
    if isinstance(values, dict):
        values = _migrated(values, file)
    manifest = checked(Manifest, values, RunFolderError, str(file))
    return manifest.model_dump(by_alias=True, exclude_unset=True)


def _migrated(values: dict[str, Any], file: Path) -> dict[str, Any]:
    version = values.get("schema", 0)
    if type(version) is not int or version < 0:
        return values  # which the schema refuses
    if version > SCHEMA:
        raise RunFolderError(
            f"{file} is of version {version}, this lscollapse reads up to {SCHEMA}: update it, or measure again"
        )
    for step in MIGRATIONS[version:]:
        values = step(values)
    return values


def environment() -> dict[str, Any]:
    """Versions, machine and code state for the manifest. No paths, host names or environment variables."""
    versions: dict[str, str | None] = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "git": _git_state(),
        "peak_rss_bytes": peak,
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
