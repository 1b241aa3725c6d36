"""The dry run of what is run on a card, and the arithmetic of what a card is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lscollapse.core.table import DEFAULT_MEASURES
from tests import ROOT
from tests.integration.test_docs import tables

NEEDS_A_GPU = {"smoke": {"poisoned", "product-error", "measures"}, "full": {"mamba-ssm"}}
STEPS = {"smoke": 7, "full": 14}


@pytest.mark.parametrize("mode", ["smoke", "full"])
def test_every_step_of_the_dry_run(mode: str, tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), mode, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["steps"]
    lines = [line.split() for line in done.stdout.strip().splitlines()[-len(steps) :]]
    assert len(steps) == STEPS[mode] and [name for name, *_ in lines] == list(steps)
    for name, found in steps.items():
        if name in NEEDS_A_GPU[mode]:
            assert found["status"] == "not run" and found["headline"].endswith("need a GPU")
        else:
            assert found["status"] == "ok" and found["headline"], found
    with tarfile.open(tmp_path / "gpu-check.tar") as tar:
        assert {"table.json", *(f"{name}.txt" for name in steps)} <= set(tar.getnames())


COUNT = """
import json, sys
sys.path.insert(0, {scripts!r})
from gpu import counted
counted.stand_in()
import numpy as np
from transformers import Mamba2Config
from lscollapse import Variant
sizes = dict(hidden_size=64, num_heads=4, head_dim=32, state_size=16, n_groups=1, expand=2, vocab_size=64, pad_token_id=0)
arms = [Variant(lam, gating) for gating in (False, True) for lam in (0.0, 1.0, 2.0)]
found = {{}}
for precision in ("split", "ieee", "bfloat16"):
    config = Mamba2Config(num_hidden_layers=3, **sizes)
    counts, rows = counted.counted(config, arms, np.zeros((2, 32), int), precision)
    costs = {{name: vars(cost) for name, cost in counts.costs.items()}}
    found[precision] = {{"costs": costs, "rows": rows, "reads": counts.reads}}
print(json.dumps(found))
"""


def test_what_is_counted_is_the_closed_form() -> None:
    """3 layers, batches of 3 x 2 excerpts of 32 tokens, d = 64, inner = 128, conv_dim = 160, 4 heads."""
    code = COUNT.format(scripts=str(ROOT / "scripts"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    layers, rows, d, inner, widths = 3, 6 * 32, 64, 128, (160 + 4, 128 + 160 + 4)
    flops = layers * sum(2 * rows * d * (width + inner) for width in widths)
    split, ieee, bfloat16 = (found[precision]["costs"] for precision in ("split", "ieee", "bfloat16"))
    assert (
        split["product_kernel"]["work"]["float16"] == 2 * flops
        and split["product_kernel"]["launches"] == 2 * 2 * layers
    )
    assert ieee["torch mm"]["work"] == {"float32": flops} and bfloat16["torch mm"]["work"] == {"bfloat16": flops}
    for precision in found.values():
        costs = precision["costs"]
        O = 2 if costs is bfloat16 else 4
        assert costs["combine_kernel"]["bytes"] == 2 * layers * rows * d * (4 + O + 4)
        assert costs["scan_kernel"]["work"]["tf32"] == 2 * layers * 3 * 2 * 6 * 4 * 32 * 32 * 32
        assert costs["rest_kernel"]["launches"] == 2 * layers + 1  # the embedding is measured once
        assert precision["rows"] == (layers + 1) * 6 * 2 * len(DEFAULT_MEASURES) and precision["reads"] == layers + 1
    high_low_scale, out = (
        layers * rows * (2 * d * 4 + 2 * 4 + 2 * inner * 4 + 2 * 4),
        4 * layers * rows * (sum(widths) + 2 * d),
    )
    weights = layers * 2 * (d * sum(widths) + 2 * inner * d)
    assert split["product_kernel"]["bytes"] == high_low_scale + out + weights


def test_the_page_quotes_what_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_cost.py"), "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (quoted,) = (table for table in tables("docs/gpu.md") if table[0][0] == "products")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [cells[0] for cells in quoted[2:]] == list(found)
    published = json.loads((ROOT / "results" / "reference" / "gpu" / "h200.json").read_text(encoding="utf-8"))[
        "ceilings"
    ]
    floors = published["floor_of_the_default_sweeps_products_s"]
    for precision, least, counted, ratio, _ in quoted[2:]:
        cost = found[precision]
        assert cost["products_TFLOP"] == pytest.approx(published["tflop"], abs=0.05)
        assert float(least) == pytest.approx(cost["floor_s"], abs=0.006)
        assert float(counted) == pytest.approx(cost["counted_s"], rel=0.03)
        assert float(ratio) == pytest.approx(cost["counted_s"] / cost["floor_s"], rel=0.03)
        assert cost["counted_s"] <= 2 * cost["floor_s"]  # what is asked of the engine
        assert cost["launches_a_layer_and_batch"] < 60 and cost["reads_by_the_host"] == 65
    assert found["ieee"]["floor_s"] == pytest.approx(floors["ieee32"], abs=0.006)
    assert found["bfloat16"]["floor_s"] == pytest.approx(floors["bf16"], abs=0.006)
