"""Table -> figure: one function per figure of the paper, each a pure function of the rows.

Every function takes the long table (one measurement a row; columns in docs/table.md) and returns the figure and the
numbers it plots, one point a row: KEYS, then `mean`, `std` (sample standard deviation over excerpts), `n` (excerpts
behind the mean), a count for each status, `floor`, and `drawn`:

    point      every excerpt has a number there
    at_floor   no excerpt is resolved: an open triangle on the floor
    masked     an excerpt overflowed or is NaN, so a mean of the others would mislead: the curve stops and is marked

Values under the floor enter a mean as the floor itself, the most they can be.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath
from matplotlib.ticker import LogLocator, NullFormatter

STATUSES = ("ok", "certified", "below_floor", "overflow", "nan")
KEYS = ("model", "init", "arm", "gating", "layernorm", "skip_site", "norm_site", "lam", "measure", "layer")
NEEDED = (*KEYS, "text", "dtype", "excerpt", "n_tokens", "value", "status", "floor")
NAMES = {"relative_mu": "relative μ", "rank1_residual": "rank-1 residual"}
SITES = {
    "residual": "the skip around the mixer",
    "mixer": "a skip in the mixer",
    "ffn": "the FFN skip",
    "both": "both skips",
}

WIDTH = 120 / 25.4  # inches
PANEL, LABEL_LINE = 46 / 25.4, 9.0 / 72  # least height of a panel, and of a line of label, in inches
SMALL = 7.0  # points
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.size": 0,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "ytick.minor.size": 1.5, "ytick.minor.width": 0.4,
    "axes.grid": True, "grid.color": "0.92", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "axes.titlelocation": "left", "lines.linewidth": 1.2, "lines.markersize": 3.5, "lines.markeredgewidth": 0.8,
    "legend.frameon": False, "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.04,
    "pdf.fonttype": 42,
}  # fmt: skip
# Okabe-Ito and Tol: safe for the colour-blind
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#882255", "#999933")
NEGATIVE = LinearSegmentedColormap.from_list("negative", ["#8CC5EE", "#2F86C9", "#0B2A63"])
POSITIVE = LinearSegmentedColormap.from_list("positive", ["#F7B267", "#DD5A25", "#6B0F0F"])
Curve = tuple[str, str, Any, pd.DataFrame]  # name, colour, line style, points
Label = tuple[float, float, str, str]  # x and y of the curve's end, text, colour
styled = style.context(["default", STYLE])  # whatever the user's matplotlibrc says


class FigureError(ValueError):
    """The table cannot be drawn; one line that says what is missing and what to do."""


@styled
def figure1(rows: pd.DataFrame, model: str, yscale: str = "linear", note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 1 of arXiv:2410.10609v3: relative mu against layer, a curve per lambda; gate removed, LayerNorm on.

    Under it the rank-1 residual of the same curves, which also sees rows collapsing to +u and -u. `note` ends the
    caption. Raises FigureError when the table holds no such rows.
    """
    rows = _of_model(rows, model)
    rows = _without_gate(rows[rows["layernorm"].astype(bool)])
    rows = rows[rows["init"] == _first(rows["init"], "trained")]
    data = summarise(rows, ("relative_mu", "rank1_residual"))
    lams = list(data["lam"].unique())  # NaN for a schedule of lambdas
    curves = [
        ("per layer" if np.isnan(lam) else _number(lam), lambda_colour(lam, lams), "-", points)
        for (lam, _), points in _groups(data, ["lam", "arm"])
    ]
    gating = data["gating"].iloc[0]
    title = ", ".join((model, *(() if pd.isna(gating) else (_gate_word(gating),)), "LayerNorm on"))
    panels = [(measure, yscale) for measure in data["measure"].unique()]
    return _against_layer(curves, panels, title, [*_words(rows, data), note], header="λ"), data


@styled
def figure2(rows: pd.DataFrame, yscale: str = "linear", note: str = "") -> tuple[Figure, pd.DataFrame]:
    """Figure 2: last-layer relative mu against lambda, LayerNorm on; transformers in one panel, Mamba-2 in another.

    The rank-1 residual is the thin dashed line of the same colour. Raises FigureError without such rows.
    """
    rows = _checked(rows)
    rows = rows[rows["layernorm"].astype(bool) & rows["lam"].notna()]
    rows = rows[rows["layer"] == rows.groupby("model")["layer"].transform("max")]
    rows = _reading(rows[rows["init"] == _first(rows["init"], "trained")])
    data = summarise(rows, ("relative_mu", "rank1_residual"))
    texts = rows.drop_duplicates("model").set_index("model")["text"]
    gated = data["gating"].notna()
    panels = {"transformers": data[~gated], "Mamba-2": data[gated]}
    panels = {title: part for title, part in panels.items() if len(part)}
    words = _words(rows, data)
    if (data["drawn"] == "masked").any():
        words.append("A cross at the top: an excerpt overflowed or is NaN at that λ.")
    most_lines = max(len(part[["model", "gating"]].drop_duplicates()) for part in panels.values())
    figure, axes = _canvas(len(panels), 4 * most_lines, [*words, note])
    colours = itertools.cycle(PALETTE)
    labels: dict[Axes, list[Label]] = {ax: [] for ax in axes}
    for letter, ax, (title, part) in zip("ab", axes, panels.items(), strict=False):
        ax.set_title(f"$\\bf{{{letter}}}$  {title}")
        _limits(ax, [part], yscale, "last-layer relative μ")
        ax.set_xscale("symlog", linthresh=1, linscale=0.6)
        for i, ((name, gating), line) in enumerate(_groups(part, ["model", "gating"])):
            what = f"reads {_kind_of_text(texts[name])}" if pd.isna(gating) else _gate_word(gating)
            label = "\n".join((name, *textwrap.wrap(what, 18)))
            labels[ax] += _against_lambda(ax, line, label, next(colours), 0.98 - 0.04 * i)
        ticks = sorted(data["lam"].unique())
        ax.set_xticks(ticks, [_number(lam) if len(ticks) < 14 or lam == int(lam) else "" for lam in ticks])
    _key(axes[0], [("relative μ", {"lw": 1.2}), ("rank-1 residual", {"lw": 0.7, "ls": (0, (4, 2))})])
    axes[-1].set_xlabel("λ (linear between −1 and 1)")
    _label_ends(figure, labels)
    return figure, data


@styled
def figure3(rows: pd.DataFrame, model: str, note: str = "", lam: float = 1.0) -> tuple[Figure, pd.DataFrame]:
    """Figure 3: gating x LayerNorm, relative mu against layer at one lambda, on a linear and on a log axis.

    Random-init controls are dashed; a negative lambda adds the rank-1 residual. Raises FigureError without such rows.
    """
    rows = _of_model(rows, model)
    rows = rows[rows["lam"] == lam]
    measures = ("relative_mu", "rank1_residual") if lam < 0 else ("relative_mu",)
    data = summarise(rows, measures)
    curves: list[Curve] = []
    for (gating, layernorm, init), points in _groups(data, ["gating", "layernorm", "init"]):
        gate = () if pd.isna(gating) else ("gate" if gating else "no gate",)
        name = " + ".join((*gate, "LN")) if layernorm else ", ".join((*gate, "no LN"))
        colour = PALETTE[2 * (not layernorm) + (not pd.isna(gating) and not gating)]
        if init == "trained":
            curves.append((name, colour, "-", points))
        else:  # named by its colour; only its overflow needs a label
            curves.append(("random weights," if _ends_with(points) else "", colour, (0, (3, 1.5)), points))
    panels = [("relative_mu", "linear"), ("relative_mu", "log"), *[(m, "linear") for m in measures[1:]]]
    figure = _against_layer(curves, panels, f"{model}, λ = {_number(lam)}", [*_words(rows, data), note])
    if data["init"].nunique() > 1:
        _key(figure.axes[0], [("trained", {"lw": 1.2}), ("random weights", {"lw": 1.0, "ls": (0, (3, 1.5))})])
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
    """Save the figures of one experiment: 1 (each model) and 2 of `sweep-lambda`, 3 (each model) of `ablate-gating`.

    The first model with a gate (else the first) gives figure1 or figure3, another one figure1-NAME or figure3-NAME.
    Raises FigureError for an experiment without figures.
    """
    models = list(dict.fromkeys([*rows["model"][rows["gating"].notna()], *rows["model"]]))
    stems = {model: "" if model == models[0] else "-" + re.sub(r"[^\w.-]+", "_", model) for model in models}
    made: dict[str, tuple[Figure, pd.DataFrame]] = {}
    if experiment == "sweep-lambda":
        for model, stem in stems.items():
            made[f"figure1{stem}"] = figure1(rows, model, yscale, _embedded_note([model]))
        made["figure2"] = figure2(rows, yscale, _embedded_note(models))
    elif experiment == "ablate-gating":
        made = {f"figure3{stem}": figure3(rows, model, _embedded_note([model])) for model, stem in stems.items()}
    else:
        raise FigureError(f"no figure is drawn of {experiment!r}: give a run of sweep-lambda or ablate-gating")
    return [path for stem, (figure, data) in made.items() for path in save(figure, data, folder, stem)]


@styled
def save(figure: Figure, data: pd.DataFrame, folder: str | Path, stem: str) -> list[Path]:
    """Write stem.png (200 dpi), stem.pdf and stem.csv (the plotted numbers) into `folder`, each whole or not at all.

    No date goes in: the same table and library versions give the same bytes. Raises OSError for an unwritable folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, dict[str, Any]] = {"png": {"dpi": 200, "metadata": {"Software": None}}}
    kinds["pdf"] = {"metadata": {"CreationDate": None}}
    paths = [_whole(folder / f"{stem}.csv", lambda path: data.to_csv(path, index=False, lineterminator="\n"))]
    for kind, options in kinds.items():
        draw = functools.partial(figure.savefig, format=kind, **options)
        paths.append(_whole(folder / f"{stem}.{kind}", draw))
    return paths


def _whole(path: Path, write: Callable[[Path], object]) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
    return path


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
    return _reading(rows[rows["model"] == model])


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


def _groups(rows: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return [(key, part) for key, part in rows.groupby(keys, dropna=False, sort=False)]  # type: ignore[misc]


def _without_gate(rows: pd.DataFrame) -> pd.DataFrame:
    gated = rows["gating"].fillna(False).astype(bool)
    return rows if gated.all() else rows[~gated]


# --- words ---


def _number(lam: float) -> str:
    return f"{lam:g}".replace("-", "\N{MINUS SIGN}")


def _gate_word(gating: Any) -> str:
    return "no gate" if pd.isna(gating) else "full architecture" if gating else "gate removed"


def _kind_of_text(text: str) -> str:
    return "SMILES" if "smiles" in text.lower() else text.split(" (")[0]


def describe(rows: pd.DataFrame) -> str:
    """Who read what: models, text, number of excerpts, tokens and dtype, models of one kind together."""
    kinds: dict[str, list[str]] = {}
    for (model,), part in _groups(rows, ["model"]):
        texts, dtypes = " / ".join(part["text"].unique()), ", ".join(sorted(set(part["dtype"])))
        n, low, high = part["excerpt"].nunique(), part["n_tokens"].min(), part["n_tokens"].max()
        tokens = f"{low}" if low == high else f"{low} to {high}"
        what = f"{texts}, n = {n} excerpt{'s' * (n > 1)} of {tokens} tokens, {dtypes}."
        kinds.setdefault(what, []).append(model)
    return " ".join(f"{', '.join(models)}: {what}" for what, models in kinds.items())


def _embedded_note(models: Sequence[str]) -> str:
    from lscollapse.models import registry  # brings torch, which the rest does without

    small = [model for model in models if model in registry.ENTRIES and registry.ENTRIES[model].embedded]
    if not small:
        return ""
    what = "are small embedded models" if len(small) > 1 else "is a small embedded model"
    return f"{', '.join(small)} {what}, not the paper's."


def _words(rows: pd.DataFrame, data: pd.DataFrame) -> list[str]:
    """The sentences of every caption, before those of one figure."""
    sites = [SITES.get(str(site), str(site)) for site in rows["skip_site"].dropna().unique()]
    drawn = set(data["drawn"])
    return [
        describe(rows),
        "Weights: random, not trained." if set(data["init"]) == {"random"} else "",
        f"λ acts on {', '.join(sites)}." if sites else "",
        "Line and band: mean and one standard deviation over excerpts." if (data["n"] > 1).any() else "",
        "Triangles: under the floor, below which the dtype resolves nothing." if "at_floor" in drawn else "",
        _disagreement(data),
    ]


def _disagreement(data: pd.DataFrame) -> str:
    """Names the curves that relative mu calls spread out and the rank-1 residual does not, at the last layer."""
    last = data[(data["layer"] == data.groupby("model")["layer"].transform("max")) & (data["drawn"] == "point")]
    last = last[[*KEYS, "mean"]]
    spread, rank1 = (last[last["measure"] == m].drop(columns="measure") for m in ("relative_mu", "rank1_residual"))
    both = spread.merge(rank1, on=[key for key in KEYS if key != "measure"], suffixes=("", "_rank1"))
    both = both[(both["mean"] > 0.5) & (both["mean_rank1"] < both["mean"] / 2)]
    if both.empty:
        return ""
    named: dict[str, list[str]] = {}
    for (model, gating), part in _groups(both, ["model", "gating"]):
        lams = ",\N{NO-BREAK SPACE}".join(map(_number, sorted(part["lam"].unique())))
        named.setdefault(lams, []).append(model if pd.isna(gating) else f"{model} ({_gate_word(gating)})")
    alone = data["model"].nunique() == 1 and data["gating"].nunique() < 2
    equals = "λ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    where = [equals + lams + ("" if alone else f" of {', '.join(names)}") for lams, names in named.items()]
    return (
        "Relative μ cannot see rows going to +u and −u. At the last layer the two measures disagree "
        f"(relative μ > 0.5, rank-1 residual under half of it): {'; '.join(where)}."
    )


def _ends_with(points: pd.DataFrame) -> str:
    bad = points[points["drawn"] == "masked"]
    if bad.empty:
        return ""
    first = bad.sort_values("layer").iloc[0]
    status = "overflow" if first["overflow"] else "nan"
    total = int(sum(first[s] for s in STATUSES))
    some = f" ({first[status]} of {total})" if 0 < first[status] < total else ""
    return f"{'overflow' if first['overflow'] else 'NaN'} at layer {first['layer']}{some}"


# --- drawing ---


def lambda_colour(lam: float, lams: Sequence[float]) -> str:
    """Diverging about 0 (black): blues below, reds above, darker with |lam| (symlog); grey for a schedule (NaN)."""
    if np.isnan(lam):
        return "#808080"
    if lam == 0:
        return "#000000"
    top = max(1.0, *(abs(v) for v in lams if np.isfinite(v)))
    return to_hex((NEGATIVE if lam < 0 else POSITIVE)(np.arcsinh(2 * abs(lam)) / np.arcsinh(2 * top)))


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> np.ndarray:
    """Centres nearest to those wanted (least squares) at which labels of these heights fit in low..high, apart.

    The order is kept (ties: as given). Pool-adjacent-violators on the centres less the room of the labels below.
    """
    order = np.argsort(wanted, kind="stable")
    h = np.asarray(heights, float)[order]
    room = np.concatenate([[0.0], np.cumsum((h[1:] + h[:-1]) / 2)])
    blocks: list[tuple[float, int]] = []
    for target in np.asarray(wanted, float)[order] - room:
        blocks.append((target, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (m2, n2), (m1, n1) = blocks.pop(), blocks.pop()
            blocks.append(((m1 * n1 + m2 * n2) / (n1 + n2), n1 + n2))
    centres = np.repeat([m for m, _ in blocks], [n for _, n in blocks])
    centres = np.maximum(np.minimum(centres, high - h[-1] / 2 - room[-1]), low + h[0] / 2) + room
    out = np.empty(len(order))
    out[order] = centres
    return out


def _wrap(text: str, width: float) -> str:
    """Lines of at most `width` points in the caption's font."""
    measure, font = TextToPath(), FontProperties(family="DejaVu Sans", size=SMALL - 0.5)
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}".strip()
        fits = measure.get_text_width_height_descent(line, font, ismath=False)[0] <= width
        lines[-1:] = [line] if fits or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)


def _canvas(n_panels: int, label_lines: int, words: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels under each other, sharing x, tall enough for their labels, and the caption under them."""
    caption = _wrap(" ".join(filter(None, words)), 0.94 * 72 * (WIDTH - 0.16))  # hinting widens text at low dpi
    panel = max(PANEL, label_lines * LABEL_LINE)
    height = n_panels * (panel + 0.3) + 0.3 + (caption.count("\n") + 1) * 1.25 * (SMALL - 0.5) / 72
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(n_panels, 1, sharex=True, squeeze=False)[:, 0]
    figure.supxlabel(caption, x=0.08 / WIDTH, ha="left", fontsize=SMALL - 0.5, color="0.25", linespacing=1.25)
    return figure, list(axes)


def _key(ax: Axes, entries: Sequence[tuple[str, dict]]) -> None:
    """What solid and dashed mean, in a row of its own between the title and the axes."""
    handles = [Line2D([], [], color="0.3", label=name, **kind) for name, kind in entries]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 0.99), "ncols": len(entries)}
    ax.legend(handles=handles, borderpad=0.2, handlelength=2.4, **place)
    ax.set_title(ax.get_title("left"), pad=18)


def _limits(ax: Axes, parts: Sequence[pd.DataFrame], yscale: str, ylabel: str) -> None:
    """Axis from 0 to 1, or down to the decade of the least value; the floor as a dashed line where it is in sight."""
    ax.set_ylabel(ylabel)
    points = pd.concat(parts)
    seen = points[points["drawn"] != "masked"]
    if seen.empty:
        ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", va="center", color="0.4")
    floors = [f for f in points["floor"].dropna().unique() if f > 0]
    if yscale == "linear":
        ax.set_ylim(0, 1.03)
        bottom = 0.01
    else:
        positive = seen["mean"][seen["mean"] > 0]
        least = positive.min() if len(positive) else 0.1
        decade = 10.0 ** np.floor(np.log10(least * 0.8))
        bottom = decade * max(step for step in (1, 2, 5) if step * decade <= least * 0.8 or step == 1)
        ax.set_yscale("log")
        ax.set_ylim(bottom, 1.4)
        if bottom > 0.005:  # few decades: 0.2 0.5 1 rather than powers of ten
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for floor in floors:
        if floor > bottom:
            ax.axhline(floor, color="0.45", lw=0.7, ls=(0, (4, 3)), zorder=1)
            small: dict[str, Any] = {"fontsize": SMALL - 1, "color": "0.45"}
            ax.annotate("floor", (0, floor), (2, 3), ax.get_yaxis_transform(), "offset points", **small)


def _curve(
    ax: Axes, points: pd.DataFrame, x: str, colour: str, marker: str = "", band: bool = True, **line: Any
) -> pd.DataFrame:
    """One curve with its band and marks; returns the points that are drawn, with their height `y`."""
    points = points.sort_values(x)
    shown = points["drawn"] != "masked"
    log, bottom = ax.get_yscale() == "log", ax.get_ylim()[0]
    low = points["floor"].where(points["floor"] > 0, bottom) if log else 0.0
    y = points["mean"].where(shown)
    at_floor = (points["drawn"] == "at_floor") | (log & (y <= 0))
    y = y.clip(lower=bottom) if log else y
    marker = marker or ("o" if shown.sum() == 1 else "")
    ax.plot(points[x], y, color=colour, **line)
    ax.plot(points[x][~at_floor], y[~at_floor], ls="", marker=marker, ms=3, color=colour)
    if at_floor.any():  # an empty unclipped line would upset the layout
        ax.plot(points[x][at_floor], y[at_floor], "v", ms=3, mfc="white", mec=colour, mew=0.6, clip_on=False)
    if band:
        least = np.minimum(y, np.maximum(y - points["std"], low))
        ax.fill_between(points[x], least, y + points["std"], color=colour, alpha=0.13, lw=0)
    return points.assign(y=y)[shown]


def _against_lambda(ax: Axes, line: pd.DataFrame, label: str, colour: str, top: float) -> list[Label]:
    """Relative mu with marks and band, the rank-1 residual thin and dashed, crosses at height `top` where masked."""
    thin = {"lw": 0.7, "ls": (0, (4, 2)), "band": False, "marker": "_" if line["lam"].nunique() == 1 else ""}
    ends: list[Label] = []
    for measure, points in line.groupby("measure", sort=False):
        main = measure == "relative_mu"
        shown = _curve(ax, points, "lam", colour, **({"marker": "o"} if main else thin))
        bad = points["lam"][points["drawn"] == "masked"]
        if main:
            ax.plot(bad, np.full(len(bad), top), "x", color=colour, transform=ax.get_xaxis_transform())
            at = (shown["lam"].iloc[-1], shown["y"].iloc[-1]) if len(shown) else (line["lam"].max(), np.nan)
            ends.append((*at, label, colour))
    return ends


def _against_layer(
    curves: Sequence[Curve], panels: Sequence[tuple[str, str]], title: str,
    words: Sequence[str], header: str = "",
) -> Figure:  # fmt: skip
    """Panels (measure, yscale) of the curves against layer."""
    lines = sum(1 + bool(_ends_with(points)) for _, _, _, points in curves)
    figure, axes = _canvas(len(panels), lines, words)
    labels: dict[Axes, list[Label]] = {ax: [] for ax in axes}
    for letter, ax, (measure, yscale) in zip("abc", axes, panels, strict=False):
        parts = [points[points["measure"] == measure] for *_, points in curves]
        again = "log scale" if measure == panels[0][0] else NAMES[measure]
        ax.set_title(f"$\\bf{{{letter}}}$  {title if letter == 'a' else again}")
        _limits(ax, parts, yscale, NAMES[measure])
        ax.set_xlim(0, max(1, max(part["layer"].max() for part in parts)))
        for (name, colour, dash, _), part in zip(curves, parts, strict=True):
            shown = _curve(ax, part, "layer", colour, ls=dash)
            end = _ends_with(part)
            x, y = (shown["layer"].iloc[-1], shown["y"].iloc[-1]) if len(shown) else (0.0, np.nan)
            if end and len(shown):
                ax.plot(x, y, "x", color=colour, ms=5, mew=1.2, clip_on=False, zorder=4)
            if name or end:
                labels[ax].append((x, y, "\n".join(filter(None, (name, end))), colour))
    axes[-1].set_xlabel("layer")
    _label_ends(figure, labels, header)
    return figure


def _label_ends(figure: Figure, panels: dict[Axes, list[Label]], header: str = "") -> None:
    """Labels right of the axes at the heights where the curves end, moved apart, each with a thin line to its curve.

    A curve with no point has its label at the bottom, without a line.
    """
    figure.draw_without_rendering()  # the heights of the axes are known after this
    for ax, labels in panels.items():
        _label_panel(figure, ax, labels, header)


def _label_panel(figure: Figure, ax: Axes, labels: Sequence[Label], header: str) -> None:
    height = ax.get_window_extent().height / figure.dpi
    wanted = []
    for x, y, _, _ in labels:
        at = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1] if np.isfinite(y) else 0.0
        wanted.append(float(np.clip(at, 0, 1)))
    # labels of several lines stand a little further apart
    sizes = [(1 + 1.2 * text.count("\n")) * LABEL_LINE / height for *_, text, _ in labels]
    look: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "fontsize": SMALL, "annotation_clip": False}
    leader = {"arrowstyle": "-", "lw": 0.4, "alpha": 0.7, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
    for (x, y, text, colour), centre in zip(labels, spread(wanted, sizes, 0.0, 1.02), strict=True):
        if np.isfinite(y):
            look["arrowprops"] = leader | {"color": colour, "ls": "-" if x == ax.get_xlim()[1] else ":"}
            ax.annotate(text, (x, y), (1.05, centre), color=colour, **look)
        else:
            ax.text(1.05, centre, text, transform=ax.transAxes, va="center", fontsize=SMALL, color=colour)
    if header:
        ax.annotate(header, (1.05, 1.0), (0, 5), "axes fraction", "offset points", fontsize=SMALL, color="0.3")
