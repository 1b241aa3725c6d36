"""Table -> figure: one function per figure, each a pure function of the rows. How they look is in drawing.py.

Every function takes the long table (one measurement a row; columns in docs/table.md) and returns the figure and the
numbers it plots, one point a row: KEYS, then `mean`, `std` (sample standard deviation over excerpts), `n` (excerpts
behind the mean), a count for each status, `floor`, and `drawn`:

    point      every excerpt has a number there
    at_floor   no excerpt is resolved: an open triangle on the floor
    masked     an excerpt overflowed or is NaN, so a mean of the others would mislead: the curve stops and is marked

Values under the floor enter a mean as the floor itself, the most they can be.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lscollapse.core.table import reads_pixels
from lscollapse.reports.figures import style
from lscollapse.reports.figures.style import PALETTE, STATUSES, THIN, Curve, Label, canvas, limits, styled

KEYS = ("model", "init", "arm", "gating", "layernorm", "skip_site", "norm_site", "lam", "measure", "layer")
NEEDED = (*KEYS, "text", "dtype", "excerpt", "n_tokens", "value", "status", "floor")
SITES = {
    "residual": "the skip around the mixer",
    "mixer": "a skip in the mixer",
    "ffn": "the FFN skip",
    "both": "both skips",
}
NORMS = {"mixer": "the mixer's norm", "block": "the block's norm", "both": "both norms"}
ARMS = ((True, True), (False, True), (True, False), (False, False))  # gating, layernorm
DASHED = (0, (3, 1.5))  # random weights


class FigureError(ValueError):
    """The table cannot be drawn; one line that says what is missing and what to do."""


@styled
def figure1(rows: pd.DataFrame, model: str, yscale: str = "linear", note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 1 of arXiv:2410.10609v3: relative mu against layer, a curve per lambda; gate removed, LayerNorm on.

    Under it the rank-1 residual of the same curves, which also sees rows collapsing to +u and -u. `note` ends the
    caption. Raises FigureError when the table holds no such rows.
    """
    rows = _reading(_of_model(rows, model))
    rows = rows[rows["layernorm"].astype(bool)]
    rows = rows if _gated(rows).all() else rows[~_gated(rows)]
    rows = rows[rows["init"] == _first(rows["init"], "trained")]
    data = summarise(rows, ("relative_mu", "rank1_residual"))
    lams = list(data["lam"].unique())  # NaN for a schedule of lambdas
    curves = [
        ("per layer" if np.isnan(lam) else style.number(lam), style.lambda_colour(lam, lams), "-", points)
        for (lam, _), points in groups_of(data, ["lam", "arm"])
    ]
    gating = data["gating"].iloc[0]
    title = ", ".join((model, *(() if pd.isna(gating) else (gate_word(gating),)), "LayerNorm on"))
    panels = [(measure, yscale) for measure in data["measure"].unique()]
    return style.against_layer(curves, panels, title, [*_words(rows, data), note], header="λ"), data


@styled
def figure2(rows: pd.DataFrame, yscale: str = "linear", note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 2: last-layer relative mu against lambda, LayerNorm on; transformers, Mamba and models of images in panels of their own.

    The rank-1 residual is the thin dashed line of the same colour. Raises FigureError without such rows.
    """
    rows = _checked(rows)
    rows = rows[rows["layernorm"].astype(bool) & rows["lam"].notna()]
    rows = rows[rows["layer"] == rows.groupby("model")["layer"].transform("max")]
    rows = _reading(rows[rows["init"] == _first(rows["init"], "trained")])
    data = summarise(rows, ("relative_mu", "rank1_residual"))
    texts = rows.drop_duplicates("model").set_index("model")["text"]
    gated = data["gating"].notna()
    pixels = data["model"].isin([model for (model,), part in groups_of(rows, ["model"]) if reads_pixels(part)])
    panels = {"transformers": data[~gated & ~pixels], "Mamba": data[gated], "images": data[pixels]}
    panels = {title: part for title, part in panels.items() if len(part)}
    words = _words(rows, data)
    if (data["drawn"] == "masked").any():
        words.append("A cross at the top: an excerpt overflowed or is NaN at that λ.")
    most_lines = max(len(part[["model", "gating"]].drop_duplicates()) for part in panels.values())
    figure, axes = canvas(len(panels), style.panel_height(4 * most_lines), [*words, note])
    axes = axes[:, 0]
    colours = itertools.cycle(PALETTE)
    labels: dict[Axes, list[Label]] = {ax: [] for ax in axes}
    for letter, ax, (title, part) in zip("abc", axes, panels.items(), strict=False):
        ax.set_title(f"$\\bf{{{letter}}}$  {title}")
        limits(ax, [part], yscale, "last-layer relative μ")
        for i, ((name, gating), line) in enumerate(groups_of(part, ["model", "gating"])):
            what = f"reads {_kind_of_text(texts[name])}" if pd.isna(gating) else gate_word(gating)
            label = "\n".join((name, *textwrap.wrap(what, 18)))
            labels[ax] += style.against_lambda(ax, line, label, next(colours), 0.98 - 0.04 * i)
        style.lambda_axis(ax, data["lam"])
    style.line_key(axes[0], [("relative μ", {"lw": 1.2}), ("rank-1 residual", THIN)])
    axes[-1].set_xlabel("λ (linear between −1 and 1)")
    style.label_ends(figure, labels)
    return figure, data


@styled
def figure3(rows: pd.DataFrame, model: str, note: str = "", lam: float = 1.0) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: gating x LayerNorm, relative mu against layer at one lambda, on a linear and on a log axis.

    Random-init controls are dashed; a negative lambda adds the rank-1 residual. Raises FigureError without such rows.
    """
    rows = _reading(_of_model(rows, model))
    rows = rows[rows["lam"] == lam]
    measures = ("relative_mu", "rank1_residual") if lam < 0 else ("relative_mu",)
    data = summarise(rows, measures)
    curves: list[Curve] = []
    for (gating, layernorm, init), points in groups_of(data, ["gating", "layernorm", "init"]):
        name, colour = _arm(gating, layernorm)
        if init == "trained":
            curves.append((name, colour, "-", points))
        else:  # named by its colour; only its overflow needs a label
            curves.append(("random weights," if style.ends_with(points) else "", colour, DASHED, points))
    panels = [("relative_mu", "linear"), ("relative_mu", "log"), *[(m, "linear") for m in measures[1:]]]
    figure = style.against_layer(curves, panels, f"{model}, λ = {style.number(lam)}", [*_words(rows, data), note])
    if data["init"].nunique() > 1:
        style.line_key(figure.axes[0], [("trained", {"lw": 1.2}), ("random weights", {"lw": 1.0, "ls": DASHED})])
    return figure, data


@styled
def figure4(rows: pd.DataFrame, model: str, note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 4: skip (lambda = 1) or none (lambda = 0) x LayerNorm of S4D, relative mu and rank-1 residual against layer.

    Raises FigureError without such rows.
    """
    rows = _of_model(rows, model)
    rows = rows[(rows["init"] == _first(rows["init"], "trained")) & rows["lam"].isin((0, 1))]
    data = summarise(rows, ("relative_mu", "rank1_residual"))
    curves: list[Curve] = []
    for (lam, layernorm), points in groups_of(data, ["lam", "layernorm"]):
        name = ("skip" if lam else "no skip") + (" + LN" if layernorm else ", no LN")
        curves.append((name, PALETTE[2 * (not layernorm) + (lam == 0)], "-", points))
    panels = [("relative_mu", "linear"), ("relative_mu", "log"), ("rank1_residual", "linear")]
    words = [*_words(rows, data), nets_note(rows)]
    return style.against_layer(curves, panels, model, [*words, note]), data


@styled
def figure_readings(rows: pd.DataFrame, model: str, note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figures 1 and 3 under every reading of the paper: a row of panels a skip_site, a column a norm_site.

    The first column is the last layer against lambda (no gate, LayerNorm on; rank-1 residual dashed), the others gating
    x LayerNorm at lambda = 1 against layer. The arms with LayerNorm are the same for every norm_site. Raises
    FigureError without such rows.
    """
    rows = _of_model(rows, model)
    rows = rows[rows["init"] == _first(rows["init"], "trained")]
    norm, last = rows["layernorm"].astype(bool), rows["layer"] == rows["layer"].max()
    swept = norm & last & ~_gated(rows) & rows["lam"].notna()
    arms = (rows["lam"] == 1) & (rows["measure"] == "relative_mu")
    skip_sites = list(rows["skip_site"].unique())
    norm_sites = sorted(rows["norm_site"][arms & ~norm].unique(), key=lambda site: site == "both")  # both last
    rows = rows[swept | arms]
    data = summarise(rows, ("relative_mu", "rank1_residual"))
    words = _words(rows, data)
    if (data["drawn"] == "masked").any():
        words.append("A cross: at that λ, or in the next layer, an excerpt overflowed or is NaN.")
    columns = (1.3, *(1.0 for _ in norm_sites))
    figure, axes = canvas(len(skip_sites), style.SMALL_PANEL, [*words, note], columns, style.PAGE)
    for row, skip_site in zip(axes, skip_sites, strict=True):
        here = data[data["skip_site"] == skip_site]
        line = here[here["layernorm"] & ~_gated(here) & (here["layer"] == data["layer"].max())]
        limits(row[0], [line], "linear", f"λ on the {skip_site} skip\nrelative μ")
        style.against_lambda(row[0], line, "", _arm(False, True)[1], 0.97)
        style.lambda_axis(row[0], data["lam"], room=0.08)
        here = here[(here["lam"] == 1) & (here["measure"] == "relative_mu")]
        for ax, norm_site in zip(row[1:], norm_sites, strict=True):
            part = here[here["layernorm"] | (here["norm_site"] == norm_site)]
            limits(ax, [part], "linear", "")
            ax.set_xlim(0, max(1, data["layer"].max()))
            for (gating, layernorm), points in groups_of(part, ["gating", "layernorm"]):
                style.layer_curve(ax, points, _arm(gating, layernorm)[1])
    titles = [f"{model}, last layer", *(f"LN: {NORMS.get(site, site)}" for site in norm_sites)]
    xlabels = ["λ (linear between −1 and 1)", *["layer at λ = 1"] * len(norm_sites)]
    lines = [(name, {"color": colour}) for name, colour in itertools.starmap(_arm, ARMS)]
    style.name_panels(figure, axes, titles, xlabels, [*lines, ("rank-1 residual", THIN)])
    return figure, data


def summarise(rows: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Mean, spread, status counts and fate of every point (see the module). Raises FigureError for pooled settings."""
    rows = rows[rows["measure"].isin(measures)]
    if rows.empty:
        raise FigureError(f"no rows of {' or '.join(measures)} for this figure: measure them, or choose another model")
    keys = list(KEYS)
    if rows.duplicated([*keys, "excerpt"]).any():
        settings = ("revision", "dtype", "backend", "seed", "tokenizer", "text")
        varied = ", ".join(c for c in settings if c in rows and rows[c].nunique() > 1) or "unknown"
        raise FigureError(f"several measurements of one excerpt ({varied} vary): keep the rows of one setting")
    below = rows["status"].eq("below_floor")
    number = rows["value"].where(rows["status"].isin(("ok", "certified")))
    number = number.mask(below, rows["floor"].fillna(rows["value"]))
    counts = {status: rows["status"].eq(status) for status in STATUSES}
    groups = rows.assign(number=number, **counts).groupby(keys, dropna=False)
    data = groups.agg(
        mean=("number", "mean"), std=("number", "std"), n=("number", "count"),
        **{status: (status, "sum") for status in STATUSES}, floor=("floor", "max"),
    ).reset_index()  # fmt: skip
    masked = (data["n"] == 0) | (data["overflow"] + data["nan"] > 0)
    unresolved = data["below_floor"] == data[list(STATUSES)].sum(axis=1)
    data["drawn"] = np.select([masked, unresolved], ["masked", "at_floor"], "point")
    return pd.concat([data[data["measure"] == measure] for measure in measures], ignore_index=True)


def draw(experiment: str, rows: pd.DataFrame, folder: str | Path, yscale: str = "linear") -> list[Path]:
    """Save the figures of one experiment.

    `sweep-lambda` and `measure` have figure1 (each model), of several lambdas figure2, and of a run with losses quality;
    `ablate-gating` has figure3, `ablate-s4d` figure4, `all-readings` readings (each model). The first model with a gate (else the first) gives figure1, another one figure1-NAME; so for
    the others.
    Raises FigureError for an experiment without figures.
    """
    models = list(dict.fromkeys([*rows["model"][rows["gating"].notna()], *rows["model"]]))
    stems = {model: "" if model == models[0] else "-" + re.sub(r"[^\w.-]+", "_", model) for model in models}
    made: dict[str, tuple[Figure, pd.DataFrame]] = {}
    if experiment in ("sweep-lambda", "measure"):
        for model, stem in stems.items():
            made[f"figure1{stem}"] = figure1(rows, model, yscale, embedded_note([model]))
        if rows["lam"].nunique() > 1:
            made["figure2"] = figure2(rows, yscale, embedded_note(models))
        measured = [model for model in models if (rows.loc[rows["model"] == model, "measure"] == "lm_loss").any()]
        if measured:
            from lscollapse.reports.figures.quality import figure_quality  # which draws with this module's words

            made["quality"] = figure_quality(rows, embedded_note(measured))
    elif experiment == "ablate-gating":
        made = {f"figure3{stem}": figure3(rows, model, embedded_note([model])) for model, stem in stems.items()}
    elif experiment == "ablate-s4d":
        made = {f"figure4{stem}": figure4(rows, model, embedded_note([model])) for model, stem in stems.items()}
    elif experiment == "all-readings":
        made = {f"readings{stem}": figure_readings(rows, name, embedded_note([name])) for name, stem in stems.items()}
    else:
        known = "sweep-lambda, measure, ablate-gating, ablate-s4d and all-readings"
        raise FigureError(f"no figure is drawn of {experiment!r}: only of {known}")
    return [path for stem, (figure, data) in made.items() for path in style.save(figure, data, folder, stem)]


# --- which rows ---


def _checked(rows: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise FigureError(f"the table has no column {', '.join(missing)}: give the rows of a run folder")
    return rows


def _of_model(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    rows = _checked(rows)
    if model not in set(rows["model"]):
        known = ", ".join(sorted(set(rows["model"]))) or "none"
        raise FigureError(f"no rows of model {model!r}: the table has {known}")
    return rows[rows["model"] == model]


def _first(values: pd.Series, wanted: str) -> str:
    """The wanted value if it occurs, else the first that does."""
    present = list(values.dropna().unique())
    return wanted if wanted in present or not present else present[0]


def _reading(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a table that crosses the sites, the default reading (or the first there is), per model."""
    parts = []
    for _, part in rows.groupby(["model", "layernorm"], sort=False):
        for column, wanted in (("skip_site", "residual"), ("norm_site", "both")):
            if part[column].notna().any():
                part = part[part[column] == _first(part[column], wanted)]
        parts.append(part)
    return pd.concat(parts) if parts else rows


def groups_of(rows: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return [(key, part) for key, part in rows.groupby(keys, dropna=False, sort=False)]  # type: ignore[misc]


def _gated(rows: pd.DataFrame) -> pd.Series:
    return rows["gating"].fillna(False).astype(bool)


# --- words ---


def _arm(gating: Any, layernorm: bool) -> tuple[str, str]:
    """Name and colour of one of the four arms."""
    gate = () if pd.isna(gating) else ("gate" if gating else "no gate",)
    name = " + ".join((*gate, "LN")) if layernorm else ", ".join((*gate, "no LN"))
    return name, PALETTE[2 * (not layernorm) + (not pd.isna(gating) and not gating)]


def gate_word(gating: Any) -> str:
    return "no gate" if pd.isna(gating) else "full architecture" if gating else "gate removed"


def _kind_of_text(text: str) -> str:
    return "SMILES" if "smiles" in text.lower() else text.split(" (")[0]


def nets_note(rows: pd.DataFrame) -> str:
    """Whether the arms of Figure 4 are one net's, or each has its own."""
    n_nets = rows["checkpoint_sha256"].nunique()
    if n_nets == 1:
        return "One net, trained with skip and LN; every arm is ablated at inference, none retrained."
    return f"{n_nets} nets, each arm retrained: trained as it is measured, nothing is ablated at inference."


def describe(rows: pd.DataFrame) -> str:
    """Who read what: models, text, number of excerpts, tokens and dtype, models of one kind together."""
    kinds: dict[str, list[str]] = {}
    for (model,), part in groups_of(rows, ["model"]):
        texts, dtypes = " / ".join(part["text"].unique()), ", ".join(sorted(set(part["dtype"])))
        n, low, high = part["excerpt"].nunique(), part["n_tokens"].min(), part["n_tokens"].max()
        length = f"{low}" if low == high else f"{low} to {high}"
        one, units = ("image", "pixels") if reads_pixels(part) else ("excerpt", "tokens")
        what = f"{texts}, n = {n} {one}{'s' * (n > 1)} of {length} {units}, {dtypes}."
        kinds.setdefault(what, []).append(model)
    return " ".join(f"{', '.join(models)}: {what}" for what, models in kinds.items())


def embedded_note(models: Sequence[str]) -> str:
    from lscollapse.core import registry  # brings torch, which the rest does without

    small = [model for model in models if model in registry.ENTRIES and registry.ENTRIES[model].embedded]
    if not small:
        return ""
    what = "are small embedded models" if len(small) > 1 else "is a small embedded model"
    return f"{', '.join(small)} {what}, not the paper's."


def _words(rows: pd.DataFrame, data: pd.DataFrame) -> list[str]:
    """The sentences of every caption, before those of one figure."""
    sites = [SITES.get(str(site), str(site)) for site in rows["skip_site"].dropna().unique()]
    drawn, unit = set(data["drawn"]), "images" if reads_pixels(rows) else "excerpts"
    return [
        describe(rows),
        "Weights: random, not trained." if set(data["init"]) == {"random"} else "",
        f"λ acts on {' or '.join(sites)}." if sites else "",
        f"Line and band: mean and one standard deviation over {unit}." if (data["n"] > 1).any() else "",
        "Triangles: under the floor, below which the dtype resolves nothing." if "at_floor" in drawn else "",
        disagreement(data),
    ]


def disagreement(data: pd.DataFrame) -> str:
    """Names the curves that relative mu calls spread out and the rank-1 residual does not, at the last layer."""
    last = data[(data["layer"] == data.groupby("model")["layer"].transform("max")) & (data["drawn"] == "point")]
    last = last[[*KEYS, "mean"]]
    spread, rank1 = (last[last["measure"] == m].drop(columns="measure") for m in ("relative_mu", "rank1_residual"))
    both = spread.merge(rank1, on=[key for key in KEYS if key != "measure"], suffixes=("", "_rank1"))
    both = both[(both["mean"] > 0.5) & (both["mean_rank1"] < both["mean"] / 2)]
    if both.empty:
        return ""
    named: dict[str, list[str]] = {}
    for (model, gating), part in groups_of(both, ["model", "gating"]):
        lams = ",\N{NO-BREAK SPACE}".join(map(style.number, sorted(part["lam"].unique())))
        named.setdefault(lams, []).append(model if pd.isna(gating) else f"{model} ({gate_word(gating)})")
    alone = data["model"].nunique() == 1 and data["gating"].nunique() < 2
    equals = "λ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    where = [equals + lams + ("" if alone else f" of {', '.join(names)}") for lams, names in named.items()]
    return (
        "Relative μ cannot see rows going to +u and −u. At the last layer the two measures disagree "
        f"(relative μ > 0.5, rank-1 residual under half of it): {'; '.join(where)}."
    )
