"""Curves against layer and against lambda on their axes, with bands and marks.

`points` is always the data of `points.summarise`: one point a row, with its mean, spread, status counts and fate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lscollapse.core.table import MASSIVE, UNRESOLVED
from lscollapse.reports.figures.points import RATIO, has_value
from lscollapse.reports.figures.style import (
    HATCH,
    SMALL,
    THIN,
    Key,
    Label,
    canvas,
    label_ends,
    line_key,
    log_ticks,
    panel_height,
    title,
)
from lscollapse.reports.figures.wording import ends_with, measure_word, number

Curve = tuple[str, str, Any, pd.DataFrame]  # name, colour, line style, points


def _seen(ax: Axes, parts: Sequence[pd.DataFrame], ylabel: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All points of a panel, and those that have a value; it says so where none has. Names the axis."""
    ax.set_ylabel(ylabel)
    points = pd.concat(parts)
    seen = points[has_value(points)]
    if seen.empty:
        ax.text(0.5, 0.5, "no known value", transform=ax.transAxes, ha="center", va="center", color="0.4")
    return points, seen


def _ratio_limits(ax: Axes, parts: Sequence[pd.DataFrame], ylabel: str) -> None:
    """A log axis from 1, at which all rows have one norm; a thin line where a row counts as massive."""
    _, seen = _seen(ax, parts, ylabel)
    highest = (seen["mean"] + seen["std"].fillna(0)).max() if len(seen) else MASSIVE
    top = min(max(2 * MASSIVE, 1.5 * highest), 1e300)
    ax.set(yscale="log", ylim=(0.8, top))
    log_ticks(ax, few_decades=False)
    if top < 1e5:  # 1, 10, 100 rather than powers of ten
        ax.yaxis.set_major_formatter("{x:g}")
    ax.axhline(MASSIVE, color="0.45", lw=0.7, ls=(0, (4, 3)), zorder=1)


def limits(ax: Axes, parts: Sequence[pd.DataFrame], yscale: str, ylabel: str) -> None:
    """Axis from 0 to 1, or down to the decade of the least value; the floor as a dashed line where it is in sight."""
    points, seen = _seen(ax, parts, ylabel)
    if yscale == "linear":
        ax.set_ylim(0, 1.03)
        bottom = 0.01
    else:
        positive = seen["mean"][seen["mean"] > 0]
        least = positive.min() if len(positive) else 0.1
        decade = 10.0 ** np.floor(np.log10(least * 0.8))
        # The largest of 1, 2 and 5 times the decade that leaves a fifth of the least value below it.
        bottom = decade * max(step for step in (1, 2, 5) if step * decade <= least * 0.8 or step == 1)
        ax.set_yscale("log")
        ax.set_ylim(bottom, 1.4)
        log_ticks(ax, few_decades=bottom > 0.005)
    for floor in points["floor"].dropna().unique():
        if floor > bottom:
            ax.axhline(floor, color="0.45", lw=0.7, ls=(0, (4, 3)), zorder=1)
            small: dict[str, Any] = {"fontsize": SMALL - 1, "color": "0.45"}
            ax.annotate("floor", (0, floor), (2, 3), ax.get_yaxis_transform(), "offset points", **small)


def _curve(
    ax: Axes, points: pd.DataFrame, x: str, colour: str, marker: str = "", band: bool = True, **line: Any
) -> pd.DataFrame:
    """One curve with its band and marks; returns the points that are drawn, with their height `y`."""
    points = points.sort_values(x)
    shown = has_value(points)
    log, bottom = ax.get_yscale() == "log", ax.get_ylim()[0]
    low = points["floor"].where(points["floor"] > 0, bottom) if log else 0.0
    y = points["mean"].where(shown)
    at_floor = (points["drawn"] == "at_floor") | (log & (y <= 0))
    y = y.clip(lower=bottom) if log else y
    alone = shown & ~shown.shift(1, fill_value=False) & ~shown.shift(-1, fill_value=False)  # no line shows it
    dots = ~at_floor & (bool(marker) | alone)
    ax.plot(points[x], y, color=colour, **line)
    ax.plot(points[x][dots], y[dots], ls="", marker=marker or "o", ms=3, color=colour)
    if at_floor.any():  # an empty unclipped line would upset the layout
        ax.plot(points[x][at_floor], y[at_floor], "v", ms=3, mfc="white", mec=colour, mew=0.6, clip_on=False)
    if band:
        least = np.minimum(y, np.maximum(y - points["std"], low))  # no band under the floor, none above its curve
        ax.fill_between(points[x], least, y + points["std"], color=colour, alpha=0.13, lw=0)
    return points.assign(y=y)[shown]


def _hatch(ax: Axes, points: pd.DataFrame, x: str, colour: str) -> None:
    """A hatched strip along the bottom where a curve is unresolved, over those of the curves before it."""
    points = points.sort_values(x)
    at = points[x].to_numpy(float)
    between = (at[1:] + at[:-1]) / 2
    # A strip ends half way to the next point, and the one of a curve of a single point is as wide as a layer.
    edges = np.array([at[0], *between, at[-1]]) if len(at) > 1 else at[0] + np.array([-0.5, 0.5])
    turns = np.diff(np.concatenate([[0], points["drawn"] == UNRESOLVED, [0]]))  # 1 where a stretch begins, -1 after it
    ends = zip(np.flatnonzero(turns == 1), np.flatnonzero(turns == -1), strict=True)
    bars = [(edges[first], edges[after] - edges[first]) for first, after in ends]
    if bars:
        above = 0.03 * sum(strip.get_gid() == UNRESOLVED for strip in ax.collections)
        look: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "linewidth": 0, "hatch": HATCH, "zorder": 1.5}
        ax.broken_barh(bars, (0.005 + above, 0.025), transform=ax.get_xaxis_transform(), gid=UNRESOLVED, **look)


def unresolved_key(points: pd.DataFrame) -> list[Key]:
    """What the hatching means, where there is any."""
    return [("unresolved", {"hatch": HATCH})] if (points["drawn"] == UNRESOLVED).any() else []


def against_lambda(ax: Axes, line: pd.DataFrame, label: str, colour: str, top: float) -> list[Label]:
    """Relative mu with marks and band, the rank-1 residual thin and dashed, crosses at height `top` where masked."""
    thin = THIN | {"band": False, "marker": "_" if line["lam"].nunique() == 1 else ""}
    ends: list[Label] = []
    unresolved_last = line.sort_values("drawn", key=lambda drawn: drawn == UNRESOLVED, kind="stable")
    _hatch(ax, unresolved_last.drop_duplicates("lam", keep="last"), "lam", colour)  # where one of the two is
    for measure, points in line.groupby("measure", sort=False):
        main = measure == "relative_mu"
        shown = _curve(ax, points, "lam", colour, **({"marker": "o"} if main else thin))
        bad = points["lam"][points["drawn"] == "masked"]
        if main:
            ax.plot(bad, np.full(len(bad), top), "x", color=colour, transform=ax.get_xaxis_transform())
            at = (shown["lam"].iloc[-1], shown["y"].iloc[-1]) if len(shown) else (line["lam"].max(), np.nan)
            ends.append((*at, label, colour))
    return ends


def lambda_axis(ax: Axes, lams: pd.Series, room: float = 0.0) -> None:
    """Ticks at every lambda, all named if under 14, else the integers.

    In a narrow panel `room` is the share of the axis that a name takes: the integers are named where it is free.
    """
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ticks = np.sort(lams.unique())
    place = dict(zip(ticks, ax.xaxis.get_transform().transform(ticks), strict=True))
    apart = room * (max(place.values()) - min(place.values()))
    named: list[float] = []
    for lam in sorted(ticks, key=lambda lam: (lam != 0, -abs(lam))):  # the first ones are kept
        nameable = lam == int(lam) or (len(ticks) < 14 and not room)
        if nameable and all(abs(place[lam] - place[other]) >= apart for other in named):
            named.append(lam)
    ax.set_xticks(ticks, [number(lam) if lam in named else "" for lam in ticks])


def layer_curve(ax: Axes, points: pd.DataFrame, colour: str, dash: Any = "-") -> tuple[float, float]:
    """A curve against layer, a cross where it stops early; returns its end, (0, NaN) if it has none.

    Where a stretch before the stop is unresolved the curve has no end to cross.
    """
    if points.empty:
        return 0.0, np.nan
    shown = _curve(ax, points, "layer", colour, ls=dash)
    _hatch(ax, points, "layer", colour)
    if shown.empty:
        return 0.0, np.nan
    x, y = shown["layer"].iloc[-1], shown["y"].iloc[-1]
    if x == points.loc[points["drawn"] != "masked", "layer"].max() < points["layer"].max():
        ax.plot(x, y, "x", color=colour, ms=5, mew=1.2, clip_on=False, zorder=4)
    return x, y


def against_layer(
    curves: Sequence[Curve],
    panels: Sequence[tuple[str, str]],
    heading: str,
    words: Sequence[str],
    header: str = "",
    key: Sequence[Key] = (),
) -> Figure:
    """A figure of the curves against layer, with a panel for each of `panels` (measure, yscale)."""
    lines = sum(1 + bool(ends_with(points)) for _, _, _, points in curves)
    figure, axes = canvas(len(panels), panel_height(lines), words)
    axes = axes[:, 0]
    labels: dict[Axes, list[Label]] = {ax: [] for ax in axes}
    for letter, ax, (measure, yscale) in zip("abc", axes, panels, strict=False):
        parts = [points[points["measure"] == measure] for *_, points in curves]
        again = "log scale" if measure == panels[0][0] else measure_word(measure)
        title(ax, letter, heading if letter == "a" else again)
        if measure == RATIO:
            _ratio_limits(ax, parts, measure_word(measure))
        else:
            limits(ax, parts, yscale, measure_word(measure))
        ax.set_xlim(0, max(1, max(points["layer"].max() for *_, points in curves)))
        for (name, colour, dash, _), part in zip(curves, parts, strict=True):
            x, y = layer_curve(ax, part, colour, dash)
            end = ends_with(part)
            if name or end:
                labels[ax].append((x, y, "\n".join(filter(None, (name, end))), colour))
    axes[-1].set_xlabel("layer")
    line_key(axes[0], [*key, *unresolved_key(pd.concat([points for *_, points in curves]))])
    label_ends(figure, labels, header)
    return figure
