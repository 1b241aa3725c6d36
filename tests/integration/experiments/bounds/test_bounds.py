"""Bounds of tiny models: constants against transformers and the plain numpy models, certificates against what happens."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lscollapse.experiments.bounds import bounds, gains
from lscollapse.experiments.bounds.find_lambda import find
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.theory.arrays import TheoryError
from lscollapse.theory.stretches import Found, Report
from tests.equivalence import plain_models, tiny
from tests.integration.experiments.bounds.test_find_lambda import EXCERPTS, TOKENS, made, task_of

IDS = tiny.ids(EXCERPTS, TOKENS, seed=4)


def test_attention_matrices_are_those_transformers_returns() -> None:
    for model in (tiny.bert(), tiny.bert(is_decoder=True), tiny.albert(2, 1, 1)):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(torch.tensor(IDS), output_attentions=True, output_hidden_states=True)
        Ms, S = gains.mixing_matrices(adapt(model), 1, outputs.hidden_states[1])
        np.testing.assert_allclose(Ms, outputs.attentions[1].numpy(), atol=1e-6)
        w = plain_models.weights_of(model)
        where = (
            "encoder.layer.1.attention"
            if hasattr(model.encoder, "layer")
            else "encoder.albert_layer_groups.0.albert_layers.0.attention"
        )
        names = ("self.value", "output.dense") if hasattr(model.encoder, "layer") else ("value", "dense")
        V, O = (w[f"{where}.{name}.weight"].T for name in names)  # X V O
        expected = [np.linalg.norm(V[:, h : h + 4] @ O[h : h + 4], 2) for h in range(0, 16, 4)]
        np.testing.assert_allclose(S, expected, rtol=1e-6)


def test_C_M_of_a_head_is_its_largest_norm_over_the_excerpts(tmp_path: Path) -> None:
    task = task_of(made("bert"), tmp_path)
    Ms, _ = gains.mixing_matrices(task.adapter, 0, task.adapter.embed(torch.tensor(IDS)))
    found = [row["C_M"] for row in gains.head_rows(task) if row["layer"] == 1]
    assert found == pytest.approx(np.sqrt((Ms**2).sum((2, 3))).max(0), rel=1e-6)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2_matrices_reproduce_the_recurrence(n_groups: int) -> None:
    model = tiny.mamba2(n_groups)
    config, w = model.config, plain_models.weights_of(model)
    part = {n.removeprefix("layers.0."): a for n, a in w.items() if n.startswith("layers.0.")}
    X = np.random.default_rng(0).standard_normal((2, TOKENS, 16))
    Ms, S = gains.mixing_matrices(adapt(model), 0, torch.tensor(X))
    u = plain_models._rms_norm(part["norm.weight"], X, config.layer_norm_epsilon)
    expected = plain_models.mamba2_mixer(part, config, u, gating=True, norm=True, extra_skip=0.0)

    z, xBC, _ = np.split(plain_models._linear(part, "mixer.in_proj", u), [32, 64 + 2 * n_groups * 5], -1)
    padded = np.pad(xBC, ((0, 0), (3, 0), (0, 0)))
    taps = part["mixer.conv1d.weight"][:, 0]
    conv = sum(padded[:, s : s + TOKENS] * taps[:, s] for s in range(4)) + part["mixer.conv1d.bias"]
    x = plain_models._silu(conv)[..., :32].reshape(2, TOKENS, 4, 8)
    y = np.einsum("bhij,bjhp->bihp", Ms, x).reshape(2, TOKENS, 32) * plain_models._silu(z)
    y = plain_models._rms_norm(part["mixer.norm.weight"], y, config.layer_norm_epsilon, n_groups)
    np.testing.assert_allclose(plain_models._linear(part, "mixer.out_proj", y), expected, atol=1e-6)
    assert S is None


@pytest.mark.parametrize("lam", [1.0, -3.0, 2.0**21])
def test_gains_of_a_prenorm_net(lam: float, tmp_path: Path) -> None:
    """Against X' - lam X of the plain model; at 2^21 the stream is carried scaled, and only rounding is left of X' - lam X."""
    model = made("mamba2")
    run = gains.gains_at(task_of(model, tmp_path), lam)
    w = plain_models.weights_of(model)
    Xs = plain_models.mamba2(w, model.config, IDS, lam=lam)
    assert run.first == pytest.approx([plain_models.plain_measures(Y)["relative_mu"] for Y in Xs[0]], abs=1e-6)
    assert run.final_norm == pytest.approx(np.linalg.norm(Xs[-1], axis=(1, 2)), rel=1e-5)
    for k, (X, after) in enumerate(itertools.pairwise(Xs)):
        if abs(lam) > 1e3:  # the norm of O does not grow, that of X does by lam a layer
            assert (run.frobenius[k] < 40.0 * abs(lam) ** -k).all() and (run.frobenius[k] > 0.0).all()
            continue
        O = after - lam * X
        rows = np.linalg.norm(O, axis=2) / np.linalg.norm(X, axis=2)
        assert run.row[k] == pytest.approx(rows.max(1), rel=1e-4)
        assert run.frobenius[k] == pytest.approx(
            np.linalg.norm(O, axis=(1, 2)) / np.linalg.norm(X, axis=(1, 2)), rel=1e-4
        )
    assert run.feed_forward is None


def test_gains_of_a_postnorm_net(tmp_path: Path) -> None:
    """Without the channel mean, which LayerNorm removes."""
    model = made("bert")
    run = gains.gains_at(task_of(model, tmp_path), 1.0)
    with torch.no_grad():
        states = model(torch.tensor(IDS), output_hidden_states=True).hidden_states
        for k, X in enumerate(states[:-1]):
            block = model.encoder.layer[k]
            O = block.attention.output.dense(block.attention.self(X)[0])
            Z = block.attention.output.LayerNorm(X + O)
            for got, (skip, out) in (
                (run.row, (X, O)),
                (run.feed_forward, (Z, block.output.dense(block.intermediate(Z)))),
            ):
                assert got is not None
                ratios = out.std(-1, correction=0) / skip.std(-1, correction=0)
                assert got[k] == pytest.approx(ratios.amax(1).numpy(), rel=1e-4)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Report]]:
    models = {kind: made(kind) for kind in ("mamba2", "bert")}
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in models}
    return {
        kind: (model, bounds.report(task_of(model, folders[kind]), 0.6, 0.9, 0.1)) for kind, model in models.items()
    }


def bound(report: Report, start: str, sign: int) -> float:
    return next(line.lam for line in report.lines if line.bound.startswith(start) and line.sign == sign)


@pytest.mark.parametrize("depth", ["this depth", "every depth"])
def test_prenorm_certificates_hold(reports: dict[str, tuple[Any, Report]], depth: str) -> None:
    """Every excerpt of the plain model keeps the target from the certified lambda on."""
    model, report = reports["mamba2"]
    weights = bound(report, f"pre-norm certificate, weights only, {depth}", 0)
    for sign in (1, -1):
        measured = bound(report, f"pre-norm certificate, measured gains, {depth}", sign)
        assert measured <= 1.06 * weights, "a measured gain is never over its bound"
        for lam in (measured, weights):
            last = plain_models.mamba2(plain_models.weights_of(model), model.config, IDS, lam=sign * lam)[-1]
            assert min(plain_models.plain_measures(Y)["relative_mu"] for Y in last) >= 0.6


def test_theorem_41_lines(reports: dict[str, tuple[Any, Report]]) -> None:
    """Condition (7) at a = 0.9 is 18.48683298 C_M (C_V = I); with b more; nothing at all with the C_V of a head."""
    for _, report in reports.values():
        alone = bound(report, "Theorem 4.1, condition (7)", 0)
        assert alone == pytest.approx(18.48683298 * report.C_M, rel=1e-8)
        assert bound(report, "Theorem 4.1 with b", 0) > alone
        assert report.C_M == max(row["C_M"] for row in report.layers) == max(row["C_M"] for row in report.heads)
        assert all(words in report.remarks[0] for words in ("937.924", "C_M = 50.73;", f"{alone:.1f}"))
    assert math.isinf(bound(reports["bert"][1], "Theorem 4.1 with each head's own C_V", 0))


def test_angle_lines_of_a_postnorm_net(reports: dict[str, tuple[Any, Report]]) -> None:
    """At the certified lambda the rows turned by attention, computed with transformers' modules, stay within the budget."""
    model, report = reports["bert"]
    assert math.isinf(bound(report, "Theorem 4.1*, whole blocks", 0))
    for sign in (1, -1):
        lam = sign * bound(report, "Theorem 4.1*, attention sublayers alone", sign)
        turned = torch.zeros(EXCERPTS)
        with torch.no_grad():
            X = model.embeddings(torch.tensor(IDS))
            Y = torch.nn.functional.normalize(X - X.mean(-1, keepdim=True), dim=-1).numpy()
            start = [math.asin(plain_models.plain_measures(y)["relative_mu"]) for y in Y]
            for block in model.encoder.layer:
                own = block.attention
                total = lam * X + own.output.dense(own.self(X)[0])
                before, after = (A - A.mean(-1, keepdim=True) for A in (X, total))
                cosine = sign * torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
                turned += torch.arccos(cosine.clamp(max=1.0)).amax(1)
                Z = own.output.LayerNorm(total)
                X = block.output.LayerNorm(Z + block.output.dense(block.intermediate(Z)))
        left = np.sin(np.array(start) - turned.numpy())
        assert left.min() >= 0.6
        assert min(start) == pytest.approx(math.asin(report.first), abs=1e-6)


def test_the_measured_lines_are_those_of_find_lambda(tmp_path: Path, reports: dict[str, tuple[Any, Report]]) -> None:
    model, report = reports["bert"]
    found = find(task_of(model, tmp_path), 0.6, 0.1)
    for name, words in (("relative_mu", "relative mu"), ("rank1_residual", "rank-1 residual")):
        for sign in (1, -1):
            lines = [i for i in report.lines if (i.bound, i.sign) == (f"measured, {words}", sign)]
            sizes, values = found.curve(sign, name)
            for size, value in zip(sizes, values, strict=True):
                assert any(line.lam <= size <= line.to for line in lines) == (value >= 0.6), size
            assert math.isinf(lines[-1].to) == (values[-1] >= 0.6 or lines[-1].lam == math.inf)


def test_an_interval_has_both_its_ends() -> None:
    points = {0.0: 0.1, -0.5: 0.8, -1.0: 0.9, -2.0: 0.2, -4.0: 0.7, 1.0: 0.3}
    found = Found("m", "a", 1, 1, 2, 0.5, 0.02, points={k: {"rank1_residual": v} for k, v in points.items()})
    lines = bounds._measured(found, -1, "rank1_residual")
    assert [(line.lam, line.to, line.reads) for line in lines] == [(0.5, 1.0, "0.5 to 1"), (4.0, math.inf, "from 4")]
    (none,) = bounds._measured(found, 1, "rank1_residual")
    assert math.isinf(none.lam) and none.reads == "none suffices"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TheoryError, match="strictly between 0 and 1"):
        bounds.report(task_of(made("bert"), tmp_path), a=1.0)
    (tmp_path / "b").mkdir()
    with pytest.raises(UnsupportedModel, match="residual skip"):
        bounds.report(task_of(made("bert"), tmp_path / "b", skip_site="ffn"))
