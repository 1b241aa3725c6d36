"""The arms of Figure 3 on the shipped mamba2-tiny, against the plain float64 recurrence, as far as its numbers are finite."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import lscollapse
from lscollapse import Variant
from lscollapse.data import corpus
from lscollapse.models.checkpoints.checkpoint import load
from tests.equivalence import plain_models

N_TOKENS = 48


@pytest.fixture(scope="module")
def model():
    return load("mamba2-tiny").model


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.array([excerpt.ids for excerpt in corpus.draw_excerpts("packaged", 2, N_TOKENS, seed=5).excerpts])


@pytest.mark.parametrize(("gating", "layernorm"), list(itertools.product((True, False), repeat=2)))
def test_four_arms(model, ids, gating, layernorm) -> None:
    rows = lscollapse.measure(model, ids, [Variant(gating=gating, layernorm=layernorm)])
    measured = rows[rows["measure"] == "relative_mu"].set_index(["layer", "excerpt"])
    with np.errstate(all="ignore"):
        outputs = plain_models.mamba2(
            plain_models.weights_of(model), model.config, ids, gating=gating, layernorm=layernorm
        )
    compared = 0
    for layer, Y in enumerate(outputs):
        for excerpt, matrix in enumerate(Y):
            row = measured.loc[(layer, excerpt)]
            largest = np.abs(matrix).max()
            if not np.isfinite(largest):
                assert row["status"] == "overflow", (layer, excerpt)
            elif largest < 1e150:  # the last layer before overflow amplifies rounding without bound
                expected = plain_models.plain_measures(matrix)["relative_mu"]
                assert row["value"] == pytest.approx(expected, rel=1e-5), (layer, excerpt)
                compared += 1
    assert compared == len(measured) if layernorm else compared > 10
