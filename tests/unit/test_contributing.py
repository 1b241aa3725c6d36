"""The worked examples of CONTRIBUTING.md, followed to the letter: what they say is enough is enough."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import lscollapse
from lscollapse import Variant, measures
from lscollapse.core import table
from lscollapse.models import adapt
from lscollapse.reports.figures import draw
from tests import ROOT

WIDTH, LAYERS, VOCABULARY = 8, 3, 20
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 6))
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block_after(words: str) -> str:
    """The first Python block of the guide after some words of it."""
    found = re.search(r"```python\n(.*?)```", GUIDE.partition(words)[2], re.DOTALL)
    assert found, words
    return found[1]


def entry_after(words: str) -> str:
    """The line of code, indented by four spaces, that the guide says is to be added, after some words of it."""
    found = re.search(r"^    (\S.*),$", GUIDE.partition(words)[2], re.MULTILINE)
    assert found, words
    return found[1]


def test_every_heading_is_there_once() -> None:
    headings = re.findall(r"^#+ .*", GUIDE, re.MULTILINE)
    assert len(headings) == len(set(headings)) > 5


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:[a-z]\w*/)+\w+\.py)`", GUIDE))
    invented = {"models/adapters/NAME.py", "models/nets/NAME.py", "models/adapters/toy.py", "reports/figures/NAME.py",
                "reports/figures/dong.py", "data/NAME.py", "experiments/NAME.py"}  # fmt: skip
    assert invented < named
    assert [
        name for name in named - invented if not any((root / name).is_file() for root in (ROOT, ROOT / "lscollapse"))
    ] == []


def test_the_table_of_the_house_has_every_file_of_a_room() -> None:
    rows = dict(re.findall(r"^\| \d \| `(\w+)/` \|[^|]*\|(.*)\|$", GUIDE, re.MULTILINE))
    assert len(rows) == 9
    for room, inside in rows.items():
        named = {word.rstrip("/") for ticked in re.findall("`([^`]+)`", inside) for word in ticked.split()}
        stems = {path.stem for path in (ROOT / "lscollapse" / room).iterdir() if not path.name.startswith("__")}
        assert named == {re.sub("^statements_.*", "statements_*", stem) for stem in stems}, room


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


@pytest.fixture
def model() -> ToyModel:
    torch.manual_seed(0)
    return ToyModel(ToyConfig()).eval()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The adapter of the guide, where a file of it would be; its module's name."""
    module = ModuleType("lscollapse.models.adapters.toy")
    exec(block_after("### A model"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name, place = re.findall(r'"([^"]+)"', entry_after("one line of `ADAPTERS`, by"))
    monkeypatch.setitem(adapt.ADAPTERS, name, place)
    return module.__name__


def test_the_model(model: ToyModel, toy: str) -> None:
    assert type(adapt.adapt(model)).__module__ == toy
    rows = lscollapse.measure(model, IDS, [Variant(), Variant(lam=-0.5), Variant(lam=3.0)], dtype=torch.float64)
    for number, lam in enumerate((1.0, -0.5, 3.0)):
        found = values(rows[rows["variant"] == number], "relative_mu")
        for layer, Y in enumerate(plain(model, IDS, lam)):
            spread = np.linalg.norm(Y - Y.mean(1, keepdims=True), axis=(1, 2)) / np.linalg.norm(Y, axis=(1, 2))
            np.testing.assert_allclose(found[layer], spread, rtol=1e-12)


def values(rows: pd.DataFrame, measure: str) -> np.ndarray:
    """(layers + 1, excerpts)."""
    part = rows[rows["measure"] == measure].sort_values(["layer", "excerpt"])
    return part["value"].to_numpy().reshape(LAYERS + 1, -1)


# --- a measure ---


def test_the_measure(model: ToyModel, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function: dict[str, Any] = {}
    exec(block_after("### A measure"), measures.__dict__, function)
    entry = eval(f"{{{entry_after('one entry of `MEASURES`, of')}}}", measures.__dict__)
    for name, measure in entry.items():
        monkeypatch.setitem(measures.MEASURES, name, measure)
    monkeypatch.setattr(table, "MEASURES", tuple(measures.MEASURES))
    rows = lscollapse.measure(model, IDS, [Variant(lam=0.5)], dtype=torch.float64, measures=["longest_share"])
    assert set(rows["measure"]) == {*table.ALWAYS, "longest_share"}
    found = values(rows, "longest_share")
    for layer, Y in enumerate(plain(model, IDS, 0.5)):
        lengths = (Y**2).sum(-1)
        np.testing.assert_allclose(found[layer], lengths.max(-1) / lengths.sum(-1), rtol=1e-12)
    alone = torch.zeros(4, 3, dtype=torch.float64)
    alone[2] = torch.tensor([3.0, 4.0, 0.0]).double() * 1e-200
    assert float(function["longest_share"](alone)) == pytest.approx(1.0, abs=1e-15)


# --- a figure ---


def test_the_figure(model: ToyModel, toy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module: dict[str, Any] = {}
    exec(block_after("### A figure"), module)
    drawing = eval(entry_after("one line of `DRAWINGS`, which"), {**draw.__dict__, **module})
    monkeypatch.setattr(draw, "DRAWINGS", (drawing,))
    rows = lscollapse.measure(model, IDS, [Variant(), Variant(lam=0.5)])
    rows = rows.assign(
        model="toy", init="trained", text="random ids", revision="", backend="", tokenizer="none", seed=0
    )
    files = draw.draw("ablate-gating", rows, tmp_path)
    assert {file.name for file in files} == {"dong.csv", "dong.png", "dong.pdf"}
    plotted = pd.read_csv(tmp_path / "dong.csv")
    for lam, part in plotted.groupby("lam"):
        residuals = [dong(Y - Y.mean(1, keepdims=True)) / dong(Y) for Y in plain(model, IDS, float(lam))]
        expected = [residual.mean() for residual in residuals]
        np.testing.assert_allclose(part.sort_values("layer")["mean"], expected, rtol=1e-5)


def dong(Y: np.ndarray) -> np.ndarray:
    """sqrt(||Y||_1 ||Y||_inf) of every excerpt."""
    return np.sqrt(np.abs(Y).sum(1).max(-1) * np.abs(Y).sum(2).max(-1))
