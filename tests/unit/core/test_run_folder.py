"""A run folder: parts that are whole or absent, resuming, and refusing what belongs to another configuration."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lscollapse.core.files import changes
from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.rows import WORDS, read_rows
from lscollapse.core.run_folder import RunFolder
from lscollapse.core.table import COLUMNS

IDENTITY = {"experiment": "sweep-lambda", "config": {"lambdas": [0.0, 1.0], "seed": 0}, "subjects": [{"model": "a"}]}
ITEMS = ["00-00000", "00-00008", "01-00000"]  # two tiles of excerpts of one model, one of another
GONE = 2**22 + 1  # the number of no process: Linux has none over 2^22
FIRST_EXCERPT, SUBJECT = (0, 8, 0), (0, 0, 1)


def part(number: int) -> pd.DataFrame:
    """A work item's rows, arm after arm."""
    keys = itertools.product((0, 1), (0, 1), ("mu", "relative_mu"), range(3))
    rows = pd.DataFrame(keys, columns=["variant", "layer", "measure", "excerpt"])
    rows["excerpt"] += FIRST_EXCERPT[number]
    rows["subject"] = SUBJECT[number]
    rows["value"] = np.random.default_rng(number).standard_normal(len(rows))
    rows["gating"] = pd.array([None] * len(rows), "boolean")
    for name in set(COLUMNS) - set(rows):
        rows[name] = {"init": "trained", "status": "ok", "layernorm": True}.get(name, "x" if name in WORDS else 0)
    return rows


def expected_rows() -> pd.DataFrame:
    """By model, variant, layer, measure and excerpt, whatever the tiles were."""
    rows = pd.concat([part(n) for n in range(3)]).to_dict("records")
    rows.sort(key=lambda r: (r["subject"], r["variant"], r["layer"], r["measure"] != "mu", r["excerpt"]))
    return pd.DataFrame(rows)[list(COLUMNS)].astype({"gating": "boolean"})


def finished(path: Path) -> RunFolder:
    with RunFolder(path, IDENTITY) as folder:
        for number, item in enumerate(ITEMS):
            folder.add(item, part(number))
        folder.finish(ITEMS, {"device": "cpu"})
    return folder


def test_rows_are_the_parts_in_the_order_of_the_table(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    pd.testing.assert_frame_equal(rows, expected_rows())
    csv = pd.read_csv(tmp_path / "run" / "rows.csv")
    np.testing.assert_array_equal(csv["value"], rows["value"])
    assert len(csv) == len(rows) and list(csv) == list(rows)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["manifest.json", "rows.csv", "rows.parquet"]


SPECIAL = [1.0, -math.inf, math.inf, math.nan, 0.1 + 0.2, 5e-324, -1.7976931348623157e308, 1e16]


def test_the_csv_says_the_same_to_pandas_as_the_parquet(tmp_path: Path) -> None:
    """Every digit, infinity, missing numbers and truth values, and text with all that CSV gives a meaning to."""
    rows = part(0)
    rows["value"] = np.resize(SPECIAL, len(rows))
    rows["gating"] = pd.array(np.resize(np.array([True, False, None], object), len(rows)), "boolean")
    rows["layernorm"] = np.resize([True, False], len(rows))
    rows["text"] = np.resize(['a, "b"', "two\nlines", "Zürich"], len(rows))
    rows["revision"] = None
    folder = RunFolder(tmp_path / "run", IDENTITY)
    folder.add(ITEMS[0], rows)
    folder.finish(ITEMS[:1], {})
    binary, text = (
        read_rows(tmp_path / "run"),
        pd.read_csv(tmp_path / "run" / "rows.csv", dtype={"gating": "boolean"}),
    )
    assert set(binary["value"].dropna()) == {number for number in SPECIAL if number == number}
    pd.testing.assert_frame_equal(text.drop(columns="revision"), binary.drop(columns="revision"), check_exact=True)
    assert text["layernorm"].dtype == bool and text["revision"].isna().all() and binary["revision"].isna().all()


def test_categoricals_are_written_as_what_they_stand_for(tmp_path: Path) -> None:
    """Whatever categories each part has, in whatever order, used or not: the bytes are those of plain strings."""
    finished(tmp_path / "plain")
    folder = RunFolder(tmp_path / "run", IDENTITY)
    for number, item in enumerate(ITEMS):
        measures = pd.CategoricalDtype([["mu", "relative_mu"], ["relative_mu", "rank", "mu"]][number % 2])
        names = [name for name, dtype in part(number).dtypes.items() if pd.api.types.is_string_dtype(dtype)]
        folder.add(item, part(number).astype(dict.fromkeys(names, "category") | {"measure": measures}))
        pd.testing.assert_frame_equal(folder.part(item), part(number))
    pd.testing.assert_frame_equal(folder.finish(ITEMS, {}), expected_rows())
    for name in ("rows.parquet", "rows.csv"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_rows_without_a_layer_come_last(tmp_path: Path) -> None:
    """As numpy sorts them, NaN after every number, and rows that are alike in the order in which they came."""
    rows = part(0).assign(layer=np.tile([2.0, np.nan, 0.0, np.nan, 1.0, 2.0], 4))
    folder = RunFolder(tmp_path / "run", IDENTITY)
    folder.add(ITEMS[0], rows)
    found = folder.finish(ITEMS[:1], {})
    of_variant = [rows[rows["variant"] == variant] for variant in (0, 1)]
    assert np.array_equal(found["layer"], np.concatenate([np.sort(of["layer"]) for of in of_variant]), equal_nan=True)


def test_manifest(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["complete"] is True
    assert manifest["identity"] == IDENTITY
    assert manifest["device"] == "cpu"
    assert manifest["versions"]["torch"] and manifest["versions"]["transformers"]
    assert manifest["wall_seconds"] >= 0
    assert manifest["peak_rss_bytes"] > 10 * 2**20
    assert str(Path.home()) not in json.dumps({key: value for key, value in manifest.items() if key != "identity"})


def test_order_of_work_does_not_show(tmp_path: Path) -> None:
    """Parts made in another order, by three processes that each did one: the same bytes."""
    finished(tmp_path / "one")
    for number in (2, 0, 1):
        RunFolder(tmp_path / "two", IDENTITY).add(ITEMS[number], part(number))
    with RunFolder(tmp_path / "two", IDENTITY) as folder:
        assert [folder.has(item) for item in (*ITEMS, "02-00000")] == [True, True, True, False]
        assert not folder.complete
        folder.finish(ITEMS, {})
    assert RunFolder(tmp_path / "two", IDENTITY).complete
    for name in ("rows.parquet", "rows.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_half_written_part_is_not_a_part(tmp_path: Path) -> None:
    """What a kill leaves: a temporary file with half the bytes. It is not read and does not get in the way."""
    finished(tmp_path / "one")
    folder = RunFolder(tmp_path / "two", IDENTITY)
    folder.add(ITEMS[0], part(0))
    folder.close()
    whole = (tmp_path / "two" / "parts" / f"{ITEMS[0]}.parquet").read_bytes()
    (tmp_path / "two" / "parts" / f"{ITEMS[1]}.tmp").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "two" / "rows.tmp").write_bytes(b"half")
    (tmp_path / "two" / "manifest.json.tmp").write_bytes(b'{"half')
    again = RunFolder(tmp_path / "two", IDENTITY)
    assert [again.has(item) for item in ITEMS] == [True, False, False]
    for number in (1, 2):
        again.add(ITEMS[number], part(number))
    again.finish(ITEMS, {})
    assert (tmp_path / "one" / "rows.parquet").read_bytes() == (tmp_path / "two" / "rows.parquet").read_bytes()


def test_killed_while_the_first_manifest_is_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / f".manifest.json.{GONE}.partial"
    left.write_text('{"compl', encoding="utf-8")
    assert not RunFolder(tmp_path / "run", IDENTITY).complete
    assert not left.exists()


def test_a_folder_that_is_no_run_keeps_all_it_has(tmp_path: Path) -> None:
    """Another program's half-written files too, at any depth; of a run only what the run writes itself goes."""
    others = [tmp_path / ".film.mkv.77.partial", tmp_path / "deep" / ".notes.txt.5.partial"]
    (tmp_path / "deep").mkdir()
    for file in others:
        file.write_text("half")
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder(tmp_path, IDENTITY)
    assert all(file.read_text() == "half" for file in others)


def test_what_a_kill_left_of_a_part_goes_when_the_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", IDENTITY)
    folder.add(ITEMS[0], part(0))
    folder.close()
    left = folder.path / "parts" / f".{ITEMS[1]}.parquet.{GONE}.partial"
    nets = folder.path / "cells" / f".state.pt.{GONE}.partial"
    nets.parent.mkdir()
    for file in (left, nets):
        file.write_bytes(b"PAR1")
    assert RunFolder(tmp_path / "run", IDENTITY).has(ITEMS[0])
    assert not left.exists()
    assert nets.exists()  # of a process that may still train there


def test_killed_while_the_parts_are_removed(tmp_path: Path) -> None:
    """The manifest says complete and a part is left over: the run is complete, and the part goes."""
    finished(tmp_path / "run")
    (tmp_path / "run" / "parts").mkdir()
    part(2).to_parquet(tmp_path / "run" / "parts" / f"{ITEMS[2]}.parquet")
    assert RunFolder(tmp_path / "run", IDENTITY).complete
    assert not (tmp_path / "run" / "parts").exists()
    assert len(read_rows(tmp_path / "run")) == 72


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"lambdas": [0.0, 1.0], "seed": 5}}, r"config\.seed: 0, now 5"),
        ({"config": {"lambdas": [0.0], "seed": 0}}, r"config\.lambdas: \[0\.0, 1\.0\], now \[0\.0\]"),
        ({"config": {"lambdas": [0.0, 1.0], "seed": 0, "tokens": 3}}, r"config\.tokens: null, now 3"),
        ({"experiment": "ablate-gating"}, 'experiment: "sweep-lambda", now "ablate-gating"'),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, complete: bool, change: dict, message: str) -> None:
    if complete:
        finished(tmp_path / "run")
    else:
        RunFolder(tmp_path / "run", IDENTITY).add(ITEMS[0], part(0))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(RunFolderError, match=message):
        RunFolder(tmp_path / "run", IDENTITY | change)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(RunFolderError, match="not empty and not a run folder"):
        RunFolder(tmp_path, IDENTITY)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path, IDENTITY).complete


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, where: str) -> None:
    """Also for root, who may write anywhere: a file is in the way."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="cannot write the run folder") as caught:
        RunFolder(tmp_path / where, IDENTITY)
    assert "\n" not in str(caught.value)


def test_reading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"has no rows\.parquet"):
        read_rows(tmp_path)
    with pytest.raises(RunFolderError, match=r"manifest\.json is missing or unreadable"):
        read_manifest(tmp_path)


def test_differences() -> None:
    assert changes({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}) == []
    assert changes({"a": 1, "b": {"c": [1]}}, {"a": 2, "b": {"c": [2]}}) == ["a: 1, now 2", "b.c: [1], now [2]"]
    assert changes({"a": 1}, {"b": 1}) == ["a: 1, now null", "b: null, now 1"]
