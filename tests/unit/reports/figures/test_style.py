"""How the figures look: places of labels by hand, colours, names of ticks, and files that come out the same twice."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from lscollapse.reports.figures.lines import against_layer, lambda_axis
from lscollapse.reports.figures.style import lambda_colour, save, spread
from lscollapse.reports.figures.wording import ends_with, number

LAMBDAS = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def points(mean, **counts) -> pd.DataFrame:
    """Points of a curve against layer as `points.summarise` makes them, four excerpts behind each."""
    data = pd.DataFrame({
        "layer": np.arange(len(mean)), "measure": "relative_mu", "mean": mean, "std": 0.1 / 3, "floor": 1e-6,
        "rounding": 1e-7, "ok": 4, "certified": 0, "below_floor": 0, "unresolved": 0, "overflow": 0, "nan": 0,
    }).assign(**counts)  # fmt: skip
    return data.assign(drawn=np.where(data["overflow"] + data["nan"] > 0, "masked", "point"))


def plot() -> tuple[Figure, pd.DataFrame]:
    data = points([0.9, 1 / 3, 0.2])
    return against_layer([("one", "#0072B2", "-", data)], [("relative_mu", "linear")], "title", ["A caption."]), data


def test_two_saves_give_the_same_bytes(tmp_path):
    first = save(*plot(), tmp_path / "a", "figure2")
    assert {path.name for path in first} == {"figure2.png", "figure2.pdf", "figure2.csv"}
    again = save(*plot(), tmp_path / "b", "figure2")
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert b"CreationDate" not in (tmp_path / "a" / "figure2.pdf").read_bytes()
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]


def test_the_csv_holds_the_plotted_numbers(tmp_path):
    figure, data = plot()
    save(figure, data, tmp_path, "figure2")
    back = pd.read_csv(tmp_path / "figure2.csv")
    np.testing.assert_array_equal(back["mean"], data["mean"])
    assert list(back["drawn"]) == list(data["drawn"])


def test_a_curve_says_why_it_stops_and_for_how_many_excerpts():
    assert ends_with(points([0.9, 0.5])) == ""
    assert ends_with(points([0.9, 0.5, np.nan], ok=[4, 4, 0], overflow=[0, 0, 4])) == "overflow at layer 2"
    assert ends_with(points([0.9, 0.5, 0.4], ok=[4, 3, 2], nan=[0, 1, 2])) == "NaN at layer 1 (1 of 4)"


@pytest.mark.parametrize(
    ("lams", "room", "named"),
    [
        (LAMBDAS, 0.0, ["−8", "−4", "−2", "−1", "−0.5", "0", "0.5", "1", "2", "4", "8"]),
        (LAMBDAS, 0.08, ["−8", "−4", "−2", "−1", "0", "1", "2", "4", "8"]),
        (range(-8, 9), 0.08, ["−8", "−4", "−2", "−1", "0", "1", "2", "4", "8"]),
        (np.linspace(-2, 2, 17), 0.0, ["−2", "−1", "0", "1", "2"]),
        ([0.5], 0.0, ["0.5"]),
    ],
)  # fmt: skip
def test_ticks_of_lambda(lams, room, named):
    ax = Figure().subplots()
    lambda_axis(ax, pd.Series([*lams, *lams], dtype=float), room)
    assert list(ax.get_xticks()) == sorted(lams)
    assert [tick.get_text() for tick in ax.get_xticklabels() if tick.get_text()] == named


def test_numbers_have_a_true_minus_sign():
    assert [number(lam) for lam in (-0.5, 0.0, 8.0)] == ["\N{MINUS SIGN}0.5", "0", "8"]


def test_colours_are_black_at_zero_distinct_and_dark_at_the_ends():
    def luminance(colour: str) -> float:
        return float(np.dot([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], [0.2126, 0.7152, 0.0722]))

    colours = [lambda_colour(lam, LAMBDAS) for lam in LAMBDAS]
    assert colours[5] == "#000000" and len(set(colours)) == 11
    assert all(luminance(colour) < 0.75 for colour in colours)  # seen on white
    assert luminance(colours[0]) < 0.2 and luminance(colours[-1]) < 0.2
    assert all(luminance(a) < luminance(b) for a, b in itertools.pairwise(colours[:5]))


def test_spread_by_hand():
    np.testing.assert_allclose(spread([0.5, 0.5], [0.2, 0.2], 0, 1), [0.4, 0.6])
    np.testing.assert_allclose(spread([0.9, 0.1], [0.1, 0.1], 0, 1), [0.9, 0.1])  # apart already: left alone
    np.testing.assert_allclose(spread([1.0, 1.0, 1.0], [0.1, 0.1, 0.1], 0, 1), [0.75, 0.85, 0.95])
    np.testing.assert_allclose(spread([0.0, 0.02], [0.1, 0.3], 0, 1), [0.05, 0.25])
