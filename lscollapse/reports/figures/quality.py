"""Table -> figure: does the lambda that stops collapse leave the model useful? Last-layer relative mu against loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lscollapse.core.table import COLLAPSED
from lscollapse.reports.figures import style, wording
from lscollapse.reports.figures.points import KEYS, FigureError, groups_of, has_value, is_gated, last_layer, summarise
from lscollapse.reports.figures.style import Label, canvas, styled

WIDE = 3.0  # a loss axis that spans more than this factor is logarithmic
POINT = tuple(key for key in KEYS if key not in ("measure", "layer"))


@styled
def figure_quality(rows: pd.DataFrame, note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Loss in nats per token against last-layer relative mu, a point per lambda; a panel per model and gate, LayerNorm on.

    Crosses are one standard deviation over excerpts. The dashed horizontal line is the untouched model (lambda = 1, with
    its gate), the vertical one where a layer counts as collapsed. `note` ends the caption.

    Returns:
        The figure, and the numbers it plots: a point a row, `relative_mu` and `lm_loss` with `_std` and `_rounding`, `n`,
        `unresolved` (excerpts), and `drawn` (False where an excerpt overflowed or is unresolved).

    Raises:
        FigureError: the table has no rows of `lm_loss`.
    """
    if not (rows["measure"] == "lm_loss").any():
        raise FigureError("no rows of lm_loss: measure them with --quality")
    rows = rows[rows["model"].isin(rows.loc[rows["measure"] == "lm_loss", "model"]) & (rows["init"] == "trained")]
    rows = last_layer(rows[rows["layernorm"].astype(bool) & rows["lam"].notna()])
    data = _points(rows)
    parts = [data[data["model"] == model] for model in dict.fromkeys(rows["model"])]
    data = pd.concat([part.sort_values("gating", ascending=False, kind="stable") for part in parts], ignore_index=True)
    panels = groups_of(data, ["model", "gating"])
    unresolved = data["unresolved"] > 0
    why = {"an excerpt overflowed": ~data["drawn"] & ~unresolved, "rounding leaves it unresolved": unresolved}
    words = [
        wording.describe(rows),
        "Crosses: mean and one standard deviation over excerpts.",
        "Dashed: the untouched model's loss, and the relative μ under which a layer counts as collapsed.",
        *(
            f"No point, because {words}: {panel_name(*key)}: {', '.join(map(wording.number, part['lam']))}."
            for words, missing in why.items()
            for key, part in groups_of(data[missing], ["model", "gating"])
        ),
        note,
    ]
    figure, axes = canvas(len(panels), style.panel_height(max(len(part) for _, part in panels)), words)
    labels: dict[Axes, list[Label]] = {}
    for letter, ax, (key, part) in zip("abcdefgh", axes[:, 0], panels, strict=False):
        style.title(ax, letter, panel_name(*key))
        labels[ax] = _panel(ax, part[part["drawn"]], data[data["model"] == key[0]])
    axes[-1, 0].set_xlabel("last-layer relative μ")
    style.label_ends(figure, labels, header="λ")
    return figure, data


def panel_name(model: str, gating: Any) -> str:
    return model if pd.isna(gating) else f"{model}, {wording.gate_word(gating)}"


def _points(rows: pd.DataFrame) -> pd.DataFrame:
    """Relative mu and loss of every arm side by side."""
    mu, loss = (summarise(rows, (measure,)).set_index(list(POINT)) for measure in ("relative_mu", "lm_loss"))
    loss = loss.reindex(mu.index)
    names = ("mean", "std", "rounding")
    parts = [part[[*names]].set_axis([measure, f"{measure}_std", f"{measure}_rounding"], axis=1)
             for measure, part in (("relative_mu", mu), ("lm_loss", loss))]  # fmt: skip
    unresolved = np.fmax(mu["unresolved"], loss["unresolved"]).astype(int)
    drawn = has_value(mu) & (loss["drawn"] == "point")
    return pd.concat(parts, axis=1).assign(n=loss["n"], unresolved=unresolved, drawn=drawn).reset_index()


def _panel(ax: Axes, part: pd.DataFrame, whole: pd.DataFrame) -> list[Label]:
    """The points of one panel; `whole` are those of its model, which share the loss axis. Returns their labels."""
    lams = list(whole["lam"].unique())
    shown = whole[whole["drawn"]]
    if shown.empty:
        ax.text(0.5, 0.5, "no known value", transform=ax.transAxes, ha="center", va="center", color="0.4")
        return []
    low, high = shown["lm_loss"].min(), (shown["lm_loss"] + shown["lm_loss_std"].fillna(0)).max()
    ax.set(xlim=(0, 1.03), ylabel="loss, nats per token")
    if high > WIDE * low:
        ax.set_yscale("log")
        style.log_ticks(ax, few_decades=True)
    ax.set_ylim(0.9 * low, 1.05 * high)
    untouched = shown[(shown["lam"] == 1) & (shown["gating"].isna() | is_gated(shown))]
    rule: dict[str, Any] = {"color": "0.45", "lw": 0.7, "ls": (0, (4, 3)), "zorder": 1}
    ax.axvline(COLLAPSED, **rule)
    for loss in untouched["lm_loss"]:
        ax.axhline(loss, **rule)
    labels: list[Label] = []
    for point in part.to_dict("records"):
        x, y, colour = point["relative_mu"], point["lm_loss"], style.lambda_colour(point["lam"], lams)
        spread: dict[str, Any] = {"xerr": point["relative_mu_std"], "yerr": point["lm_loss_std"], "elinewidth": 0.6}
        ax.errorbar(x, y, fmt="o", ms=3, color=colour, **spread)
        labels.append((x, y, wording.number(point["lam"]), colour))
    return labels
