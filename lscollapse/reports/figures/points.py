"""Rows -> the points of a figure, and the parts of a table that a figure shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lscollapse.core.table import LOST, MASSIVE, STATUSES, UNRESOLVED, known_ratio

KEYS = ("model", "init", "arm", "gating", "layernorm", "skip_site", "norm_site", "lam", "measure", "layer")
NEEDED = (*KEYS, "text", "dtype", "excerpt", "n_tokens", "value", "status", "floor")
RATIO = "row_norm_ratio"


class FigureError(ValueError):
    """The table cannot be drawn; one line that says what is missing and what to do."""


def summarise(rows: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Mean, spread, status counts and fate of every point, as `paper` explains them. Raises FigureError for pooled settings."""
    rows = rows[rows["measure"].isin(measures)]
    if rows.empty:
        raise FigureError(f"no rows of {' or '.join(measures)} for this figure: measure them, or choose another model")
    if rows.duplicated([*KEYS, "excerpt"]).any():
        settings = ("revision", "dtype", "backend", "seed", "tokenizer", "text")
        varied = ", ".join(c for c in settings if c in rows and rows[c].nunique() > 1) or "unknown"
        raise FigureError(f"several measurements of one excerpt ({varied} vary): keep the rows of one setting")
    counts = {status: rows["status"].eq(status) for status in STATUSES}
    rounding = rows.get("rounding", np.nan)  # of a table from before it was estimated
    groups = rows.assign(number=numbers(rows), rounding=rounding, **counts).groupby(list(KEYS), dropna=False)
    data = groups.agg(
        mean=("number", "mean"), std=("number", "std"), n=("number", "count"),
        **{status: (status, "sum") for status in STATUSES}, floor=("floor", "max"),
        rounding=("rounding", "max"),
    ).reset_index()  # fmt: skip
    unresolved = data[UNRESOLVED] > 0
    lost = (data[list(LOST)].sum(axis=1) > 0) | ((data["n"] == 0) & ~unresolved)
    masked = lost | np.isinf(data["mean"])  # more than half of the rows may be zero, of which the ratio is infinite
    at_floor = data["below_floor"] == data[list(STATUSES)].sum(axis=1)
    data["drawn"] = np.select([masked, unresolved, at_floor], ["masked", "unresolved", "at_floor"], "point")
    return pd.concat([data[data["measure"] == measure] for measure in measures], ignore_index=True)


def has_value(points: pd.DataFrame) -> pd.Series:
    """Whether the mean of a point is the value of all its excerpts."""
    return points["drawn"].isin(("point", "at_floor"))


def row_norm_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """The points of the row norm ratio; none of a table without it."""
    held = rows[rows["measure"] == RATIO]
    return held.assign(mean=np.nan, drawn="") if held.empty else summarise(held, (RATIO,))


def massive_points(points: pd.DataFrame) -> pd.DataFrame:
    """The points of the row norm ratio at which one row is so long that it decides relative mu and the rank-1 residual."""
    long: pd.Series = has_value(points) | np.isinf(points["mean"])
    long &= (points["measure"] == RATIO) & (points["mean"] > MASSIVE)
    return points[long]


def shown_with(rows: pd.DataFrame, measures: Sequence[str]) -> tuple[str, ...]:
    """The measures, and the row norm ratio where a row is massive anywhere."""
    return (*measures, RATIO) if len(massive_points(row_norm_ratios(rows))) else tuple(measures)


def numbers(rows: pd.DataFrame) -> pd.Series:
    """What a mean is taken of: the value, under the floor the floor itself, NaN where none is known."""
    return known_ratio(rows).mask(rows["status"].eq("below_floor"), rows["floor"].fillna(rows["value"]))


def with_columns(rows: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise FigureError(f"the table has no column {', '.join(missing)}: give the rows of a run folder")
    return rows


def of_model(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    rows = with_columns(rows)
    if model not in set(rows["model"]):
        known = ", ".join(sorted(set(rows["model"]))) or "none"
        raise FigureError(f"no rows of model {model!r}: the table has {known}")
    return rows[rows["model"] == model]


def _first_of(values: pd.Series, wanted: str) -> str:
    """The wanted value if it occurs, else the first that does."""
    present = list(values.dropna().unique())
    return wanted if wanted in present or not present else present[0]


def last_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the deepest layer of each model."""
    return rows[rows["layer"] == rows.groupby("model")["layer"].transform("max")]


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of trained weights; of a table without any, those of the first kind that it has."""
    return rows[rows["init"] == _first_of(rows["init"], "trained")]


def default_reading(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a table that crosses the sites, the default reading (or the first there is), per model."""
    parts = []
    for _, part in rows.groupby(["model", "layernorm"], sort=False):
        for column, wanted in (("skip_site", "residual"), ("norm_site", "both")):
            if part[column].notna().any():
                part = part[part[column] == _first_of(part[column], wanted)]
        parts.append(part)
    return pd.concat(parts) if parts else rows


def groups_of(rows: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return [(key, part) for key, part in rows.groupby(keys, dropna=False, sort=False)]


def is_gated(rows: pd.DataFrame) -> pd.Series:
    return rows["gating"].fillna(False).astype(bool)
