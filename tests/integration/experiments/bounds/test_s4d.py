"""Bounds of a tiny S4D: its matrices against impulses through the recurrence, its numbers against the plain float64 net."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.signal import cont2discrete

from lscollapse.cli import app
from lscollapse.cli.terminal import theory
from lscollapse.core import registry
from lscollapse.core.config import Experiment
from lscollapse.experiments.bounds import bounds, find_lambda, s4d
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.nets.s4d import S4D, S4DConfig
from lscollapse.runs.loading import LoadedTask
from lscollapse.theory.stretches import Report
from tests.equivalence import plain_models
from tests.integration.experiments.test_retrain import (
    little,
    plain_mixer,
    plain_s4d,
    recurrence,
    weights_of,
    write_folder,
)

SHAPE = S4DConfig(hidden_size=6, state_size=4, num_hidden_layers=3, channels=1, levels=17, data="digits")
IMAGES, N, TARGET = 2, 64, 0.3


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[S4D, Path, LoadedTask, Report]:
    net, folder = little(SHAPE), tmp_path_factory.mktemp("s4d")
    model = write_folder(net, folder / "little")
    task = find_lambda.load_with_grid(Experiment(models=[str(model)], excerpts=IMAGES, offline=True, cache_dir=folder))
    return net, model, task, bounds.report(task, TARGET, 0.9, 0.2)


def mixer_weights(net: S4D, layer: int) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(f"layers.{layer}.mixer."): a
        for name, a in weights_of(net).items()
        if name.startswith(f"layers.{layer}.mixer.")
    }


def matrices(weights: dict[str, np.ndarray], length: int) -> np.ndarray:
    """(d, N, N): column j is what an impulse at j makes of every channel."""
    d = len(weights["D"])
    columns = [recurrence(weights, np.outer(np.arange(length) == j, np.ones(d))) for j in range(length)]
    return np.array(columns).transpose(2, 1, 0)


def test_norms_are_those_of_the_impulse_responses() -> None:
    net, length = little(SHAPE), 8
    rows = s4d.channel_rows(adapt(net), length)
    assert [(row["layer"], row["channel"]) for row in rows] == list(itertools.product((1, 2, 3), range(6)))
    for layer in range(3):
        w = mixer_weights(net, layer)
        for c, (M, row) in enumerate(zip(matrices(w, length), rows[6 * layer :], strict=False)):
            kernel = M - w["D"][c] * np.eye(length)
            assert row["C_M"] == pytest.approx(np.linalg.norm(M), rel=1e-10)
            assert row["without_D"] == pytest.approx(np.linalg.norm(kernel), rel=1e-10)
            assert np.linalg.norm(M, 2) * (1.0 - 1e-12) <= row["spectral"] <= np.abs(M[:, 0]).sum() * (1.0 + 1e-12)
            assert np.linalg.norm(kernel) <= row["corrected"]


def test_footnote_3_as_printed() -> None:
    """||A|| ||B|| ||C||_F of the discrete system with both members of each pair, from scipy's zero-order hold."""
    net = little(SHAPE)
    rows = s4d.channel_rows(adapt(net), 9)
    w = mixer_weights(net, 1)
    for c in range(6):
        a = -np.exp(w["log_A_real"][c]) + 1j * w["A_imag"][c]
        pairs, C = np.concatenate([a, a.conj()]), w["C"][c, :, 0] + 1j * w["C"][c, :, 1]
        C = np.concatenate([C, C.conj()])[None]
        system = (np.diag(pairs), np.ones((4, 1)), C, np.zeros((1, 1)))
        A, B, *_ = cont2discrete(system, math.exp(w["log_dt"][c]), method="zoh")
        expected = np.linalg.norm(A, 2) * np.linalg.norm(B, 2) * np.linalg.norm(C)
        assert rows[6 + c]["printed"] == pytest.approx(expected, rel=1e-9)


def test_the_net_without_skip_and_norm(case: tuple[S4D, Path, LoadedTask, Report]) -> None:
    net, _, task, report = case
    Xs = plain_s4d(weights_of(net), SHAPE, task.ids, Variant(lam=0.0, layernorm=False))
    for row, (X, O) in zip(report.layers, itertools.pairwise(Xs), strict=True):
        before, after = (np.linalg.norm(Y - Y.mean(1, keepdims=True), axis=(1, 2)) for Y in (X, O))
        assert row["mu_ratio"] == pytest.approx((after / before).max(), rel=1e-5)
        expected = np.mean([plain_models.plain_measures(Y)["relative_mu"] for Y in O])
        assert row["relative_mu"] == pytest.approx(expected, rel=1e-5)
        own = [head for head in report.heads if head["layer"] == row["layer"]]
        assert row["under_1"] == len([head for head in own if head["C_M"] < 1.0])
        assert (row["C_M"], row["spectral"]) == (max(h["C_M"] for h in own), max(h["spectral"] for h in own))


def unit(X: np.ndarray) -> np.ndarray:
    X = X - X.mean(-1, keepdims=True)
    return X / np.linalg.norm(X, axis=-1, keepdims=True)


def passed(net: S4D, ids: np.ndarray, lam: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(X, lam X + O, block output) of every layer of the plain net."""
    Xs = plain_s4d(weights_of(net), SHAPE, ids, Variant(lam=lam))
    sums = [lam * X + np.stack([plain_mixer(mixer_weights(net, k), x) for x in X]) for k, X in enumerate(Xs[:-1])]
    return list(zip(Xs[:-1], sums, Xs[1:], strict=True))


def test_turns_of_the_norms(case: tuple[S4D, Path, LoadedTask, Report]) -> None:
    net, _, task, report = case
    for row, (_, total, output) in zip(report.layers, passed(net, task.ids, 1.0), strict=True):
        cosines = (unit(total) * unit(output)).sum(-1)
        assert row["norm_turn"] == pytest.approx(math.degrees(math.acos(cosines.min())), abs=0.01)


def line(report: Report, start: str, sign: int = 0) -> float:
    return next(each.lam for each in report.lines if each.bound.startswith(start) and each.sign == sign)


def test_theorem_41_with_both_norms(case: tuple[S4D, Path, LoadedTask, Report]) -> None:
    """Condition (7) at a = 0.9 is 18.48683298 C_M; at the repaired |lambda| its b is mu_0^2 of the worst image."""
    *_, report = case
    assert max(row["C_M"] for row in report.heads) == report.C_M
    assert line(report, "Theorem 4.1, condition (7)") == pytest.approx(18.48683298 * report.C_M, rel=1e-8)
    lam, C = line(report, "Theorem 4.1 repaired"), max(row["spectral"] for row in report.heads)
    b_over_N = 0.9**-3 * 2.0 * lam * C / (lam**2 - 0.9 * (C + lam) ** 2)
    assert b_over_N == pytest.approx(report.first**2, rel=1e-6)
    assert line(report, "Theorem 4.1 with b") > lam


def test_the_angle_certificate_of_the_mixers(case: tuple[S4D, Path, LoadedTask, Report]) -> None:
    """At the certified lambda the rows turned by the mixers of the plain net stay within the budget."""
    net, _, task, report = case
    assert math.isinf(line(report, "Theorem 4.1*, whole blocks"))
    for sign in (1, -1):
        lam = sign * line(report, "Theorem 4.1*, mixers alone", sign)
        layers = passed(net, task.ids, lam)
        start = [math.asin(plain_models.plain_measures(Y)["relative_mu"]) for Y in unit(layers[0][0])]
        turned = np.zeros(IMAGES)
        for X, total, _ in layers:
            cosines = sign * (unit(X) * unit(total)).sum(-1)
            turned += np.arccos(np.minimum(cosines, 1.0)).max(1)
        assert np.sin(np.array(start) - turned).min() >= TARGET
        assert min(start) == pytest.approx(math.asin(report.first), abs=1e-6)


def test_what_is_said_and_drawn(
    case: tuple[S4D, Path, LoadedTask, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, model, _, report = case
    theory.bounds_table(report)
    told = capsys.readouterr().out
    under = len([row for row in report.heads if row["C_M"] < 1.0])
    assert f"{under} of 18 channels" in told and "10^" in told and "footnote 3" in told
    wrong = len([row for row in report.heads if row["printed"] < row["without_D"]])
    assert f"in {wrong} of 18 channels" in told
    monkeypatch.setattr(
        sys, "argv", f"lscollapse theory bound {model} --excerpts 2 --tol 0.5 --offline --out {tmp_path}".split()
    )
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    assert len(pd.read_csv(tmp_path / "channels.csv")) == 18
    assert {"norm_turn", "mu_ratio", "gain", "C_M"} <= set(pd.read_csv(tmp_path / "layers.csv").columns)
    assert (tmp_path / "bounds.png").stat().st_size > 10_000


def test_the_short_name() -> None:
    assert registry.resolve("s4d").name == "s4d-digits"
