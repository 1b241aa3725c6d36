"""Losses against transformers' own, a plain float64 model, and torch's cross-entropy on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AlbertForMaskedLM,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import lscollapse
from lscollapse import Variant
from lscollapse.instrument import early_exit
from lscollapse.instrument.forward import measure_pass
from lscollapse.instrument.lm_loss import LossError, cross_entropy, lm_loss, targets_of
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Head, UnsupportedModel
from tests.equivalence import plain_models, tiny

MASK = 7
N = 13


def with_head(kind: Any, config: Any, seed: int = 0) -> Any:
    """A model with its head, every weight moved off its initial value."""
    torch.manual_seed(seed)
    return tiny._shaken(kind(config), seed)


def gpt2() -> Any:
    return with_head(GPT2LMHeadModel, GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=3, n_head=4))


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return with_head(LlamaForCausalLM, LlamaConfig(vocab_size=61, max_position_embeddings=32, **sizes))


def mamba2(**changes: Any) -> Any:
    return with_head(Mamba2ForCausalLM, tiny.mamba2(2, **{"tie_word_embeddings": True} | changes).config)


def albert() -> Any:
    return with_head(AlbertForMaskedLM, tiny.albert().config)


def bert() -> Any:
    return with_head(BertForMaskedLM, tiny.bert().config)


def roberta() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return with_head(RobertaForMaskedLM, RobertaConfig(vocab_size=61, max_position_embeddings=40, **sizes))


DECODERS: dict[str, Callable[[], Any]] = {
    "mamba2": mamba2,
    "mamba2, untied": lambda: mamba2(tie_word_embeddings=False),
    "gpt2": gpt2,
    "llama": llama,
}
ENCODERS: dict[str, Callable[[], Any]] = {"albert": albert, "bert": bert, "roberta": roberta}


def values(rows: pd.DataFrame) -> np.ndarray:
    """(variants, excerpts)."""
    return rows.pivot(index="variant", columns="excerpt", values="value").to_numpy()


@cache
def encoder() -> Any:
    return adapt(tiny.bert())


def hidden(seed: int, excerpt: int, n_tokens: int = N) -> np.ndarray:
    """Which tokens of an excerpt an encoder has to fill in."""
    targets = targets_of(encoder(), torch.zeros(1, n_tokens, dtype=torch.long), MASK, seed, [excerpt])
    return targets.at[0].numpy()


# --- at lambda = 1 it is transformers' loss ----------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_next_token_loss_is_that_of_transformers(name: str) -> None:
    model, ids = DECODERS[name](), torch.as_tensor(tiny.ids(3, N))
    rows = lm_loss(model, ids)
    with torch.no_grad():
        theirs = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    np.testing.assert_allclose(values(rows)[0], theirs, rtol=2e-6)
    assert set(rows["measure"]) == {"lm_loss"} and set(rows["status"]) == {"ok"}
    assert set(rows["layer"]) == {3}
    np.testing.assert_allclose(rows["log10"], np.log10(rows["value"]))


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_token_loss_is_that_of_transformers(name: str) -> None:
    model, ids = ENCODERS[name](), torch.as_tensor(tiny.ids(3, N))
    rows = lm_loss(model, ids, mask_token=MASK, seed=5)
    theirs = []
    for number, row in enumerate(ids):
        at = hidden(5, number)
        masked, labels = row.clone(), torch.full_like(row, -100)
        masked[at], labels[at] = MASK, row[at]
        with torch.no_grad():
            theirs.append(float(model(input_ids=masked[None], labels=labels[None]).loss))
    np.testing.assert_allclose(values(rows)[0], theirs, rtol=2e-6)


def test_hidden_tokens_are_a_seventh_drawn_by_seed_and_excerpt_whatever_the_tile() -> None:
    adapter, ids = encoder(), torch.as_tensor(tiny.ids(4, 20))
    whole = targets_of(adapter, ids, MASK, 3, range(len(ids)))
    tail = targets_of(adapter, ids[2:], MASK, 3, range(2, len(ids)))
    assert torch.equal(whole.at[2:], tail.at) and torch.equal(whole.inputs[2:], tail.inputs)
    for row, at, inputs, labels in zip(ids, whole.at, whole.inputs, whole.labels, strict=True):
        assert len(set(at.tolist())) == 3  # 15 % of 20
        assert torch.equal(labels, row[at])
        kept = np.setdiff1d(np.arange(20), at)
        assert torch.equal(inputs[kept], row[kept]) and (inputs[at] == MASK).all()
    draws = [hidden(0, k, 128) for k in range(300)]
    assert {len(draw) for draw in draws} == {19}
    times = np.bincount(np.concatenate(draws), minlength=128)  # 300 * 19 / 128 = 44.5 each, standard deviation 6.2
    assert times.min() > 15 and times.max() < 75
    assert not np.array_equal(hidden(0, 0, 128), hidden(1, 0, 128))
    assert hidden(0, 0, 2).size == 1


# --- architectures whose head is not known in parts ---------------------------------------------------

SIZE = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
PREDICTING: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},
    "Gemma2": GROUPED | {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25, "num_key_value_heads": 2},
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "FalconMamba": {"state_size": 4, "time_step_rank": 4, "num_attention_heads": None, "intermediate_size": 32},
    "Gemma4Text": GROUPED | {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "global_head_dim": 8,
        "num_global_key_value_heads": 2, "final_logit_softcapping": 2.0,
    },
    "Electra": {"embedding_size": 8, "is_decoder": True},
}  # fmt: skip
FILLING: dict[str, dict[str, Any]] = {
    "DistilBert": {"hidden_dim": 24},
    "Electra": {"embedding_size": 8},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
}


def of_class(name: str, kind: str, **changes: Any) -> Any:
    settings = {key: value for key, value in (SIZE | changes).items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**settings)
    return with_head(getattr(transformers, f"AutoModelFor{kind}").from_config, config)


def masked_losses(model: Any, ids: torch.Tensor, seed: int) -> list[float]:
    """transformers' own, each excerpt with the tokens hidden that `hidden` names."""
    found = []
    for number, row in enumerate(ids):
        at = hidden(seed, number)
        inputs, labels = row.clone(), torch.full_like(row, -100)
        inputs[at], labels[at] = MASK, row[at]
        with torch.no_grad():
            found.append(float(model(input_ids=inputs[None], labels=labels[None]).loss))
    return found


@pytest.mark.parametrize("name", PREDICTING)
def test_the_loss_of_any_decoder_is_that_of_transformers(name: str) -> None:
    """With and without surgery: soft caps, scales and projections of the scores included."""
    model, ids = of_class(name, "CausalLM", **PREDICTING[name]), torch.as_tensor(tiny.ids(3, N))
    variants = [Variant(1.0), Variant(-0.5), Variant(2.0)]
    rows = lm_loss(model, ids, variants)
    for found, variant in zip(values(rows), variants, strict=True):
        with lscollapse.surgery(model, variant), torch.no_grad():
            theirs = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
        np.testing.assert_allclose(found, theirs, rtol=2e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", FILLING)
def test_the_loss_of_any_encoder_is_that_of_transformers(name: str) -> None:
    model, ids = of_class(name, "MaskedLM", **FILLING[name]), torch.as_tensor(tiny.ids(3, N))
    for variant in (Variant(1.0), Variant(-0.5)):
        rows = lm_loss(model, ids, [variant], mask_token=MASK, seed=5)
        with lscollapse.surgery(model, variant):
            np.testing.assert_allclose(values(rows)[0], masked_losses(model, ids, 5), rtol=2e-6)


def test_the_scores_are_made_in_the_dtype_of_the_stream() -> None:
    """float32 weights, all computed in float64: against transformers' model in float64."""
    model, ids = of_class("GPTNeoX", "CausalLM"), torch.as_tensor(tiny.ids(2, N))
    found = values(lm_loss(model, ids, [Variant(-0.5)], torch.float64))[0]
    assert model.dtype == torch.float32
    with lscollapse.surgery(model.double(), Variant(-0.5)), torch.no_grad():
        scores = model(ids).logits
    assert scores.dtype == torch.float64
    expected = F.cross_entropy(scores[:, :-1].mT, ids[:, 1:], reduction="none").mean(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-7)  # GPT-NeoX's angles are float32


def test_a_head_that_sees_more_than_the_last_block_is_refused() -> None:
    """Here the scores are scaled by what the first block made."""
    model = of_class("GPTNeoX", "CausalLM")
    made: dict[str, torch.Tensor] = {}
    model.gpt_neox.layers[0].mlp.register_forward_hook(lambda module, args, output: made.update(scale=output.sum()))
    model.lm_head.register_forward_hook(lambda module, args, output: output * made.pop("scale", 1.0))
    with pytest.raises(UnsupportedModel, match="the loss of GPTNeoXForCausalLM cannot be measured: its scores follow"):
        lm_loss(model, tiny.ids(2, N))


def test_a_head_that_uses_what_the_blocks_hand_over_is_refused() -> None:
    """Here the last block gives a second tensor, made of the tokens, which the final norm's output is shifted by."""
    model = of_class("GPTNeoX", "CausalLM")
    block, decoder = model.gpt_neox.layers[-1], model.gpt_neox
    block.register_forward_hook(
        lambda module, args, output: (output[0] if isinstance(output, tuple) else output, 5 * args[0])
    )

    def decode(input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        X = memory = decoder.embed_in(input_ids)
        angles = decoder.rotary_emb(X, torch.arange(X.shape[1])[None])
        for layer in decoder.layers:
            given = layer(X, attention_mask=None, position_embeddings=angles)
            X, memory = given if isinstance(given, tuple) and len(given) == 2 else (given, memory)
        return decoder.final_layer_norm(X), memory

    decoder.forward = lambda input_ids: SimpleNamespace(last_hidden_state=decode(input_ids)[0])
    model.forward = lambda input_ids: SimpleNamespace(logits=model.lm_head(sum(decode(input_ids))))
    with pytest.raises(UnsupportedModel, match="the loss of GPTNeoXForCausalLM cannot be measured: its scores follow"):
        lm_loss(model, tiny.ids(2, N))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: of_class("GPTNeoX", "CausalLM").gpt_neox, "came with this gpt_neox: give it as GPTNeoXForCausalLM"),
        (lambda: of_class("DistilBert", "MaskedLM", hidden_dim=24).distilbert, "give it as DistilBertForMaskedLM"),
        (lambda: tiny.bert(is_decoder=True), "came with this bert: give it as BertLMHeadModel"),
        (
            lambda: of_class("T5", "Seq2SeqLM", d_model=16, d_kv=4, d_ff=24),
            "is known of t5: choose a model that predicts",
        ),
    ],
)
def test_a_model_without_a_head_says_what_to_give(model: Callable[[], Any], reason: str) -> None:
    with pytest.raises(LossError, match=f"^no language-model head .*{reason}"):
        lm_loss(model(), tiny.ids(2, N), mask_token=MASK)


# --- decoders of the BERT family ----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM", "BertForMaskedLM", "RobertaForMaskedLM"])
def test_loss_by_the_class_and_mask_by_the_config(name: str, is_decoder: bool, attention: str) -> None:
    kind = getattr(transformers, name)
    config = kind.config_class(
        **SIZE | {"max_position_embeddings": 40}, is_decoder=is_decoder, attn_implementation=attention
    )
    model, ids = with_head(kind, config), torch.as_tensor(tiny.ids(3, N) % 50 + 5)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    rows = lscollapse.measure(model, ids)
    mu = rows[rows["measure"] == "relative_mu"].pivot(index="layer", columns="excerpt", values="value")
    expected = [[plain_models.plain_measures(x.numpy())["relative_mu"] for x in state] for state in states]
    np.testing.assert_allclose(mu, expected, rtol=1e-5)
    if "Masked" in name:
        theirs = masked_losses(model, ids, 0)
    else:
        with torch.no_grad():
            theirs = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
    mask_token = MASK if "Masked" in name else None
    np.testing.assert_allclose(values(lm_loss(model, ids, mask_token=mask_token))[0], theirs, rtol=2e-6)


# --- other variants ----------------------------------------------------------------------------------


def plain_loss(X: np.ndarray, transform: Any, weight: Any, bias: Any, labels: np.ndarray) -> np.ndarray:
    """Mean of -log softmax(transform(X) W^T + b)[label] in float64, (B, P, d) -> (B,)."""
    with torch.no_grad():
        scores = transform(torch.as_tensor(X)) @ weight.double().T + (0.0 if bias is None else bias.double())
        return F.cross_entropy(scores.mT, torch.as_tensor(labels), reduction="none").mean(-1).numpy()


@pytest.mark.parametrize("lam", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize(
    ("gating", "layernorm", "norm_site"), [(True, True, "both"), (False, True, "both"), (False, False, "block")]
)
def test_a_decoder_under_surgery(lam: float, gating: bool, layernorm: bool, norm_site: str) -> None:
    model, ids = mamba2(), tiny.ids(2, N)
    rows = lm_loss(model, ids, [Variant(lam, gating, layernorm, norm_site=norm_site)])
    X = plain_models.mamba2(
        plain_models.weights_of(model.backbone), model.config, ids, lam, gating, layernorm, norm_site=norm_site
    )[-1]
    weight, eps = model.backbone.norm_f.weight.double(), model.config.layer_norm_epsilon
    norm = lambda X: F.rms_norm(X, weight.shape, weight, eps)  # noqa: E731
    plain = plain_loss(X[:, :-1], norm, model.lm_head.weight, None, ids[:, 1:])
    np.testing.assert_allclose(values(rows)[0], plain, rtol=1e-5)


@pytest.mark.parametrize("lam", [-2.0, 0.0])
@pytest.mark.parametrize("layernorm", [True, False])
def test_an_encoder_under_surgery(lam: float, layernorm: bool) -> None:
    model, ids = bert(), tiny.ids(2, N)
    rows = lm_loss(model, ids, [Variant(lam, layernorm=layernorm)], mask_token=MASK)
    at = np.array([hidden(0, b) for b in range(2)])
    masked = ids.copy()
    np.put_along_axis(masked, at, MASK, 1)
    X = plain_models.bert(plain_models.weights_of(model.bert), model.config, masked, lam, layernorm)[-1]
    X = np.take_along_axis(X, at[..., None], 1)
    head = model.cls.predictions
    plain = plain_loss(
        X, head.transform.double(), head.decoder.weight, head.decoder.bias, np.take_along_axis(ids, at, 1)
    )
    np.testing.assert_allclose(values(rows)[0], plain, rtol=1e-5)


def test_a_stream_that_outgrew_float32_has_the_loss_of_its_direction() -> None:
    """|lambda|^K is 1e60 here; in float64 the plain model still holds it."""
    model, ids = mamba2(), tiny.ids(2, N)
    lam = -1e20
    rows = lm_loss(model, ids, [Variant(lam)])
    X = plain_models.mamba2(plain_models.weights_of(model.backbone), model.config, ids, lam)[-1]
    weight = model.backbone.norm_f.weight.double()
    plain = plain_loss(
        X[:, :-1], lambda X: F.rms_norm(X, weight.shape, weight, 1e-5), model.lm_head.weight, None, ids[:, 1:]
    )
    np.testing.assert_allclose(values(rows)[0], plain, rtol=1e-5)


def test_overflow_has_its_status_and_no_number() -> None:
    model = mamba2()
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(1e30)
        model.backbone.layers[2].mixer.in_proj.weight.mul_(1e30)
    rows = lm_loss(model, tiny.ids(2, N), [Variant(gating=False, layernorm=False)], torch.float32)
    assert list(rows["status"]) == ["overflow"] * 2
    assert rows["value"].isna().all() and rows["log10"].isna().all()


def test_an_embedding_that_is_nan_is_nan_not_overflow() -> None:
    model, ids = mamba2(), tiny.ids(2, N)
    ids[0], ids[1] = ids[0] % 30, 30 + ids[1] % 30
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # else it has the NaN too
    with torch.no_grad():
        model.backbone.embeddings.weight[:30] = torch.nan
    for batched in (True, False):
        streams: list[Any] = []
        measure_pass(adapt(model), ids, [Variant()], None, finished=streams.append, batched=batched)
        for given in (streams, None):  # known of the layers as they came, or at the end
            assert list(lm_loss(model, ids, streams=given)["status"]) == ["nan", "ok"]


# --- the head in blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 61, 100])
def test_blocks_of_the_vocabulary_make_no_difference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(block)
    Z = 30 * torch.randn(9, 5, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(61, 5, generator=generator), torch.randn(61, generator=generator)
    labels = torch.randint(0, 61, (9,), generator=generator)
    monkeypatch.setattr("lscollapse.instrument.lm_loss.BLOCK", block)
    found = cross_entropy(Z, labels, Head(torch.nn.Identity(), weight, bias))
    whole = F.cross_entropy(Z @ weight.double().T + bias.double(), labels, reduction="none")
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


# --- excerpts whose last layers were not computed -------------------------------------------------------


@pytest.mark.parametrize("lam", [300.0, -300.0, (-90.0, 400.0, -1e3, -7e4, 5e5)])
def test_certified_exit_has_the_loss_within_its_bound(lam: float | tuple[float, ...]) -> None:
    model, ids = mamba2(n_layers=5), tiny.ids(3, N)
    adapter, variants = adapt(model), [Variant(lam)]
    gains = early_exit.gains(adapter, "random-init-0")
    streams: list[Any] = []

    measure_pass(adapter, ids, variants, None, gains=gains, finished=streams.append)
    early = lm_loss(adapter, ids, variants, streams=streams)
    X = plain_models.mamba2(plain_models.weights_of(model.backbone), model.config, ids, lam)[-1]
    weight = model.backbone.norm_f.weight.double()
    exact = plain_loss(
        X[:, :-1], lambda X: F.rms_norm(X, weight.shape, weight, 1e-5), model.lm_head.weight, None, ids[:, 1:]
    )
    assert set(early["status"]) == {"certified"}
    bound = early["bound"].to_numpy()
    rounding = 1e-5
    assert (np.abs(values(early)[0] - exact) < bound + rounding).all() and (bound < 1e-2).all()


def test_certified_loss_knows_the_sign_of_the_lambdas_that_were_skipped() -> None:
    """X of an odd number of negative lambdas is turned round, and its loss is another one."""
    model, ids = mamba2(n_layers=5), tiny.ids(1, N)
    adapter = adapt(model)
    found = {}

    for last in (-1e6, 1e6):
        streams: list[Any] = []
        variants = [Variant((1e6, 1e6, 1e6, 1e6, last))]
        measure_pass(
            adapter, ids, variants, None, gains=early_exit.gains(adapter, "random-init-0"), finished=streams.append
        )
        found[last] = lm_loss(adapter, ids, variants, streams=streams)["value"][0]
        np.testing.assert_allclose(found[last], lm_loss(adapter, ids, variants)["value"][0], rtol=1e-5)
    assert abs(found[1e6] - found[-1e6]) > 0.01


def plain_decoder_loss(model: Any, ids: np.ndarray, lam: Any) -> np.ndarray:
    X = plain_models.mamba2(plain_models.weights_of(model.backbone), model.config, ids, lam)[-1]
    weight, eps = model.backbone.norm_f.weight.double(), model.config.layer_norm_epsilon
    norm = lambda X: F.rms_norm(X, weight.shape, weight, eps)  # noqa: E731
    return plain_loss(X[:, :-1], norm, model.lm_head.weight, None, ids[:, 1:])


LAYERS = 14
SETTLING = [
    8.0, -8.0, -5.0, 64.0, -64.0, -1e3, 1.0, -1.0,
    (-7.0, 3.0, -40.0, 900.0, -0.5, -11.0, 6.0, -1.0, -1.0, 0.25, -3.0, -3.0, -2.0, 8.0),
]  # fmt: skip


@pytest.mark.parametrize("lam", SETTLING, ids=str)
def test_excerpts_of_a_tile_that_settle_at_different_layers_have_their_own_loss(lam: Any) -> None:
    """The words of one excerpt are 10^4 times those of the other: it is certified layers before it, whatever the tile."""
    model = mamba2(n_layers=LAYERS, use_bias=False)
    with torch.no_grad():
        model.backbone.embeddings.weight[:30] *= 1e4
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) / 4)  # untied, of words alike
    ids = np.stack([tiny.ids(1, N)[0] % 30, 30 + tiny.ids(1, N)[0] % 30, tiny.ids(1, N, seed=1)[0] % 30])
    adapter, variants = adapt(model), [Variant(lam)]
    gains = early_exit.gains(adapter, "")

    exact = plain_decoder_loss(model, ids, lam)
    for tile in ([0, 1, 2], [0], [1], [2, 1]):
        streams: list[Any] = []
        rows = measure_pass(adapter, ids[tile], variants, None, gains=gains, finished=streams.append)
        settled = rows[rows["bound"].notna()].groupby("excerpt")["layer"].min()
        if len(tile) == 3 and lam not in (1.0, -1.0):
            assert settled[0] < settled[1]
        found = values(lm_loss(adapter, ids[tile], variants, streams=streams))[0]
        np.testing.assert_allclose(found, exact[tile], rtol=2e-5)


@pytest.mark.parametrize("lam", [0.5, -0.5, 0.6])
def test_the_final_norm_sees_the_true_size_of_a_small_stream_that_was_certified(lam: float) -> None:
    """Its eps is not small beside X = lam^K X_0 here, so that a size counted twice is another loss."""
    model = mamba2(n_layers=12, use_bias=False)
    with torch.no_grad():
        model.backbone.embeddings.weight[:30] *= 1e-3  # not certified as soon as the others, if at all
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
        for layer in model.backbone.layers:
            layer.mixer.out_proj.weight.mul_(1e-13)
    ids = np.stack([tiny.ids(1, N)[0] % 30, 30 + tiny.ids(1, N)[0] % 30])
    adapter, variants = adapt(model), [Variant(lam)]
    streams: list[Any] = []

    measure_pass(adapter, ids, variants, None, gains=early_exit.gains(adapter, ""), finished=streams.append)
    early = lm_loss(adapter, ids, variants, streams=streams)
    assert "certified" in set(early["status"])
    np.testing.assert_allclose(values(early)[0], plain_decoder_loss(model, ids, lam), rtol=1e-5)


# --- what cannot be done ---------------------------------------------------------------------------------


def test_errors_are_one_clear_line() -> None:
    for base, head in ((tiny.mamba2(), "Mamba2ForCausalLM"), (tiny.bert(), "BertForMaskedLM")):
        with pytest.raises(LossError, match=rf"no language-model head came with this .*: give it as {head}$"):
            lm_loss(base, tiny.ids(1, 4), mask_token=MASK)
    with pytest.raises(LossError, match=r"fills in masked tokens .* no mask token"):
        lm_loss(bert(), tiny.ids(1, 4))
    with pytest.raises(LossError, match="one token has no next one"):
        lm_loss(mamba2(), tiny.ids(1, 1))
