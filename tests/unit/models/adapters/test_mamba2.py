"""Mamba-2 whose weights are held in 16 bits, as a GPU holds those of a file in 16 bits: everything computes in float32."""

from __future__ import annotations

import copy

import pytest
import torch

from lscollapse import Variant
from lscollapse.instrument.forward import measure_pass
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.kernels.backends import Kernels
from lscollapse.models.kernels.chunked import causal_conv, chunked_scan, gated_norm
from tests.equivalence import plain_models, tiny
from tests.equivalence.compare import assert_rows_match

IDS = tiny.ids(2, 9, seed=1)


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def held(request: pytest.FixtureRequest) -> Mamba2Adapter:
    adapter = adapt(tiny.mamba2(2, 2).to(request.param))
    assert isinstance(adapter, Mamba2Adapter)
    adapter.computes_in = torch.float32
    return adapter


def test_own_blocks_compute_with_the_very_weights_in_float32(held: Mamba2Adapter) -> None:
    weights, narrow = plain_models.weights_of(held.held_as), held.held_as.dtype
    arms = [Variant(lam, gating) for gating in (True, False) for lam in (-1.0, 0.5)]
    rows = measure_pass(held, IDS, arms, None)
    assert set(rows["dtype"]) == {"float32"} and held.dtype == torch.float32
    for arm in arms:
        of = rows[(rows["gating"] == arm.gating) & (rows["lam"] == arm.lam)]
        assert_rows_match(of, plain_models.mamba2(weights, held.config, IDS, arm.lam, arm.gating))
    assert held.held_as.dtype == narrow == held.held(1)["mixer.in_proj.weight"].dtype


def test_the_backend_is_that_of_the_dtype(held: Mamba2Adapter) -> None:
    held.kernels = Kernels(chunked_scan, causal_conv, gated_norm, "own kernels", "cpu", triton=True)
    assert (held.backend(torch.float32), held.backend(torch.bfloat16)) == ("own kernels", "own kernels")
    assert held.backend(torch.float64) == "torch operations"


def test_modules_are_in_float32_where_they_are_asked_for(held: Mamba2Adapter) -> None:
    expected = copy.deepcopy(held.held_as).float()
    assert held.device.type == "cpu" and held.n_layers == 2 and held.embedding is not None
    assert held.held_as.dtype != torch.float32
    with torch.no_grad():
        found = held.forward(torch.as_tensor(IDS)).last_hidden_state
        assert torch.equal(found, expected(torch.as_tensor(IDS)).last_hidden_state)
    assert {parameter.dtype for parameter in held.held_as.parameters()} == {torch.float32}
