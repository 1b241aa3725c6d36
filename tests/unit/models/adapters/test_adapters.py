"""Mamba, RoBERTa, GPT-2, Llama and its kin, ViT: against transformers' hidden states and a plain second implementation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lscollapse
from lscollapse import Variant
from lscollapse.instrument.identity import differences
from lscollapse.instrument.surgery import surgery_on_layer
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.numerics.carried import Carried
from tests.equivalence import plain_decoders, plain_models

PRE_NORM = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "vit")
DTYPES = (torch.float32, torch.float64)
PER_LAYER = (1.5, 0.0, -0.5)


def ids_for(name: str, batch: int = 2, n_tokens: int = 9) -> np.ndarray:
    """No padding id among them; of ViT whole pictures of 8 x 8 pixels."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 2**24, (batch, 64)) if name == "vit" else generator.integers(3, 61, (batch, n_tokens))


def plain(name: str, model: Any, ids: np.ndarray, *arguments: Any, **named: Any) -> list[np.ndarray]:
    """The plain implementation of a tiny model."""
    w = plain_models.weights_of(model)
    if name == "roberta":
        offset = model.config.pad_token_id + 1
        w["embeddings.position_embeddings.weight"] = w["embeddings.position_embeddings.weight"][offset:]
        return plain_models.bert(w, model.config, ids, *arguments, **named)
    function = getattr(plain_decoders, "llama" if name in ("mistral", "qwen2", "qwen3") else name)
    return function(w, model.config, ids, *arguments, **named)


def outputs(model: Any, ids: np.ndarray, variant: Variant, anew: bool = False) -> list[np.ndarray]:
    """Embedding and output of every block, one at a time, as forward.py runs them."""
    adapter = adapt(model)
    X = adapter.embed(torch.as_tensor(ids))
    found = [X]
    for layer in range(adapter.n_layers):
        with surgery_on_layer(adapter, layer, variant, Carried(X) if anew else None):
            X = adapter.run(layer, X)
        found.append(X)
    return [Y.detach().double().numpy() for Y in found]


def assert_close(found: list[Any], expected: list[Any], tolerance: float, what: str) -> None:
    assert len(found) == len(expected)
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < tolerance, f"{what}, layer {layer}: {error}"


def hidden_states(model: Any, name: str, ids: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """transformers' hidden states, X_0..X_{K-1} (of Mamba, which leaves out the embedding, X_1..X_K), and its final output."""
    tokens = torch.as_tensor(ids)
    inputs = adapt(model).pixel_values(tokens) if name == "vit" else tokens  # type: ignore[attr-defined]
    with torch.no_grad():
        whole = model(inputs, output_hidden_states=True)
    return list(whole.hidden_states[: model.config.num_hidden_layers]), whole.last_hidden_state


def final_norm(model: Any, X: np.ndarray) -> Tensor:
    norms = ("ln_f", "norm", "norm_f", "layernorm")
    norm = next((getattr(model, name) for name in norms if hasattr(model, name)), torch.nn.Identity())
    with torch.no_grad():
        return norm(torch.as_tensor(X).to(model.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", plain_decoders.TINY)
def test_lambda_one_is_the_model_itself(name: str, dtype: torch.dtype) -> None:
    """With the sums left alone, and formed anew."""
    model, ids = plain_decoders.tiny(name).to(dtype), ids_for(name)
    states, last = hidden_states(model, name, ids)
    # transformers' RMSNorm and Mamba's residual stream are float32, whatever the model's dtype (test_precision.py has float64).
    rounded = name in ("mamba", "llama", "mistral", "qwen2", "qwen3")
    tolerance = 1e-6 if dtype == torch.float32 or rounded else 1e-12
    with torch.no_grad():
        for anew in (False, True):
            found = outputs(model, ids, Variant(), anew)
            expected = [state.double().numpy() for state in states]
            assert_close(found[1:] if name == "mamba" else found[:-1], expected, tolerance, name)
            assert_close([final_norm(model, found[-1]).double().numpy()], [last.double().numpy()], tolerance, "final")
    assert max(d.output for d in differences(model, ids)) < tolerance


@pytest.mark.parametrize("name", PRE_NORM)
def test_every_edit_of_pre_norm(name: str) -> None:
    model, ids = plain_decoders.tiny(name), ids_for(name)
    for lam, layernorm, site in itertools.product(
        (-2.0, 0.0, 1.0, PER_LAYER), (True, False), ("residual", "ffn", "both")
    ):
        variant = Variant(lam, layernorm=layernorm, skip_site=site)
        assert_close(outputs(model, ids, variant), plain(name, model, ids, lam, layernorm, site), 2e-5, str(variant))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edits_in_float64(name: str) -> None:
    """Llama's norms and angles are float32 in transformers."""
    model, ids = plain_decoders.tiny(name).double(), ids_for(name)
    for site in ("residual", "both"):
        expected = plain(name, model, ids, PER_LAYER, True, site)
        tolerance = 1e-12 if name == "gpt2" else 1e-5
        assert_close(outputs(model, ids, Variant(PER_LAYER, skip_site=site)), expected, tolerance, site)


def test_every_edit_of_mamba() -> None:
    model, ids = plain_decoders.tiny("mamba"), ids_for("mamba")
    for lam, gating, layernorm, site in itertools.product(
        (-2.0, 0.0, 1.0, PER_LAYER), (True, False), (True, False), ("residual", "mixer")
    ):
        variant = Variant(lam, gating, layernorm, site)
        expected = plain("mamba", model, ids, lam, gating, layernorm, site)
        assert_close(outputs(model, ids, variant), expected, 2e-5, str(variant))


def test_every_edit_of_roberta() -> None:
    model, ids = plain_decoders.tiny("roberta"), ids_for("roberta")
    for lam, layernorm, site in itertools.product((-2.0, 0.0, PER_LAYER), (True, False), ("residual", "ffn", "both")):
        variant = Variant(lam, layernorm=layernorm, skip_site=site)
        assert_close(
            outputs(model, ids, variant), plain("roberta", model, ids, lam, layernorm, site), 2e-5, str(variant)
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_surgery_of_a_whole_model_with_a_head(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = plain_decoders.tiny(name)
    whole = AutoModelForCausalLM.from_config(model.config).eval()
    whole.base_model.load_state_dict(model.state_dict())
    ids, before = ids_for(name), {k: v.clone() for k, v in whole.state_dict().items()}
    with lscollapse.surgery(whole, Variant(-2.0)), torch.no_grad():
        logits = whole(torch.as_tensor(ids)).logits.double().numpy()
    last = final_norm(model, plain(name, model, ids, -2.0)[-1])
    expected = (last @ whole.get_output_embeddings().weight.T).detach().double().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert all(torch.equal(before[k], v) for k, v in whole.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_hooks for module in whole.modules())


@pytest.mark.parametrize(
    ("name", "site"),
    [("gpt2", "residual"), ("gpt2", "both"), ("mistral", "residual"), ("mistral", "both"), ("mamba", "residual")],
)
def test_streams_that_outgrow_their_scale(name: str, site: str) -> None:
    """8^20 and 64^20 are far over 2^40: X is carried scaled, both sums with it; a small lambda brings it down again."""
    lam = (8.0,) * 20 + (0.125,) * 4
    model, ids = plain_decoders.tiny(name, num_hidden_layers=len(lam)), ids_for(name, 3)
    rows = lscollapse.measure(model, ids, [Variant(lam, skip_site=site)])
    expected = plain(name, model, ids, lam, site=site)
    assert set(rows["status"]) == {"ok"}
    for layer, excerpt in itertools.product((10, 20, 24), range(3)):
        here = rows[(rows["layer"] == layer) & (rows["excerpt"] == excerpt)].set_index("measure")
        measured = plain_models.plain_measures(expected[layer][excerpt])
        assert here["value"]["relative_mu"] == pytest.approx(measured["relative_mu"], rel=1e-4)
        assert here["log10"]["mu"] == pytest.approx(np.log10(measured["mu"]), abs=1e-4)


def test_lambda_zero_on_the_ffn_skip_drops_a_scale_that_the_attention_skip_still_needs() -> None:
    lam = (4096.0,) * 5 + (0.0, -3.0)
    model, ids = plain_decoders.tiny("gpt2", num_hidden_layers=len(lam)), ids_for("gpt2")
    rows = lscollapse.measure(model, ids, [Variant(lam, skip_site="ffn")]).set_index(["layer", "excerpt", "measure"])
    for layer, Y in enumerate(plain("gpt2", model, ids, lam, site="ffn")):
        for excerpt, matrix in enumerate(Y):
            measured = plain_models.plain_measures(matrix)
            for name in ("relative_mu", "mu"):
                assert rows["value"][layer, excerpt, name] == pytest.approx(measured[name], rel=1e-4), (layer, name)


def test_pixels_as_the_published_processor_makes_them() -> None:
    """Against ViT's image processor, with another mean and deviation than the default's."""
    from transformers import ViTImageProcessor

    pictures = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    red, green, blue = np.moveaxis(pictures.astype(np.int64), -1, 0)
    ids = torch.as_tensor((red << 16 | green << 8 | blue).reshape(2, 64))
    model = plain_decoders.tiny("vit")
    for settings in ({}, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}):
        for name, value in settings.items():
            setattr(model.config, name, value)
        processor = ViTImageProcessor(do_resize=False, **settings)
        expected = processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        found = adapt(model).pixel_values(ids)  # type: ignore[attr-defined]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="64 pixels, but the model reads pictures of 16 x 16"):
        lscollapse.measure(plain_decoders.tiny("vit", image_size=16), ids_for("vit"))
    with pytest.raises(UnsupportedModel, match="4 channels"):
        adapt(plain_decoders.tiny("vit", num_channels=4))
    with pytest.raises(UnsupportedModel, match="add_cross_attention"):
        adapt(plain_decoders.tiny("gpt2", add_cross_attention=True))
    with pytest.raises(ValueError, match="31 tokens, but the model has 30 positions"):
        lscollapse.measure(plain_decoders.tiny("roberta"), ids_for("roberta", 1, 31))
    lscollapse.measure(plain_decoders.tiny("roberta"), ids_for("roberta", 1, 30))


def test_blocks_get_the_masks_of_the_ids_embedded_last() -> None:
    adapter = adapt(plain_decoders.tiny("mistral"))
    for n_tokens in (9, 4, 12):
        ids = ids_for("mistral", 2, n_tokens)
        expected = plain("mistral", adapter.model, ids)
        assert_close(outputs(adapter, ids, Variant()), expected, 2e-5, str(n_tokens))


@pytest.mark.parametrize("name", ["gpt2", "roberta", "vit"])
def test_the_embedding_of_a_float64_arm_is_float64(name: str) -> None:
    """Layer 0, of a float32 model measured in float64: looked up, summed, normed, and pictures scaled, in float64."""
    model, ids = plain_decoders.tiny(name, attn_implementation="sdpa"), ids_for(name)
    rows = lscollapse.measure(model, ids, [Variant(), Variant(-2.0)], dtype=torch.float64)
    first = rows[(rows["layer"] == 0) & (rows["excerpt"] == 1)]
    expected = plain_models.plain_measures(plain(name, model, ids)[0][1])
    for measure, value in zip(first["measure"], first["value"], strict=True):
        assert value == pytest.approx(expected[measure], rel=1e-13), measure


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_out_of_range_are_overflow_not_zeros(attention: str, dtype: torch.dtype) -> None:
    """Without norms the scores go with the square of X: fused attention gives zeros where they are infinite."""
    model, ids = (
        plain_decoders.tiny("gpt2", attn_implementation=attention, num_hidden_layers=3).double(),
        ids_for("gpt2"),
    )
    with torch.no_grad():
        model.h[0].attn.c_proj.weight *= 1e21
    for lam in (0.0, 1.0):
        with np.errstate(all="ignore"):
            outputs = plain("gpt2", model, ids, lam, False, "residual")
        rows = lscollapse.measure(model.to(dtype), ids, [Variant(lam, layernorm=False)], dtype=dtype)
        mu = rows[rows["measure"] == "mu"].pivot(index="layer", columns="excerpt", values=["value", "status"])
        for layer, X in enumerate(outputs):
            expected = np.linalg.norm(X - X.mean(1, keepdims=True), axis=(1, 2))
            right = np.isclose(mu["value"].loc[layer].astype(float), expected, rtol=1e-4)
            assert (right == (mu["status"].loc[layer] == "ok")).all(), (lam, layer, mu.loc[layer], expected)
        assert (mu["status"].loc[3] == ("overflow" if dtype == torch.float32 else "ok")).all()
        model.double()
