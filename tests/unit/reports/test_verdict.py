"""Verdicts where one row of a layer is massive, on tables made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lscollapse.reports.massive import massive, pooled
from lscollapse.reports.verdict import arms, verdict

INF, NAN = math.inf, math.nan
# SmolLM2-135M on text: relative mu, rank-1 residual, row norm ratio, angular mu and angular rank-1 residual of the layers named;
# those between have the values of the last one named, those from 11 on the values of 12.
SMOL = {
    0: (0.94, 0.84, 1.4, 0.94, 0.86), 1: (0.69, 0.67, 2.6, 0.67, 0.67), 11: (0.99, 0.06, 170, 0.70, 0.70),
    16: (0.99, 0.08, 137, 0.67, 0.66), 24: (0.98, 0.15, 62, 0.66, 0.66), 28: (0.69, 0.64, 5.6, 0.62, 0.60),
}  # fmt: skip
NAMES = ("relative_mu", "rank1_residual", "row_norm_ratio", "angular_mu", "angular_rank1_residual")


def table(*layers: tuple[float, ...], position: float = 0.0, **columns: Any) -> pd.DataFrame:
    """Two excerpts with these values of NAMES, layer by layer, and the position of the longest row."""
    rows = [
        {"layer": layer, "measure": name, "value": value, "excerpt": excerpt}
        for layer, values in enumerate(layers)
        for name, value in zip((*NAMES, "longest_row"), (*values, position), strict=True)
        for excerpt in range(2)
    ]
    fixed = {"model": "m", "init": "trained", "arm": "LN", "lam": 1.0, "dtype": "float32", "status": "ok",
             "tokenizer": "t", "text": "t", "n_tokens": 128, "backend": "cpu"}  # fmt: skip
    return pd.DataFrame(rows).assign(**{**fixed, **columns})


def put(rows: pd.DataFrame, measure: str, layer: int, excerpt: int, **values: Any) -> pd.DataFrame:
    at = (rows["measure"] == measure) & (rows["layer"] == layer) & (rows["excerpt"] == excerpt)
    assert at.sum() == 1
    for column, value in values.items():
        rows.loc[at, column] = value
    return rows


def smol() -> pd.DataFrame:
    since = [max(known for known in SMOL if known <= layer) for layer in range(31)]
    return table(*(SMOL[layer] for layer in since))


HEALTHY, LONG = (0.9, 0.8, 2.0, 0.85, 0.8), (0.99, 0.05, 100.0, 0.7, 0.6)
SINK = (0.99, 0.05, 100.0, 0.2, 0.2)  # every row but one points the same way
THERE = "judged by directions there (angular mu {}; relative mu, {}, weighs that token most)"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (smol(), "does not collapse: relative mu, angular where a row is massive, stays over 0.5; lowest 0.660 (layer 24), last"
         " 0.690; token 0 has up to 170 times the median row norm at layers 11 to 27: judged by directions there (angular mu"
         " 0.660 to 0.700; relative mu, 0.980 to 0.990, weighs that token most)"),
        (table(HEALTHY, HEALTHY, SINK, SINK), "collapses: relative mu, angular where a row is massive, is under 0.5 from layer 2"
         " on; lowest 0.200 (layer 2), last 0.200; token 0 has up to 100 times the median row norm at layers 2 to 3: "
         + THERE.format("0.200", "0.990")),
        (table(HEALTHY, SINK), "collapses: angular mu is under 0.5 from layer 1 on; lowest 0.200 (layer 1), last 0.200; token 0"
         " has 100 times the median row norm at layer 1: " + THERE.format("0.200", "0.990")),
        (table(HEALTHY, SINK, HEALTHY), "falls under 0.5 and recovers: relative mu, angular where a row is massive, is lowest in"
         " layer 1 (0.200), last 0.900; token 0 has 100 times the median row norm at layer 1: "
         + THERE.format("0.200", "0.990")),
        (table(HEALTHY, SINK, (0.7, 0.5, 5.0, 0.4, 0.4)), "falls under 0.5 and recovers: relative mu, angular where a row is massive,"
         " is lowest in layer 1 (0.200), last 0.700; but angular mu of the last is 0.400: most rows point one way, and their"
         " lengths keep relative mu over 0.5; token 0 has 100 times the median row norm at layer 1: "
         + THERE.format("0.200", "0.990")),
        (table(SINK, HEALTHY), "does not collapse: relative mu stays over 0.5; lowest 0.900 (layer 1), last 0.900"),
        # 10 times the median is not massive, and a few long rows are why the rank-1 residual is low
        (table(HEALTHY, (0.9, 0.3, 10.0, 0.5, 0.1)), "does not collapse: relative mu stays over 0.5; lowest 0.900 (layer 1), last"
         " 0.900; but the rank-1 residual of the last is 0.300: one direction carries nearly everything (rows at +u and -u, or"
         " a few long rows), which relative mu does not see"),
        (table(HEALTHY, (0.99, 0.05, 10.2, 0.9, 0.3)), "does not collapse: angular mu stays over 0.5; lowest 0.900 (layer 1),"
         " last 0.900; but the angular rank-1 residual of the last is 0.300: one direction carries nearly everything (rows at"
         " +u and -u), which angular mu does not see; token 0 has 10 times the median row norm at layer 1: "
         + THERE.format("0.900", "0.990")),
    ],
)  # fmt: skip
def test_a_massive_row_does_not_decide(rows: pd.DataFrame, expected: str) -> None:
    (arm,) = arms(rows)
    assert verdict(arm) == expected


def without(rows: pd.DataFrame, *measures: str) -> pd.DataFrame:
    return rows[~rows["measure"].isin(measures)]


MEASURE_ALL = "is not in this table: measure it again"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (without(smol(), "angular_mu"), "no verdict: token 0 has up to 170 times the median row norm at layers 11 to 27: relative"
         f" mu, 0.980 to 0.990, weighs that token most, and angular mu {MEASURE_ALL}; elsewhere relative mu is lowest in layer 1 (0.690)"),
        (without(table(HEALTHY, LONG), "angular_mu", "longest_row"), "no verdict: one token has 100 times the median row norm at"
         f" layer 1: relative mu, 0.990, weighs that token most, and angular mu {MEASURE_ALL}"),
        (without(table(HEALTHY, LONG), "angular_rank1_residual"), "does not collapse: angular mu stays over 0.5; lowest 0.700"
         " (layer 1), last 0.700; token 0 has 100 times the median row norm at layer 1: " + THERE.format("0.700", "0.990")),
        # a table of before there was a ratio is judged as it was then
        (without(table(HEALTHY, LONG), "row_norm_ratio", "angular_mu"), "does not collapse: relative mu stays over 0.5; lowest"
         " 0.990 (layer 1), last 0.990; but the rank-1 residual of the last is 0.050: one direction carries nearly everything"
         " (rows at +u and -u, or a few long rows), which relative mu does not see"),
    ],
)  # fmt: skip
def test_measures_that_the_table_lacks(rows: pd.DataFrame, expected: str) -> None:
    (arm,) = arms(rows)
    assert verdict(arm) == expected


ZERO = (0.99, 0.05, INF, NAN, NAN)  # more than half of the rows are zero


def zero_rows(*layers: tuple[float, ...]) -> pd.DataFrame:
    rows = table(*layers)
    return rows.assign(status=np.select([rows["value"].isna(), rows["value"] == INF], ["nan", "overflow"], "ok"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (zero_rows(HEALTHY, HEALTHY, ZERO), "no verdict: layer 2 of 2 has no angular mu, since rows are zero; elsewhere relative"
         " mu, angular where a row is massive, is lowest in layer 1 (0.900); token 0 has infinitely many times the median row"
         " norm at layer 2: relative mu, 0.990, weighs that token most"),
        (zero_rows(HEALTHY, ZERO, SINK), "collapses: angular mu is under 0.5 from layer 2 on; lowest 0.200 (layer 2), last 0.200;"
         " layer 1 has no angular mu, since rows are zero; token 0 has infinitely many times the median row norm at layers 1 to"
         " 2: " + THERE.format("0.200", "0.990")),
        (put(table(HEALTHY, LONG), "angular_mu", 1, 1, value=NAN, status="nan"), "no verdict: layer 1 of 1 has no angular mu,"
         " since rows are zero; token 0 has 100 times the median row norm at layer 1: relative mu, 0.990, weighs that token most"),
        (put(table(HEALTHY, LONG, HEALTHY), "angular_mu", 1, 1, status="unresolved"), "no verdict: layer 1 of 2 is unresolved:"
         " rounding in float32 decides it: run with --dtype float64; elsewhere relative mu, angular where a row is massive, is"
         " lowest in layer 2 (0.900); token 0 has 100 times the median row norm at layer 1: relative mu, 0.990, weighs that token most"),
        (put(table(HEALTHY, LONG), "relative_mu", 1, 1, status="unresolved"), "does not collapse: angular mu stays over 0.5;"
         " lowest 0.700 (layer 1), last 0.700; token 0 has 100 times the median row norm at layer 1: judged by directions there"
         " (angular mu 0.700; relative mu weighs that token most)"),
        (put(table(HEALTHY, LONG), "longest_row", 1, 1, status="unresolved"), "does not collapse: angular mu stays over 0.5;"
         " lowest 0.700 (layer 1), last 0.700; one token (0 in 1 of 2 outputs) has 100 times the median row norm at layer 1: "
         + THERE.format("0.700", "0.990")),
        (put(table(HEALTHY, HEALTHY, HEALTHY), "row_norm_ratio", 1, 1, status="unresolved"), "does not collapse: relative mu"
         " stays over 0.5; lowest 0.900 (layer 1), last 0.900; whether a row is massive is unresolved at layer 1"),
        (put(table(HEALTHY, LONG, HEALTHY), "relative_mu", 2, 0, value=NAN, status="overflow"), "no verdict: layer 2 of 2 is"
         " missing, where the values of 1 of 2 excerpts leave float32; before that angular mu is lowest in layer 1 (0.700);"
         " token 0 has 100 times the median row norm at layer 1: " + THERE.format("0.700", "0.990")),
        (table(HEALTHY, SINK, tokenizer="pixels"), "collapses: angular mu is under 0.5 from layer 1 on; lowest 0.200 (layer 1),"
         " last 0.200; position 0 has 100 times the median row norm at layer 1: judged by directions there (angular mu 0.200;"
         " relative mu, 0.990, weighs that position most)"),
    ],
)  # fmt: skip
def test_values_that_are_not_known(rows: pd.DataFrame, expected: str) -> None:
    (arm,) = arms(rows)
    assert verdict(arm) == expected


def test_several_arms_as_one() -> None:
    first, second = table(HEALTHY, LONG, HEALTHY), table(HEALTHY, HEALTHY, (0.99, 0.05, 1500.0, 0.7, 0.6), position=3.0)
    words = pooled([massive(first), massive(second), massive(table(HEALTHY))]).words
    assert words == "one token (not the same in all outputs) has up to 1,500 times the median row norm at layers 1 to 2"


def doubtful(relative: float, angular: float, log10: float, rounding: float) -> str:
    """The verdict where the ratio of the first of two layers is unresolved."""
    rows = table(HEALTHY, (relative, 0.5, 10.0**log10, angular, 0.5), HEALTHY)
    at = (rows["measure"] == "row_norm_ratio") & (rows["layer"] == 1)
    rows["log10"] = rows["value"].where(rows["value"] > 0).map(math.log10)
    rows["rounding"] = np.where(at, rounding, 0.0)
    (arm,) = arms(rows.assign(status=np.where(at, "unresolved", "ok")))
    return verdict(arm)


@pytest.mark.parametrize("log10", [2.2, 0.5])
def test_a_ratio_that_rounding_moves_on_its_side_of_ten_only_is_known(log10: float) -> None:
    said = doubtful(0.97, 0.2, log10, 0.3)
    assert ("token 0 has 158 times the median row norm at layer 1" in said) == (log10 > 1)
    assert said.startswith("falls under 0.5" if log10 > 1 else "does not collapse") and "unresolved" not in said


def test_no_verdict_where_it_hangs_on_whether_a_row_is_massive() -> None:
    said = doubtful(0.97, 0.2, 1.1, 0.3)
    assert said.startswith("no verdict: layer 1 of 2 is unresolved") and "whether a row is massive" in said
    said = doubtful(0.97, 0.7, 1.1, 0.3)  # spread out either way
    assert said.startswith("does not collapse") and said.endswith("whether a row is massive is unresolved at layer 1")
