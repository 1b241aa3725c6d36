"""The worked examples of CONTRIBUTING.md, followed to the letter: what they say is enough is enough."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import lscollapse
from lscollapse import Variant
from lscollapse.models import adapt
from tests import ROOT

WIDTH, LAYERS, VOCABULARY = 8, 3, 20
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block_after(words: str) -> str:
    """The first Python block of the guide after some words of it."""
    found = re.search(r"```python\n(.*?)```", GUIDE.partition(words)[2], re.DOTALL)
    assert found, words
    return found[1]


def entry_after(words: str) -> str:
    """The line of code, indented by four spaces, that the guide says is to be added, after some words of it."""
    found = re.search(r"^    (\S.*)$", GUIDE.partition(words)[2], re.MULTILINE)
    assert found, words
    return found[1]


# --- a model ---


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, **settings: object) -> None:
        super().__init__(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, **settings)


class ToyBlock(nn.Module):
    """Z = X + mix(norm1(X)) with a causal mean over the tokens before a matrix, then Y = Z + feed(norm2(Z))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.feed = CausalMean(), nn.Linear(WIDTH, WIDTH)

    def forward(self, X: Tensor) -> Tensor:
        Z = X + self.mix(self.norm1(X))
        return Z + self.feed(self.norm2(Z))


class CausalMean(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, V: Tensor) -> Tensor:
        return super().forward(V.cumsum(1) / torch.arange(1, V.shape[1] + 1)[:, None])


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(ToyBlock() for _ in range(LAYERS))
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        X = self.embedding(input_ids)
        for layer in self.layers:
            X = layer(X)
        return X


def plain(model: ToyModel, ids: np.ndarray, lam: float) -> list[np.ndarray]:
    """Embedding and every block's output with lambda on the first skip, in numpy and float64."""
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def norm(X: np.ndarray, name: str) -> np.ndarray:
        centred = X - X.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    outputs = [w["embedding.weight"][ids]]
    for k in range(LAYERS):
        at, X = f"layers.{k}", outputs[-1]
        V = norm(X, f"{at}.norm1").cumsum(1) / np.arange(1, ids.shape[1] + 1)[:, None]
        Z = lam * X + V @ w[f"{at}.mix.weight"].T + w[f"{at}.mix.bias"]
        outputs.append(Z + norm(Z, f"{at}.norm2") @ w[f"{at}.feed.weight"].T + w[f"{at}.feed.bias"])
    return outputs


def test_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "### A model"
    toy = ModuleType("lscollapse.models.adapters.toy")
    exec(block_after(words), toy.__dict__)
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    name, place = re.findall(r'"([^"]+)"', entry_after("one line of `ADAPTERS`"))
    monkeypatch.setitem(adapt.ADAPTERS, name, place)

    torch.manual_seed(0)
    model = ToyModel(ToyConfig()).eval()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 6))
    assert type(adapt.adapt(model)).__module__ == toy.__name__
    rows = lscollapse.measure(model, ids, [Variant(), Variant(lam=-0.5), Variant(lam=3.0)], dtype=torch.float64)
    for number, lam in enumerate((1.0, -0.5, 3.0)):
        found = rows[(rows["variant"] == number) & (rows["measure"] == "relative_mu")]
        found = found.sort_values(["layer", "excerpt"])["value"].to_numpy().reshape(LAYERS + 1, -1)
        for layer, Y in enumerate(plain(model, ids, lam)):
            spread = np.linalg.norm(Y - Y.mean(1, keepdims=True), axis=(1, 2)) / np.linalg.norm(Y, axis=(1, 2))
            np.testing.assert_allclose(found[layer], spread, rtol=1e-12)
