"""The callback of Lightning on a tiny model: that training is not disturbed, what loggers get, where it stops."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lscollapse
from lscollapse import LightningMonitorCallback
from tests.equivalence import tiny
from tests.integration.instrument.test_monitor import MEANS, PROBE, Mixing, Texts, bert


class Net(lightning.pytorch.LightningModule):
    """A BERT whose second block mixes its rows fully from some step on."""

    def __init__(self, breaks: int | None = None) -> None:
        super().__init__()
        self.net = bert()
        self.breaks = breaks
        if breaks is not None:
            self.net.bert.encoder.layer[1] = Mixing(0.0)

    def training_step(self, batch: Tensor) -> Tensor:
        if self.breaks is not None and self.global_step >= self.breaks:
            self.net.bert.encoder.layer[1].share = 1.0
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(module: Any, folder: Path, *callbacks: Any, steps: int = 8, **changes: Any) -> Any:
    """Two batches make a step; the Trainer itself would log every 50 steps."""
    lightning.pytorch.seed_everything(3, verbose=False)
    settings = {
        "max_steps": steps, "accumulate_grad_batches": 2, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": folder,
    }  # fmt: skip
    trainer = lightning.pytorch.Trainer(callbacks=list(callbacks), **settings | changes)
    texts = [torch.tensor(Texts()[number]["input_ids"]) for number in range(64)]
    trainer.fit(module, DataLoader(texts, batch_size=4))
    return trainer


def test_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    callback = LightningMonitorCallback(PROBE, every=2)
    with_it, without = Net(), Net()
    train(with_it, tmp_path, callback, steps=6)
    train(without, tmp_path, steps=6)
    assert [values["step"] for values in callback.history] == [0, 2, 4, 6]
    assert callback.history[0]["relative_mu/03"] != callback.history[-1]["relative_mu/03"]
    assert all(torch.equal(tensor, without.state_dict()[name]) for name, tensor in with_it.state_dict().items())


def test_what_the_loggers_and_the_file_get(tmp_path: Path) -> None:
    callback = LightningMonitorCallback(PROBE, every=3, file=tmp_path / "collapse.csv")
    logger = CSVLogger(tmp_path, name="log", version=0)
    train(Net(), tmp_path, callback, logger=logger)
    with (tmp_path / "log" / "version_0" / "metrics.csv").open() as handle:
        logged = {int(line["step"]): line for line in csv.DictReader(handle)}
    assert list(logged) == [0, 3, 6] == [values["step"] for values in callback.history]
    for values in callback.history:
        for name in (*(f"{name}/{layer:02d}" for name in MEANS for layer in range(4)), "collapse"):
            assert float(logged[values["step"]][name]) == pytest.approx(values[name], rel=1e-12)
    lines = (tmp_path / "collapse.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(s), str(k)] for s in (0, 3, 6) for k in range(4)]


def test_it_stops_and_calls_where_the_net_collapses(tmp_path: Path) -> None:
    called: list[Any] = []
    callback = LightningMonitorCallback(PROBE, 2, stop_at="collapsed", on_collapse=called.append)
    trainer = train(Net(breaks=3), tmp_path, callback)
    assert trainer.global_step == 4
    assert [values["collapse"] for values in callback.history] == [0, 0, 2]
    assert called == callback.history[2:]


def test_a_net_that_starts_collapsed_takes_no_step(tmp_path: Path) -> None:
    module = Net(breaks=0)
    module.net.bert.encoder.layer[1].share = 1.0
    callback = LightningMonitorCallback(PROBE, stop_at="early")
    assert train(module, tmp_path, callback).global_step == 0
    assert [values["step"] for values in callback.history] == [0]


class Two(Net):
    """A student beside its teacher, and a list of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny.bert()
        self.heads = nn.ModuleDict({"first": tiny.bert(n_layers=2)})


@pytest.mark.parametrize(("model", "layers"), [("net", 3), ("teacher", 3), ("heads.first", 2)])
def test_which_model_is_watched(model: str, layers: int, tmp_path: Path) -> None:
    callback = LightningMonitorCallback(PROBE, model=model)
    train(Two(), tmp_path, callback, steps=1)
    assert f"relative_mu/{layers:02d}" in callback.history[0]
    assert f"relative_mu/{layers + 1:02d}" not in callback.history[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "Two has not one attribute that is a transformers model, but net, teacher: say where it is by model="),
        ("student", "Two has no module 'student': say where its model is by model="),
    ],
)
def test_a_model_that_is_not_found(model: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(Two(), tmp_path, LightningMonitorCallback(PROBE, model=model), steps=1)


def test_the_trainer_of_either_name_takes_it() -> None:
    callback = LightningMonitorCallback(PROBE)
    for package in (lightning.pytorch, pytorch_lightning):
        assert isinstance(callback, package.Callback)
        trainer = package.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
        assert callback in trainer.callbacks


def test_nothing_else_needs_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "lscollapse.instrument.lightning", raising=False)
    names: dict[str, Any] = {}
    exec("from lscollapse import *", names)
    assert names["MonitorCallback"](PROBE).every == 100
    with pytest.raises(ImportError, match=r"^LightningMonitorCallback needs Lightning 2: pip install lightning \("):
        lscollapse.LightningMonitorCallback  # noqa: B018
