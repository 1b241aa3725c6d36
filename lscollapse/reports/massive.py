"""Massive rows of a layer's output: where one row has so many times the median norm that it decides relative mu nearly alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from lscollapse.core.table import KNOWN, MASSIVE, POSITION, UNRESOLVED, known, known_ratio, massive_words, reads_pixels


class Massive(NamedTuple):
    """Layers with a massive row, ascending, and what `core.table.massive_words` says of them; none is falsy in `layers`."""

    layers: list[int]
    ratio: float
    positions: list[float]
    unit: str

    @property
    def words(self) -> str:
        return massive_words(*self)


def massive(rows: pd.DataFrame) -> Massive:
    """What is massive in the rows of one arm; nothing where the table does not hold `row_norm_ratio`.

    A row of a picture is named by its position: that of a pixel or, in a net of patches, of a patch.
    """
    ratio = sides(rows)
    over = ratio[ratio > MASSIVE]
    places = rows[(rows["measure"] == POSITION) & rows["layer"].isin(over.index)]
    unit = "position" if reads_pixels(rows) else "token"
    return Massive([int(layer) for layer in over.index], float(over.max()), known(places).tolist(), unit)


def sides(rows: pd.DataFrame) -> pd.Series:
    """The mean ratio of row norms by layer, also where rounding moves it but not over MASSIVE; NaN where that is open."""
    held = rows[rows["measure"] == "row_norm_ratio"]
    if {"log10", "rounding"} <= set(held):
        sure = (held["log10"] - math.log10(MASSIVE)).abs() > held["rounding"]
        held = held.assign(status=held["status"].mask(held["status"].eq(UNRESOLVED) & sure, KNOWN[0]))
    return curve(held)


def pooled(found: Iterable[Massive]) -> Massive:
    """Several arms as one: where any of them has a massive row, and the largest ratio."""
    arms = [each for each in found if each.layers]
    layers = sorted({layer for each in arms for layer in each.layers})
    positions = [place for each in arms for place in each.positions]
    return Massive(layers, max(each.ratio for each in arms), positions, arms[0].unit)


def curve(rows: pd.DataFrame) -> pd.Series:
    """The mean of one measure over the excerpts by layer; NaN where that of an excerpt is not known. A ratio may be infinite."""
    means: pd.Series = known_ratio(rows).groupby(rows["layer"]).agg(lambda values: values.mean(skipna=False))
    return means
