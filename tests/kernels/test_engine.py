"""The engine of a GPU on own kernels, interpreted on a CPU: rows against the plain model, and how much a layer asks for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from lscollapse.instrument.engines import Engines
from lscollapse.instrument.forward import measure_pass
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.kernels.backends import own_kernels
from lscollapse.models.kernels.fused_measures import Fused
from tests.equivalence import plain_models, tiny
from tests.equivalence.compare import assert_rows_match
from tests.launches import Launches

SIZES = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 16}
MOST = 60  # launches a layer


@pytest.mark.parametrize("held", [torch.float16, torch.float32], ids=str)
def test_every_arm_is_that_of_the_plain_model(held: torch.dtype) -> None:
    """As one batch for each gate setting, from weights as they are stored."""
    model = tiny.mamba2(n_layers=2, **SIZES).to(held)
    adapter, ids = adapt(model), tiny.ids(2, 9)
    adapter.computes_in, adapter.kernels = torch.float32, own_kernels("cpu")
    weights = {name: tensor.astype(float) for name, tensor in plain_models.weights_of(model).items()}
    norms = ((True, "both"), (False, "mixer"))
    arms = [
        Variant(lam, gating, layernorm, skip_site, norm_site)
        for lam, gating, (layernorm, norm_site), skip_site in itertools.product(
            (-2.0, 0.0), (True, False), norms, ("residual", "mixer")
        )
    ]
    rows = measure_pass(adapter, ids, arms, torch.float32, batched=True)
    for number, v in enumerate(arms):
        args = v.lam, v.gating, v.layernorm, v.skip_site, v.norm_site
        outputs = plain_models.mamba2(weights, model.config, ids, *args)
        assert_rows_match(rows[rows["variant"] == number], outputs, what=str(v))


class AndKernels(Launches):
    """Those of the kernels too, whose interpretation is not counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        plain = InterpretedFunction.__getitem__

        def counted(kernel: Any, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                self.counts[kernel.fn.__name__] += 1
                self.paused = True
                plain(kernel, grid)(*args, **kwargs)
                self.paused = False

            return launch

        patch.setattr(InterpretedFunction, "__getitem__", counted)


@pytest.mark.parametrize("gating", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("gains", [None, [1e9] * 3], ids=["all layers", "certified exit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_a_layer(
    dtype: torch.dtype, gains: list[float] | None, gating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more for eleven arms than for three; the block, its factors, all measures and what is known of the rows."""
    model = tiny.mamba2(n_layers=3, use_bias=False, **SIZES)  # as the released ones
    for parameter in model.parameters():
        parameter.data = parameter.data.half() if parameter.ndim == 2 else parameter.data
    adapter = adapt(model)
    adapter.computes_in, adapter.kernels = torch.float32, own_kernels("cpu")
    found = []
    for n in (3, 11):
        engines = Engines(adapter, [Variant(1.5 + lam, gating) for lam in range(n)], dtype, batched=True)
        with torch.no_grad(), monkeypatch.context() as patch:
            (stream,) = engines.streams(torch.as_tensor(tiny.ids(1, 5)), gains)
            with AndKernels(patch) as launches:
                for layer, _, _ in engines.steps([stream]):
                    stream.record(layer + 1, Fused(stream.X))
        assert "_local_scalar_dense" not in launches.counts and "item" not in launches.counts
        found.append(sum(launches.counts.values()) / 3)
    assert found[0] == found[1] <= MOST - 1, launches.counts  # one more brings the layer's numbers together
