"""Gradient norms in a run: their rows, and the models whose gradients a run refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lscollapse.core.config import ConfigError
from lscollapse.instrument.gradients import grad_norm
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.streamed import StreamedMamba2
from lscollapse.models.checkpoints import checkpoint
from tests.equivalence import tiny
from tests.equivalence.layouts import hf_state, write_hf
from tests.integration.instrument.test_lm_loss import frozen, sweep
from tests.unit.instrument.test_lm_loss import PREDICTING, N, of_class


def test_a_run_has_their_rows_and_a_streamed_one_is_refused(tmp_path: Path) -> None:
    frozen(tmp_path)
    model = write_hf(tmp_path / "model", hf_state(dtype=torch.float32))
    settings: dict[str, Any] = {"gradients": True, "quality": False, "excerpts": 9, "lambdas": [1.0]}
    _, _ = sweep(tmp_path, model, "out", **settings)
    rows = pd.read_parquet(tmp_path / "out" / "rows.parquet")
    rows = rows[rows["measure"] == "grad_norm"]
    assert len(rows) == 2 * 4 * 9  # gate on and off, layers 0..3, excerpts
    assert (rows["value"] > 0).all()
    assert rows["rounding"].between(0, 1e-3, inclusive="neither").all()
    with pytest.raises(ConfigError, match=r"gradients need all of .* in memory.* use --stream never"):
        sweep(tmp_path, model, "streamed", stream="always", **settings)
    with pytest.raises(UnsupportedModel, match="no modules to put hooks on: use --stream never"):
        grad_norm(StreamedMamba2(checkpoint.open_layers(model)), [[1, 2, 3]])


def test_blocks_that_hand_numbers_on_are_refused(tmp_path: Path) -> None:
    """Shared keys and values of Gemma 4: X^(k) alone does not decide the loss. Nothing is left behind by the run."""
    model = of_class("Gemma4Text", "CausalLM", **PREDICTING["Gemma4Text"])
    with pytest.raises(UnsupportedModel, match="gradient of gemma4_text cannot be followed from block to block"):
        grad_norm(model, tiny.ids(2, N))
    model.save_pretrained(tmp_path / "model")
    frozen(tmp_path, size=61)
    with pytest.raises(UnsupportedModel, match="leave out --gradients"):
        sweep(tmp_path, tmp_path / "model", "out", gradients=True, lambdas=[1.0])
    assert not (tmp_path / "out").exists()
