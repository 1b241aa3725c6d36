"""dtype and floor of the rows say what computed: float64 arms against plain float64 models, and models that keep to float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import lscollapse
from lscollapse import Variant, measures
from lscollapse.instrument.identity import differences
from lscollapse.instrument.precision import computed_in
from lscollapse.models.adapt import adapt
from lscollapse.models.numerics.widened import computing_in
from tests.equivalence import plain_decoders, plain_models, plain_others, tiny
from tests.equivalence.compare import assert_rows_match
from tests.unit.models.adapters.test_adapters import ids_for, plain
from tests.unit.models.adapters.test_generic import build

NATIVE = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mamba", "roberta", "vit")
OTHERS: dict[str, tuple[Callable[..., list[np.ndarray]], dict[str, Any]]] = {
    "GPTNeoX": (plain_others.gpt_neox, {"num_attention_heads": 2, "rotary_pct": 0.5}),
    "Gemma": (plain_others.gemma, {}),
    "T5": (plain_others.t5_encoder, {}),
}
PER_LAYER = (1.5, 0.0, -0.5)


def other(name: str) -> tuple[Any, Callable[..., list[np.ndarray]]]:
    function, settings = OTHERS[name]
    model = build(name, **settings)
    weights = plain_models.weights_of(model.get_encoder() if name == "T5" else model)
    return model, lambda ids, lam: function(weights, model.config, ids, lam)


def assert_float64(rows: pd.DataFrame, outputs: list[np.ndarray], what: str) -> None:
    assert set(rows["dtype"]) == {"float64"}, what
    assert set(rows["floor"]) == {2.0**-50}, what
    assert_rows_match(rows, outputs, rel=1e-12, noise=2e-14, what=what)


def test_what_a_model_computes_in_is_looked_for_once_for_a_length() -> None:
    model = plain_decoders.tiny("gpt2")
    adapter, runs = adapt(model), []
    model.h[0].register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[1]))
    ids = torch.as_tensor(ids_for("gpt2"))
    adapter.embed(ids)  # tries the model out
    runs.clear()
    assert [computed_in(adapter, ids[n : n + 1]) for n in (0, 1)] == [torch.float32] * 2
    assert computed_in(adapter, ids[:1, :5]) == torch.float32
    assert runs == [9, 9, 5, 5]  # by `embed`, which computes no block, and by `run`


@pytest.mark.parametrize("lam", [-2.0, 0.0, PER_LAYER])
@pytest.mark.parametrize("name", NATIVE)
def test_float64_arms_are_the_plain_float64_model(name: str, lam: Any) -> None:
    """Of a float32 model, and of the same one in float64, which is left as it was."""
    model, ids = plain_decoders.tiny(name), ids_for(name)
    expected = plain(name, model, ids, lam)
    assert_float64(lscollapse.measure(model, ids, [Variant(lam)], dtype=torch.float64), expected, name)
    model = model.double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_float64(lscollapse.measure(model, ids, [Variant(lam)]), expected, f"{name}.double()")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", OTHERS)
def test_float64_arms_of_the_generic_adapter(name: str) -> None:
    model, expected = other(name)
    ids = ids_for(name)
    for lam in (-2.0, 0.0, 1.0, PER_LAYER):
        rows = lscollapse.measure(model, ids, [Variant(lam)], dtype=torch.float64)
        assert_float64(rows, expected(ids, lam), f"{name}, lambda {lam}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_collapses_as_far_as_float64_reaches(attention: str) -> None:
    """24 layers at lambda = 0: float32 inside would say 5e-8 where 4e-8 is the value."""
    model = plain_decoders.tiny("llama", num_hidden_layers=24, num_attention_heads=2)
    model.set_attn_implementation(attention)
    ids = ids_for("llama")
    expected = plain("llama", model, ids, 0.0)
    rows = lscollapse.measure(model, ids, [Variant(0.0)], dtype=torch.float64)
    last = rows[(rows["layer"] == 24) & (rows["measure"] == "relative_mu")].set_index("excerpt")
    for excerpt, Y in enumerate(expected[-1]):
        truth = plain_models.plain_measures(Y)["relative_mu"]
        assert truth < 1e-3 and last["status"][excerpt] == "ok"
        assert last["value"][excerpt] == pytest.approx(truth, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("gating", [True, False])
def test_mamba_without_norms_reaches_as_far_as_float64(gating: bool) -> None:
    """Its values are far over float32's 3e38 before they overflow."""
    model, ids = plain_decoders.tiny("mamba", num_hidden_layers=12), ids_for("mamba", 1)
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.in_proj.weight *= 30
            layer.mixer.out_proj.weight *= 30
    with np.errstate(all="ignore"):
        expected = plain("mamba", model, ids, 1.0, gating, False)
    rows = lscollapse.measure(model, ids, [Variant(gating=gating, layernorm=False)])
    assert set(rows["dtype"]) == {"float64"}
    found = rows[rows["measure"] == "relative_mu"].set_index("layer")
    sizes = [np.abs(Y).max() for Y in expected]
    assert any(1e60 < size < 1e300 for size in sizes) and not np.isfinite(sizes[-1])
    for layer, Y in enumerate(expected):
        if np.isfinite(sizes[layer]):
            assert found["status"][layer] == "ok", (layer, sizes[layer])
            assert found["value"][layer] == pytest.approx(plain_models.plain_measures(Y[0])["relative_mu"], rel=1e-9)
        else:
            assert found["status"][layer] == "overflow", layer


class SingleNorm(nn.Module):
    """A norm that leaves torch for float32, as compiled code may; no request of it can be answered with float64."""

    def forward(self, X: Tensor) -> Tensor:
        single = torch.from_numpy(X.numpy().astype(np.float32))
        return (single / single.norm(dim=-1, keepdim=True)).to(X.dtype)


def test_an_arm_that_float32_remains_in_is_called_float32() -> None:
    """The norm of the last block only: the pass that is watched goes through all of them."""
    model, ids = plain_decoders.tiny("llama"), ids_for("llama")
    model.layers[-1].post_attention_layernorm = SingleNorm()
    for made in (model, model.double()):
        rows = lscollapse.measure(made, ids, [Variant(), Variant(-2.0)], dtype=torch.float64)
        assert set(rows["dtype"]) == {"float32"}
        assert set(rows["floor"]) == {measures.floor(torch.float32)}


def test_weights_of_two_dtypes_are_the_narrower_one() -> None:
    """T5 with its embedding alone in float32, the first of its parameters."""
    model, ids = build("T5").bfloat16(), ids_for("T5")
    model.shared.float()
    assert next(model.get_encoder().parameters()).dtype == torch.float32
    assert set(lscollapse.measure(model, ids)["dtype"]) == {"bfloat16"}
    assert set(lscollapse.measure(model, ids, dtype=torch.float32)["dtype"]) == {"float32"}


def test_layer_0_is_measured_in_the_dtype_of_its_rows() -> None:
    """One token and no positions: the rows of BERT's embedding, after its norm, are equal. Distinct types make the rest."""
    model = tiny.bert()
    with torch.no_grad():
        model.embeddings.position_embeddings.weight *= 1e-9
    ids = np.full((1, 6), 7)
    expected = plain_models.bert(plain_models.weights_of(model), model.config, ids)[0]
    rows = lscollapse.measure(model, ids, dtype=torch.float64)
    found = rows[(rows["layer"] == 0) & (rows["measure"] == "relative_mu")]["value"].item()
    assert found == pytest.approx(plain_models.plain_measures(expected[0])["relative_mu"], rel=1e-5)
    assert 1e-11 < found < 1e-8


def test_a_constant_that_someone_set_is_kept() -> None:
    """Rotary frequencies are computed anew in float64 only where they are what transformers computes."""
    model, ids = plain_decoders.tiny("llama"), ids_for("llama")
    model.rotary_emb.inv_freq *= 2.0
    single = lscollapse.measure(model, ids)
    double = lscollapse.measure(model, ids, dtype=torch.float64)
    np.testing.assert_allclose(double["value"], single["value"], rtol=1e-5)
    plain_rows = lscollapse.measure(plain_decoders.tiny("llama"), ids)
    assert (single["value"] - plain_rows["value"]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "settings"), [
    ("Bloom", {}), ("Mixtral", None), ("Jamba", None), ("FalconMamba", {"state_size": 4}),
])  # fmt: skip
def test_architectures_whose_own_float64_fails(name: str, settings: dict[str, Any] | None) -> None:
    """Experts have no grouped product in float64, and Falcon-Mamba rounds its residual: refused as they are, not here."""
    model, ids = build(name, **(settings or {})), ids_for(name)
    single = lscollapse.measure(model, ids, [Variant(), Variant(-2.0)])
    double = lscollapse.measure(model, ids, [Variant(), Variant(-2.0)], dtype=torch.float64)
    assert set(double["dtype"]) == {"float64"}
    np.testing.assert_allclose(double["value"], single["value"], rtol=1e-4, atol=1e-5)
    again = lscollapse.measure(model.double(), ids, [Variant(), Variant(-2.0)])
    np.testing.assert_allclose(again["value"], double["value"], rtol=1e-12)
    assert max(d.output for d in differences(model, ids)) < 1e-12


def test_what_is_answered_with_float64() -> None:
    x = torch.full((3,), 1 / 3, dtype=torch.float64)
    with computing_in(torch.float64):
        answers = [
            x.float(), x.to(torch.float32), x.to(dtype=torch.bfloat16), x.half(), torch.zeros(2, dtype=torch.float32),
            torch.tensor(0.1), torch.arange(3).float(), torch.softmax(x, -1, dtype=torch.float32), x.type(torch.float32),
            nn.functional.softmax(x, dim=-1, dtype=torch.float32), torch.ones(2), x.to("cpu", torch.float32),
        ]  # fmt: skip
        assert x.float() is x and x.long().dtype == torch.int64
        assert torch.view_as_complex(torch.ones(2, 2)).to(torch.complex64).dtype == torch.complex128
    assert {answer.dtype for answer in answers} == {torch.float64}
    assert float(answers[5]) == 0.1 and torch.equal(answers[1], x)
    with computing_in(torch.float32):
        assert x.float().dtype == torch.float32


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch older than its grouped product")
def test_grouped_products_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7, 3), (3, 3, 5)))
    offs = torch.tensor([2, 2, 6], dtype=torch.int32)
    with computing_in(torch.float64):
        found = nn.functional.grouped_mm(X, W, offs=offs)
    expected = torch.cat([X[:2] @ W[0], X[2:6] @ W[2]])
    torch.testing.assert_close(found[:6], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_floors_cover_the_rounding_of_equal_rows(kind: str) -> None:
    """lambda = 0 on both skips: the plain model's rows agree to 1e-9 and less, float32 leaves up to 3 spacings of them."""
    sizes = {"hidden_size": 64, "intermediate_size": 256}
    model = tiny.bert(12, **sizes) if kind == "bert" else tiny.albert(12, 1, 1, **sizes)
    ids = tiny.ids(2, 24)
    outputs = getattr(plain_models, kind)(plain_models.weights_of(model), model.config, ids, 0.0, True, "both")
    rows = lscollapse.measure(model, ids, [Variant(0.0, skip_site="both")], torch.float32)
    assert_no_noise_is_ok(rows, outputs, over=1.0)


def assert_no_noise_is_ok(rows: pd.DataFrame, outputs: list[np.ndarray], over: float) -> None:
    """Values that float32 cannot resolve are called so, and `over` spacings of noise were seen: the floor is needed."""
    noise = 0.0
    indexed = rows.set_index(["layer", "excerpt", "measure"])
    for layer, Y in enumerate(outputs):
        for excerpt, matrix in enumerate(Y):
            for name in ("relative_mu", "rank1_residual"):
                truth, row = plain_models.plain_measures(matrix)[name], indexed.loc[(layer, excerpt, name)]
                assert abs(row["value"] - truth) < row["floor"], (layer, name)
                if truth < 1e-9:
                    noise = max(noise, row["value"] / 2.0**-23)
                    assert row["status"] == "below_floor", (layer, name, row["value"])
    assert noise > over


def test_floors_cover_the_rounding_of_gpt2() -> None:
    model, ids = plain_decoders.tiny("gpt2", num_hidden_layers=24, hidden_size=32, n_inner=128), ids_for("gpt2", 2, 24)
    expected = plain("gpt2", model, ids, 0.0, True, "both")
    rows = lscollapse.measure(model, ids, [Variant(0.0, skip_site="both")])
    assert_no_noise_is_ok(rows, expected, over=-1.0)
    assert min(plain_models.plain_measures(Y)["relative_mu"] for Y in expected[-1]) < 1e-3


def test_float64_loss_of_a_norm_that_upcasts() -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(plain_decoders.tiny("llama").config).eval()
    model.model.load_state_dict(plain_decoders.tiny("llama").state_dict())
    ids = ids_for("llama")
    X = plain("llama", model.model, ids)[-1]
    weight = model.model.norm.weight.detach().double().numpy()
    Z = plain_models._rms_norm(weight, X, model.config.rms_norm_eps) @ model.lm_head.weight.detach().double().numpy().T
    logs = Z - np.log(np.exp(Z - Z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - Z.max(-1, keepdims=True)
    expected = [
        -np.mean([row[p, token] for p, token in enumerate(tokens[1:])]) for row, tokens in zip(logs, ids, strict=True)
    ]
    rows = lscollapse.lm_loss(model, ids, dtype=torch.float64)
    assert set(rows["dtype"]) == {"float64"}
    np.testing.assert_allclose(rows["value"], expected, rtol=1e-13)


def test_adapters_of_copies_are_the_adapters_of_the_model() -> None:
    adapter = adapt(build("Bart"))
    rows = lscollapse.measure(adapter, ids_for("Bart"), [Variant(-2.0)], dtype=torch.float64)
    assert set(rows["dtype"]) == {"float64"}
