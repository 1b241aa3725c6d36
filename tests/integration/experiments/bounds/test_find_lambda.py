"""find-lambda: the found lambda against a sweep of the plain float64 models, and what is said of a curve."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lscollapse.cli.terminal import theory
from lscollapse.cli.terminal.theory import sentence
from lscollapse.core.config import Experiment
from lscollapse.experiments.bounds import find_lambda, gains
from lscollapse.instrument.sublayers import sublayers
from lscollapse.models.adapt import adapt
from lscollapse.runs.loading import LoadedTask
from lscollapse.theory.stretches import BESIDE, MEASURES, SIGNS, Found, in_words
from tests.equivalence import plain_models, tiny
from tests.unit.instrument.test_lm_loss import PREDICTING, of_class

EXCERPTS, TOKENS = 3, 7
TARGET, TOL = 0.6, 0.05
NETS = ("mamba2", "bert", "albert")


def task_of(model: Any, folder: Path, **settings: Any) -> LoadedTask:
    """A tiny model saved to a folder, with random ids frozen beside it, loaded the way the verbs do."""
    model.save_pretrained(folder / "model")
    ids = tiny.ids(EXCERPTS, TOKENS, seed=4).tolist()
    provenance = {"text_sha256": "0" * 64, "tokenizer": "made up", "source": "by hand"}
    lines = [json.dumps({"title": f"T{n}", "ids": row, **provenance}) for n, row in enumerate(ids)]
    (folder / "excerpts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = Experiment(
        models=[str(folder / "model")], excerpts=EXCERPTS, tokens=TOKENS, source=str(folder / "excerpts.jsonl"),
        offline=True, cache_dir=folder, **settings,
    )  # fmt: skip
    return find_lambda.load_with_grid(config)


def made(kind: str) -> Any:
    return {"mamba2": lambda: tiny.mamba2(2, 4), "bert": tiny.bert, "albert": lambda: tiny.albert(3, 1, 1)}[kind]()


def plain_last(kind: str, model: Any, lam: float, **arm: Any) -> dict[str, float]:
    """Last-layer means of the float64 numpy model."""
    run = getattr(plain_models, kind)
    last = run(plain_models.weights_of(model), model.config, tiny.ids(EXCERPTS, TOKENS, seed=4), lam=lam, **arm)[-1]
    values = [plain_models.plain_measures(Y) for Y in last]
    return {name: float(np.mean([v[name] for v in values])) for name in (*MEASURES, *BESIDE)}


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Found]:
    model = made(request.param)
    task = task_of(model, tmp_path_factory.mktemp(request.param))
    return request.param, model, find_lambda.find(task, TARGET, TOL)


def test_every_point_is_the_plain_model(case: tuple[str, Any, Found]) -> None:
    kind, model, found = case
    for lam in sorted(found.points)[::5]:
        expected = plain_last(kind, model, lam)
        assert found.points[lam] == pytest.approx(expected, abs=2e-4), lam


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("name", MEASURES)
def test_the_found_lambda_is_confirmed_by_a_sweep(case: tuple[str, Any, Found], sign: int, name: str) -> None:
    kind, model, found = case
    lam = found.smallest(sign, name)
    if math.isinf(lam):
        assert plain_last(kind, model, sign * find_lambda.LARGEST)[name] < TARGET
        return
    for size in np.geomspace(max(lam, find_lambda.SMALLEST), find_lambda.LARGEST, 9):
        assert plain_last(kind, model, sign * float(max(size, lam)))[name] >= TARGET - 2e-4
    if lam > 0.0:
        below = lam - TOL * max(lam, find_lambda.SMALLEST)
        tested = [size for size in found.curve(sign, name)[0] if below - 1e-12 <= size < lam]
        assert tested, "a point under the target lies within the tolerance"
        assert plain_last(kind, model, sign * tested[-1])[name] < TARGET + 2e-4


def test_without_the_gate(tmp_path: Path) -> None:
    model = made("mamba2")
    found = find_lambda.find(task_of(model, tmp_path, gating=False), TARGET, 0.3)
    assert found.arm == "no gate, LN"
    for lam in (-2.0, 0.0, 1.0):
        assert found.points[lam] == pytest.approx(plain_last("mamba2", model, lam, gating=False), abs=2e-4)


def curve(values: dict[float, tuple[float, float]]) -> Found:
    points = {lam: dict(zip(MEASURES, pair, strict=True)) for lam, pair in values.items()}
    return Found("model", "arm", 1, 1, 2, 0.5, 0.02, points=points)


def test_a_curve_that_is_not_monotone() -> None:
    found = curve(
        {0.0: (0.6, 0.1), 1.0: (0.4, 0.1), 2.0: (0.7, 0.1), 4.0: (0.2, 0.1), 8.0: (0.9, 0.6), 16.0: (0.9, 0.4)}
    )
    assert found.kept(1, "relative_mu") == [(0.0, 0.0), (2.0, 2.0), (8.0, 16.0)]
    assert found.smallest(1, "relative_mu") == 8.0
    assert found.intervals(1, "relative_mu") == [(0.0, 0.0), (2.0, 2.0), (8.0, math.inf)]
    assert found.kept(1, "rank1_residual") == found.intervals(1, "rank1_residual") == [(8.0, 8.0)]
    assert found.smallest(1, "rank1_residual") == math.inf
    told = "|lambda| >= 8 keeps it over the target; over it also for |lambda| 0 only, 2 only"
    assert theory.sentence(found, 1, "relative_mu") == told


def test_an_answer_that_is_an_interval_is_said_as_one() -> None:
    """As albert-smiles at negative lambda: neither nothing suffices, nor everything from some |lambda| on."""
    found = curve({0.0: (0.1, 0.1), -0.5: (0.4, 0.4), -0.75: (0.8, 0.7), -2.0: (0.79, 0.52), -4.0: (0.75, 0.47)})
    assert found.intervals(-1, "rank1_residual") == [(0.75, 2.0)]
    told = theory.sentence(found, -1, "rank1_residual")
    assert told == "|lambda| 0.75 to 2 keeps it over the target; 4 does not, where it is 0.470"
    assert "for |lambda| from 0.75, but the rank-1 residual falls to 0.470 (lambda = -4)" in str(found.rank_warning())
    short = curve({0.0: (0.1, 0.1), -1.0: (0.8, 0.3), -2.0: (0.3, 0.2), 1.0: (0.1, 0.1)})
    assert "for |lambda| 1 only, but the rank-1 residual falls to 0.300" in str(short.rank_warning())


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.0, math.inf, "no collapse"), (0.0, 0.3, "0 to 0.3"), (0.679688, 2.46442, "0.68 to 2.46"), (0.5, 0.5, "0.5 only"),
        (math.inf, math.inf, "none suffices"), (73.6946, math.inf, "from 73.7"), (1238540.4, math.inf, "from 1,239,000"),
        (1238540.6, math.inf, "from 1,239,000"), (6575.17, math.inf, "from 6,575"), (999.9, 60474.4, "1,000 to 60,470"),
    ],
)  # fmt: skip
def test_a_stretch_in_words(low: float, high: float, words: str) -> None:
    assert in_words(low, high) == words


def test_no_collapse_and_nothing_suffices() -> None:
    found = curve({0.0: (0.6, 0.1), 1.0: (0.6, 0.1), -1.0: (math.nan, 0.1)})
    assert found.smallest(1, "relative_mu") == 0.0
    assert curve({0.0: (0.6, 0.1), 1.0: (0.3, 0.1)}).smallest(1, "relative_mu") == math.inf


def test_no_answer_where_the_last_layer_is_missing() -> None:
    """Over the target, missing, over it again: what lies above the missing value decides, and the sentence names it."""
    gone = math.nan
    top = curve({0.0: (0.1, 0.1), 1.0: (0.7, 0.1), 4.0: (0.9, 0.1), 16.0: (gone, gone)})
    assert math.isnan(top.smallest(1, "relative_mu")) and math.isnan(top.smallest(1, "rank1_residual"))
    assert top.missing(1, "relative_mu") == [16.0]
    assert sentence(top, 1, "relative_mu") == (
        "not known: the last layer is missing or unresolved at |lambda| 16, where values leave floating point or rounding decides them; over the target for |lambda| 1 to 4"
    )
    assert sentence(top, 1, "rank1_residual").startswith(
        "not known: the last layer is missing or unresolved at |lambda| 16"
    )
    middle = curve({0.0: (0.1, 0.1), 1.0: (0.7, 0.1), 4.0: (gone, gone), 16.0: (0.9, 0.1)})
    assert math.isnan(middle.smallest(1, "relative_mu"))
    assert middle.kept(1, "relative_mu") == [(1.0, 1.0), (16.0, 16.0)]
    low = curve({0.0: (gone, gone), 1.0: (0.3, 0.1), 4.0: (0.9, 0.1), 16.0: (0.9, 0.1)})
    assert low.smallest(1, "relative_mu") == 4.0 and low.smallest(1, "rank1_residual") == math.inf
    assert sentence(low, 1, "relative_mu") == (
        "|lambda| >= 4 keeps it over the target; the last layer is missing or unresolved at |lambda| 0"
    )
    assert curve({0.0: (gone, gone)}).smallest(1, "relative_mu") != 0.0
    nowhere = curve({0.0: (gone, gone), -1.0: (gone, gone)})
    assert nowhere.rank_warning() is None and "over the target" not in sentence(nowhere, -1, "relative_mu")


def test_lambdas_that_overflow_are_no_answer(tmp_path: Path) -> None:
    """GPT-NeoX carries no scale: at |lambda| = 2^12 X grows by 2^(12 * 14) in 14 layers, and float32 ends at 2^128."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=14, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    found = find_lambda.find(task_of(transformers.GPTNeoXModel(config), tmp_path), TARGET, 0.5)
    assert found.missing(1, "relative_mu")[-1] == 4096.0
    assert math.isnan(found.smallest(1, "relative_mu")) or found.smallest(1, "relative_mu") == math.inf
    assert "not known: the last layer is missing or unresolved at |lambda| " in sentence(found, 1, "relative_mu")


def test_rank_warning_only_where_rank_is_lost() -> None:
    lost = curve({0.0: (0.1, 0.1), -1.0: (0.9, 0.8), -2.0: (0.9, 0.2), 1.0: (0.9, 0.2)})
    assert "0.200 (lambda = -2)" in str(lost.rank_warning())
    assert curve({0.0: (0.1, 0.1), -1.0: (0.9, 0.8), -2.0: (0.9, 0.7), 1.0: (0.9, 0.2)}).rank_warning() is None
    assert curve({0.0: (0.1, 0.1), -1.0: (0.2, 0.1)}).rank_warning() is None


def test_a_warning_where_one_row_decides_the_last_layer() -> None:
    """Points of relative mu, rank-1 residual, angular mu and row norm ratio, by hand."""
    values = {0.0: (0.1, 0.1, 0.1, 1.2), 1.0: (0.9, 0.1, 0.3, 40.4), 2.0: (0.9, 0.1, 0.2, 170.4), 4.0: (0.9, 0.1, 0.6, 90.0),
              8.0: (0.9, 0.6, 0.3, 9.9), -1.0: (0.4, 0.1, 0.1, 300.0)}  # fmt: skip
    found = curve({lam: value[:2] for lam, value in values.items()})
    assert theory.massive_warning(found) is None  # not measured
    for lam, value in values.items():
        found.points[lam] |= dict(zip(BESIDE, value[2:], strict=True))
    assert theory.massive_warning(found) == (
        "at 2 of 6 tested lambdas, from 1 to 2, one row of the last layer has up to 170 times the median norm and decides relative"
        " mu, which is over 0.5; angular mu, of directions alone, falls to 0.200 (lambda = 2)"
    )
    del found.points[1.0]
    found.points[2.0] |= {"angular_mu": math.nan, "row_norm_ratio": math.inf}
    assert str(theory.massive_warning(found)).startswith(
        "at lambda = 2, one row of the last layer has infinitely many times the median norm and decides"
    )
    assert str(theory.massive_warning(found)).endswith("angular mu, of directions alone, is not known")
    del found.points[2.0]
    assert theory.massive_warning(found) is None


@pytest.mark.parametrize("target, tol", [(0.0, 0.1), (1.0, 0.1), (0.5, 0.0), (0.5, 1.0)])
def test_refuses(target: float, tol: float, tmp_path: Path) -> None:
    with pytest.raises(find_lambda.SearchError, match="strictly between 0 and 1"):
        find_lambda.find(task_of(made("bert"), tmp_path), target, tol)


def test_estimate_only_measures_no_curve(tmp_path: Path) -> None:
    found = find_lambda.find(task_of(made("albert"), tmp_path), 0.3, estimate_only=True)
    assert set(found.estimates) == {1, -1} and not found.points


def test_sublayers_are_what_transformers_computes() -> None:
    model, X = tiny.bert(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (own, O), (Z, fed) = sublayers(adapt(model), 1, X, lam=-3.0)
    block = model.encoder.layer[1]
    with torch.no_grad():
        attended = block.attention.output.dense(block.attention.self(X)[0])
        middle = block.attention.output.LayerNorm(-3.0 * X + attended)
        expected = block.output.dense(block.intermediate(middle))
    torch.testing.assert_close(own, X)
    torch.testing.assert_close(O, attended)
    torch.testing.assert_close(Z, middle)
    torch.testing.assert_close(fed, expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flow_uses_the_mean_attention_of_the_layers() -> None:
    model, X = tiny.bert(), torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    mixer, Y0 = find_lambda.attention_flow(adapt(model), X)
    lengths = torch.linalg.vector_norm(X[0], dim=-1)
    np.testing.assert_allclose(Y0, (X[0] / lengths[:, None]).numpy(), atol=1e-6)
    Z = torch.tensor(Y0, dtype=torch.float32)[None] * lengths.mean()
    with torch.no_grad():
        outputs = [b.attention.output.dense(b.attention.self(Z)[0])[0] for b in model.encoder.layer]
    np.testing.assert_allclose(mixer(Y0), (sum(outputs) / len(outputs) / lengths.mean()).numpy(), atol=1e-6)


def test_flow_of_layers_that_take_keys_and_values_of_others() -> None:
    """O of Gemma 4 is what its second norm gives; in one forward every layer is handed the same Z."""
    model = of_class("Gemma4Text", "CausalLM", **PREDICTING["Gemma4Text"]).model
    adapter = adapt(model)
    X = adapter.embed(torch.as_tensor(tiny.ids(1, 9))).detach()
    mixer, Y0 = find_lambda.attention_flow(adapter, X)
    size = torch.linalg.vector_norm(X[0], dim=-1).mean()
    Z, seen = torch.tensor(Y0, dtype=torch.float32)[None] * size, []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: (Z, *args[1:]))
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(torch.as_tensor(tiny.ids(1, 9)), use_cache=False)
    for layer in model.layers:
        layer._forward_pre_hooks.clear()
    np.testing.assert_allclose(mixer(Y0), (sum(seen[:6]) / 6 / size).numpy(), atol=1e-6)


def test_the_dtype_asked_for_is_the_one_computed_in(tmp_path: Path) -> None:
    """float64 in find-lambda, also of the package's own blocks: to 1e-12 the plain float64 model, which float32 is not."""
    model = tiny.mamba2(2, 4)
    task = task_of(model, tmp_path, dtype="float64")
    found = find_lambda.last_means(task, [2.0])[2.0]
    assert found == pytest.approx(plain_last("mamba2", model, 2.0), rel=1e-12)
    steps = gains.trace(task.adapter, task.ids, 2.0, dtype=task.compute_dtype)
    assert {step.X.dtype for step in steps} == {torch.float64}
