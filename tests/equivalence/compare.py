"""Rows of the table against a list of layer outputs [X_0, ..., X_K], each (B, N, d)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lscollapse.core.table import DEFAULT_MEASURES
from tests.equivalence.plain_models import plain_measures


def by_layer(rows: pd.DataFrame) -> dict[tuple[int, int, str], tuple[float, float, str]]:
    """(layer, excerpt, measure) -> (value, log10, status) of one arm."""
    keys = zip(rows["layer"], rows["excerpt"], rows["measure"], strict=True)
    table = dict(zip(keys, zip(rows["value"], rows["log10"], rows["status"], strict=True), strict=True))
    assert len(table) == len(rows), "a measurement is there twice"
    return table


VANISHING = {"mu", "relative_mu", "rank1_residual", "dong_residual", "angular_mu", "angular_rank1_residual"}


def assert_rows_match(
    rows: pd.DataFrame, outputs: Sequence[np.ndarray], rel: float = 1e-5, noise: float = 1e-6, what: str = ""
) -> None:
    """Values within `rel` of the plain ones, or within `noise` times ||Y|| where the precision of the pass shows.

    A value under `noise` (relative to ||Y||) may be called below the floor, or unresolved; any other must be ok.
    """
    table = by_layer(rows)
    assert len(table) == len(outputs) * len(outputs[0]) * len(DEFAULT_MEASURES)
    for layer, Y in enumerate(outputs):
        for excerpt, matrix in enumerate(Y):
            plain = plain_measures(matrix)
            for name in DEFAULT_MEASURES:
                expected = plain[name]
                value, log10, status = table[layer, excerpt, name]
                slack = noise * (float(np.linalg.norm(matrix)) if name == "mu" else 1.0)
                where = f"{what} layer {layer}, excerpt {excerpt}, {name}: {value}, {status} against {expected}"
                assert abs(value - expected) <= rel * abs(expected) + slack, where
                if name == "longest_row":  # two rows may be within rounding of a thousandth
                    assert status in ("ok", "unresolved"), where
                elif (
                    expected > (100 if name == "mu" else 1) * slack or name not in VANISHING
                ):  # mu is to be known to 1 %
                    assert status == "ok", where
                else:
                    assert status in ("ok", "below_floor", "unresolved"), where
                if expected > 10 * slack:
                    assert abs(log10 - np.log10(expected)) <= (rel + slack / expected) / np.log(10) * 1.1, where
