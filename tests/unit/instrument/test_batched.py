"""Arms as one batch, the order of a GPU, on CPU tensors: against the plain models, and against arms that run by turns."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaModel

from lscollapse import Variant
from lscollapse.instrument import early_exit, rounding
from lscollapse.instrument.engines import Engines
from lscollapse.instrument.forward import measure_pass
from lscollapse.instrument.lm_loss import lm_loss
from lscollapse.models.adapt import adapt
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.checkpoints.architectures import on_meta
from lscollapse.models.kernels.backends import Kernels, causal_conv, chunked_scan, gated_norm
from lscollapse.models.kernels.fused_measures import shared_of
from tests.equivalence import plain_models, tiny
from tests.equivalence.compare import assert_rows_match
from tests.launches import Launches

LAMS = (-2.0, 0.0, 1.0, 3.0, (1.5, 0.0))
NORMS = ((True, "both"), (False, "both"), (False, "mixer"), (False, "block"))
ARMS = [
    Variant(lam, gating, layernorm, skip_site, norm_site)
    for lam, gating, (layernorm, norm_site), skip_site in itertools.product(
        LAMS, (True, False), NORMS, ("residual", "mixer")
    )
]


def assert_same_rows(found: pd.DataFrame, expected: pd.DataFrame, rel: float, near: float) -> None:
    """The same rows but for rounding: values to `rel` of themselves, or to `near` where they are at most about 1."""
    exact = [name for name in found if name not in ("value", "log10", "bound", "rounding")]
    pd.testing.assert_frame_equal(found[exact], expected[exact])
    known = found["status"] != "below_floor"
    mu = known & (found["measure"] == "mu") & (found["value"] > 1e-3)
    for one, other in ((found["value"][known], expected["value"][known]), (found["log10"][mu], expected["log10"][mu])):
        np.testing.assert_allclose(one, other, rtol=rel, atol=near)
    np.testing.assert_allclose(found["bound"], expected["bound"], rtol=1e-3)


@pytest.mark.parametrize(("n_groups", "act"), [(2, "silu"), (1, "swish")], ids=["own blocks", "hooks"])
def test_every_arm_of_mamba2_is_that_of_the_plain_model(n_groups: int, act: str) -> None:
    model, ids = tiny.mamba2(n_groups, 2, hidden_act=act), tiny.ids(2, 19)
    weights = plain_models.weights_of(model)
    rows = measure_pass(adapt(model), ids, ARMS, torch.float64, batched=True)
    for number, v in enumerate(ARMS):
        outputs = plain_models.mamba2(
            weights, model.config, ids, v.lam, v.gating, v.layernorm, v.skip_site, v.norm_site
        )
        part = rows[rows["variant"] == number]
        assert_rows_match(part, outputs, rel=1e-9, noise=1e-12, what=str(v))


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_every_arm_of_a_post_norm_net_is_that_of_the_plain_model(kind: str) -> None:
    model, ids = getattr(tiny, kind)(), tiny.ids(2, 9)
    plain, weights = getattr(plain_models, kind), plain_models.weights_of(model)
    arms = [
        Variant(lam, layernorm=layernorm, skip_site=site)
        for lam, layernorm, site in itertools.product((-2.0, 0.0, 3.0), (True, False), ("residual", "ffn", "both"))
    ]
    rows = measure_pass(adapt(model), ids, arms, torch.float64, batched=True)
    for number, v in enumerate(arms):
        outputs = plain(weights, model.config, ids, v.lam, v.layernorm, v.skip_site)
        assert_rows_match(rows[rows["variant"] == number], outputs, rel=1e-9, noise=1e-12, what=str(v))


def mamba1() -> Any:
    torch.manual_seed(0)
    return MambaModel(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=3, state_size=5)).eval()


@pytest.mark.parametrize("make", [tiny.mamba2, tiny.albert, mamba1, lambda: checkpoint.load("s4d-digits").model])
def test_arms_by_turns_are_the_same_rows(make: Any) -> None:
    model = make()
    adapter = adapt(model)
    arms = [
        Variant(lam, gating) for gating in ({True, bool(not adapter.has_gate)}) for lam in (-8.0, 0.0, 0.5, 1.0, 30.0)
    ]
    ids = tiny.ids(3, 11) % adapter.vocabulary
    for dtype in (torch.float32, torch.float64):
        found, expected = (measure_pass(adapter, ids, arms, dtype, batched=batched) for batched in (True, False))
        eps = torch.finfo(dtype).eps
        assert_same_rows(found, expected, 1e3 * eps, 1e3 * eps)


def test_rows_that_are_certified_leave_and_the_others_go_on() -> None:
    """As many rows as without leaving, each as if its arm ran by itself; also the loss, from what left and what stayed."""
    torch.manual_seed(1)
    config = tiny.mamba2().config.to_dict() | {"num_hidden_layers": 12}
    model = Mamba2ForCausalLM(Mamba2Config(**config)).eval()
    adapter, ids = adapt(model), tiny.ids(4, 7)
    with torch.no_grad():
        model.backbone.embeddings.weight[: 61 // 2] *= 1e4  # so that excerpts are certified at different layers
    ids[0], ids[1] = ids[0] % 30, 30 + ids[1] % 30
    gains = early_exit.gains(adapter, "")
    arms = [Variant(lam, gating) for gating in (True, False) for lam in (-8.0, 64.0, 0.0, 1.0, 16.0, 0.5)]
    streams: dict[bool, list[Any]] = {True: [], False: []}
    rows = {}
    for batched, finished in streams.items():
        rows[batched] = measure_pass(
            adapter, ids, arms, torch.float32, gains=gains, finished=finished.append, batched=batched
        )
    assert len(streams[True]) == 2 and len(streams[False]) == len(arms)
    assert all(0 < len(stream.rows) < len(arms) // 2 * len(ids) for stream in streams[True])
    assert_same_rows(rows[True], rows[False], 1e-4, 1e-4)
    assert 0.2 < rows[True]["bound"].notna().mean() < 0.8
    losses = {batched: lm_loss(adapter, ids, arms, torch.float32, streams=own) for batched, own in streams.items()}
    assert_same_rows(losses[True], losses[False], 1e-5, 1e-6)
    computed = lm_loss(adapter, ids, arms, torch.float32)
    assert ((losses[True]["value"] - computed["value"]).abs() <= losses[True]["bound"].fillna(0) + 1e-5).all()


def test_a_row_that_is_lost_leaves_and_stays_lost() -> None:
    model = tiny.mamba2(n_layers=5)
    with torch.no_grad():
        model.layers[2].mixer.out_proj.weight *= 1e38
        model.layers[2].mixer.out_proj.bias[:] = 3e38
    arms = [Variant(lam) for lam in (1.0, 2.0)]
    found, expected = (
        measure_pass(adapt(model), tiny.ids(2, 5), arms, torch.float32, batched=batched) for batched in (True, False)
    )
    assert set(found[found["layer"] >= 3]["status"]) == {"overflow"} and "overflow" not in set(
        found[found["layer"] < 3]["status"]
    )
    assert_same_rows(found, expected, 1e-4, 1e-4)


def test_twins_of_every_arm_are_shaken_alike() -> None:
    ids = tiny.ids(2, 9)
    arms = [Variant(lam, gating) for gating in (True, False) for lam in (-1.0, 2.0)]
    found, expected = (
        rounding.without_twins(
            measure_pass(
                adapt(tiny.mamba2()), np.concatenate([ids, ids]), arms, torch.float32, twins=rounding.Twins(range(2)),
                batched=batched,
            ),
            2,
        )
        for batched in (True, False)
    )  # fmt: skip
    assert (found.loc[found["measure"] != "longest_row", "apart"] > 0).mean() > 0.9
    np.testing.assert_allclose(found["apart"], expected["apart"], rtol=0, atol=3e-6)


# --- what a GPU is asked for ---


@pytest.mark.parametrize("gains", [None, [1.0, 1.0]], ids=["all layers", "certified exit"])
def test_no_layer_waits_for_the_device_however_many_arms_there_are(gains: list[float] | None) -> None:
    """On tensors that have a shape and no numbers: whatever asks for one raises."""
    adapter, counts = adapt(on_meta(tiny.mamba2(n_layers=2).config).eval()), []
    adapter.kernels = Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "meta")
    for n in (1, 11):
        engines = Engines(adapter, [Variant(1.0 + lam, gating=False) for lam in range(n)], torch.float32)
        (stream,) = engines.streams(torch.zeros(4, 9, dtype=torch.long, device="meta"), gains)
        with torch.no_grad(), Launches() as launches:
            for layer, _, computed in engines.steps([stream]):
                assert computed and stream.X.shape == (4 * n, 9, 16)
                stream.record(layer + 1, shared_of(stream.X))
        counts.append(launches.counts.total() // 2)
    assert counts[0] <= counts[1] <= counts[0] + 4  # lambda as numbers, or as a vector


def test_one_transfer_a_layer() -> None:
    read = []
    plain = torch.Tensor.numpy

    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(self.shape)
        return plain(self, *args, **kwargs)

    model, ids = tiny.mamba2(n_layers=7), tiny.ids(2, 5)
    adapter, arms = adapt(model), [Variant(lam, gating) for gating in (True, False) for lam in (-1.0, 0.5, 1.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "numpy", numpy)
        measure_pass(adapter, ids, arms, torch.float32, batched=True)
    rows = [shape for shape in read if shape[:1] == (len(arms) * len(ids),)]
    assert len(rows) == 8
