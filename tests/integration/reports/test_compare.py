"""Two runs compared: real small ones, against sums written out here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer

from lscollapse.cli import results
from lscollapse.core.config import Experiment
from lscollapse.core.manifest import RunFolderError
from lscollapse.core.table import DEFAULT_MEASURES
from lscollapse.experiments import paper
from lscollapse.reports import compare
from tests.equivalence import tiny

EXCERPTS, TOKENS = 5, 7


def frozen(path: Path, seed: int) -> Path:
    ids = tiny.ids(EXCERPTS, TOKENS, seed).tolist()
    lines = [
        json.dumps({"title": f"T{n}", "text_sha256": "0" * 64, "tokenizer": "t", "source": "s", "ids": row})
        for n, row in enumerate(ids)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, and others that differ from it in one thing each."""
    base = tmp_path_factory.mktemp("runs")
    for name, model in (
        ("net", tiny.mamba2(1, 3)), ("retrained/net", tiny.mamba2(1, 3, seed=7)), ("deeper", tiny.mamba2(1, 4)),
        ("bert", tiny.bert(2)),
    ):  # fmt: skip
        model.save_pretrained(base / name)
    one, two = frozen(base / "one.jsonl", 1), frozen(base / "two.jsonl", 2)
    first: dict[str, Any] = {"models": [str(base / "net")], "lambdas": [-2, 0, 1], "excerpts": EXCERPTS, "tokens": TOKENS,
                             "source": str(one), "offline": True}  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "a": {}, "again": {}, "float64": {"dtype": "float64"}, "retrained": {"models": [str(base / "retrained" / "net")]},
        "other-texts": {"source": str(two)}, "deeper": {"models": [str(base / "deeper")], "lambdas": [1]},
        "more-lambdas": {"lambdas": [-2, 0, 1, 4]}, "bert": {"models": [str(base / "bert")]},
        "one-excerpt": {"excerpts": 1, "dtype": "float64"},
    }  # fmt: skip
    for name, change in changes.items():
        paper.sweep_lambda(Experiment(**first | change), base / "runs" / name)
    paper.ablate_gating(Experiment(**first), base / "runs" / "ablation")
    return {path.name: path for path in (base / "runs").iterdir()}


def test_the_same_run_twice(runs: dict[str, Path]) -> None:
    found = compare.compare(runs["a"], runs["again"])
    assert found.alike and found.sentence == "identical: every number of 6 arms"
    assert (found.configuration, found.only_a, found.only_b, found.lost, found.notes) == ([], [], [], [], [])
    assert (found.differences["difference"] == 0.0).all()


def test_another_dtype_is_within_the_spread(runs: dict[str, Path]) -> None:
    found = compare.compare(runs["a"], runs["float64"])
    assert found.alike and found.sentence == "within the spread in all 6 arms"
    assert found.configuration == ['config.dtype: "auto", now "float64"']
    assert 0.0 < found.differences["ratio"].max() < 0.01


def cells(rows: pd.DataFrame) -> dict[tuple[str, float, str, int], np.ndarray]:
    """Excerpt by excerpt, in the order of the excerpts; mu and the ratio of row norms as their logarithms."""
    out: dict[tuple[str, float, str, int], np.ndarray] = {}
    for row in rows.sort_values("excerpt").itertuples():
        key = (row.arm, row.lam, row.measure, row.layer)
        value = math.log10(row.value) if row.measure in ("mu", "row_norm_ratio") and row.value else row.value
        out[key] = np.append(out.get(key, np.zeros(0)), value)
    return out


@pytest.mark.parametrize(("other", "paired"), [("retrained", True), ("other-texts", False)])
def test_numbers_are_those_of_plain_sums(runs: dict[str, Path], other: str, paired: bool) -> None:
    found = compare.compare(runs["a"], runs[other])
    a, b = (cells(pd.read_parquet(run / "rows.parquet")) for run in (runs["a"], runs[other]))
    best: dict[tuple[str, str], float] = {}
    numbers = {}
    for key, ours in a.items():
        if key[2] == "longest_row":
            continue
        theirs = b[key]
        spread = max(math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 2), 2.0**-23)
        step, error = theirs.mean() - ours.mean(), (theirs - ours).std(ddof=1) / math.sqrt(EXCERPTS)
        if not paired:
            error = math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / EXCERPTS)
        name, ratio = f"net: {key[0]}, lambda {key[1]:g}", abs(step) / max(spread, 4 * error)
        numbers[name, key[2], key[3]] = (ours.mean(), theirs.mean(), step, spread, error, ratio)
        best[name, key[2]] = max(best.get((name, key[2]), 0.0), ratio)
    assert len(found.differences) == 6 * (
        len(DEFAULT_MEASURES) - 1
    )  # of the position of the longest row no mean is taken
    for row in found.differences.itertuples():
        expected = numbers[row.name, row.measure, row.layer]
        got = (row.a, row.b, row.difference, row.spread, row.error, row.ratio)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert row.ratio == pytest.approx(best[row.name, row.measure], rel=1e-6)
    assert list(found.differences["ratio"]) == sorted(found.differences["ratio"], reverse=True)
    beyond = {name for (name, _), most in best.items() if most > 1}
    words = f"beyond the spread in {len(beyond)} of 6 arms" if beyond else "within the spread in all 6 arms"
    assert (found.alike, found.sentence) == (not beyond, words)
    assert paired == bool(beyond)  # other weights on the same texts; the same weights on other texts
    assert bool(found.notes) == (not paired)


def test_what_only_one_run_has(runs: dict[str, Path]) -> None:
    found = compare.compare(runs["a"], runs["more-lambdas"])
    assert found.only_a == [] and found.alike
    assert found.only_b == ["net: no gate, LN, lambda 4", "net: gate, LN, lambda 4"]
    assert found.sentence == "identical: every number of 6 arms"
    assert found.configuration == ["config.lambdas: [-2.0, 0.0, 1.0], now [-2.0, 0.0, 1.0, 4.0]"]
    both_ways = compare.compare(runs["more-lambdas"], runs["a"])
    assert (both_ways.only_a, both_ways.only_b) == (found.only_b, found.only_a)


def test_models_of_another_name_and_depth(runs: dict[str, Path]) -> None:
    found = compare.compare(runs["a"], runs["deeper"])
    assert found.notes[:2] == [
        "net of A is compared with deeper of B", "net has 3 layers in A and 4 in B: the last ones are compared",
    ]  # fmt: skip
    assert set(found.differences["layer"]) == {3}
    rows = [pd.read_parquet(runs[name] / "rows.parquet") for name in ("a", "deeper")]
    lasts = [
        part[
            (part["arm"] == "gate, LN")
            & (part["lam"] == 1)
            & (part["measure"] == "relative_mu")
            & (part["layer"] == depth)
        ]
        for part, depth in zip(rows, (3, 4), strict=True)
    ]
    (row,) = found.differences.query("name == 'net: gate, LN, lambda 1' and measure == 'relative_mu'").itertuples()
    assert (row.a, row.b) == pytest.approx([part["value"].mean() for part in lasts])
    assert any(line.startswith("subjects.net.sha256: ") for line in found.configuration)


def test_nothing_in_common(runs: dict[str, Path]) -> None:
    found = compare.compare(runs["a"], runs["bert"])
    assert not found.alike and found.sentence.startswith("nothing to compare")


def test_one_excerpt_has_no_spread(runs: dict[str, Path]) -> None:
    found = compare.compare(runs["one-excerpt"], runs["one-excerpt"])
    assert found.alike
    against = compare.compare(runs["a"], runs["one-excerpt"])
    assert "net: not the same excerpts, so only their means are compared" in against.notes
    assert against.differences["ratio"].notna().all()


def test_layers_that_one_run_lost(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = pd.read_parquet(runs["ablation"] / "rows.parquet")
    copy_manifest(runs["ablation"], tmp_path)
    gone = (rows["arm"] == "gate, no LN") & (rows["layer"] >= 2) & (rows["excerpt"] == 3)
    rows.loc[gone, ["value", "log10", "status"]] = [np.nan, np.nan, "overflow"]
    rows.to_parquet(tmp_path / "rows.parquet")
    found = compare.compare(runs["ablation"], tmp_path)
    assert found.lost == ["net: gate, no LN, lambda 1: A nowhere, B from layer 2"]
    assert not found.alike and found.sentence.endswith("other layers lost or unresolved in 1 of 4 arms")


def copy_manifest(run: Path, out: Path) -> None:
    """Without the digests of the rows, which are to be others."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (out / "manifest.json").write_text(json.dumps({**manifest, "files": {}}), encoding="utf-8")


def changed(run: Path, out: Path, change: Callable[[pd.DataFrame], None]) -> Path:
    """A copy of a run with other rows."""
    out.mkdir()
    copy_manifest(run, out)
    rows = pd.read_parquet(run / "rows.parquet")
    change(rows)
    rows.to_parquet(out / "rows.parquet")
    return out


def doubted(rows: pd.DataFrame) -> None:
    """From layer 2 on one arm is other numbers that rounding decides."""
    bad = (rows["arm"] == "gate, no LN") & (rows["layer"] >= 2)
    rows.loc[bad, ["value", "log10", "status", "rounding"]] = [0.5, -0.3, "unresolved", 0.1]


def test_what_is_unresolved_is_not_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    b = changed(runs["ablation"], tmp_path / "b", doubted)
    found = compare.compare(runs["ablation"], b)
    assert found.lost == ["net: gate, no LN, lambda 1: A nowhere, B unresolved from layer 2"]
    assert not found.alike and found.sentence == "other layers lost or unresolved in 1 of 4 arms"
    assert (found.differences["difference"] == 0.0).all()  # of what both know
    other_way = compare.compare(b, runs["ablation"])
    assert other_way.lost == ["net: gate, no LN, lambda 1: A unresolved from layer 2, B nowhere"]

    def moved(rows: pd.DataFrame) -> None:
        doubted(rows)
        rows.loc[rows["status"] == "unresolved", "value"] = 0.6

    both = compare.compare(b, changed(runs["ablation"], tmp_path / "c", moved))
    assert both.alike and both.lost == []
    assert both.sentence == "within the spread in all 4 arms as far as they are resolved; 1 of them are not everywhere"
    nothing = changed(b, tmp_path / "d", lambda rows: rows.update({"status": ["unresolved"] * len(rows)}))
    assert not compare.compare(b, nothing).alike
    assert compare.compare(b, nothing).sentence.endswith("nothing that both know in 4 of 4 arms")


def test_rounding_is_what_a_difference_may_be(runs: dict[str, Path], tmp_path: Path) -> None:
    """Both are known, 0.004 apart, and the estimate of one allows 0.008: half of it."""

    def shifted(rows: pd.DataFrame) -> None:
        rows["value"], rows["rounding"] = rows["value"] + 0.004, 0.008

    one = runs["one-excerpt"]  # no spread of its own
    found = compare.compare(one, changed(one, tmp_path / "b", shifted)).differences
    found = found[found["measure"] == "relative_mu"]
    assert list(found["ratio"]) == pytest.approx([0.5] * 6)
    assert list(found["spread"]) == pytest.approx([0.008] * 6)


def test_runs_of_table1(tmp_path: Path) -> None:
    """Accuracies with the spread over seeds."""
    values = {"a": [0.80, 0.82, 0.84], "b": [0.90, 0.92, 0.94], "c": [0.80, 0.82, 0.84]}
    for name, accuracies in values.items():
        (tmp_path / name).mkdir()
        manifest = {"complete": True, "identity": {"experiment": "table1", "config": {"mixers": ["mamba"]}}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        rows = pd.DataFrame({"task": "mqar", "mixer": "mamba", "lam": "1", "lr": 0.01, "seed": [0, 1, 2], "value": accuracies,
                             "measure": "test_accuracy", "status": "ok"})  # fmt: skip
        rows.to_parquet(tmp_path / name / "rows.parquet")
    found = compare.compare(tmp_path / "a", tmp_path / "b")
    (row,) = found.differences.itertuples()
    assert row.name == "mqar mamba: trained, lambda 1"
    error = 0.02 * (2 / 3) ** 0.5  # of two independent means of three
    assert (row.difference, row.spread, row.error, row.ratio) == pytest.approx((0.1, 0.02, error, 0.1 / (4 * error)))
    assert found.notes == []
    assert not found.alike
    assert compare.compare(tmp_path / "a", tmp_path / "c").alike


def test_what_is_no_run(runs: dict[str, Path], tmp_path: Path) -> None:
    for a, b in ((tmp_path, runs["a"]), (runs["a"], tmp_path)):
        with pytest.raises(RunFolderError, match="finished run"):
            compare.compare(a, b)
    (tmp_path / "manifest.json").write_text('{"identity": {}}', encoding="utf-8")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(RunFolderError, match="has no column"):
        compare.compare(tmp_path, runs["a"])


def test_exit_code_and_what_is_shown(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results.compare(runs["a"], runs["float64"], 3)
    out = capsys.readouterr().out
    assert "within the spread in all 6 arms" in out and 'config.dtype: "auto", now "float64"' in out
    assert sum(", layer " in line for line in out.splitlines()) == 3
    with pytest.raises(typer.Exit) as stopped:
        results.compare(runs["a"], runs["bert"], 3)
    assert stopped.value.exit_code == 1
