"""Figures of the theory: arrays of `lscollapse.theory` -> figure."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from lscollapse.theory.examples import ExamplesTable, table

if TYPE_CHECKING:
    from lscollapse.theory.stretches import Line, Report

WIDTH = 170 / 25.4  # inches
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "ytick.minor.size": 0,
    "pdf.fonttype": 42,
}
NAMES = {"sys1": "Sys-1 (LTI SSM)", "sys2": "Sys-2 (selective SSM)"}
PAPER, TRUE = "#000000", "#D55E00"
LABEL = 56  # characters of a line of the legend
SMALLEST = 1e-12  # rank-1 residuals under this share one colour
CURVES = {1: ("#0072B2", "λ > 0"), -1: ("#D55E00", "λ < 0")}
LINES = ("#000000", "#666666", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A6FD1", "#7A4B00")
DASHES = {0: "-", 1: (0, (5, 2)), -1: (0, (1.5, 1.5))}


def theory_examples_figure(sys1: ExamplesTable | None = None, sys2: ExamplesTable | None = None) -> Figure:
    """The two systems of section 4.2.2 over lambda and depth: mu above, rank-1 residual below, thresholds marked.

    Tables of `lscollapse.theory.examples.table` (made when not given). A dashed line is the paper's threshold, above
    which it claims mu -> 0; a solid one the true threshold, -1. Returns a Figure 170 mm wide.
    """
    tables = (sys1 or table("sys1"), sys2 or table("sys2"))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 0.72 * WIDTH), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for column, data in enumerate(tables):
            _panel(axes[0, column], data, data.mu, Normalize(0.0, math.sqrt(2.0)))
            _panel(axes[1, column], data, np.maximum(data.rank1_residual, SMALLEST), LogNorm(SMALLEST, 1.0))
            axes[0, column].set_title(NAMES[data.system], pad=16)
            axes[1, column].set_xlabel("skip strength λ")
            _thresholds(axes[0, column], data, label=True)
            _thresholds(axes[1, column], data, label=False)
        for row, name in enumerate(("μ", "rank-1 residual")):
            axes[row, 0].set_ylabel("layer")
            bar = figure.colorbar(axes[row, 1].collections[0], ax=axes[row, :], label=name, fraction=0.04, pad=0.02)
            bar.outline.set_linewidth(0.6)
            bar.minorticks_off()
            if row == 0:
                bar.set_ticks([0.0, 0.5, 1.0, math.sqrt(2.0)], labels=["0", "0.5", "1", "√2"])
            else:
                bar.set_ticks([1e-12, 1e-8, 1e-4, 1.0], labels=["≤ 10⁻¹²", "10⁻⁸", "10⁻⁴", "1"])
    return figure


def _panel(ax: Axes, data: ExamplesTable, values: np.ndarray, norm: Normalize) -> None:
    ax.pcolormesh(data.lambdas, data.depths, values.T, norm=norm, cmap="cividis", shading="nearest", rasterized=True)


def _thresholds(ax: Axes, data: ExamplesTable, label: bool) -> None:
    marks = (
        (data.paper_threshold, PAPER, (0, (4, 2)), "paper", "right"),
        (data.true_threshold, TRUE, "-", "true", "left"),
    )
    for at, colour, dashes, name, side in marks:
        ax.axvline(at, color="white", linewidth=2.4)
        ax.axvline(at, color=colour, linestyle=dashes, linewidth=1.4)
        if label:
            ax.annotate(
                f"{name} {at:g}".replace("-", "−"),
                (at, 1.0),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha=side,
                color=colour,
                fontsize=7,
            )


def bounds_figure(report: Report) -> Figure:
    """Last-layer relative mu and rank-1 residual over |λ| on a log axis, every bound of a guarantees.Report a vertical line.

    A bound is labelled in the legend with its number, a curve with the |λ| that keep it over the target; a bound that
    certifies nothing is there without a line. λ = 0 is off the axis. Returns a Figure 170 mm wide.
    """
    found = report.found
    bounds = [line for line in report.lines if not line.measured]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 0.72 * WIDTH), layout="constrained")
        ax = figure.subplots()
        for sign, (colour, name) in CURVES.items():
            for measure, words, bound, dashes in (
                ("relative_mu", "relative μ", "measured, relative mu", "-"),
                ("rank1_residual", "rank-1 residual", "measured, rank-1 residual", "--"),
            ):
                sizes, values = found.curve(sign, measure)
                reads = " or ".join(line.reads for line in report.lines if (line.bound, line.sign) == (bound, sign))
                label = textwrap.fill(f"{words}, {name}: {reads}" if reads else f"{words}, {name}", LABEL)
                ax.plot(
                    sizes[1:], values[1:], dashes, color=colour, linewidth=1.4, marker=".", markersize=3, label=label
                )
        ax.axhline(found.target, color="0.6", linewidth=0.8)
        ax.annotate(f"target {found.target:g}", (1.0, found.target), (-2, 2), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", color="0.4", fontsize=7)  # fmt: skip
        kinds = list(dict.fromkeys(line.bound for line in bounds))
        for line in bounds:
            _bound(ax, line, LINES[kinds.index(line.bound) % len(LINES)])
        ax.set(xscale="log", ylim=(0.0, 1.03), xlabel="|λ|", ylabel=f"layer {found.n_layers}, mean over excerpts")
        ax.set_title(f"{found.model}, {found.arm}: what the theorems ask for, and what is needed")
        ax.spines[["top", "right"]].set_visible(False)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return figure


def _bound(ax: Axes, line: Line, colour: str) -> None:
    name = line.bound + {0: "", 1: ", λ > 0", -1: ", λ < 0"}[line.sign]
    if math.isfinite(line.lam):
        ax.axvline(line.lam, color=colour, linestyle=DASHES[line.sign], linewidth=1.2, label=f"{name}: {line.reads}")
    else:
        ax.plot([], [], " ", label=f"{name}: {line.reads}")
