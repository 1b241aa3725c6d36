"""One row a hundred times as long as the others: the panel that shows it, the words that say it, the angular figures that it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from lscollapse.reports.figures.draw import draw
from lscollapse.reports.figures.paper import figure1, figure2, figure3
from lscollapse.reports.figures.points import FigureError
from tests.unit.reports.figures.test_paper import texts

# A decoder whose first token is massive at layers 2 to 4 of 5, in the manner of SmolLM2-135M.
SINK = {
    "relative_mu": (0.94, 0.69, 0.99, 0.99, 0.98, 0.69),
    "rank1_residual": (0.84, 0.67, 0.06, 0.08, 0.15, 0.64),
    "angular_mu": (0.94, 0.67, 0.70, 0.67, 0.66, 0.62),
    "angular_rank1_residual": (0.86, 0.67, 0.70, 0.66, 0.66, 0.60),
    "row_norm_ratio": (1.4, 2.6, 170.0, 137.0, 62.0, 5.6),
    "longest_row": (3.0, 1.0, 0.0, 0.0, 0.0, 7.0),
}
EVEN = SINK | {"row_norm_ratio": (1.4, 2.6, 9.9, 3.0, 2.0, 1.6)}
SAYS = "One row has more than 10 times the median norm at "
END = ": relative μ weighs that row most there."


def table(
    curves: Mapping[str, Sequence[float]], model: str = "decoder", lam: float = 1.0, arm: str = "LN",
    gating: bool | None = None, init: str = "trained",
) -> pd.DataFrame:  # fmt: skip
    """Two excerpts, a tenth of a percent under and over the curves."""
    parts = []
    for measure, means in curves.items():
        for excerpt, factor in enumerate((0.999, 1.001)):
            value = np.array(means) * factor
            status = np.select([np.isnan(value), np.isinf(value)], ["nan", "overflow"], "ok")
            part = {
                "layer": np.arange(len(means)),
                "measure": measure,
                "excerpt": excerpt,
                "value": value,
                "status": status,
            }
            parts.append(pd.DataFrame(part))
    gate = pd.array([pd.NA if gating is None else gating] * sum(map(len, parts)), dtype="boolean")
    return pd.concat(parts, ignore_index=True).assign(
        model=model, init=init, arm=arm, gating=gate, layernorm=arm.endswith(", LN") or arm == "LN", skip_site="residual",
        norm_site="both", lam=lam, text="a text", dtype="float32", n_tokens=128, floor=4.8e-7,
    )  # fmt: skip


def curve(ax: Axes) -> np.ndarray:
    """Heights of the one line against layer."""
    (line,) = [line for line in ax.lines if len(line.get_xdata()) == 6]
    return np.asarray(line.get_ydata())


def caption(figure) -> str:
    return texts(figure).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("draws", "panels"), [(figure1, ("relative_mu", "rank1_residual")), (figure3, ("relative_mu",) * 2)]
)
def test_a_massive_row_has_a_panel_and_a_sentence(draws, panels):
    figure, data = draws(table(SINK), "decoder")
    assert len(figure.axes) == 3
    for ax, measure in zip(figure.axes, (*panels, "row_norm_ratio"), strict=True):
        np.testing.assert_allclose(curve(ax), SINK[measure], rtol=1e-12)
    ratio = figure.axes[2]
    assert ratio.get_yscale() == "log" and ratio.get_ylabel() == "row norm ratio"
    assert [list(line.get_ydata()) for line in ratio.lines if len(line.get_xdata()) == 2] == [[10, 10]]
    assert ratio.get_ylim()[0] < 1.4 and ratio.get_ylim()[1] > 170
    assert SAYS + "layers 2 to 4" + END in caption(figure)
    assert set(data["measure"]) == {*panels, "row_norm_ratio"}


@pytest.mark.parametrize("draws", [figure1, figure3])
def test_without_a_massive_row_the_figure_is_the_one_of_a_table_that_knows_no_ratio(draws):
    old = {measure: EVEN[measure] for measure in ("relative_mu", "rank1_residual")}
    (figure, data), (plain, without) = draws(table(EVEN), "decoder"), draws(table(old), "decoder")
    assert caption(figure) == caption(plain) and len(figure.axes) == len(plain.axes) == 2
    pd.testing.assert_frame_equal(data, without)


def test_the_sentence_names_the_curves_where_not_all_are_meant():
    even = {"row_norm_ratio": (1, 1, 1, 1, 1, 1)}
    rows = [table(SINK | (even if lam < 0 else {}), lam=lam) for lam in (-2.0, -1.0, 0.5, 1.0)]
    assert SAYS + "layers 2 to 4 of λ = 0.5, 1" + END in caption(figure1(pd.concat(rows), "decoder")[0])
    arms = [
        table(SINK, arm="gate, LN", gating=True),
        table(SINK | even, arm="no gate, LN", gating=False),
        table(SINK | {"row_norm_ratio": (1, 1, 1, 30, 1, 1)}, arm="no gate, no LN", gating=False),
        table(SINK, arm="gate, LN", gating=True, init="random"),
    ]
    words = caption(figure3(pd.concat(arms), "decoder")[0])
    assert SAYS + "layers 2 to 4 of gate, LN (random weights) / gate, LN; layer 3 of no gate, no LN" + END in words


def test_many_curves_of_many_minds_are_counted():
    starts = {0.0: 2, 1.0: 3, 2.0: 4, 3.0: 5}  # from this layer on
    rows = [table(SINK | {"row_norm_ratio": [1.0] * n + [50.0] * (6 - n)}, lam=lam) for lam, n in starts.items()]
    rows.append(table(EVEN, lam=8.0))
    assert SAYS + "some of layers 2 to 5 in 4 of 5 curves" + END in caption(figure1(pd.concat(rows), "decoder")[0])


def test_an_infinite_ratio_is_a_hole_and_named():
    """More than half of the rows are zero."""
    rows = table(SINK | {"row_norm_ratio": (1.4, 2.6, np.inf, np.inf, 62.0, 5.6)})
    figure, data = figure1(rows, "decoder")
    np.testing.assert_allclose(curve(figure.axes[2]), (1.4, 2.6, np.nan, np.nan, 62.0, 5.6), rtol=1e-12)
    assert (
        list(data.loc[data["measure"] == "row_norm_ratio", "drawn"]) == ["point"] * 2 + ["masked"] * 2 + ["point"] * 2
    )
    words = caption(figure)
    assert "infinite at layers 2 to 3" in words and SAYS + "layers 2 to 4" + END in words
    assert not [line for ax in figure.axes for line in ax.lines if line.get_marker() == "x"]
    figure, _ = figure1(table(SINK | {"row_norm_ratio": (1.4,) + (np.inf,) * 5}), "decoder")
    crosses = [list(line.get_xdata()) for line in figure.axes[2].lines if line.get_marker() == "x"]
    assert crosses == [[0]] and "infinite at layer 1" in caption(figure)


def test_a_zero_row_in_the_embedding_does_not_end_the_angular_curve():
    rows = table(EVEN | {"angular_mu": (np.nan, 0.67, 0.7, 0.67, 0.66, 0.62)})
    figure, _ = figure1(rows, "decoder", measure="angular_mu")
    np.testing.assert_allclose(curve(figure.axes[0]), (np.nan, 0.67, 0.7, 0.67, 0.66, 0.62), rtol=1e-12)
    assert "NaN at layer 0" in caption(figure)
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "x"]


def test_the_angular_figures_stand_beside_the_papers(tmp_path: Path):
    both = pd.concat([table(EVEN, model="b"), table(EVEN, model="a/b")])
    names = {path.name for path in draw("sweep-lambda", both, tmp_path, measure="angular_mu") if path.suffix == ".png"}
    assert names == {"figure1-angular.png", "figure1-angular-a_b.png"}
    saved = pd.read_csv(tmp_path / "figure1-angular.csv")
    for measure in ("angular_mu", "angular_rank1_residual"):
        np.testing.assert_allclose(saved.loc[saved["measure"] == measure, "mean"], EVEN[measure], rtol=1e-12)
    assert len(saved) == 12
    names = {path.name for path in draw("ablate-gating", table(SINK), tmp_path, measure="angular_mu")}
    assert names == {f"figure3-angular.{kind}" for kind in ("png", "pdf", "csv")}


def test_an_angular_figure_names_its_measures():
    figure, _ = figure1(table(SINK), "decoder", measure="angular_mu")
    assert [ax.get_ylabel() for ax in figure.axes] == ["angular μ", "angular rank-1 residual", "row norm ratio"]
    np.testing.assert_allclose(curve(figure.axes[0]), SINK["angular_mu"], rtol=1e-12)
    assert "Angular μ: that of the rows scaled to norm 1" in caption(figure)
    figure, _ = figure3(table(EVEN), "decoder", measure="angular_mu")
    assert [ax.get_ylabel() for ax in figure.axes] == ["angular μ"] * 2
    for ax in figure.axes:
        np.testing.assert_allclose(curve(ax), EVEN["angular_mu"], rtol=1e-12)


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        ("sweep-lambda", "no rows of angular_mu or angular_rank1_residual"),
        ("ablate-gating", "no rows of angular_mu"),
        (
            "ablate-s4d",
            "no figure of angular_mu is drawn of 'ablate-s4d': only of sweep-lambda, measure, ablate-gating",
        ),
    ],
)
def test_what_has_no_angular_figure_says_so_in_one_line(tmp_path, experiment, says):
    old = {measure: SINK[measure] for measure in ("relative_mu", "rank1_residual")}
    with pytest.raises(FigureError, match=says) as caught:
        draw(experiment, table(old), tmp_path, measure="angular_mu")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_disagreement_is_explained_by_what_makes_it():
    """At the last layer: rows at +u and -u under lambda = -1, one massive row under lambda = 1."""
    ends = {"relative_mu": (0.9, 0.95), "rank1_residual": (0.8, 0.1), "row_norm_ratio": (1.5, 2.0)}
    rows = pd.concat([table(ends, lam=-1.0), table(ends | {"row_norm_ratio": (1.5, 80.0)}, lam=1.0)])
    disagree = "At the last layer the two measures disagree (relative μ > 0.5, rank-1 residual under half of it)"
    for figure, _ in (figure1(rows, "decoder"), figure2(rows)):
        words = caption(figure)
        assert f"Relative μ cannot see rows going to +u and −u. {disagree}: λ = −1." in words
        assert f"{disagree}, because one row of over 10 times the median norm decides both: λ = 1." in words
        assert words.count("+u") == 1


def test_angular_mu_cannot_see_two_directions_either():
    ends = {"angular_mu": (0.9, 0.95), "angular_rank1_residual": (0.8, 0.1), "row_norm_ratio": (1.5, 80.0)}
    words = caption(figure1(table(ends), "decoder", measure="angular_mu")[0])
    assert "Angular μ cannot see rows going to +u and −u." in words and "decides both" not in words
    assert "(angular μ > 0.5, angular rank-1 residual under half of it): λ = 1." in words


def test_nothing_is_said_of_a_ratio_that_rounding_decides():
    rows = table(SINK)
    rows.loc[(rows["measure"] == "row_norm_ratio") & (rows["excerpt"] == 0), "status"] = "unresolved"
    figure, _ = figure1(rows, "decoder")
    assert len(figure.axes) == 2 and "median norm" not in caption(figure)
