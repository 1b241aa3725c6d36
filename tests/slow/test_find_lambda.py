"""The search for lambda on the embedded models."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lscollapse.core import assets, registry
from lscollapse.core.config import Experiment
from lscollapse.experiments.bounds import find_lambda
from lscollapse.theory.stretches import MEASURES, SIGNS


@pytest.mark.parametrize("name", ["mamba2-tiny", "minilm-l6", "albert-smiles"])
def test_the_embedded_models_keep_what_was_found(name: str) -> None:
    """A sweep on the same excerpts without certified exit (BERT and ALBERT in float64), from the found lambda upwards."""
    try:
        registry.embedded_files(registry.resolve(name))
    except assets.AssetError as error:
        pytest.skip(str(error))
    gating = False if name == "mamba2-tiny" else None
    settings: dict[str, Any] = {"models": [name], "excerpts": 8, "gating": gating}
    found = find_lambda.find(find_lambda.load_with_grid(Experiment(**settings)), 0.5)
    exact = find_lambda.load_with_grid(Experiment(**settings, dtype="float64", certified_exit=False))
    for sign in SIGNS:
        for measure in MEASURES:
            lam = found.smallest(sign, measure)
            sizes = [find_lambda.LARGEST] if math.isinf(lam) else [lam, 1.5 * lam, 3.0 * lam, 10.0 * lam]
            for point in find_lambda.last_means(exact, [sign * size for size in sizes]).values():
                assert (point[measure] >= 0.5 - 1e-3) != math.isinf(lam)
