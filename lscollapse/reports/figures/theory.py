"""Figures of the theory: arrays of `lscollapse.theory` -> figure."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from lscollapse.reports.figures.style import PAGE, PALETTE, SMALL, canvas, styled, title
from lscollapse.reports.figures.wording import NAMES, SIGNS, number
from lscollapse.theory.examples import ExamplesTable
from lscollapse.theory.stretches import Line, Report

SYSTEMS = {"sys1": "Sys-1 (LTI SSM)", "sys2": "Sys-2 (selective SSM)"}
LABEL = 56  # characters of a line of the legend
SMALLEST = 1e-12  # rank-1 residuals under this share one colour
CURVES = {1: PALETTE[1], -1: PALETTE[0]}  # of a positive and of a negative lambda, in every figure and on the page
LINES = ("#000000", "#666666", *PALETTE[2:], "#E69F00")
DASHES = {0: "-", 1: (0, (5, 2)), -1: (0, (1.5, 1.5))}


@styled
def theory_examples_figure(sys1: ExamplesTable, sys2: ExamplesTable) -> Figure:
    """The two systems of section 4.2.2 over lambda and depth: mu above, rank-1 residual below, thresholds marked.

    Tables of `lscollapse.theory.examples.table`. A dashed line is the paper's threshold, above which it claims mu -> 0; a
    solid one the true threshold, -1. Returns a Figure 180 mm wide.
    """
    words = "Dashed: the threshold of the paper, above which it claims μ → 0. Solid: the true one."
    figure, axes = canvas(2, 0.25 * PAGE, [words], (1, 1), PAGE)
    for letter, column, data in zip("ab", axes.T, (sys1, sys2), strict=True):
        residual = np.maximum(data.rank1_residual, SMALLEST)
        norms = Normalize(0.0, math.sqrt(2.0)), LogNorm(SMALLEST, 1.0)
        for ax, values, norm in zip(column, (data.mu, residual), norms, strict=True):
            ax.pcolormesh(
                data.lambdas, data.depths, values.T, norm=norm, cmap="cividis", shading="nearest", rasterized=True
            )
            ax.grid(False)
            _thresholds(ax, data, label=ax is column[0])
        title(column[0], letter, SYSTEMS[data.system])
        column[0].set_title(column[0].get_title("left"), pad=16)
        column[1].set_xlabel("skip strength λ")
    ticks = ([0.0, 0.5, 1.0, math.sqrt(2.0)], [1e-12, 1e-8, 1e-4, 1.0])
    labels = (["0", "0.5", "1", "√2"], ["≤ 10⁻¹²", "10⁻⁸", "10⁻⁴", "1"])
    for row, name, places, texts in zip(axes, ("μ", NAMES["rank1_residual"]), ticks, labels, strict=True):
        row[0].set_ylabel("layer")
        bar = figure.colorbar(row[1].collections[0], ax=row, label=name, fraction=0.04, pad=0.02)
        bar.outline.set_linewidth(0.6)
        bar.minorticks_off()
        bar.set_ticks(places, labels=texts)
    return figure


def _thresholds(ax: Axes, data: ExamplesTable, label: bool) -> None:
    marks = (
        (data.paper_threshold, "#000000", (0, (4, 2)), "paper", "right"),
        (data.true_threshold, PALETTE[1], "-", "true", "left"),
    )
    for at, colour, dashes, name, side in marks:
        ax.axvline(at, color="white", linewidth=2.4)
        ax.axvline(at, color=colour, linestyle=dashes, linewidth=1.4)
        if label:
            over = (at, 1.0), (0, 3), ("data", "axes fraction"), "offset points"
            ax.annotate(f"{name} {number(at)}", *over, ha=side, color=colour, fontsize=SMALL)


@styled
def bounds_figure(report: Report) -> Figure:
    """Last-layer relative mu and rank-1 residual over |λ| on a log axis, every bound of a Report a vertical line.

    A bound is labelled in the legend with its number, a curve with the |λ| that keep it over the target; a bound that
    certifies nothing is there without a line. λ = 0 is off the axis. Returns a Figure 180 mm wide.
    """
    found = report.found
    bounds = [line for line in report.lines if not line.measured]
    figure = Figure(figsize=(PAGE, 0.72 * PAGE), layout="constrained")
    ax = figure.subplots()
    for sign, colour in CURVES.items():
        for measure, dashes in (("relative_mu", "-"), ("rank1_residual", "--")):
            sizes, values = found.curve(sign, measure)
            bound = f"measured, {NAMES[measure].replace('μ', 'mu')}"  # as the lines of a Report are called
            reads = " or ".join(line.reads for line in report.lines if (line.bound, line.sign) == (bound, sign))
            label = textwrap.fill(f"{NAMES[measure]}, {SIGNS[sign]}" + (f": {reads}" if reads else ""), LABEL)
            ax.plot(sizes[1:], values[1:], dashes, color=colour, marker=".", markersize=3, label=label)
    ax.axhline(found.target, color="0.6", linewidth=0.8)
    place = (1.0, found.target), (-2, 2), ("axes fraction", "data"), "offset points"
    ax.annotate(f"target {found.target:g}", *place, ha="right", color="0.4", fontsize=SMALL)
    kinds = list(dict.fromkeys(line.bound for line in bounds))
    for line in bounds:
        _bound(ax, line, LINES[kinds.index(line.bound) % len(LINES)])
    ax.set(xscale="log", ylim=(0.0, 1.03), xlabel="|λ|", ylabel=f"layer {found.n_layers}, mean over excerpts")
    ax.set_title(f"{found.model}, {found.arm}: what the theorems ask for, and what is needed")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _bound(ax: Axes, line: Line, colour: str) -> None:
    label = line.bound + (f", {SIGNS[line.sign]}" if line.sign else "") + f": {line.reads}"
    if math.isfinite(line.lam):
        ax.axvline(line.lam, color=colour, linestyle=DASHES[line.sign], label=label)
    else:
        ax.plot([], [], " ", label=label)
