"""Table -> figure: one function per figure, each a pure function of the rows. How they look is in `style`.

Every function takes the long table (one measurement a row; columns in docs/table.md) and returns the figure and the
numbers it plots, one point a row: KEYS, then `mean`, `std` (sample standard deviation over excerpts), `n` (excerpts
behind the mean: those whose value is known), a count for each status, `floor`, `rounding` (the largest), and `drawn`:

    point      every excerpt has a number there
    at_floor   every excerpt is under the floor: an open triangle on it
    unresolved rounding may have moved an excerpt by more than is tolerated, so nothing is known of the mean: a gap in the
               curve, and hatched at the bottom of the panel
    masked     an excerpt overflowed, is NaN or infinite, so a mean of the others would mislead: the curve stops and is marked,
               or has a hole and is named

Values under the floor enter a mean as the floor itself, the most they can be.
"""

from __future__ import annotations

import itertools
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lscollapse.core.table import reads_pixels
from lscollapse.reports.figures import style, wording
from lscollapse.reports.figures.lines import (
    Curve,
    against_lambda,
    against_layer,
    lambda_axis,
    layer_curve,
    limits,
    unresolved_key,
)
from lscollapse.reports.figures.points import (
    default_reading,
    groups_of,
    is_gated,
    last_layer,
    of_model,
    shown_with,
    summarise,
    trained,
    with_columns,
)
from lscollapse.reports.figures.style import PALETTE, THIN, Key, Label, canvas, styled

ARMS = ((True, True), (False, True), (True, False), (False, False))  # gating, layernorm
DASHED = (0, (3, 1.5))  # random weights


def arm_look(gating: Any, layernorm: bool) -> tuple[str, str]:
    """Name and colour of one of the four arms."""
    gate = () if pd.isna(gating) else ("gate" if gating else "no gate",)
    name = " + ".join((*gate, "LN")) if layernorm else ", ".join((*gate, "no LN"))
    return name, PALETTE[2 * (not layernorm) + (not pd.isna(gating) and not gating)]


@styled
def figure1(
    rows: pd.DataFrame, model: str, yscale: str = "linear", note: str = "", measure: str = "relative_mu"
) -> tuple[Figure, pd.DataFrame]:
    """Figure 1 of arXiv:2410.10609v3: relative mu against layer, a curve per lambda; gate removed, LayerNorm on.

    Under it the rank-1 residual of the same curves, which also sees rows collapsing to +u and -u. With `measure`
    "angular_mu" both are the angular ones. Where a row is massive the row norm ratio is under them. `note` ends the
    caption. Raises FigureError when the table holds no such rows.
    """
    rows = default_reading(of_model(rows, model))
    rows = rows[rows["layernorm"].astype(bool)]
    rows = trained(rows if is_gated(rows).all() else rows[~is_gated(rows)])
    data = summarise(rows, shown_with(rows, wording.PAIRS[measure]))
    lams = list(data["lam"].unique())  # NaN for a schedule of lambdas
    curves = [
        ("per layer" if np.isnan(lam) else wording.number(lam), style.lambda_colour(lam, lams), "-", points)
        for (lam, _), points in groups_of(data, ["lam", "arm"])
    ]
    gating = data["gating"].iloc[0]
    title = ", ".join((model, *(() if pd.isna(gating) else (wording.gate_word(gating),)), "LayerNorm on"))
    panels = [(shown, yscale) for shown in data["measure"].unique()]
    return against_layer(curves, panels, title, [*wording.caption(rows, data), note], header="λ"), data


@styled
def figure2(rows: pd.DataFrame, yscale: str = "linear", note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 2: last-layer relative mu against lambda, LayerNorm on; transformers, Mamba and models of images in panels of their own.

    The rank-1 residual is the thin dashed line of the same colour. Raises FigureError without such rows.
    """
    rows = with_columns(rows)
    rows = rows[rows["layernorm"].astype(bool) & rows["lam"].notna()]
    rows = default_reading(trained(last_layer(rows)))
    data = summarise(rows, wording.PAIR)
    texts = rows.drop_duplicates("model").set_index("model")["text"]
    gated = data["gating"].notna()
    pixels = data["model"].isin([model for (model,), part in groups_of(rows, ["model"]) if reads_pixels(part)])
    panels = {"transformers": data[~gated & ~pixels], "Mamba": data[gated], "images": data[pixels]}
    panels = {title: part for title, part in panels.items() if len(part)}
    words = wording.caption(rows, data)
    if (data["drawn"] == "masked").any():
        words.append("A cross at the top: an excerpt overflowed or is NaN at that λ.")
    most_lines = max(len(part[["model", "gating"]].drop_duplicates()) for part in panels.values())
    figure, axes = canvas(len(panels), style.panel_height(4 * most_lines), [*words, note])
    axes = axes[:, 0]
    colours = itertools.cycle(PALETTE)
    labels: dict[Axes, list[Label]] = {ax: [] for ax in axes}
    for letter, ax, (heading, part) in zip("abc", axes, panels.items(), strict=False):
        style.title(ax, letter, heading)
        limits(ax, [part], yscale, "last-layer relative μ")
        for i, ((name, gating), line) in enumerate(groups_of(part, ["model", "gating"])):
            reads = "SMILES" if "smiles" in texts[name].lower() else texts[name].split(" (")[0]
            what = f"reads {reads}" if pd.isna(gating) else wording.gate_word(gating)
            label = "\n".join((name, *textwrap.wrap(what, 18)))
            labels[ax] += against_lambda(ax, line, label, next(colours), 0.98 - 0.04 * i)
        lambda_axis(ax, data["lam"])
    style.line_key(axes[0], [("relative μ", {"lw": 1.2}), ("rank-1 residual", THIN), *unresolved_key(data)])
    axes[-1].set_xlabel("λ (linear between −1 and 1)")
    style.label_ends(figure, labels)
    return figure, data


@styled
def figure3(
    rows: pd.DataFrame, model: str, note: str = "", measure: str = "relative_mu"
) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: gating x LayerNorm, relative mu (or angular mu) against layer at lambda = 1, on a linear and on a log axis.

    Random-init controls are dashed. Where a row is massive the row norm ratio is under them. Raises FigureError without
    such rows.
    """
    rows = default_reading(of_model(rows, model))
    rows = rows[rows["lam"] == 1]
    data = summarise(rows, shown_with(rows, (measure,)))
    curves: list[Curve] = []
    for (gating, layernorm, init), points in groups_of(data, ["gating", "layernorm", "init"]):
        name, colour = arm_look(gating, layernorm)
        if init == "trained":
            curves.append((name, colour, "-", points))
        else:  # named by its colour; only its overflow needs a label
            curves.append(("random weights," if wording.ends_with(points) else "", colour, DASHED, points))
    panels = [(measure, "linear"), *((shown, "log") for shown in data["measure"].unique())]
    inits: list[Key] = [("trained", {"lw": 1.2}), ("random weights", {"lw": 1.0, "ls": DASHED})]
    key = inits if data["init"].nunique() > 1 else []
    return against_layer(curves, panels, f"{model}, λ = 1", [*wording.caption(rows, data), note], key=key), data


@styled
def figure4(rows: pd.DataFrame, model: str, note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 4: skip (lambda = 1) or none (lambda = 0) x LayerNorm of S4D, relative mu and rank-1 residual against layer.

    Raises FigureError without such rows.
    """
    rows = of_model(rows, model)
    rows = trained(rows)
    rows = rows[rows["lam"].isin((0, 1))]
    data = summarise(rows, wording.PAIR)
    curves: list[Curve] = []
    for (lam, layernorm), points in groups_of(data, ["lam", "layernorm"]):
        name = ("skip" if lam else "no skip") + (" + LN" if layernorm else ", no LN")
        curves.append((name, PALETTE[2 * (not layernorm) + (lam == 0)], "-", points))
    panels = [("relative_mu", "linear"), ("relative_mu", "log"), ("rank1_residual", "linear")]
    words = [*wording.caption(rows, data), wording.nets_note(rows)]
    return against_layer(curves, panels, model, [*words, note]), data


@styled
def figure_readings(rows: pd.DataFrame, model: str, note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figures 1 and 3 under every reading of the paper: a row of panels a skip_site, a column a norm_site.

    The first column is the last layer against lambda (no gate, LayerNorm on; rank-1 residual dashed), the others gating
    x LayerNorm at lambda = 1 against layer. The arms with LayerNorm are the same for every norm_site. Raises
    FigureError without such rows.
    """
    rows = of_model(rows, model)
    rows = trained(rows)
    norm, last = rows["layernorm"].astype(bool), rows["layer"] == rows["layer"].max()
    swept = norm & last & ~is_gated(rows) & rows["lam"].notna()
    arms = (rows["lam"] == 1) & (rows["measure"] == "relative_mu")
    skip_sites = list(rows["skip_site"].unique())
    norm_sites = sorted(rows["norm_site"][arms & ~norm].unique(), key=lambda site: site == "both")  # both last
    rows = rows[swept | arms]
    data = summarise(rows, wording.PAIR)
    words = wording.caption(rows, data)
    if (data["drawn"] == "masked").any():
        words.append("A cross: at that λ, or in the next layer, an excerpt overflowed or is NaN.")
    widths = (1.3, *[1.0] * len(norm_sites))
    figure, axes = canvas(len(skip_sites), style.SMALL_PANEL, [*words, note], widths, style.PAGE)
    for row, skip_site in zip(axes, skip_sites, strict=True):
        here = data[data["skip_site"] == skip_site]
        line = here[here["layernorm"] & ~is_gated(here) & (here["layer"] == data["layer"].max())]
        limits(row[0], [line], "linear", f"λ on the {skip_site} skip\nrelative μ")
        against_lambda(row[0], line, "", arm_look(False, True)[1], 0.97)
        lambda_axis(row[0], data["lam"], room=0.08)
        here = here[(here["lam"] == 1) & (here["measure"] == "relative_mu")]
        for ax, norm_site in zip(row[1:], norm_sites, strict=True):
            part = here[here["layernorm"] | (here["norm_site"] == norm_site)]
            limits(ax, [part], "linear", "")
            ax.set_xlim(0, max(1, data["layer"].max()))
            for (gating, layernorm), points in groups_of(part, ["gating", "layernorm"]):
                layer_curve(ax, points, arm_look(gating, layernorm)[1])
    titles = [f"{model}, last layer", *(f"LN: {wording.NORMS.get(site, site)}" for site in norm_sites)]
    xlabels = ["λ (linear between −1 and 1)", *["layer at λ = 1"] * len(norm_sites)]
    lines = [(name, {"color": colour}) for name, colour in itertools.starmap(arm_look, ARMS)]
    style.name_panels(figure, axes, titles, xlabels, [*lines, ("rank-1 residual", THIN), *unresolved_key(data)])
    return figure, data
