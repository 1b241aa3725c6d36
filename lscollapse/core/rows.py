"""The rows of a finished run folder, checked: they are those that the run wrote, and each column holds what it may hold."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype, is_bool_dtype, is_numeric_dtype

from lscollapse.core.files import first_line
from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.outside import shown
from lscollapse.core.table import INITS, MEASURES, OTHER_MEASURES, STATUSES, TRAINING_MEASURES

ROWS, CSV = "rows.parquet", "rows.csv"
NUMBERS = ("lam", "lr", "value", "log10", "bound", "floor", "rounding")
COUNTS = ("seed", "excerpt", "n_tokens", "layer")
FLAGS = ("gating", "layernorm")
WORDS = (
    "model", "init", "arm", "measure", "status", "dtype", "text", "tokenizer", "backend", "skip_site", "norm_site",
    "revision", "checkpoint_sha256", "task", "data", "mixer", "when",
)  # fmt: skip
ALWAYS_SAID = ("model", "init", "arm", "measure", "status", "task", "mixer")  # never missing
LEAVE = "put the file back, or read it as a table that was edited with --no-verify"


def digests(path: Path) -> dict[str, str]:
    """Hex sha256 of the files of rows in a run folder, by their name."""
    found = {}
    for name in (ROWS, CSV):
        if (path / name).is_file():
            with (path / name).open("rb") as handle:
                found[name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def edited(path: Path) -> list[str]:
    """The files of rows that are not those that the run wrote; none where nothing says so, as in folders of earlier versions."""
    written = read_manifest(path).get("files", {})
    return [name for name, found in digests(path).items() if name in written and found != written[name]]


def edited_words(path: Path) -> str:
    """That the rows were edited, as a reader of what is made of them is told; nothing where they were not."""
    names = edited(path)
    return f"Edited after the run: {' and '.join(names)} of {path.resolve().name}." if names else ""


def verify(path: Path, mend: str = LEAVE) -> None:
    """Raise RunFolderError where the rows of a finished run are not those that it wrote."""
    if names := edited(path):
        raise RunFolderError(f"{path / names[0]} is not what the run wrote, by the sha256 in its manifest.json: {mend}")


def read_rows(path: Path, verified: bool = True) -> pd.DataFrame:
    """The table of a finished run folder.

    Args:
        verified: refuse one that was edited since.

    Raises:
        RunFolderError: there is none, it is not the one that the run wrote, or a column holds what it may not.
    """
    file = path / ROWS
    if not file.is_file():
        raise RunFolderError(f"{path} has no rows.parquet: give the folder of a finished run")
    manifest = read_manifest(path)
    if manifest.get("schema") and not manifest.get("complete"):
        raise RunFolderError(f"{path} is not a finished run: its command continues it")
    if verified:
        verify(path)
    try:
        rows = pd.read_parquet(file)
        check(rows, file, known=bool(manifest.get("schema")))
    except (MemoryError, RunFolderError):
        raise
    except Exception as error:  # whatever the library makes of bytes that are no Parquet, or no text
        raise RunFolderError(f"{file} is no table in Parquet ({shown(first_line(error))}): measure again") from error
    if "mixer" not in rows and "excerpt" in rows:
        rows["excerpt"] = rows["excerpt"].astype("int64")  # it may have been written as 0.0, 1.0, ...
    if "floor" in rows and "rounding" not in rows:  # written before it was estimated
        rows["rounding"] = math.nan
    return rows


def check(rows: pd.DataFrame, file: Path, known: bool = True) -> None:
    """Raise RunFolderError where a column of a table of measurements, or of Table 1, holds what it may not.

    Args:
        known: whether its measures are those of this version; one that nobody knows is shown, but not judged.
    """
    if rows.empty:
        raise RunFolderError(f"{file} has no rows: measure again")
    if not rows.columns.is_unique:
        raise RunFolderError(f"{file} has a column twice: {shown(rows.columns[rows.columns.duplicated()][0])}")
    table1 = "mixer" in rows
    texts = (*WORDS, "lam") if table1 else WORDS
    for name in rows.columns.intersection([*texts, *NUMBERS, *COUNTS, *FLAGS]):
        column = rows[name]
        if name in texts:
            _refuse(file, column, _no_words(column, name in ALWAYS_SAID), "text")
        elif name in FLAGS:
            _refuse(file, column, _no_flags(column), "true, false or nothing")
        else:
            _refuse(file, column, _no_numbers(column), "a number or nothing")
            if name in COUNTS:
                _refuse(file, column, _no_counts(column), "a whole number from 0 on, or nothing")
            if name == "lam":
                _refuse(file, column, np.isinf(column.astype(float)), "a finite number, or nothing")
            if name == "excerpt" and not table1:
                _refuse(file, column, column.isna(), "a whole number from 0 on")
    measures = TRAINING_MEASURES if table1 else (*MEASURES, *OTHER_MEASURES)
    words = {"status": STATUSES, "init": INITS} | ({"measure": measures} if known else {})
    for name, allowed in words.items():
        if name in rows:
            _refuse(file, rows[name], ~rows[name].isin(allowed), f"one of {', '.join(allowed)}")


def _refuse(file: Path, column: pd.Series, wrong: Any, allowed: str) -> None:
    places = np.flatnonzero(np.asarray(wrong, dtype=bool))
    if len(places):
        came = column.iloc[places[0]]
        came = came.item() if isinstance(came, np.generic) else came
        what = "nothing" if came is None or came is pd.NA or came != came else shown(came)
        raise RunFolderError(f"{file}, row {places[0] + 1}, column {column.name}: {what}, where {allowed} is allowed")


def _no_words(column: pd.Series, said: bool) -> Any:
    missing = column.isna()
    values = column.cat.categories.to_series() if isinstance(column.dtype, pd.CategoricalDtype) else column
    if missing.all() or infer_dtype(values, skipna=True) == "string":
        return missing & said
    return column.map(lambda value: not isinstance(value, str)).astype(bool) & (~missing | said)


def _no_flags(column: pd.Series) -> Any:
    if is_bool_dtype(column):
        return np.zeros(len(column), bool)
    return column.map(lambda value: not isinstance(value, bool | np.bool_)).astype(bool) & column.notna()


def _no_numbers(column: pd.Series) -> Any:
    if is_numeric_dtype(column) and not is_bool_dtype(column) and column.dtype.kind in "iuf":
        return np.zeros(len(column), bool)
    return column.notna()


def _no_counts(column: pd.Series) -> Any:
    values = column.astype(float)
    with np.errstate(invalid="ignore"):
        return values.notna() & ((values < 0) | (values % 1 != 0) | np.isinf(values))
