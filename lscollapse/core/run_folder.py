"""A run folder: rows.parquet, rows.csv and manifest.json, written so that killing the process loses one work item at most.

Each work item's rows become one file under parts/, complete or absent. `finish` joins them in an order that does not depend
on the items, so a run that was killed and continued, or tiled otherwise, ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lscollapse.core.files import PARTIAL, changes, write_csv, write_json, write_parquet
from lscollapse.core.table import COLUMNS, ORDER

NETS = "nets"  # that were trained for the run lie there before it begins
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
    """A run folder cannot be written, or belongs to another configuration."""


class RunFolder:
    """One run on disk. Opening an existing folder continues it when its configuration is the same.

    Args:
        path: the folder; made if absent.
        identity: everything that decides the rows (JSON values): experiment name, configuration, weights, texts.

    Raises:
        RunFolderError: not writable, or made with another identity (says what differs).
    """

    columns: tuple[str, ...] = COLUMNS
    order: tuple[str, ...] = ORDER

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.parts = path / "parts"
        self._began = time.monotonic()
        manifest = path / "manifest.json"
        if manifest.exists():
            self._refuse_other(read_manifest(path))
        try:
            path.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                _clear(path.glob(f".*{PARTIAL}"))
                _clear(self.parts.glob(f".*{PARTIAL}"))
                return
            _clear(path.glob(f".{manifest.name}.*{PARTIAL}"))  # nothing else in a folder that may be no run's
            if any(entry.name != NETS for entry in path.iterdir()):
                raise RunFolderError(
                    f"{path} is not empty and not a run folder: give an empty or new folder with --out"
                )
            write_json(manifest, {"complete": False, "identity": self.identity})
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run folder {path} ({error.strerror}): choose another with --out"
            ) from None

    @property
    def complete(self) -> bool:
        return bool(read_manifest(self.path).get("complete"))

    def has(self, item: str) -> bool:
        """Whether a work item's rows are there."""
        return (self.parts / f"{item}.parquet").exists()

    def part(self, item: str) -> pd.DataFrame:
        """A work item's rows."""
        return pd.read_parquet(self.parts / f"{item}.parquet")

    def add(self, item: str, rows: pd.DataFrame) -> None:
        """Store one work item's rows, whole or not at all."""
        self.parts.mkdir(exist_ok=True)
        write_parquet(self.parts / f"{item}.parquet", rows)

    def finish(self, items: list[str], facts: dict[str, Any]) -> pd.DataFrame:
        """Join the items' rows into rows.parquet and rows.csv and complete the manifest with `facts`."""
        rows = pd.concat([self.part(item) for item in items], ignore_index=True)
        ranks = [_ranks(rows[name]) for name in self.order]
        rows = rows[list(self.columns)].take(np.lexsort(ranks[::-1])).reset_index(drop=True)
        write_parquet(self.path / "rows.parquet", rows)
        write_csv(self.path / "rows.csv", rows)
        record = {"complete": True, "identity": self.identity, **environment(), **facts}
        record["wall_seconds"] = round(time.monotonic() - self._began, 1)
        write_json(self.path / "manifest.json", record)
        shutil.rmtree(self.parts)
        return rows

    def _refuse_other(self, manifest: dict[str, Any]) -> None:
        different = changes(manifest["identity"], self.identity)
        if different:
            raise RunFolderError(
                f"{self.path} holds a run of another configuration ({'; '.join(different[:4])}):"
                " give a new folder with --out, or remove this one"
            )


def _clear(left: Iterable[Path]) -> None:
    """Take away what a kill at that very moment left half-written."""
    for file in list(left):
        file.unlink()


def _ranks(column: pd.Series) -> np.ndarray:
    """The place of each row: of measures in the order in which they come, of everything else by value, missing ones last."""
    return pd.factorize(column, sort=column.name != "measure", use_na_sentinel=False)[0]


def read_rows(path: Path) -> pd.DataFrame:
    """The table of a finished run folder."""
    file = path / "rows.parquet"
    if not file.is_file():
        raise RunFolderError(f"{path} has no rows.parquet: give the folder of a finished run")
    rows = pd.read_parquet(file)
    if "floor" in rows and "rounding" not in rows:  # written before it was estimated
        rows["rounding"] = math.nan
    return rows


def read_manifest(path: Path) -> dict[str, Any]:
    """What a run folder says of itself.

    Raises:
        RunFolderError: it is none, or its manifest was cut off or is something else.
    """
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise RunFolderError(f"{path}/manifest.json is missing or unreadable: not a run folder")
    return manifest


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
