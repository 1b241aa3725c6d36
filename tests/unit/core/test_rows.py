"""The table of a run: the one that was written or none, and columns that hold what they may."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.rows import CSV, ROWS, edited, edited_words, read_rows
from lscollapse.core.run_folder import RunFolder
from tests.unit.core.test_run_folder import IDENTITY, expected_rows, finished, part


@pytest.fixture
def run(tmp_path: Path) -> Path:
    finished(tmp_path / "run")
    return tmp_path / "run"


def test_the_manifest_holds_the_digests_of_both_files(run: Path) -> None:
    expected = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in (ROWS, CSV)}
    assert read_manifest(run)["files"] == expected
    assert edited(run) == [] and edited_words(run) == ""


@pytest.mark.parametrize("name", [ROWS, CSV])
def test_one_flipped_bit_is_refused_by_name(run: Path, name: str) -> None:
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    with pytest.raises(RunFolderError, match=rf"{name} is not what the run wrote.*--no-verify"):
        read_rows(run)
    assert edited(run) == [name] and edited_words(run) == f"Edited after the run: {name} of run."
    with RunFolder(run, IDENTITY) as folder, pytest.raises(RunFolderError, match=rf"{name} is not .*remove {run} to"):
        folder.rows()


def test_half_of_the_rows_is_another_table_which_can_be_asked_for(run: Path) -> None:
    half = read_rows(run).head(36)
    half.to_parquet(run / ROWS)
    with pytest.raises(RunFolderError, match="is not what the run wrote"):
        read_rows(run)
    pd.testing.assert_frame_equal(read_rows(run, verified=False), half)


def test_a_run_of_an_earlier_version_is_read_as_it_is(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    old = {key: value for key, value in manifest.items() if key not in ("schema", "files")}
    (run / "manifest.json").write_text(json.dumps(old))
    read_rows(run).head(36).assign(measure="of old").to_parquet(run / ROWS)
    assert len(read_rows(run)) == 36 and edited(run) == []


def test_a_run_that_was_killed_before_its_manifest_is_none(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(RunFolderError, match="is not a finished run: its command continues it"):
        read_rows(run)


def of(run: Path, **columns: Any) -> Path:
    """The run with other columns, None for one that goes."""
    rows = expected_rows().assign(**{name: value for name, value in columns.items() if value is not None})
    rows.drop(columns=[name for name, value in columns.items() if value is None]).to_parquet(run / ROWS)
    return run


def odd(value: Any, others: Any, dtype: Any = object) -> pd.Series:
    """A column whose fifth row is another."""
    column = pd.Series([others] * len(expected_rows()), dtype=dtype)
    column.iloc[4] = value
    return column


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("value", odd("much", "0.5"), "row 1, column value: 0.5, where a number or nothing is allowed"),
        ("value", odd(True, True), "column value: True, where a number"),
        ("model", odd(None, "a"), "row 5, column model: nothing, where text is allowed"),
        ("model", 3, "row 1, column model: 3, where text"),
        ("arm", odd("\x1b[2J", "a").str.encode("ascii"), "column arm: b'a', where text"),
        (
            "status",
            odd("okay", "ok"),
            "row 5, column status: okay, where one of ok, certified, below_floor, unresolved,",
        ),
        ("status", odd("\x1b[2J", "ok"), r"row 5, column status: \x1b[2J, where one of"),
        ("init", odd("warm", "trained"), "row 5, column init: warm, where one of trained, random"),
        ("measure", odd("nu", "mu"), "row 5, column measure: nu, where one of mu, relative_mu"),
        ("layer", odd(-1, 2, int), "row 5, column layer: -1, where a whole number from 0 on, or nothing"),
        ("layer", odd(1.5, 2, float), "row 5, column layer: 1.5, where a whole number"),
        ("excerpt", odd(math.inf, 0, float), "row 5, column excerpt: inf, where a whole number"),
        ("excerpt", odd(math.nan, 0, float), "row 5, column excerpt: nothing, where a whole number from 0 on is"),
        ("lam", odd(-math.inf, 0, float), "row 5, column lam: -inf, where a finite number, or nothing is allowed"),
        ("layernorm", odd("x", "y"), "row 1, column layernorm: y, where true, false or nothing"),
        ("gating", 0.5, "row 1, column gating: 0.5, where true, false or nothing"),
    ],
)
def test_a_column_that_holds_what_it_may_not(run: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(RunFolderError) as caught:
        read_rows(of(run, **{name: value}), verified=False)
    assert str(caught.value).startswith(f"{run / ROWS}, ") and message in str(caught.value)


def test_what_may_be_missing_may(run: Path) -> None:
    """Values, flags and provenance; numbers out of range; words as categoricals; layers of rows that have none."""
    changed = {
        "value": np.resize([math.nan, math.inf, -1.0], 72),
        "gating": pd.NA,
        "revision": None,
        "layer": odd(math.nan, 1, float),
    }
    words = {"status": pd.Categorical(["ok"] * 72), "text": odd(None, "t"), "log10": None}
    assert len(read_rows(of(run, **changed, **words), verified=False)) == 72


def test_what_is_no_table(run: Path) -> None:
    for content in (b"", b"PAR1", b"PAR1" * 100, (run / ROWS).read_bytes()[:-9]):
        (run / ROWS).write_bytes(content)
        with pytest.raises(RunFolderError, match=r"rows\.parquet is no table in Parquet"):
            read_rows(run, verified=False)
    part(0).head(0).to_parquet(run / ROWS)
    with pytest.raises(RunFolderError, match="has no rows"):
        read_rows(run, verified=False)
    (run / ROWS).unlink()
    with pytest.raises(RunFolderError, match=r"has no rows\.parquet"):
        read_rows(run)
