"""Gradient norms against torch.autograd on the untouched model, and against finite differences of a plain float64 model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import BertLMHeadModel

from lscollapse import Variant
from lscollapse.instrument.gradients import grad_norm
from tests.equivalence import plain_models, tiny
from tests.unit.instrument.test_lm_loss import (
    MASK,
    PREDICTING,
    N,
    albert,
    bert,
    gpt2,
    hidden,
    llama,
    mamba2,
    of_class,
    with_head,
)


def norms(rows: pd.DataFrame) -> np.ndarray:
    """(layers, excerpts) of a single variant."""
    return rows.pivot(index="layer", columns="excerpt", values="value").to_numpy()


def blocks_of(model: Any) -> list[nn.Module]:
    """In the order in which they are called."""
    base, kind = model.base_model, model.config.model_type
    if kind == "albert":  # 4 passes over 2 groups of 2 layers
        groups = [list(group.albert_layers) for group in base.encoder.albert_layer_groups]
        return [*groups[0], *groups[0], *groups[1], *groups[1]]
    return list({"bert": lambda: base.encoder.layer, "gpt2": lambda: base.h}.get(kind, lambda: base.layers)())


def gemma2() -> Any:
    return of_class("Gemma2", "CausalLM", **PREDICTING["Gemma2"])


def bert_decoder() -> Any:
    """Eager attention, which has no causal mask of its own."""
    config = tiny.bert(is_decoder=True, attn_implementation="eager").config
    return with_head(BertLMHeadModel, config)


def autograd_norms(model: Any, ids: Tensor, labels: Tensor) -> list[float]:
    """One excerpt through transformers' own forward and loss; the norms of the gradients that torch leaves at every X."""
    seen: list[Tensor] = []

    def keep(value: Any) -> None:
        X = value[0] if isinstance(value, tuple) else value
        X.retain_grad()
        seen.append(X)

    blocks = blocks_of(model)
    first = blocks[0].register_forward_pre_hook(lambda _, args: None if seen else keep(args[0]))
    handles = [block.register_forward_hook(lambda _, args, output: keep(output)) for block in dict.fromkeys(blocks)]
    model(input_ids=ids[None], labels=labels[None]).loss.backward()
    for handle in [first, *handles]:
        handle.remove()
    model.zero_grad()
    assert len(seen) == len(blocks) + 1
    return [float(torch.linalg.vector_norm(X.grad)) for X in seen]


@pytest.mark.parametrize(
    "make", [mamba2, gpt2, llama, bert, albert, gemma2, bert_decoder], ids=lambda make: make.__name__
)
def test_at_lambda_one_they_are_those_of_autograd(make: Callable[[], Any]) -> None:
    model, ids = make(), torch.as_tensor(tiny.ids(2, N))
    masked = type(model).__name__.endswith("ForMaskedLM")
    rows = grad_norm(model, ids, mask_token=MASK if masked else None, seed=1)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    theirs = []
    for number, row in enumerate(ids):
        inputs, labels = row.clone(), row.clone()
        if masked:
            at = hidden(1, number)
            labels = torch.full_like(row, -100)
            inputs[at], labels[at] = MASK, row[at]
        theirs.append(autograd_norms(model, inputs, labels))
    np.testing.assert_allclose(norms(rows), np.array(theirs).T, rtol=2e-5)
    assert set(rows["measure"]) == {"grad_norm"} and set(rows["dtype"]) == {"float32"}
    np.testing.assert_allclose(rows["log10"], np.log10(rows["value"]), rtol=1e-6)


def plain_loss(X: np.ndarray, model: Any, layer: int, labels: np.ndarray, variant: Variant) -> float:
    """The loss of the plain model from the input X (N, d) of a layer on; the rows of X are given as an embedding."""
    weights = plain_models.weights_of(model.backbone)
    tail = {"embeddings.weight": X}
    for name, value in weights.items():
        if name.startswith("layers.") and int(name.split(".")[1]) >= layer:
            _, number, rest = name.split(".", 2)
            tail[f"layers.{int(number) - layer}.{rest}"] = value
    config = type(model.config)(
        **{**model.config.to_dict(), "num_hidden_layers": model.config.num_hidden_layers - layer}
    )
    Y = plain_models.mamba2(tail, config, np.arange(len(X))[None], variant.lam, variant.gating)[-1][0, :-1]
    Y = Y / np.sqrt((Y**2).mean(-1, keepdims=True) + config.layer_norm_epsilon) * weights["norm_f.weight"]
    scores = Y @ model.lm_head.weight.detach().double().numpy().T
    scores -= scores.max(-1, keepdims=True)
    return float((np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(Y)), labels]).mean())


@pytest.mark.parametrize(
    ("layer", "lam"),
    [(0, -2.0), (2, -2.0), (0, -1e15), (2, 1e15), (0, -1e39), (1, (1e20, 1e-20, 1.0)), (1, (1e35, 0.0, 2.0))],
    ids=str,
)
def test_under_surgery_they_are_finite_differences(layer: int, lam: Any) -> None:
    """At |lambda| = 1e15 X grows to 1e45, past float32, and the gradient shrinks with it; where lambda is small after it
    has been large, the gradient goes through the norm of an X that is carried scaled."""
    model, ids = mamba2(), tiny.ids(1, 5)
    variant = Variant(lam, gating=False)
    found = norms(grad_norm(model, ids, [variant]))[layer, 0]
    X = plain_models.mamba2(plain_models.weights_of(model.backbone), model.config, ids, lam, False)[layer][0]
    tail = Variant(lam[layer:] if isinstance(lam, tuple) else lam, gating=False)
    step = 1e-5 * np.abs(X).max()
    gradient = np.zeros_like(X)
    for place in np.ndindex(*X.shape):
        shift = np.zeros_like(X)
        shift[place] = step
        up, down = (plain_loss(X + sign * shift, model, layer, ids[0, 1:], tail) for sign in (1, -1))
        gradient[place] = (up - down) / (2 * step)
    assert found == pytest.approx(np.linalg.norm(gradient), rel=1e-4, abs=0)


def test_a_gradient_that_is_zero_is_below_what_can_be_told() -> None:
    """At lambda = 0 nothing but O goes on, and this O does not depend on X."""
    model = mamba2()
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.zero_()
    rows = grad_norm(model, tiny.ids(2, N), [Variant(0.0)]).set_index("layer")
    assert set(rows.loc[[0, 1], "status"]) == {"below_floor"} and (rows.loc[[0, 1], "value"] == 0).all()
    assert set(rows.loc[[2, 3], "status"]) == {"ok"} and (rows.loc[[2, 3], "value"] > 0).all()


def test_overflow_forward_is_overflow_at_every_layer_of_that_excerpt_alone() -> None:
    model, ids = mamba2(), np.array([[1, 1, 1], [2, 2, 2]])
    with torch.no_grad():
        model.backbone.embeddings.weight[1] = 1e38
        model.backbone.layers[0].mixer.in_proj.weight.mul_(10)
    rows = grad_norm(model, ids, [Variant(gating=False, layernorm=False)])
    assert set(rows.loc[rows["excerpt"] == 0, "status"]) == {"overflow"}
    assert rows.loc[rows["excerpt"] == 0, "value"].isna().all()
    assert set(rows.loc[rows["excerpt"] == 1, "status"]) == {"ok"}


def test_bfloat16_weights_are_gone_through_in_float32() -> None:
    model, ids = mamba2(), tiny.ids(2, N)
    rounded = mamba2().bfloat16()
    with torch.no_grad():
        for own, other in zip(model.parameters(), rounded.parameters(), strict=True):
            own.copy_(other)
    np.testing.assert_allclose(norms(grad_norm(rounded, ids)), norms(grad_norm(model, ids)), rtol=1e-6)
    assert rounded.dtype == torch.bfloat16
