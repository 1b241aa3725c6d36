"""The theory verbs and find-lambda as a user meets them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from lscollapse.experiments.bounds import find_lambda
from lscollapse.reports.figures.theory import bounds_figure
from lscollapse.theory import verify
from lscollapse.theory.checking import Statement
from lscollapse.theory.stretches import Found
from tests import verbs
from tests.integration.experiments.bounds.test_find_lambda import EXCERPTS, TOKENS, made, task_of


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "240")
    return lambda *arguments: verbs.run(arguments)


@pytest.fixture
def little(tmp_path: Path) -> list[object]:
    """Arguments that read a tiny saved ALBERT and frozen excerpts."""
    task_of(made("albert"), tmp_path)
    source = ["--source", tmp_path / "excerpts.jsonl", "--excerpts", EXCERPTS, "--tokens", TOKENS, "--offline"]
    return [tmp_path / "model", *source]


def test_verify_writes_what_it_prints(run, tmp_path: Path) -> None:
    code, out, _ = run("theory", "verify", "--instances", 60, "--seed", 3, "--out", tmp_path)
    assert code == 0 and f"{len(verify.STATEMENTS)} of {len(verify.STATEMENTS)} hold as corrected" in out
    rows = json.loads((tmp_path / "verify.json").read_text())
    assert [row["statement"] for row in rows] == [statement.name for statement in verify.STATEMENTS]
    assert all(row["statement"] in out for row in rows)
    assert (tmp_path / "verify.md").read_text().count("\n") == len(rows) + 2


def test_verify_exits_1_on_a_false_statement(run, monkeypatch: pytest.MonkeyPatch) -> None:
    false = Statement(
        "2 < 1", lambda: ("fails", "it is not"), "still false", lambda rng: {"x": float(rng.random())}, lambda x: -1.0
    )
    monkeypatch.setattr(verify, "STATEMENTS", (false,))
    code, out, _ = run("theory", "verify", "--instances", 5)
    assert code == 1 and "NOT: 2 < 1" in out


def test_examples(run, tmp_path: Path) -> None:
    """Sys-1 ends at mu = sqrt 2 below lambda = -1, also where the paper claims collapse (-2 to -1), and at 0 above."""
    code, _, _ = run("theory", "examples", "--out", tmp_path)
    assert code == 0 and (tmp_path / "examples.png").stat().st_size > 10_000
    rows = pd.read_csv(tmp_path / "examples.csv")
    last = rows[(rows["system"] == "sys1") & (rows["layer"] == 40) & (rows["measure"] == "mu")].set_index("lam")[
        "value"
    ]
    assert last[-1.5] == pytest.approx(math.sqrt(2.0), abs=1e-6)
    assert last[0.0] == pytest.approx(0.0, abs=1e-6)


def test_find_lambda(run, little: list[object], tmp_path: Path) -> None:
    code, out, _ = run("find-lambda", *little, "--target", 0.6, "--tol", 0.2, "--out", tmp_path / "found")
    assert code == 0
    assert "checked:" in out and "not monotone" in out and "K/tau* of the attention" in out
    curve = pd.read_csv(tmp_path / "found" / "curve.csv")
    assert list(curve.columns) == ["lam", "relative_mu", "rank1_residual", "angular_mu", "row_norm_ratio"]
    assert {find_lambda.LARGEST, -find_lambda.LARGEST, 0.0} <= set(curve["lam"])


def test_estimate_only_writes_no_curve(run, little: list[object], tmp_path: Path) -> None:
    code, out, _ = run("find-lambda", *little, "--target", 0.3, "--estimate-only", "--out", tmp_path / "found")
    assert code == 0 and "estimate" in out and "checked" not in out
    assert not (tmp_path / "found").exists()


def test_bound_writes_tables_and_a_figure(run, little: list[object], tmp_path: Path) -> None:
    code, out, _ = run("theory", "bound", *little, "--target", 0.6, "--tol", 0.2, "--out", tmp_path / "bound")
    assert code == 0 and "certifies nothing" in out and "937.924" in out
    bounds = pd.read_csv(tmp_path / "bound" / "bounds.csv")
    assert list(bounds.columns) == ["bound", "sign", "lam", "to", "reads", "note"]
    curve = pd.read_csv(tmp_path / "bound" / "curve.csv")
    for measure, words in (("relative_mu", "relative mu"), ("rank1_residual", "rank-1 residual")):
        for sign in (1, -1):
            lines = bounds[(bounds["bound"] == f"measured, {words}") & (bounds["sign"] == sign)]
            for lam, value in zip(curve["lam"], curve[measure], strict=True):
                if lam * sign >= 0.0 and abs(value - 0.6) > 1e-6:
                    inside = (lines["lam"] <= abs(lam) + 1e-6) & (abs(lam) - 1e-6 <= lines["to"])
                    assert inside.any() == (value >= 0.6), (measure, lam)
    assert len(pd.read_csv(tmp_path / "bound" / "heads.csv")) == 3 * 4
    assert (tmp_path / "bound" / "bounds.png").stat().st_size > 10_000


def test_the_figure_shows_every_bound_once() -> None:
    from lscollapse.theory.stretches import Line, Report

    points = {lam: {"relative_mu": 0.6, "rank1_residual": 0.4} for lam in (-2.0, -1.0, 0.0, 1.0, 2.0)}
    found = Found("net", "arm", 3, 1, 2, 0.5, 0.02, points=points)
    lines = [
        Line("A", 0, 1234.0), Line("B", -1, math.inf), Line("C", 0, 1238540.49), Line("measured, relative mu", 1, 0.5),
        Line("measured, rank-1 residual", -1, 0.25, to=0.5), Line("measured, rank-1 residual", -1, 2.0),
    ]  # fmt: skip
    figure = bounds_figure(Report(found, 0.9, 1.0, 1.0, lines, [], [], []))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels[4:] == ["A: 1,234", "B, λ < 0: certifies nothing", "C: 1,239,000"]
    assert labels[0] == "relative μ, λ > 0: from 0.5" and labels[3] == "rank-1 residual, λ < 0: 0.25 to 0.5 or from 2"
    assert figure.axes[0].get_xscale() == "log"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["find-lambda", "--target", 1.5], "strictly between 0 and 1"),
        (["theory", "bound", "--a", 1.0], "the collapse rate lies strictly between 0 and 1"),
    ],
)
def test_one_line_errors(run, little: list[object], arguments: list[object], message: str) -> None:
    code, _, err = run(*arguments, *little)
    assert code == 2 and message in err and "Traceback" not in err


def test_an_unknown_model_is_one_line(run) -> None:
    code, _, err = run("find-lambda", "mamba-tiny")
    assert code == 2 and "did you mean 'mamba2-tiny'" in err
