"""Loss against collapse: the plotted numbers against numpy, panels, labels, and excerpts that overflowed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from lscollapse.reports.figures.points import FigureError
from lscollapse.reports.figures.quality import figure_quality
from tests.unit.reports.figures.test_paper import arm_rows

LAMS = (-2.0, 0.0, 1.0, 2.0)


def with_loss(rows: pd.DataFrame, seed: int, scale: float = 1.0) -> pd.DataFrame:
    last = rows[(rows["layer"] == rows["layer"].max()) & (rows["measure"] == "relative_mu")]
    loss = scale * np.random.default_rng(seed).uniform(4, 9, len(last))
    return pd.concat([rows, last.assign(measure="lm_loss", value=loss, status="ok", floor=np.nan)], ignore_index=True)


def table() -> pd.DataFrame:
    small = {"lams": LAMS, "n_layers": 4, "excerpts": 5}
    return pd.concat(
        [
            with_loss(arm_rows("gated", gating=True, **small), 1),
            with_loss(arm_rows("gated", gating=False, seed=1, **small), 2, 5.0),
            arm_rows("no-head", gating=None, **small),
            with_loss(arm_rows("plain", gating=None, seed=2, **small), 3),
        ],
        ignore_index=True,
    )


def texts(figure: Figure, panel: int) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


def test_a_point_per_lambda_and_a_panel_per_model_and_gate() -> None:
    rows = table()
    figure, data = figure_quality(rows, note="A note.")
    assert [ax.get_title("left").split("  ")[1] for ax in figure.axes] == [
        "gated, full architecture", "gated, gate removed", "plain",
    ]  # fmt: skip
    assert len(data) == 3 * len(LAMS) and data["drawn"].all() and (data["n"] == 5).all()
    for point in data.itertuples():
        own = rows[(rows["model"] == point.model) & (rows["lam"] == point.lam) & (rows["layer"] == 4)]
        if not pd.isna(point.gating):
            own = own[own["gating"] == point.gating]
        for measure in ("relative_mu", "lm_loss"):
            values = own.loc[own["measure"] == measure, "value"].to_numpy()
            assert getattr(point, measure) == pytest.approx(values.mean())
            assert getattr(point, f"{measure}_std") == pytest.approx(values.std(ddof=1))
    for panel, ax in enumerate(figure.axes):
        drawn = {tuple(np.round(bars.lines[0].get_xydata()[0], 9)) for bars in ax.containers}
        part = (
            data.iloc[4 * panel : 4 * panel + 4]
            if panel == 2
            else data[(data["model"] == "gated") & (data["gating"] == (panel == 0))]
        )
        assert drawn == {tuple(np.round((p.relative_mu, p.lm_loss), 9)) for p in part.itertuples()}
        assert {"−2", "0", "1", "2"} <= set(texts(figure, panel))
        assert ax.get_xlim() == (0, 1.03)
    assert figure.axes[0].get_yscale() == figure.axes[1].get_yscale() == "log"  # 4 to 45 nats
    assert figure.axes[2].get_yscale() == "linear"
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    caption = figure.get_supxlabel()
    assert "A note." in caption and "overflow" not in caption and "no-head" not in caption


def test_arms_that_overflowed_are_named_instead_of_drawn() -> None:
    rows = table()
    bad = (rows["model"] == "plain") & (rows["lam"] == 2) & (rows["layer"] == 4) & (rows["excerpt"] == 0)
    rows.loc[bad, ["status", "value"]] = "overflow", np.nan
    figure, data = figure_quality(rows)
    assert not data[(data["model"] == "plain") & (data["lam"] == 2)]["drawn"].any()
    assert len(figure.axes[2].containers) == 3
    assert "No point, because an excerpt overflowed: plain: 2." in figure.get_supxlabel().replace("\n", " ")


def test_arms_that_are_unresolved_are_named_instead_of_drawn() -> None:
    rows = table().assign(rounding=1e-6)
    plain = (rows["model"] == "plain") & (rows["layer"] == 4)
    for lam, measure in ((2.0, "lm_loss"), (0.0, "relative_mu")):
        bad = plain & (rows["lam"] == lam) & (rows["measure"] == measure) & (rows["excerpt"] < 2)
        rows.loc[bad, ["status", "rounding"]] = "unresolved", 0.3
    figure, data = figure_quality(rows)
    part = data[data["model"] == "plain"].set_index("lam")
    assert part["drawn"].to_dict() == {-2.0: True, 0.0: False, 1.0: True, 2.0: False}
    assert part["unresolved"].to_dict() == {-2.0: 0, 0.0: 2, 1.0: 0, 2.0: 2}
    assert (part.loc[2.0, "lm_loss_rounding"], part.loc[2.0, "relative_mu_rounding"]) == (0.3, 1e-6)
    assert len(figure.axes[2].containers) == 2
    caption = figure.get_supxlabel().replace("\n", " ")
    assert "No point, because rounding leaves it unresolved: plain: 0, 2." in caption and "overflow" not in caption


def test_a_panel_of_which_nothing_is_known() -> None:
    rows = table()
    rows.loc[rows["model"] == "plain", "status"] = "unresolved"
    figure, _ = figure_quality(rows)
    assert texts(figure, 2) == ["no known value"]


def test_a_table_without_losses_is_refused() -> None:
    with pytest.raises(FigureError, match="no rows of lm_loss: measure them with --quality"):
        figure_quality(arm_rows(lams=LAMS, n_layers=2, excerpts=2))
