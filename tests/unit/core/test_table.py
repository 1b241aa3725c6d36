"""The words of the table: layers, and rows that are massive."""

from __future__ import annotations

import math

import pytest

from lscollapse.core.table import ALWAYS, MEASURES, chosen_measures, layer_words, massive_words

NAN = math.nan


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([3], "layer 3"), ([3, 4], "layers 3 to 4"), ([3, 5], "layers 3 and 5"), ([3, 4, 5, 9], "layers 3 to 5 and 9"),
        ([1, 3, 4, 9], "layers 1, 3 to 4 and 9"),
    ],
)  # fmt: skip
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert layer_words(layers) == words


@pytest.mark.parametrize(
    ("layers", "ratio", "positions", "words"),
    [
        (range(11, 28), 170.4, [0.0] * 34, "token 0 has up to 170 times the median row norm at layers 11 to 27"),
        ([12], 12.6, [5.0, 5.0], "token 5 has 13 times the median row norm at layer 12"),
        ([12], 1234.4, [0.0, 0.0, 3.0], "one token (0 in 2 of 3 outputs) has 1,234 times the median row norm at layer 12"),
        ([2, 4], 20.0, [0.0, NAN, NAN, 0.0, NAN], "one token (0 in 2 of 5 outputs) has up to 20 times the median row norm at"
         " layers 2 and 4"),
        ([2, 3], 20.0, [0.0, 1.0, 2.0, NAN], "one token (not the same in all outputs) has up to 20 times the median row norm at"
         " layers 2 to 3"),
        ([2], 3.2e7, [NAN, NAN], "one token has 3e+07 times the median row norm at layer 2"),
        ([2], 10.0, [], "one token has 10 times the median row norm at layer 2"),
        ([2, 3], math.inf, [1.0, 1.0], "token 1 has infinitely many times the median row norm at layers 2 to 3"),
    ],
)  # fmt: skip
def test_massive_rows_in_words(layers: list[int], ratio: float, positions: list[float], words: str) -> None:
    assert massive_words(layers, ratio, positions) == words
    assert massive_words(layers, ratio, positions, "pixel") == words.replace("token", "pixel")


def test_measures_by_name() -> None:
    assert chosen_measures("all") == chosen_measures(["mu", "all"]) == MEASURES
    assert (
        chosen_measures("mu") == chosen_measures(["mu", "mu"]) == ("mu", *(name for name in MEASURES if name in ALWAYS))
    )
    assert set(chosen_measures([])) == set(ALWAYS)
    with pytest.raises(
        ValueError, match=r"unknown measure 'mu,rank': give a list, \[mu, stable_rank\], of mu, .*; or all$"
    ):
        chosen_measures("mu,rank")
