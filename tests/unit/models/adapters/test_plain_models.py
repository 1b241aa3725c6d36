"""The oracle itself: with nothing edited, the plain models are transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.equivalence import plain_models, tiny

CASES: dict[str, tuple[Callable[[], Any], Callable[..., list[np.ndarray]], int]] = {
    "mamba2, one group": (lambda: tiny.mamba2(1), plain_models.mamba2, 13),
    "mamba2, two groups, over two chunks": (lambda: tiny.mamba2(2), plain_models.mamba2, 19),
    "mamba2, no biases, clamped dt": (
        lambda: tiny.mamba2(4, use_bias=False, use_conv_bias=False, time_step_limit=(0.3, 0.9)),
        plain_models.mamba2,
        16,
    ),
    "bert": (tiny.bert, plain_models.bert, 7),
    "albert, groups of two": (tiny.albert, plain_models.albert, 9),
    "albert, one shared layer": (lambda: tiny.albert(3, 1, 1), plain_models.albert, 9),
    "albert, five layers in two groups": (lambda: tiny.albert(5, 2, 1), plain_models.albert, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_plain_model_is_transformers(name: str) -> None:
    make, plain, n_tokens = CASES[name]
    model = make()
    tokens = tiny.ids(2, n_tokens)
    ours = plain(plain_models.weights_of(model), model.config, tokens)
    with torch.no_grad():
        found = model(input_ids=torch.as_tensor(tokens), output_hidden_states=True)
    if model.config.model_type == "mamba2":  # hidden_states: block outputs, then norm_f
        theirs = [model.embeddings(torch.as_tensor(tokens)), *found.hidden_states[:-1]]
    else:
        theirs = list(found.hidden_states)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().double().numpy(), rtol=0, atol=3e-6 * np.abs(a).max())
