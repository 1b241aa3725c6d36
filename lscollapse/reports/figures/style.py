"""How every figure looks: style, colours, canvas, captions, keys, labels beside the curves, and its files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextToPath
from matplotlib.ticker import LogLocator, NullFormatter

from lscollapse.core.files import atomic, write_text

WIDTH, PAGE = 120 / 25.4, 180 / 25.4  # of a figure of one column of panels, and of one of several, in inches
PANEL, SMALL_PANEL = 46 / 25.4, 34 / 25.4  # least height of a panel in them, in inches
LABEL_LINE = 9.0 / 72  # height of a line of label, in inches
SMALL = 7.0  # points
PNG_DPI = 200
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.size": 0,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "ytick.minor.size": 1.5, "ytick.minor.width": 0.4,
    "axes.grid": True, "grid.color": "0.92", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "axes.titlelocation": "left", "lines.linewidth": 1.2, "lines.markersize": 3.5, "lines.markeredgewidth": 0.8,
    "legend.frameon": False, "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.04,
    "pdf.fonttype": 42, "hatch.linewidth": 0.6,
}  # fmt: skip
# Okabe-Ito and Tol: safe for the colour-blind
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#882255", "#999933")
NEGATIVE = LinearSegmentedColormap.from_list("negative", ["#8CC5EE", "#2F86C9", "#0B2A63"])
POSITIVE = LinearSegmentedColormap.from_list("positive", ["#F7B267", "#DD5A25", "#6B0F0F"])
HATCH = "/////"  # of what is unresolved
THIN = {"lw": 0.7, "ls": (0, (4, 2))}  # the rank-1 residual beside relative mu
Key = tuple[str, dict[str, Any]]  # what a line means, and how it looks
Label = tuple[float, float, str, str]  # x and y of the curve's end, text, colour
styled = style.context(["default", STYLE])  # whatever the user's matplotlibrc says


def lambda_colour(lam: float, lams: Sequence[float]) -> str:
    """Diverging about 0 (black): blues below, reds above, darker with |lam| (symlog); grey for a schedule (NaN)."""
    if np.isnan(lam):
        return "#808080"
    if lam == 0:
        return "#000000"
    size, top = (min(v, 1e300) for v in (abs(lam), max(1.0, *(abs(v) for v in lams if np.isfinite(v)))))
    return to_hex((NEGATIVE if lam < 0 else POSITIVE)(np.arcsinh(2 * size) / np.arcsinh(2 * top)))


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
    """The text in lines of at most `width` points in the caption's font."""
    measure, font = TextToPath(), FontProperties(family="DejaVu Sans", size=SMALL - 0.5)
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}".strip()
        fits = measure.get_text_width_height_descent(line, font, ismath=False)[0] <= width
        lines[-1:] = [line] if fits or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)


def panel_height(label_lines: int) -> float:
    """The height of a panel, in inches, with room for so many lines of label beside it."""
    return max(PANEL, label_lines * LABEL_LINE)


def canvas(
    n_rows: int, panel: float, words: Sequence[str], columns: Sequence[float] = (1,), width: float = WIDTH
) -> tuple[Figure, np.ndarray]:
    """Rows of panels of height `panel`, sharing x down the columns (of these relative widths), the caption under them.

    Sizes in inches. Returns the figure and its axes, (n_rows, len(columns)); rows of several panels share y.
    """
    caption = _wrap(" ".join(filter(None, words)), 0.94 * 72 * (width - 0.16))  # hinting widens text at low dpi
    # Each row has a title and the last one an x label; a line of caption is 1.25 of its font, in inches.
    height = n_rows * (panel + 0.3) + 0.3 + (caption.count("\n") + 1) * 1.25 * (SMALL - 0.5) / 72
    figure = Figure(figsize=(width, height), layout="constrained")
    share: dict[str, Any] = {"sharex": "col", "sharey": "row", "squeeze": False}
    axes = figure.subplots(n_rows, len(columns), width_ratios=columns, **share)
    figure.supxlabel(caption, x=0.08 / width, ha="left", fontsize=SMALL - 0.5, color="0.25", linespacing=1.25)
    return figure, axes


def title(ax: Axes, letter: str, words: str) -> None:
    ax.set_title(f"$\\bf{{{letter}}}$  {words}".rstrip())


def log_ticks(ax: Axes, few_decades: bool) -> None:
    """Of a logarithmic y axis: over few decades 0.2 0.5 1 rather than powers of ten; no names between."""
    if few_decades:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def name_panels(
    figure: Figure, axes: np.ndarray, titles: Sequence[str], xlabels: Sequence[str], lines: Sequence[Key]
) -> None:
    """Letters on all panels, titles over and x labels under their columns, and what the lines mean above them all."""
    letters = "abcdefghijklmnopqrstuvwxyz"[: axes.size]
    for letter, ax, words in itertools.zip_longest(letters, axes.flat, titles):  # titles end with the first row
        title(ax, letter, words or "")
    for ax, xlabel in zip(axes[-1], xlabels, strict=True):
        ax.set_xlabel(xlabel)
    figure.legend(handles=_handles(lines), loc="outside upper left", ncols=len(lines), handlelength=2.4, borderpad=0.2)


def _handles(lines: Sequence[Key]) -> list[Artist]:
    """Lines, and a rectangle for what is hatched."""
    handles: list[Artist] = []
    for name, look in lines:
        line: dict[str, Any] = {"color": "0.3"} | look
        hatched = "hatch" in look
        handles.append(
            Patch(label=name, fc="none", ec="0.3", lw=0, **look) if hatched else Line2D([], [], label=name, **line)
        )
    return handles


def line_key(ax: Axes, entries: Sequence[Key]) -> None:
    """What lines and hatching mean, in a row of its own between the title and the axes; no row without entries."""
    if not entries:
        return
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 0.99), "ncols": len(entries)}
    ax.legend(handles=_handles(entries), borderpad=0.2, handlelength=2.4, **place)
    ax.set_title(ax.get_title("left"), pad=18)


def label_ends(figure: Figure, panels: dict[Axes, list[Label]], header: str = "") -> None:
    """Labels right of the axes at the heights where the curves end, moved apart, each with a thin line to its curve.

    A curve with no point has its label at the bottom, without a line.
    """
    figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]  # the heights of the axes are known now
    for ax, labels in panels.items():
        if labels:
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


@styled
def save(figure: Figure, data: pd.DataFrame, folder: str | Path, stem: str) -> list[Path]:
    """Write stem.png (PNG_DPI), stem.pdf and stem.csv (the plotted numbers) into `folder`, each whole or not at all.

    No date goes in: the same table and library versions give the same bytes. Raises OSError for an unwritable folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, dict[str, Any]] = {"png": {"dpi": PNG_DPI, "metadata": {"Software": None}}}
    kinds["pdf"] = {"metadata": {"CreationDate": None}}
    paths = [folder / f"{stem}.{kind}" for kind in ("csv", *kinds)]
    write_text(paths[0], data.to_csv(index=False, lineterminator="\n"))
    figure.dpi = PNG_DPI
    figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]  # of `canvas`
    figure.set_layout_engine("none")  # else every file solves the layout again, after a draw of its own
    for path, (kind, options) in zip(paths[1:], kinds.items(), strict=True):
        with atomic(path) as temporary:
            figure.savefig(temporary, format=kind, **options)
    return paths
