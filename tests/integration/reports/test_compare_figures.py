"""Two folders of figures compared: points written here by hand, and the published ones."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import typer

from lscollapse.cli import results
from lscollapse.reports.compare_figures import are_figures, compare_figures
from lscollapse.reports.figures.draw import drawn_in
from lscollapse.reports.figures.points import FigureError
from tests import ROOT

REFERENCE = ROOT / "results" / "reference"
LAMBDAS, LAYERS, MEASURES = (-0.5, 1.0, math.nan), (0, 1, 2, 3), ("relative_mu", "mu")
POINTS = len(LAMBDAS) * len(LAYERS) * len(MEASURES)


def points() -> pd.DataFrame:
    """Relative mu 0.7 and mu 2e6 everywhere, at two lambdas and at one for each layer."""
    rows = [
        {"model": "net", "init": "trained", "arm": "gate, LN", "gating": True, "layernorm": True, "skip_site": "residual",
         "norm_site": "both", "lam": lam, "measure": measure, "layer": layer,
         "mean": 0.7 if measure == "relative_mu" else 2e6, "std": 0.1, "n": 4, "drawn": "point"}
        for measure, lam, layer in itertools.product(MEASURES, LAMBDAS, LAYERS)
    ]  # fmt: skip
    return pd.DataFrame(rows)


class Pair:
    """Two folders with the same figure; what is changed in `b`, and the line that is then printed."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b = folder / "a", folder / "b"
        self.points = points()
        for side in (self.a, self.b):
            side.mkdir()
            self.save(side)

    def save(self, side: Path, name: str = "figure2") -> None:
        self.points.to_csv(side / f"{name}.csv", index=False)

    def change(self, where: str, column: str, value: object) -> None:
        chosen = self.points.query(where).index
        assert len(chosen)
        self.points.loc[chosen, column] = value
        self.save(self.b)

    def line(self) -> tuple[str, bool]:
        found = compare_figures(self.a, self.b)
        (line,) = found.lines
        return line, found.alike


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


ONE = "lam == -0.5 and layer == 3 and measure == "


def test_the_same_points(pair: Pair) -> None:
    assert pair.line() == (f"figure2: agrees within 1e-4 ({POINTS} points)", True)


@pytest.mark.parametrize(
    ("measure", "value", "words"),
    [
        ("relative_mu", 0.70009, None),
        ("relative_mu", 0.7085, "differs by up to 0.0085 at net, gate, LN, lambda -0.5, layer 3, relative_mu (0.7, now 0.7085)"),
        ("relative_mu", 0.69988, "differs by up to 0.00012 at net, gate, LN, lambda -0.5, layer 3, relative_mu (0.7, now 0.69988)"),
        ("mu", 2_000_180.0, None),  # 0.9e-4 of it
        ("mu", 2_000_300.0, "differs by up to 0.015 % at net, gate, LN, lambda -0.5, layer 3, mu (2e+06, now 2.0003e+06)"),
    ],
)  # fmt: skip
def test_one_mean_differs(pair: Pair, measure: str, value: float, words: str | None) -> None:
    """Absolute of a measure that is a share, relative of any other."""
    pair.change(f"{ONE}'{measure}'", "mean", value)
    if words is None:
        assert pair.line() == (f"figure2: agrees within 1e-4 ({POINTS} points)", True)
    else:
        assert pair.line() == (f"figure2: {words}, 1 of {POINTS} points over 1e-4", False)


def test_the_largest_of_several_is_named(pair: Pair) -> None:
    pair.change("layer == 1 and measure == 'relative_mu'", "mean", 0.71)
    pair.change("layer == 2 and measure == 'relative_mu' and lam != lam", "mean", 0.6)
    line, alike = pair.line()
    assert "up to 0.1 at net, gate, LN, lambda per layer, layer 2, relative_mu (0.7, now 0.6)" in line and not alike
    assert line.endswith(f"4 of {POINTS} points over 1e-4")


def test_a_point_on_the_floor_is_the_most_that_it_can_be(pair: Pair) -> None:
    """Another processor may round it to the other side of the floor; what counts is by how much."""
    pair.change(f"{ONE}'relative_mu'", "drawn", "at_floor")
    assert pair.line() == (f"figure2: agrees within 1e-4 ({POINTS} points)", True)
    pair.change(f"{ONE}'relative_mu'", "mean", 4.8e-7)
    assert "now 4.8e-07" in pair.line()[0] and not pair.line()[1]


def test_a_point_that_one_side_masks_differs(pair: Pair) -> None:
    pair.change(f"{ONE}'relative_mu'", "drawn", "masked")
    assert pair.line() == (
        f"figure2: agrees within 1e-4 ({POINTS - 1} points); 1 of {POINTS} points drawn otherwise, "
        f"such as net, gate, LN, lambda -0.5, layer 3, relative_mu (point, now masked)",
        False,
    )


def test_a_masked_point_has_no_mean_to_compare(pair: Pair) -> None:
    pair.change("layer == 3", "drawn", "masked")
    pair.save(pair.a)
    pair.change("layer == 3", "mean", math.nan)
    assert pair.line() == (f"figure2: agrees within 1e-4 ({POINTS} points)", True)


@pytest.mark.parametrize("side", ["a", "b"])
def test_unresolved_points_are_left_out_and_counted(pair: Pair, side: str) -> None:
    pair.change("layer == 3 and measure == 'relative_mu'", "mean", 0.1)
    pair.change("layer == 3 and measure == 'relative_mu'", "drawn", "unresolved")
    if side == "a":
        pair.a, pair.b = pair.b, pair.a
    assert pair.line() == (
        f"figure2: agrees within 1e-4 ({POINTS - 3} points); 3 unresolved points left out", True,
    )  # fmt: skip
    pair.points["drawn"] = "unresolved"
    pair.save(pair.a)
    assert pair.line() == (f"figure2: nothing to compare; {POINTS} unresolved points left out", False)


def test_points_on_one_side_only(pair: Pair) -> None:
    pair.points = pair.points[pair.points["layer"] < 3]
    pair.save(pair.b)
    missing = len(LAMBDAS) * len(MEASURES)
    line, alike = pair.line()
    assert line.startswith(
        f"figure2: agrees within 1e-4 ({POINTS - missing} points); {missing} points only in A, such as "
    )
    assert line.endswith("layer 3, mu") and not alike
    pair.a, pair.b = pair.b, pair.a
    line, alike = pair.line()
    assert f"{missing} points only in B" in line and not alike


def test_figures_on_one_side_only(pair: Pair) -> None:
    """What only the first has is no fault: another command makes it."""
    pair.save(pair.a, "readings")
    (pair.a / "readings-verdicts.csv").write_text("claim,verdict\n", encoding="utf-8")
    (pair.b / "readings-verdicts.csv").write_text("claim,verdict\n", encoding="utf-8")
    found = compare_figures(pair.a, pair.b)
    assert found.lines == [f"figure2: agrees within 1e-4 ({POINTS} points)", "only in A, not compared: readings"]
    assert found.alike
    pair.save(pair.b, "figure1-bert")
    found = compare_figures(pair.a, pair.b)
    assert found.lines[0] == "figure1-bert: only in B" and not found.alike


# --- the published figures ---------------------------------------------------------------------


def test_the_published_figures_are_all_found() -> None:
    """Each has a picture beside its numbers."""
    found = drawn_in(REFERENCE)
    assert set(found) == {path.stem for path in REFERENCE.glob("*.png")}
    assert next(name for name in found if name.startswith("figure")) == "figure1"


def test_the_published_figures_agree_with_themselves(tmp_path: Path) -> None:
    """Every line of a file is a point; of the losses' figure, two."""
    for file in drawn_in(REFERENCE).values():
        shutil.copy(file, tmp_path)
    found = compare_figures(REFERENCE, tmp_path)
    counts = {name: len(file.read_text(encoding="utf-8").splitlines()) - 1 for name, file in drawn_in(tmp_path).items()}
    counts["quality"] *= 2
    assert found.lines == [f"{name}: agrees within 1e-4 ({n:,} points)" for name, n in counts.items()]
    assert found.alike


def test_a_loss_that_differs(tmp_path: Path) -> None:
    text = (REFERENCE / "quality.csv").read_text(encoding="utf-8")
    loss = "27.22772967815399"  # of mamba2-tiny with its gate at lambda = -8
    assert text.count(loss) == 1
    (tmp_path / "quality.csv").write_text(text.replace(loss, "30.0"), encoding="utf-8")
    found = compare_figures(REFERENCE, tmp_path)
    assert "up to 10 % at mamba2-tiny, gate, LN, lambda -8, layer last, lm_loss (27.228, now 30)" in found.lines[0]
    assert not found.alike


# --- what cannot be compared, and the verb -----------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:-3], "is cut off"),
        (lambda text: text[: text.rindex(",")] + "\n", "is cut off or has cells missing"),
        (lambda text: text + text.splitlines()[-1] + "\n", "has a point twice"),
        (lambda text: text.replace("drawn", "fate"), "is not the points of a figure"),
        (lambda text: text.replace("-0.5", "few"), "is not the points of a figure"),
        (lambda text: text + '"', "is not the points of a figure"),
        (lambda text: "", "is not the points of a figure"),
    ],
    ids=["cut off", "a cell missing", "twice", "no such column", "no number", "an open quote", "empty"],
)  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(pair: Pair, damage: object, words: str) -> None:
    file = pair.b / "figure2.csv"
    assert callable(damage)
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(FigureError, match=words) as refused:
        compare_figures(pair.a, pair.b)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_is_not_compared_with_figures(pair: Pair, tmp_path: Path) -> None:
    """A run's own figures lie in its folder, and it is a run all the same."""
    run = tmp_path / "run"
    shutil.copytree(pair.a, run)
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    assert are_figures(pair.a, pair.b) and not are_figures(run, run)
    for a, b in ((pair.a, run), (run, pair.a), (pair.a, tmp_path / "nowhere")):
        with pytest.raises(FigureError, match=r"a holds figures and \S+ does not"):
            are_figures(a, b)


def test_exit_code_and_what_is_shown(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    results.compare(pair.a, pair.b)
    assert capsys.readouterr().out == f"figure2: agrees within 1e-4 ({POINTS} points)\n"
    pair.change("layer == 3", "mean", 0.0)
    with pytest.raises(typer.Exit) as stopped:
        results.compare(pair.a, pair.b)
    assert stopped.value.exit_code == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("figure2: differs by up to ")
