"""A run folder: rows.parquet, rows.csv and manifest.json, written so that killing the process loses one work item at most.

Each work item's rows become one file under parts/, complete or absent. `finish` joins them in an order that does not depend
on the items, so a run that was killed and continued, or tiled otherwise, ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from lscollapse.core.files import PARTIAL, changes, clear_partials, write_csv, write_json, write_parquet
from lscollapse.core.lock import LOCK, locked
from lscollapse.core.manifest import MANIFEST, SCHEMA, RunFolderError, environment, read_manifest
from lscollapse.core.parts import DamagedPart, Parts
from lscollapse.core.progress import SILENT, Progress
from lscollapse.core.rows import CSV, ROWS, digests, read_rows, verify
from lscollapse.core.table import COLUMNS, ORDER

NETS = "nets"  # that were trained for the run lie there before it begins
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunFolder:
    """One run on disk, locked until it is closed. Opening an existing folder continues it when its configuration is the same.

    Args:
        path: the folder; made if absent.
        identity: everything that decides the rows (JSON values): experiment name, configuration, weights, texts.
        progress: is told of parts that are damaged.

    Raises:
        RunFolderError: not writable, or made with another identity (says what differs).
        LockError: another process writes there.
    """

    columns: tuple[str, ...] = COLUMNS
    order: tuple[str, ...] = ORDER

    def __init__(self, path: Path, identity: dict[str, Any], progress: Progress = SILENT) -> None:
        self.path, self.progress = path, progress
        self.identity = json.loads(json.dumps(identity))
        self._began = time.monotonic()
        self._parts = Parts(path / "parts", self.identity)
        self._lock = ExitStack()
        try:
            self._refuse_other()
            self._lock.enter_context(locked(path))
            self._begin()
        except OSError as error:
            self.close()
            if error.errno not in READ_ONLY or not (path / MANIFEST).exists() or not self.complete:
                raise RunFolderError(
                    f"cannot write the run folder {path} ({error.strerror}): choose another with --out"
                ) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write there."""
        self._lock.close()

    @property
    def complete(self) -> bool:
        return bool(read_manifest(self.path).get("complete"))

    def has(self, item: str) -> bool:
        """Whether a work item's rows are there."""
        return self._parts.file(item).exists()

    def part(self, item: str) -> pd.DataFrame:
        """A work item's rows.

        Raises:
            RunFolderError: they are no longer what was stored.
        """
        try:
            return self._parts.read(item)[0]
        except DamagedPart as damage:
            self.set_aside(item, str(damage))
            raise RunFolderError(
                f"{self._parts.file(item)} is damaged ({damage}) and set aside: the same command measures it again"
            ) from None

    def facts(self, item: str) -> dict[str, Any]:
        """What was stored beside a work item's rows."""
        return self._parts.read(item)[1]

    def add(self, item: str, rows: pd.DataFrame, **more: str) -> None:
        """Store one work item's rows, whole or not at all, and `more` that is to be known of them."""
        self._parts.add(item, rows, **more)

    def set_aside(self, item: str, why: str) -> None:
        """Take a work item's rows out of the run, so that it is measured again."""
        there = self._parts.set_aside(item)
        self.progress.note(f"{self._parts.file(item)} is damaged ({why}): set aside as {there.name}, measured again")

    def rows(self) -> pd.DataFrame:
        """The table of a finished run.

        Raises:
            RunFolderError: it is not the one that was written.
        """
        verify(self.path, f"put the file back, or remove {self.path} to measure again")
        return read_rows(self.path, verified=False)

    def finish(self, items: list[str], facts: dict[str, Any]) -> pd.DataFrame:
        """Join the items' rows into rows.parquet and rows.csv and complete the manifest with `facts`."""
        rows = pd.concat([self.part(item) for item in items], ignore_index=True)
        ranks = [_ranks(rows[name]) for name in self.order]
        rows = rows[list(self.columns)].take(np.lexsort(ranks[::-1])).reset_index(drop=True)
        write_parquet(self.path / ROWS, rows)
        write_csv(self.path / CSV, rows)
        record = {"schema": SCHEMA, "complete": True, "identity": self.identity, **environment(), **facts}
        record["wall_seconds"] = round(time.monotonic() - self._began, 1)
        record["files"] = digests(self.path)
        write_json(self.path / MANIFEST, record)
        self._remove_parts()
        return rows

    def _begin(self) -> None:
        """Under the lock: begin the run, or clean up after a process that was killed in it."""
        self._refuse_other()  # a process that has just ended may have begun one
        if not (self.path / MANIFEST).exists():
            clear_partials(self.path, MANIFEST)  # nothing else in a folder that may be no run's
            write_json(self.path / MANIFEST, {"schema": SCHEMA, "complete": False, "identity": self.identity})
            return
        clear_partials(self.path)
        clear_partials(self._parts.folder)
        manifest = read_manifest(self.path)
        if manifest.get("complete"):
            self._remove_parts()
            return
        self._parts.unmarked = not manifest.get("schema")  # an earlier version began it
        for item in self._parts.items():  # before anything is built on them
            try:
                self._parts.read(item)
            except DamagedPart as damage:
                self.set_aside(item, str(damage))

    def _refuse_other(self) -> None:
        if not (self.path / MANIFEST).exists():
            if self.path.exists() and not all(map(_may_be_there, self.path.iterdir())):
                raise RunFolderError(
                    f"{self.path} is not empty and not a run folder: give an empty or new folder with --out"
                )
            return
        different = changes(read_manifest(self.path)["identity"], self.identity)
        if different:
            raise RunFolderError(
                f"{self.path} holds a run of another configuration ({'; '.join(different[:4])}):"
                " give a new folder with --out, or remove this one"
            )

    def _remove_parts(self) -> None:
        if self._parts.folder.exists():
            shutil.rmtree(self._parts.folder)


def _may_be_there(entry: Path) -> bool:
    """Whether it may be in a folder in which a run has not begun: nets, and what a kill leaves of the lock and the manifest."""
    return entry.name in (NETS, LOCK) or (entry.name.startswith(f".{MANIFEST}.") and entry.name.endswith(PARTIAL))


def _ranks(column: pd.Series) -> np.ndarray:
    """The place of each row: of measures in the order in which they come, of everything else by value, missing ones last."""
    return pd.factorize(column, sort=column.name != "measure", use_na_sentinel=False)[0]
