"""Figures: the plotted numbers against plain numpy, the marks, the labels, and every edge a run can produce."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lscollapse.reports.figures.draw import draw
from lscollapse.reports.figures.paper import figure1, figure2, figure3, figure_readings
from lscollapse.reports.figures.points import FigureError
from lscollapse.reports.figures.style import lambda_colour

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


@pytest.fixture(scope="module")
def drawn1(sweep) -> tuple[Figure, pd.DataFrame]:
    return figure1(sweep, "mamba2-tiny", note="A note at the end.")


@pytest.fixture(scope="module")
def drawn2(sweep) -> tuple[Figure, pd.DataFrame]:
    return figure2(sweep)


@pytest.fixture(scope="module")
def drawn3(arms) -> tuple[Figure, pd.DataFrame]:
    return figure3(arms, "mamba2-tiny")


@pytest.fixture(scope="module")
def crossed() -> pd.DataFrame:
    """Two skip sites x three norm sites at lambda = 1, and three lambdas with LayerNorm, as all-readings measures them.

    With both norms gone the arm without a gate overflows at layer 3; the last excerpt of the gated one at layer 4.
    """
    parts = []
    for i, skip_site in enumerate(("residual", "mixer")):
        for j, norm_site in enumerate(("both", "mixer", "block")):
            for gating in (True, False):
                part = arm_rows(
                    lams=(1.0,), n_layers=4, excerpts=3, gating=gating, layernorm=False, seed=8 * i + 2 * j + gating,
                    overflow_at=3 if norm_site == "both" and not gating else None,
                )  # fmt: skip
                if norm_site == "both" and gating:
                    part.loc[(part["layer"] == 4) & (part["excerpt"] == 2), ["value", "status"]] = [np.nan, "overflow"]
                parts.append(part.assign(skip_site=skip_site, norm_site=norm_site, arm=f"{gating} {norm_site}"))
        for gating, lams in ((True, (1.0,)), (False, (-2.0, -0.5, 0.0, 0.5, 1.0, 2.0))):
            part = arm_rows(lams=lams, n_layers=4, excerpts=3, gating=gating, seed=50 + 2 * i + gating)
            parts.append(part.assign(skip_site=skip_site))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def drawn_readings(crossed) -> tuple[Figure, pd.DataFrame]:
    return figure_readings(crossed, "mamba2-tiny", note="A note at the end.")


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


def test_figure1_plots_the_mean_and_sample_std_over_excerpts(sweep, drawn1):
    _, data = drawn1
    for lam, layer, measure in [(-8.0, 48, "relative_mu"), (0.0, 17, "rank1_residual"), (0.5, 0, "relative_mu")]:
        some = sweep[(sweep["lam"] == lam) & (sweep["layer"] == layer) & (sweep["model"] == "mamba2-tiny")]
        x = values(some, measure=measure, gating=False)
        got = point(data, lam=lam, layer=layer, measure=measure)
        assert (len(x), got["n"], got["ok"], got["drawn"]) == (32, 32, 32, "point")
        assert got["mean"] == pytest.approx(x.sum() / 32, rel=1e-12)
        assert got["std"] == pytest.approx(np.sqrt(((x - x.sum() / 32) ** 2).sum() / 31), rel=1e-10)
    assert len(data) == 11 * 49 * 2 and set(data["gating"]) == {False}


def test_the_lines_drawn_are_the_numbers_saved(drawn1):
    figure, data = drawn1
    drawn = {
        line.get_color(): line.get_ydata()
        for line in figure.axes[0].lines
        if len(line.get_xdata()) == 49 and line.get_ls() == "-"
    }
    assert len(drawn) == 11
    for lam in LAMBDAS:
        one = data[(data["lam"] == lam) & (data["measure"] == "relative_mu")].sort_values("layer")
        np.testing.assert_array_equal(drawn[lambda_colour(lam, LAMBDAS)], one["mean"])


def test_figure1_labels_every_lambda_and_names_where_the_measures_disagree(drawn1):
    figure, _ = drawn1
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


def test_labels_do_not_overlap_and_nothing_leaves_the_page(drawn1, drawn2, drawn3):
    for figure in (drawn1[0], drawn2[0], drawn3[0]):
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


def test_figure2_reads_the_last_layer_of_each_model_and_says_who_reads_smiles(sweep, drawn2):
    figure, data = drawn2
    for model, layer in (("mamba2-tiny", 48), ("minilm-l6", 6), ("albert-smiles", 12)):
        assert set(data.loc[data["model"] == model, "layer"]) == {layer}
    some = sweep[(sweep["model"] == "albert-smiles") & (sweep["lam"] == 2.0) & (sweep["layer"] == 12)]
    got = point(data, model="albert-smiles", lam=2.0, measure="relative_mu")
    assert got["mean"] == pytest.approx(values(some, measure="relative_mu").sum() / 32, rel=1e-12)
    words = texts(figure)
    for label in ("albert-smiles reads SMILES", "minilm-l6 reads Wikipedia summaries", "mamba2-tiny gate removed"):
        assert label in words
    assert "mamba2-tiny full architecture" in words and "rank-1 residual" in words
    assert [ax.get_title("left") for ax in figure.axes] == [r"$\bf{a}$  transformers", r"$\bf{b}$  Mamba"]


def test_figure2_crosses_out_what_overflowed():
    rows = pd.concat([arm_rows(lams=(0.0, 1.0), n_layers=3), arm_rows(lams=(8.0,), n_layers=3, overflow_at=2)])
    figure, data = figure2(rows)
    got = point(data, lam=8.0, measure="relative_mu")
    assert (got["drawn"], got["overflow"], got["n"]) == ("masked", 32, 0)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[8.0]]
    assert "A cross at the top" in texts(figure)


def test_figure3_ends_an_overflowing_curve_in_a_mark(drawn3):
    figure, data = drawn3
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


def unresolved(rows: pd.DataFrame, where: pd.Series, rounding: float = 0.0187) -> pd.DataFrame:
    """The rows with numbers that rounding decides: they stay in `value`."""
    rounded = rows.assign(rounding=1e-7, value=rows["value"].where(~where, 0.123))
    rounded.loc[where, ["status", "rounding"]] = ["unresolved", rounding]
    return rounded


def strips(ax) -> list[tuple[float, float]]:
    """From where to where it is hatched."""
    found = [strip for strip in ax.collections if strip.get_gid() == "unresolved"]
    assert all(strip.get_hatch() for strip in found)
    return sorted(
        (path.vertices[:, 0].min(), path.vertices[:, 0].max()) for strip in found for path in strip.get_paths()
    )


def test_what_is_unresolved_is_a_gap_and_hatched():
    rows = arm_rows(lams=(0.0, 1.0), n_layers=8, excerpts=4)
    middle = (rows["lam"] == 1.0) & rows["layer"].between(3, 4) & (rows["excerpt"] == 2)  # one excerpt of four
    end = (rows["lam"] == 0.0) & (rows["layer"] >= 7) & (rows["measure"] == "relative_mu")
    figure, data = figure1(unresolved(rows, middle | end), "mamba2-tiny")
    got = point(data, lam=1.0, layer=3, measure="relative_mu")
    assert (got["drawn"], got["n"], got["ok"], got["unresolved"], got["rounding"]) == ("unresolved", 3, 3, 1, 0.0187)
    assert point(data, lam=1.0, layer=5, measure="relative_mu")["rounding"] == 1e-7
    gone = point(data, lam=0.0, layer=8, measure="relative_mu")
    assert (gone["drawn"], gone["n"], gone["unresolved"]) == ("unresolved", 0, 4) and np.isnan(gone["mean"])
    lines = {line.get_color(): line.get_ydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 9}
    for lam, gap in ((1.0, [3, 4]), (0.0, [7, 8])):
        curve = lines[lambda_colour(lam, [0.0, 1.0])]
        assert list(np.flatnonzero(np.isnan(curve))) == gap
        others = [layer for layer in range(9) if layer not in gap]
        means = [values(rows, lam=lam, layer=layer, measure="relative_mu").mean() for layer in others]
        np.testing.assert_allclose(curve[others], means, rtol=1e-12)  # after the gap it goes on
    assert strips(figure.axes[0]) == [(2.5, 4.5), (6.5, 8.0)] and strips(figure.axes[1]) == [(2.5, 4.5)]
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    words = texts(figure)
    assert "unresolved" in [text.get_text() for text in figure.axes[0].get_legend().texts]
    assert "a gap in the line: unresolved, rounding may move the value by more than 0.01." in words


def test_a_point_between_gaps_is_seen():
    rows = arm_rows(lams=(1.0,), n_layers=6, excerpts=2)
    figure, _ = figure1(unresolved(rows, rows["layer"].isin([3, 5, 6])), "mamba2-tiny")
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[4]]


def test_nothing_is_said_of_hatching_that_is_not_there(drawn1, drawn2):
    for figure, data in (drawn1, drawn2):
        assert "nresolved" not in texts(figure) and not any(map(strips, figure.axes))
        assert (data["unresolved"] == 0).all() and data["rounding"].isna().all()


def test_an_overflow_after_an_unresolved_stretch_is_named_and_not_marked_before_it():
    rows = arm_rows(lams=(1.0,), n_layers=6, excerpts=2, overflow_at=5)
    figure, data = figure1(unresolved(rows, rows["layer"].between(3, 4)), "mamba2-tiny")
    assert list(data["drawn"][:7]) == ["point"] * 3 + ["unresolved"] * 2 + ["masked"] * 2
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert "overflow at layer 5" in texts(figure) and strips(figure.axes[0]) == [(2.5, 4.5)]


def test_figure2_hatches_the_lambdas_that_are_unresolved():
    rows = arm_rows(lams=(-2.0, -1.0, 0.0, 1.0, 2.0), n_layers=3, excerpts=2)
    last = rows["layer"] == 3
    mu, rank1 = (rows["measure"] == name for name in ("relative_mu", "rank1_residual"))
    rows = unresolved(rows, last & (mu & (rows["lam"] == 2.0) | rank1 & (rows["lam"] == -1.0)))
    figure, data = figure2(rows)
    assert strips(figure.axes[0]) == [(-1.5, -0.5), (1.5, 2.0)]
    assert point(data, lam=2.0, measure="relative_mu")["drawn"] == "unresolved"
    assert point(data, lam=2.0, measure="rank1_residual")["drawn"] == "point"
    assert not [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [text.get_text() for text in figure.axes[0].get_legend().texts][-1] == "unresolved"


def test_readings_hatch_what_is_unresolved(crossed):
    where = (crossed["skip_site"] == "mixer") & (crossed["norm_site"] == "block") & crossed["layer"].between(1, 2)
    figure, _ = figure_readings(unresolved(crossed, where), "mamba2-tiny")
    assert [len(strips(ax)) for ax in figure.axes] == [0, 0, 0, 0, 0, 0, 2, 0]
    assert figure.legends[0].texts[-1].get_text() == "unresolved"


def all_nan() -> pd.DataFrame:
    return arm_rows(lams=(0.0, 1.0), n_layers=3, excerpts=2).assign(value=np.nan, status="nan")


EDGES = {
    "one excerpt": lambda: arm_rows(lams=(-1.0, 0.0, 2.0), n_layers=3, excerpts=1),
    "one lambda": lambda: arm_rows(lams=(1.0,), n_layers=3, excerpts=2),
    "one layer": lambda: arm_rows(lams=(1.0,), n_layers=1, excerpts=2).query("layer == 0"),
    "all nan": all_nan,
    "all unresolved": lambda: all_nan().assign(value=0.5, status="unresolved", rounding=2.0),
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


DRAWN = {  # each edge by the figures that it could upset; figure 1 has a log axis here, 2 a linear one, 3 both
    "all unresolved": "1 2 3", "one excerpt": "1 2", "one lambda": "2", "one layer": "1 3", "all nan": "2 3", "all below": "1 2",
    "1e-12": "3", "zeros called ok": "3", "no floor": "1", "overflow from the start": "1 2 3",
    "twenty lambdas": "1 2", "a schedule": "1",
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("edge", "number"), [(edge, n) for edge, ns in DRAWN.items() for n in ns.split()])
def test_every_edge_gives_a_figure(edge, number):
    rows = EDGES[edge]()
    if number == "3":
        figure, data = figure3(rows[rows["lam"] == rows["lam"].iloc[0]].assign(lam=1.0), "mamba2-tiny")
    else:
        figure, data = figure1(rows, "mamba2-tiny", "log") if number == "1" else figure2(rows)
    figure.draw_without_rendering()
    assert (data["n"] + data["overflow"] + data["nan"] + data["unresolved"] == rows["excerpt"].nunique()).all()


def test_a_crossed_table_is_read_at_the_default_sites():
    ours = arm_rows(lams=(1.0,), n_layers=2, excerpts=2)
    other = arm_rows(lams=(1.0,), n_layers=2, excerpts=2, seed=5).assign(
        skip_site="mixer", arm="no gate, LN, mixer skip"
    )
    _, data = figure1(pd.concat([other, ours]), "mamba2-tiny")
    assert set(data["skip_site"]) == {"residual"}


def test_draw_names_the_files_after_the_figures(crossed, tmp_path):
    small = [
        arm_rows(model, lams=(0.0, 1.0), n_layers=2, excerpts=2, gating=gating)
        for model, gating in (("a/b", None), ("mamba2-tiny", False))
    ]
    names = {path.name for path in draw("sweep-lambda", pd.concat(small), tmp_path) if path.suffix == ".png"}
    assert names == {"figure1.png", "figure1-a_b.png", "figure2.png"}
    assert pd.read_csv(tmp_path / "figure1.csv")["model"].unique() == ["mamba2-tiny"]
    names = {path.name for path in draw("ablate-gating", small[1], tmp_path)}
    assert names == {"figure3.png", "figure3.pdf", "figure3.csv"}
    one = crossed[(crossed["skip_site"] == "mixer") & (crossed["norm_site"] == "both")]
    assert {path.name for path in draw("all-readings", one, tmp_path)} == {
        "readings.png",
        "readings.pdf",
        "readings.csv",
    }


def test_readings_have_a_row_for_each_skip_site_and_a_panel_for_each_norm_site(drawn_readings):
    figure, _ = drawn_readings
    titles = [ax.get_title("left") for ax in figure.axes]
    assert titles[:4] == [
        r"$\bf{a}$  mamba2-tiny, last layer", r"$\bf{b}$  LN: the mixer's norm",
        r"$\bf{c}$  LN: the block's norm", r"$\bf{d}$  LN: both norms",
    ]  # fmt: skip
    assert titles[4:] == [rf"$\bf{{{letter}}}$" for letter in "efgh"]
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "λ on the residual skip\nrelative μ", "", "", "", "λ on the mixer skip\nrelative μ", "", "", "",
    ]  # fmt: skip
    assert {ax.get_ylim() for ax in figure.axes} == {(0, 1.03)}
    entries = [text.get_text() for text in figure.legends[0].texts]
    assert entries == ["gate + LN", "no gate + LN", "gate, no LN", "no gate, no LN", "rank-1 residual"]
    caption = figure._supxlabel.get_text().replace("\n", " ")
    assert "n = 3 excerpts of 128 tokens" in caption and "A cross:" in caption and "A note at the end." in caption


def test_readings_plot_the_rows_of_their_own_sites(crossed, drawn_readings):
    figure, _ = drawn_readings
    colours = {text.get_text(): line.get_color() for text, line in zip(
        figure.legends[0].texts, figure.legends[0].get_lines(), strict=True)}  # fmt: skip
    sites = itertools.product(("residual", "mixer"), ("sweep", "mixer", "block", "both"))
    panels = dict(zip(sites, figure.axes, strict=True))
    for (skip_site, norm_site), ax in panels.items():
        lines = {line.get_color(): line.get_ydata() for line in ax.lines if line.get_ls() == "-"}
        here = {"skip_site": skip_site, "measure": "relative_mu"}
        if norm_site == "sweep":
            last = {"layer": 4, "gating": False, "layernorm": True}
            means = [values(crossed, lam=lam, **here, **last).mean() for lam in (-2.0, -0.5, 0.0, 0.5, 1.0, 2.0)]
            np.testing.assert_allclose(lines[colours["no gate + LN"]], means, rtol=1e-12)
            continue
        for name in ("gate + LN", "no gate + LN", "gate, no LN", "no gate, no LN"):
            arm = {"lam": 1.0, "gating": name.startswith("gate"), "layernorm": name.endswith("+ LN")}
            site = {} if arm["layernorm"] else {"norm_site": norm_site}
            means = [values(crossed, layer=layer, **here, **arm, **site).mean() for layer in range(5)]
            np.testing.assert_allclose(lines[colours[name]], means, rtol=1e-12)


def test_readings_mark_what_overflowed(drawn_readings):
    figure, data = drawn_readings
    crosses = [sorted(line.get_xdata()[0] for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata()))
               for ax in figure.axes]  # fmt: skip
    assert crosses == [[], [], [], [2, 3]] * 2
    bad = data[data["drawn"] == "masked"]
    assert set(bad["norm_site"]) == {"both"} and sorted(bad["overflow"]) == [1, 1, 3, 3, 3, 3]


def test_readings_fit_the_page_and_name_only_what_fits_on_the_lambda_axis(drawn_readings):
    figure, _ = drawn_readings
    figure.draw_without_rendering()
    page = figure.bbox
    assert page.width / figure.dpi * 25.4 == pytest.approx(180)
    boxes = [ax.title.get_window_extent() for ax in figure.axes] + [
        ax._left_title.get_window_extent() for ax in figure.axes
    ]
    boxes += [figure.legends[0].get_window_extent(), figure._supxlabel.get_window_extent()]
    assert all(box.x0 >= 0 and box.x1 <= page.x1 and box.y0 >= 0 and box.y1 <= page.y1 for box in boxes)
    legend = figure.legends[0].get_window_extent()
    for left, right in itertools.pairwise(figure.axes[:4]):
        assert left._left_title.get_window_extent().x1 < right._left_title.get_window_extent().x0
        assert left._left_title.get_window_extent().y1 < legend.y0
    for ax in figure.axes[4:]:
        names = [tick for tick in ax.get_xticklabels() if tick.get_text()]
        for left, right in itertools.pairwise(tick.get_window_extent() for tick in names):
            assert left.x1 < right.x0
    assert [tick.get_text() for tick in figure.axes[4].get_xticklabels()] == ["−2", "", "0", "", "1", "2"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda rows: figure1(rows, "mamba3"), "no rows of model 'mamba3'"),
        (lambda rows: figure1(rows.drop(columns="floor"), "mamba2-tiny"), "no column floor"),
        (lambda rows: figure3(rows.assign(lam=3.0), "mamba2-tiny"), "no rows of relative_mu"),
        (lambda rows: figure_readings(rows.assign(lam=np.nan), "mamba2-tiny"), "no rows of relative_mu"),
        (lambda rows: figure1(pd.concat([rows, rows.assign(dtype="bfloat16")]), "mamba2-tiny"), "dtype vary"),
        (lambda rows: draw("check-identity", rows, "nowhere"), "no figure is drawn of 'check-identity'"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_drawn_is_one_clear_line(wrong, says):
    with pytest.raises(FigureError, match=says) as caught:
        wrong(arm_rows(lams=(1.0,), n_layers=2, excerpts=2))
    assert "\n" not in str(caught.value)
