"""Figures: the plotted numbers against plain numpy, the marks, the labels, and every edge a run can produce."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lscollapse.figures import FigureError, draw, figure1, figure2, figure3, lambda_colour, save, spread

LAMBDAS = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
Profile = Callable[[float, np.ndarray], np.ndarray]


def decay(lam: float, x: np.ndarray) -> np.ndarray:
    """x in 0..1 through the depth; small |lam| and lam near 1 fall, negative lambda stays above positive."""
    last = 1 - np.exp(-((0.25 + abs(lam - 0.45)) ** 0.6) * (1.2 if lam < 0 else 0.8))
    return last + (0.98 - last) * np.exp(-6 * x)


def arm_rows(
    model: str = "mamba2-tiny", lams=LAMBDAS, n_layers: int = 48, excerpts: int = 32, profile: Profile = decay,
    gating: bool | None = False, layernorm: bool = True, init: str = "trained",
    text: str = "Wikipedia summaries (packaged, en)", floor: float = 1e-6, overflow_at: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    rng = np.random.default_rng(seed)
    layers = np.arange(n_layers + 1)
    parts = []
    for lam in lams:
        mean = profile(lam, layers / n_layers)
        spread_ = rng.normal(0, 0.06, (excerpts, 1)) + rng.normal(0, 0.01, (excerpts, n_layers + 1))
        relative = np.clip(mean * np.exp(spread_), 0, 1)
        rank1 = relative * (0.3 if lam <= -4 else 0.95)
        for measure, values in (("relative_mu", relative), ("rank1_residual", rank1)):
            parts.append(pd.DataFrame({
                "lam": lam, "measure": measure, "excerpt": np.repeat(np.arange(excerpts), n_layers + 1),
                "layer": np.tile(layers, excerpts), "value": values.ravel(),
            }))  # fmt: skip
    rows = pd.concat(parts, ignore_index=True)
    rows["status"] = np.where(rows["value"] < floor, "below_floor", "ok")
    if overflow_at is not None:
        late = rows["layer"] >= overflow_at
        rows.loc[late, "status"] = "overflow"
        rows.loc[late, "value"] = np.nan
    gate = pd.array([pd.NA if gating is None else gating] * len(rows), dtype="boolean")
    return rows.assign(
        model=model, revision="", checkpoint_sha256="0", arm=[f"lam={v:g}" for v in rows["lam"]], gating=gate,
        layernorm=layernorm, skip_site="residual", norm_site="both", init=init, text=text, tokenizer="bert",
        dtype="float32", backend="cpu", seed=0, n_tokens=128, floor=floor,
        log10=np.log10(rows["value"].where(rows["value"] > 0)),
    )  # fmt: skip


def albert(lam: float, x: np.ndarray) -> np.ndarray:
    """Collapses exponentially at lam = 0, less with |lam|."""
    return 0.98 * np.exp(-20 * x / (1 + 15 * abs(lam)) * (1 if lam >= 0 else 0.6))


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    """Eleven lambdas, 32 excerpts, three models; 48 layers of Mamba-2 with and without its gate."""
    return pd.concat(
        [
            arm_rows(),
            arm_rows(gating=True, profile=lambda lam, x: 0.98 - (0.1 + 0.5 * np.exp(-abs(lam))) * x, seed=1),
            arm_rows("minilm-l6", n_layers=6, gating=None, profile=albert, seed=2),
            arm_rows(
                "albert-smiles", n_layers=12, gating=None, profile=albert, text="Chemical reactions (SMILES, packaged)"
            ),
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def arms() -> pd.DataFrame:
    """The four arms at lam = 1, those without a norm overflowing, each with a random-init control."""
    kinds: list[tuple[bool, bool, Profile, int | None]] = [
        (True, True, lambda lam, x: 0.98 - 0.08 * x, None),
        (False, True, lambda lam, x: 0.3 + 0.68 * np.exp(-5 * x), None),
        (False, False, lambda lam, x: 0.98 - 2.4 * x * np.exp(-4 * x) + 0.5 * x**2, 41),
        (True, False, lambda lam, x: 0.97 + 0.025 * (x > 0.8), 44),
    ]
    parts = []
    for i, (gating, layernorm, profile, overflow) in enumerate(kinds):
        common = {"lams": (1.0,), "gating": gating, "layernorm": layernorm, "overflow_at": overflow}
        parts.append(arm_rows(profile=profile, seed=i, **common))
        control: Profile = lambda lam, x, p=profile: p(lam, x) * (1 - 0.15 * x)  # noqa: E731
        parts.append(arm_rows(profile=control, init="random", seed=9 + i, **common))
    return pd.concat(parts, ignore_index=True)


def values(rows: pd.DataFrame, **where: object) -> np.ndarray:
    """Plain numpy selection, in row order."""
    keep = np.ones(len(rows), bool)
    for column, value in where.items():
        keep &= np.array([v is value or v == value for v in rows[column].tolist()])
    return rows["value"].to_numpy()[keep]


def point(data: pd.DataFrame, **where: object) -> pd.Series:
    for column, value in where.items():
        data = data[data[column] == value]
    assert len(data) == 1
    return data.iloc[0]


def texts(figure) -> str:
    """Every text of the figure, the caption's line breaks undone."""
    figure.draw_without_rendering()
    inside = [text for ax in figure.axes for text in [*ax.texts, *ax.get_xticklabels(), ax._left_title]]
    words = [*inside, figure._supxlabel, *(t for ax in figure.axes if ax.get_legend() for t in ax.get_legend().texts)]
    return "\n".join(t.get_text().replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ") for t in words)


def test_figure1_plots_the_mean_and_sample_std_over_excerpts(sweep):
    _, data = figure1(sweep, "mamba2-tiny")
    for lam, layer, measure in [(-8.0, 48, "relative_mu"), (0.0, 17, "rank1_residual"), (0.5, 0, "relative_mu")]:
        some = sweep[(sweep["lam"] == lam) & (sweep["layer"] == layer) & (sweep["model"] == "mamba2-tiny")]
        x = values(some, measure=measure, gating=False)
        got = point(data, lam=lam, layer=layer, measure=measure)
        assert (len(x), got["n"], got["ok"], got["drawn"]) == (32, 32, 32, "point")
        assert got["mean"] == pytest.approx(x.sum() / 32, rel=1e-12)
        assert got["std"] == pytest.approx(np.sqrt(((x - x.sum() / 32) ** 2).sum() / 31), rel=1e-10)
    assert len(data) == 11 * 49 * 2 and set(data["gating"]) == {False}


def test_the_lines_drawn_are_the_numbers_saved(sweep):
    figure, data = figure1(sweep, "mamba2-tiny")
    drawn = {
        line.get_color(): line.get_ydata()
        for line in figure.axes[0].lines
        if len(line.get_xdata()) == 49 and line.get_ls() == "-"
    }
    assert len(drawn) == 11
    for lam in LAMBDAS:
        one = data[(data["lam"] == lam) & (data["measure"] == "relative_mu")].sort_values("layer")
        np.testing.assert_array_equal(drawn[lambda_colour(lam, LAMBDAS)], one["mean"])


def test_figure1_labels_every_lambda_and_names_where_the_measures_disagree(sweep):
    figure, _ = figure1(sweep, "mamba2-tiny", note="A note at the end.")
    for ax in figure.axes:
        labels = {text.get_text() for text in ax.texts}
        assert {"−8", "−4", "−2", "−1", "−0.5", "0", "0.5", "1", "2", "4", "8", "λ"} <= labels
    words = texts(figure)
    assert "(relative μ > 0.5, rank-1 residual under half of it): λ = −8, −4." in words
    assert "Wikipedia summaries (packaged, en), n = 32 excerpts of 128 tokens, float32." in words
    assert "gate removed" in words and "A note at the end." in words


def test_nothing_is_said_of_a_disagreement_that_is_not_there():
    figure, _ = figure1(arm_rows(lams=(-1.0, 1.0), excerpts=2), "mamba2-tiny")
    assert "disagree" not in texts(figure)


def test_labels_do_not_overlap_and_nothing_leaves_the_page(sweep, arms):
    for figure in (figure1(sweep, "minilm-l6", "log")[0], figure2(sweep)[0], figure3(arms, "mamba2-tiny")[0]):
        figure.draw_without_rendering()
        page = figure.bbox
        for ax in figure.axes:
            boxes = sorted(
                (Text.get_window_extent(t) for t in ax.texts if t.get_text() != "floor"), key=lambda box: box.y0
            )
            for below, above in itertools.pairwise(boxes):
                assert above.y0 >= below.y1 - 5  # pixels at 100 dpi; boxes hold the room of descenders
            assert all(box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1 for box in boxes)
        caption = figure._supxlabel.get_window_extent()
        assert caption.x0 >= 0 and caption.x1 <= page.x1 and caption.y0 >= 0


def test_figure2_reads_the_last_layer_of_each_model_and_says_who_reads_smiles(sweep):
    figure, data = figure2(sweep)
    for model, layer in (("mamba2-tiny", 48), ("minilm-l6", 6), ("albert-smiles", 12)):
        assert set(data.loc[data["model"] == model, "layer"]) == {layer}
    some = sweep[(sweep["model"] == "albert-smiles") & (sweep["lam"] == 2.0) & (sweep["layer"] == 12)]
    got = point(data, model="albert-smiles", lam=2.0, measure="relative_mu")
    assert got["mean"] == pytest.approx(values(some, measure="relative_mu").sum() / 32, rel=1e-12)
    words = texts(figure)
    for label in ("albert-smiles reads SMILES", "minilm-l6 reads Wikipedia summaries", "mamba2-tiny gate removed"):
        assert label in words
    assert "mamba2-tiny full architecture" in words and "rank-1 residual" in words
    assert [ax.get_title("left") for ax in figure.axes] == [r"$\bf{a}$  transformers", r"$\bf{b}$  Mamba-2"]


def test_figure2_crosses_out_what_overflowed():
    rows = pd.concat([arm_rows(lams=(0.0, 1.0), n_layers=3), arm_rows(lams=(8.0,), n_layers=3, overflow_at=2)])
    figure, data = figure2(rows)
    got = point(data, lam=8.0, measure="relative_mu")
    assert (got["drawn"], got["overflow"], got["n"]) == ("masked", 32, 0)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[8.0]]
    assert "A cross at the top" in texts(figure)


def test_figure3_ends_an_overflowing_curve_in_a_mark(arms):
    figure, data = figure3(arms, "mamba2-tiny")
    words = texts(figure)
    assert "no gate, no LN overflow at layer 41" in words and "gate, no LN overflow at layer 44" in words
    assert "gate + LN" in words and "no gate + LN" in words and "random weights" in words
    for ax in figure.axes:
        ends = sorted(line.get_xdata()[0] for line in ax.lines if line.get_marker() == "x")
        assert ends == [40, 40, 43, 43]
    dashed = [line for line in figure.axes[0].lines if line.is_dashed()]
    assert len(dashed) == 4
    gone = data[(data["gating"] == False) & ~data["layernorm"] & (data["layer"] >= 41)]  # noqa: E712
    assert set(gone["drawn"]) == {"masked"} and (gone["overflow"] == 32).all() and gone["mean"].isna().all()
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log"]


def test_one_bad_excerpt_masks_the_point_and_is_counted():
    rows = arm_rows(lams=(1.0,), n_layers=4, excerpts=8)
    bad = (rows["excerpt"] == 3) & (rows["layer"] >= 3)
    rows.loc[bad, ["value", "status"]] = [np.inf, "overflow"]
    figure, data = figure1(rows, "mamba2-tiny")
    got = point(data, layer=3, measure="relative_mu")
    assert (got["drawn"], got["n"], got["ok"], got["overflow"]) == ("masked", 7, 7, 1)
    others = rows[(rows["layer"] == 3) & ~bad]
    assert got["mean"] == pytest.approx(values(others, measure="relative_mu").sum() / 7)
    assert "1 overflow at layer 3 (1 of 8)" in texts(figure)


def test_below_the_floor_is_drawn_on_the_floor():
    rows = arm_rows(lams=(0.0,), n_layers=4, excerpts=4, profile=lambda lam, x: 10.0 ** (-12 * x), floor=1e-6)
    figure, data = figure1(rows, "mamba2-tiny", "log")
    data = data[data["measure"] == "relative_mu"].set_index("layer")
    assert list(data.loc[[3, 4], "mean"]) == [1e-6, 1e-6] and list(data.loc[[3, 4], "drawn"]) == ["at_floor"] * 2
    triangles = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert {3, 4} <= set(triangles[0].get_xdata()) and "Triangles" in texts(figure)
    assert "floor" in {text.get_text() for text in figure.axes[0].texts}
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() >= 1e-6  # the band of one standard deviation stops at the floor


def test_a_wide_band_on_a_log_axis_stops_at_the_floor():
    rows = arm_rows(lams=(1.0,), n_layers=2, excerpts=4, floor=1e-5)
    rows["value"] = np.where(rows["excerpt"] == 0, 0.9, 2e-5)  # standard deviation twice the mean
    figure, data = figure1(rows, "mamba2-tiny", "log")
    assert (data["std"] > data["mean"]).all()
    assert figure.axes[0].collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(1e-5)


def all_nan() -> pd.DataFrame:
    return arm_rows(lams=(0.0, 1.0), n_layers=3, excerpts=2).assign(value=np.nan, status="nan")


EDGES = {
    "one excerpt": lambda: arm_rows(lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=1),
    "one lambda": lambda: arm_rows(lams=(1.0,), n_layers=3, excerpts=2),
    "one layer": lambda: arm_rows(lams=(1.0,), n_layers=1, excerpts=2).query("layer == 0"),
    "all nan": all_nan,
    "all below": lambda: arm_rows(lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=2, profile=lambda lam, x: 1e-9 + 0 * x),
    "1e-12": lambda: arm_rows(
        lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=2, profile=lambda lam, x: 10.0 ** (-12 * x), floor=1e-15
    ),
    "zeros called ok": lambda: arm_rows(lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=2).assign(value=0.0),
    "no floor": lambda: arm_rows(lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=2, floor=np.nan),
    "overflow from the start": lambda: arm_rows(lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=2, overflow_at=0),
    "twenty lambdas": lambda: arm_rows(lams=tuple(np.linspace(-8, 8, 20)), n_layers=3, excerpts=2),
    "a schedule": lambda: arm_rows(lams=(1.0,), n_layers=3, excerpts=2).assign(lam=np.nan, arm="no gate, LN"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("yscale", ["linear", "log"])
def test_every_edge_gives_a_figure(edge, yscale):
    rows = EDGES[edge]()
    made = [figure1(rows, "mamba2-tiny", yscale)]
    if edge != "a schedule":
        made += [figure2(rows, yscale), figure3(rows, "mamba2-tiny", lam=rows["lam"].iloc[0])]
    for figure, data in made:
        figure.draw_without_rendering()
        assert (data["n"] + data["overflow"] + data["nan"] == rows["excerpt"].nunique()).all()


def test_a_crossed_table_is_read_at_the_default_sites():
    ours = arm_rows(lams=(1.0,), n_layers=2, excerpts=2)
    other = arm_rows(lams=(1.0,), n_layers=2, excerpts=2, seed=5).assign(
        skip_site="mixer", arm="no gate, LN, mixer skip"
    )
    _, data = figure1(pd.concat([other, ours]), "mamba2-tiny")
    assert set(data["skip_site"]) == {"residual"}


def test_two_saves_give_the_same_bytes(sweep, tmp_path):
    small = sweep[(sweep["excerpt"] < 3) & sweep["lam"].isin((-8.0, 0.0, 1.0))]
    first = save(*figure2(small), tmp_path / "a", "figure2")
    assert {path.name for path in first} == {"figure2.png", "figure2.pdf", "figure2.csv"}
    again = save(*figure2(small), tmp_path / "b", "figure2")
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert b"CreationDate" not in (tmp_path / "a" / "figure2.pdf").read_bytes()
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]


def test_the_csv_holds_the_plotted_numbers(sweep, tmp_path):
    figure, data = figure2(sweep[(sweep["excerpt"] < 3) & sweep["lam"].isin((0.0, 1.0))])
    save(figure, data, tmp_path, "figure2")
    back = pd.read_csv(tmp_path / "figure2.csv")
    np.testing.assert_array_equal(back["mean"], data["mean"])
    assert list(back["drawn"]) == list(data["drawn"])


def test_draw_names_the_files_after_the_figures(sweep, arms, tmp_path):
    small = sweep[(sweep["excerpt"] < 2) & sweep["lam"].isin((0.0, 1.0))]
    names = {path.name for path in draw("sweep-lambda", small, tmp_path) if path.suffix == ".png"}
    assert names == {"figure1.png", "figure1-minilm-l6.png", "figure1-albert-smiles.png", "figure2.png"}
    assert {path.name for path in draw("ablate-gating", arms, tmp_path)} == {
        "figure3.png",
        "figure3.pdf",
        "figure3.csv",
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda rows: figure1(rows, "mamba3"), "no rows of model 'mamba3'"),
        (lambda rows: figure1(rows.drop(columns="floor"), "mamba2-tiny"), "no column floor"),
        (lambda rows: figure3(rows, "mamba2-tiny", lam=3.0), "no rows of relative_mu"),
        (lambda rows: figure1(pd.concat([rows, rows.assign(dtype="bfloat16")]), "mamba2-tiny"), "dtype vary"),
        (lambda rows: draw("check-identity", rows, "nowhere"), "no figure is drawn of 'check-identity'"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_drawn_is_one_clear_line(wrong, says):
    with pytest.raises(FigureError, match=says) as caught:
        wrong(arm_rows(lams=(1.0,), n_layers=2, excerpts=2))
    assert "\n" not in str(caught.value)


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
