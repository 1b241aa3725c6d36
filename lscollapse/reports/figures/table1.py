"""Figures of Table 1: rows of a `table1` run -> figure and the numbers that it plots."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lscollapse.reports.figures import style
from lscollapse.reports.figures.points import FigureError
from lscollapse.reports.figures.style import PAGE, PALETTE, PANEL, Key, canvas, name_panels, styled
from lscollapse.reports.table1 import FIXED, MIXERS, TASKS, is_learnt, mode_name, origin

OFFSET = 0.07  # between the modes of a layer, in layers
WHEN = {"before": (0, (4, 2)), "after": "-"}


@styled
def lambda_figure(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Lambda of every layer after training, a dot a seed, a dash their mean; a row a task, a column a mixer.

    Of each arm the learning rate that validation chose. A thin line is where it started.
    """
    chosen = _chosen(rows)
    data = chosen[(chosen["measure"] == "lambda") & (chosen["when"] == "after") & chosen["lam"].map(is_learnt)]
    if data.empty:
        raise FigureError("no learnt lambda in the table: train with lams: [learnable]")
    data = data[["task", "mixer", "lam", "lr", "seed", "layer", "value"]].reset_index(drop=True)
    modes = _modes(rows)
    learnt = [(number, mode) for number, mode in enumerate(modes) if is_learnt(mode)]
    words = "Learnt λ of the mixer's skip, of the nets whose learning rate was chosen."
    figure, axes, panels = _grid(rows, data, words)
    for ax, part in panels:
        for number, mode in learnt:
            own, colour = part[part["lam"] == mode], PALETTE[number]
            x = own["layer"].astype(float) + OFFSET * (2 * number - len(modes))
            ax.axhline(float(mode.split()[-1]), color=colour, lw=0.6, ls=(0, (1, 2)))
            ax.plot(x, own["value"], "o", color=colour, ms=3, alpha=0.7)
            means = own.groupby(x)["value"].mean()
            ax.plot(means.index, means, "_", color=colour, ms=11)
        ax.set_xlim(0.5, max(_layer_ticks(ax, part), default=1) + 0.5)
    kinds = [(mode_name(mode), {"color": PALETTE[i], "marker": "o", "ls": ""}) for i, mode in learnt]
    _name(figure, axes, data, "learnt λ", kinds)
    return figure, data


@styled
def mu_figure(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Relative mu against layer of every chosen net, before training (dashed) and after: means over seeds and inputs.

    The band is one sample standard deviation over seeds of the means over inputs.
    """
    chosen = _chosen(rows)
    kept = chosen[chosen["measure"] == "relative_mu"]
    if kept.empty:
        raise FigureError("no relative mu in the table")
    keys = ["task", "mixer", "lam", "when", "layer"]
    nets = kept.groupby([*keys, "seed"], sort=False)["value"].apply(lambda v: v.mean(skipna=False))
    data = nets.groupby(keys, sort=False).agg(["mean", "std", "count"]).reset_index()
    modes = _modes(rows)
    n_inputs = int(kept["excerpt"].max()) + 1
    words = f"Means over seeds and {n_inputs} held-out inputs, band: one standard deviation over seeds."
    figure, axes, panels = _grid(rows, data, words)
    for ax, part in panels:
        for number, mode in enumerate(modes):
            for when, dash in WHEN.items():
                curve = part[(part["lam"] == mode) & (part["when"] == when)].sort_values("layer")
                x, colour = curve["layer"].astype(int), PALETTE[number]
                ax.plot(x, curve["mean"], color=colour, ls=dash, marker="o", ms=2)
                if when == "after":
                    spread = curve["std"].fillna(0)
                    ax.fill_between(x, curve["mean"] - spread, curve["mean"] + spread, color=colour, alpha=0.13, lw=0)
        _layer_ticks(ax, part)
        ax.set_ylim(0, 1.03)
    lines: list[Key] = [(mode_name(mode), {"color": PALETTE[i]}) for i, mode in enumerate(modes)]
    lines += [(f"{when} training", {"ls": dash}) for when, dash in WHEN.items()]
    _name(figure, axes, data, "relative μ", lines)
    return figure, data


def draw(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Write both figures into `folder` as png, pdf and csv."""
    made = {"table1-mu": mu_figure(rows)}
    if rows["lam"].map(is_learnt).any():
        made["table1-lambda"] = lambda_figure(rows)
    return [path for stem, (figure, data) in made.items() for path in style.save(figure, data, folder, stem)]


def _modes(rows: pd.DataFrame) -> list[str]:
    """Lambda = 1 first, whether it is there or not, so that a mode has the same colour in every figure."""
    return [FIXED, *sorted(set(rows["lam"]) - {FIXED})]


def _chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the nets that read the test set."""
    keys = ["task", "mixer", "lam", "lr", "seed"]
    tested = rows[rows["measure"] == "test_accuracy"][keys].drop_duplicates()
    return rows.merge(tested, on=keys)


Panels = list[tuple[Axes, pd.DataFrame]]  # each with its part of the data


def _shown(data: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Tasks and mixers of the data, in the order of the table."""
    return [task for task in TASKS if task in set(data["task"])], [m for m in MIXERS if m in set(data["mixer"])]


def _grid(rows: pd.DataFrame, data: pd.DataFrame, words: str) -> tuple[Figure, np.ndarray, Panels]:
    """A row of panels a task, a column a mixer, and the caption."""
    tasks, mixers = _shown(data)
    figure, axes = canvas(len(tasks), PANEL, [_origin(rows, tasks), words], [1.0] * len(mixers), PAGE)
    pairs = itertools.product(tasks, mixers)
    parts = [data[(data["task"] == task) & (data["mixer"] == mixer)] for task, mixer in pairs]
    return figure, axes, list(zip(axes.flat, parts, strict=True))


def _layer_ticks(ax: Axes, part: pd.DataFrame) -> list[int]:
    layers = sorted(map(int, part["layer"].unique()))
    ax.set_xticks(layers, [str(layer) for layer in layers])
    return layers


def _origin(rows: pd.DataFrame, tasks: list[str]) -> str:
    firsts = {task: rows[rows["task"] == task].iloc[0] for task in tasks}
    seeds = rows.groupby("task")["seed"].nunique()
    return " ".join(f"{origin(r['data'], t)}; n = {seeds[t]} seeds, {r['dtype']}." for t, r in firsts.items())


def _name(figure: Figure, axes: np.ndarray, data: pd.DataFrame, label: str, lines: list[Key]) -> None:
    tasks, mixers = _shown(data)
    for row, task in zip(axes, tasks, strict=True):
        row[0].set_ylabel(f"{TASKS[task]}\n{label}")
    name_panels(figure, axes, [MIXERS[mixer] for mixer in mixers], ["layer"] * len(mixers), lines)
