"""The training loop against plain AdamW and torch's schedulers; a killed process continues to the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lscollapse.data import mqar
from lscollapse.data.examples import Data, Examples
from lscollapse.models.nets.lambda_net import LEARNABLE, Net, NetConfig
from lscollapse.runs import training_state
from lscollapse.runs.training import Settings, evaluate, fit, loss_of, rate, rows_of
from lscollapse.runs.training_state import Diverged, TrainingError
from tests import ROOT

TASK = mqar.MqarConfig(seq_len=16, pairs=3, vocab_size=20)


def recall(split: str, n: int) -> Examples:
    return mqar.sequences(TASK, split, n, 0)


def data() -> Data:
    return Data(recall("train", 50), recall("validation", 30), "a little MQAR")


def little(mixer: str = "attention", seed: int = 0, **more: Any) -> Net:
    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "state_size": 4, "head_dim": 8, "vocab_size": 20, "n_labels": 20, "max_positions": 16}
    return Net(NetConfig(mixer=mixer, **{**shape, **more}))


class Linear(nn.Module):
    """Logits W x + b of (B, N) ids; b without decay and with a rate of its own."""

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {}

    def __init__(self, highest_lr: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map, self.config, self.highest_lr = nn.Linear(3, 4).double(), self.Config(), highest_lr

    def forward(self, ids: Tensor) -> Tensor:
        return self.map(ids.double())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        slow = {"params": [self.map.bias], "weight_decay": 0.0, "highest_lr": self.highest_lr}
        return [{"params": [self.map.weight], "weight_decay": weight_decay}, slow]


def plain_adamw(settings: Settings, highest_lr: float, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Softmax regression by AdamW (Loshchilov and Hutter, 2019, algorithm 2) with clipping, in numpy."""
    net = Linear(highest_lr)
    w = [net.map.weight.detach().numpy().copy(), net.map.bias.detach().numpy().copy()]
    m, v = [np.zeros_like(p) for p in w], [np.zeros_like(p) for p in w]
    b1, b2 = settings.betas
    for t in range(settings.steps):
        rows = rows_of(t, len(ids), settings)
        x, y = ids[rows].astype(float), labels[rows]
        z = x @ w[0].T + w[1]
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        g = [p.T @ x / len(y), p.mean(0)]
        size = math.sqrt(sum((part**2).sum() for part in g))
        g = [part * min(1.0, settings.clip / (size + 1e-6)) for part in g]
        for i, (top, decay) in enumerate([(settings.lr, settings.weight_decay), (min(settings.lr, highest_lr), 0.0)]):
            lr = top * rate(t, settings)
            m[i], v[i] = b1 * m[i] + (1 - b1) * g[i], b2 * v[i] + (1 - b2) * g[i] ** 2
            step = m[i] / (1 - b1 ** (t + 1)) / (np.sqrt(v[i] / (1 - b2 ** (t + 1))) + 1e-8)
            w[i] = w[i] - lr * decay * w[i] - lr * step
    return tuple(w)


def test_updates_are_plain_adamw(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = Examples(rng.integers(-5, 5, (23, 3)), rng.integers(0, 4, 23))
    settings = Settings(steps=15, batch=5, lr=0.05, weight_decay=0.3, clip=0.4, betas=(0.8, 0.95), seed=3)
    net = Linear(highest_lr=0.02)
    fit(net, Data(examples, examples, "numbers"), settings, tmp_path, tensorboard=False)
    weight, bias = plain_adamw(settings, 0.02, examples.ids, examples.labels)
    np.testing.assert_allclose(net.map.weight.detach().numpy(), weight, rtol=1e-5)  # the logits become float32
    np.testing.assert_allclose(net.map.bias.detach().numpy(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rate_is_that_of_torchs_schedulers(schedule: Any) -> None:
    settings = Settings(steps=40, warmup=0.1, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler
    warm = scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    rest: Any = scheduler.ConstantLR(optimizer, 1.0)
    if schedule == "cosine":
        rest = scheduler.CosineAnnealingLR(optimizer, T_max=36)
    both = scheduler.SequentialLR(optimizer, [warm, rest], milestones=[4])
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    np.testing.assert_allclose([rate(step, settings) for step in range(40)], expected, rtol=1e-9)


def test_every_epoch_sees_each_example_once_in_another_order() -> None:
    settings = Settings(steps=1, batch=4, seed=5)
    epochs = [np.concatenate([rows_of(3 * epoch + i, 14, settings) for i in range(3)]) for epoch in range(3)]
    for seen in epochs:
        assert len(set(seen.tolist())) == 12 and set(seen.tolist()) <= set(range(14))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(rows_of(0, 14, settings), rows_of(0, 14, settings.model_copy(update={"seed": 6})))


def test_losses_are_their_formulas() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    labels = np.array([0, 2])
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    twice = np.exp(softmax) / np.exp(softmax).sum(1, keepdims=True)
    for kind, p in (("cross_entropy", softmax), ("paper_code", twice)):
        found = loss_of(torch.from_numpy(logits), torch.from_numpy(labels), kind)
        assert float(found) == pytest.approx(-np.log(p[[0, 1], labels]).mean(), rel=1e-6)


def test_accuracy_counts_the_labelled_positions() -> None:
    net, examples = little(), recall("test", 7)
    with torch.no_grad():
        everywhere = net(torch.from_numpy(examples.ids.astype(np.int64))).argmax(-1).numpy()
    assert examples.at is not None
    pairs = [(everywhere[i, p], examples.labels[i, j]) for i in range(7) for j, p in enumerate(examples.at[i])]
    accuracy, _ = evaluate(net, examples, "cpu")
    assert accuracy == pytest.approx(np.mean([said == right for said, right in pairs]))


# --- what is learnt ---


def test_a_learnable_lambda_changes_and_a_fixed_one_does_not(tmp_path: Path) -> None:
    settings = Settings(steps=5, batch=10, lr=1e-2)
    learnt, fixed = little(lam=LEARNABLE), little(lam=-1.0)
    for name, net in (("learnt", learnt), ("fixed", fixed)):
        assert net.lams() == [-1.0, -1.0]
        fit(net, data(), settings, tmp_path / name, tensorboard=False)
    assert fixed.lams() == [-1.0, -1.0]
    assert all(abs(lam + 1.0) > 1e-3 for lam in learnt.lams())


@pytest.mark.parametrize("mixer", ["attention", "linear", "mamba", "mamba2"])
def test_every_mixer_learns_its_batch_by_heart(mixer: str, tmp_path: Path) -> None:
    few = recall("train", 8)
    settings = Settings(steps=60, batch=8, lr=1e-2, weight_decay=0.0)
    outcome = fit(little(mixer, hidden_size=16), Data(few, few, "8"), settings, tmp_path, tensorboard=False)
    assert outcome.accuracy > 0.5 and outcome.loss < 1.5 < math.log(20)


def test_lambda_norms_and_state_space_parameters_do_not_decay() -> None:
    for mixer in ("mamba", "mamba2"):
        net = little(mixer, lam=LEARNABLE)
        decayed, kept = net.parameter_groups(0.1)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        free = {names[id(parameter)] for parameter in kept["params"]}
        endings = ("lam", "norm.weight", "norm.bias", "A_log", "D", "decoder.bias")
        dt = "dt_proj.bias" if mixer == "mamba" else "dt_bias"
        for ending in (*endings, dt):
            ends = {name for name in names.values() if name.endswith(ending)}
            assert ends and ends <= free
        assert {"encoder.weight", "layers.0.mixer.in_proj.weight", "decoder.weight"} <= set(names.values()) - free


# --- killed and continued ---

CHILD = """
import os, signal, sys
from pathlib import Path
from tests.unit.runs import test_training as t

class Killer:
    steps = 0
    note = start = lambda self, _: None
    def advance(self, amount):
        self.steps += 1
        if self.steps == 8:  # a step of the second epoch, after the save at 6
            os.kill(os.getpid(), signal.SIGKILL)

t.fit(t.dropped(), t.data(), t.PARTS, Path(sys.argv[1]), Killer())
"""
PARTS = Settings(steps=13, batch=9, lr=5e-3, seed=4, save_every=3, evaluate_every=4)


def dropped() -> Net:
    return little("mamba2", lam=LEARNABLE, dropout=0.2)


def test_a_killed_process_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole = dropped()
    fit(whole, data(), PARTS, tmp_path / "whole")
    child = [sys.executable, "-c", CHILD, str(tmp_path / "parts")]
    root = ROOT
    killed = subprocess.run(child, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 6

    told: list[str] = []
    parts = dropped()
    outcome = fit(parts, data(), PARTS, tmp_path / "parts", Teller(told))
    assert "continued at step 6 of 13" in told[0] and outcome.steps == 13
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")]
    moments = [list(state["optimizer"]["state"].values()) for state in states]
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(*moments, strict=True))
    logs = [
        [line.split(",") for line in (tmp_path / name / "log.csv").read_text().split()] for name in ("whole", "parts")
    ]
    assert [[line[0], *line[2:]] for line in logs[0]] == [[line[0], *line[2:]] for line in logs[1]]
    assert [line[0] for line in logs[0]] == ["step", "4", "8", "12", "13"]

    again = fit(dropped(), data(), PARTS, tmp_path / "parts")
    assert (again.steps, again.accuracy) == (13, outcome.accuracy)
    with pytest.raises(TrainingError, match=r"settings\.lr: 0\.005, now 0\.1"):
        fit(dropped(), data(), PARTS.model_copy(update={"lr": 0.1}), tmp_path / "parts")
    with pytest.raises(TrainingError, match=r"net\.hidden_size"):
        fit(little(hidden_size=16), data(), PARTS, tmp_path / "parts")
    shown = lambdas_on_tensorboard(tmp_path / "parts")
    assert sorted(shown) == [4, 8, 12, 13]
    assert shown[13] == pytest.approx(parts.lams()[0])


class Teller:
    def __init__(self, told: list[str]) -> None:
        self.note = told.append

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        return None


def lambdas_on_tensorboard(folder: Path) -> dict[int, float]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {scalar.step: scalar.value for scalar in events.Scalars("lambda/layer 1")}


def test_a_loss_that_is_no_number_stops_the_run_with_a_record(tmp_path: Path) -> None:
    net = little()
    before = net.layers[1].lam = nn.Parameter(torch.tensor(torch.inf))
    weights = net.decoder.weight.detach().clone()  # type: ignore[union-attr]
    with pytest.raises(Diverged, match=r"loss nan, gradient nan at step 1: .* lower the learning rate \(0.01\)"):
        fit(net, data(), Settings(steps=3, lr=0.01), tmp_path, tensorboard=False)
    assert torch.equal(net.decoder.weight, weights) and net.layers[1].lam is before  # type: ignore[union-attr]
    record = json.loads((tmp_path / "diverged.json").read_text())
    assert record == {"step": 1, "loss": "nan", "gradient_norm": "nan", "lr": 0.01}
    assert not (tmp_path / "state.pt").exists()
    with pytest.raises(Diverged, match="at step 1"):  # the record is what a later start finds
        fit(little(), data(), Settings(steps=3, lr=0.01), tmp_path, tensorboard=False)


def altered(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", ["altered", "cut", "empty", "another"])
def test_a_damaged_state_is_named_set_aside_and_the_training_ends_with_the_same_bits(
    tmp_path: Path, damage: str
) -> None:
    whole, again, told = dropped(), dropped(), []
    fit(whole, data(), PARTS, tmp_path, tensorboard=False)
    state = tmp_path / "state.pt"
    held = state.read_bytes()
    if damage == "another":
        torch.save({"step": 3}, state)
    else:
        state.write_bytes({"altered": altered(held), "cut": held[:-200], "empty": b""}[damage])
    fit(again, data(), PARTS, tmp_path, Teller(told), tensorboard=False)  # type: ignore[arg-type]
    assert told[0].startswith(f"{state} is damaged (") and "set aside as state.pt.damaged" in told[0]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("record", ["[1]", "{", '{"step": "one", "loss": "nan", "gradient_norm": "nan", "lr": 1}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, record: str) -> None:
    (tmp_path / "diverged.json").write_text(record)
    with pytest.raises(TrainingError) as caught:
        fit(little(), data(), PARTS, tmp_path, tensorboard=False)
    assert str(caught.value).startswith(f"{tmp_path / 'diverged.json'}: ") and not isinstance(caught.value, Diverged)


def test_it_does_not_need_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as an import that fails
    fit(little(), data(), Settings(steps=1, batch=8), tmp_path)
    assert not list(tmp_path.glob("events*")) and training_state.HEADER in (tmp_path / "log.csv").read_text()
