"""One cell of Table 1: a net trained on a task with one learning rate and one seed, as a function that any process can run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lscollapse import measures
from lscollapse.core.config import Compute
from lscollapse.core.progress import SILENT, Progress
from lscollapse.data.examples import Data
from lscollapse.experiments.table1.schema import Table1, TaskData, TrainingSection
from lscollapse.models.nets.lambda_net import LEARNABLE, Net, NetConfig
from lscollapse.one_by_one import shared_of
from lscollapse.runs.devices import device
from lscollapse.runs.training import Settings, evaluate, fit
from lscollapse.runs.training_state import Diverged

MEASURED = ("relative_mu", "rank1_residual")
BEFORE, AFTER = "before", "after"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a process needs to train one net and measure it.

    Attributes:
        lam: name of the lambda mode.
        data, net, training: as the configuration gives them; `net` has the mixer and lambda of this cell.
        measured: held-out inputs on which the layers are measured.
        device: auto, cpu or cuda, as the machine that trains has it.
        folder: gets the state and the log of the training, on that machine.
    """

    task: str
    mixer: str
    lam: str
    lr: float
    seed: int
    data: TaskData
    net: dict[str, Any]
    training: TrainingSection
    measured: int
    device: str
    tensorboard: bool
    folder: Path

    @property
    def key(self) -> str:
        return f"{self.task}-{self.mixer}-lam_{self.lam.replace(' ', '_')}-lr_{self.lr:g}-seed_{self.seed}"

    @property
    def words(self) -> str:
        return f"{self.task}, {self.mixer}, lambda {self.lam}, lr {self.lr:g}, seed {self.seed}"

    @property
    def on(self) -> str:
        """What computes on this machine: `cpu` or `cuda`."""
        return device(Compute(device=self.device))


@dataclass(frozen=True)
class DrawnTask:
    """A task with its data drawn: what the nets train on, and what a net must look like to read it."""

    data: Data
    net: dict[str, Any]


def modes(config: Table1) -> dict[str, dict[str, Any]]:
    """The lambda modes by name, and what a NetConfig has to say for each."""
    found: dict[str, dict[str, Any]] = {}
    for lam in config.lams:
        if lam == LEARNABLE:
            found |= {f"learnt from {init:g}": {"lam": lam, "lam_init": init} for init in config.lam_inits}
        else:
            found[f"{lam:g}"] = {"lam": lam}
    return found


def cells(config: Table1, folder: Path) -> Iterator[Cell]:
    """Every cell of the grid; each trains in a folder of its own under `folder`."""
    for (name, task), mixer in itertools.product(config.tasks.items(), config.mixers):
        recipe = task.recipe(mixer)
        for (mode, lam), lr, seed in itertools.product(modes(config).items(), recipe.lrs, config.seeds):
            net = {**recipe.net.model_dump(), "mixer": mixer, **lam}
            rest = (config.measured, config.device, config.tensorboard)
            cell = Cell(name, mixer, mode, lr, seed, task.data, net, recipe.training, *rest, folder)
            yield replace(cell, folder=folder / cell.key)


def train_cell(cell: Cell, progress: Progress = SILENT) -> dict[str, Any]:
    """Train and measure one net: {rows, config, weights (safetensors, as bytes), seconds, note}.

    The test set is not read.

    A net that diverged has rows with status "nan" and no weights. Called again it gives the same, from where it was.
    """
    torch.set_num_threads(1)
    task = drawn_task(cell.data)
    net, settings = make_net(cell, task), make_settings(cell, task)
    rows = _layer_rows(cell, net, task, BEFORE)
    try:
        outcome = fit(net, task.data, settings, cell.folder, progress, cell.on, cell.tensorboard)
    except Diverged as error:
        rows += [_row(cell, AFTER, "validation_accuracy", float("nan"), status="nan")]
        return {"rows": rows, "config": {}, "weights": b"", "seconds": 0.0, "note": str(error)}
    rows += _layer_rows(cell, net, task, AFTER)
    for name, value in (("validation_accuracy", outcome.accuracy), ("validation_loss", outcome.loss),
                        ("train_loss", outcome.train_loss), ("steps", outcome.steps)):  # fmt: skip
        rows.append(_row(cell, AFTER, name, value))
    rows.append(_row(cell, AFTER, "parameters", sum(p.numel() for p in net.parameters())))
    weights = save_tensors({name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()})
    note = f"validation {100 * outcome.accuracy:.1f} %"
    config = net.config.to_dict()
    return {"rows": rows, "config": config, "weights": weights, "seconds": outcome.seconds, "note": note}


def test_cell(trained: tuple[Cell, bytes]) -> dict[str, Any]:
    """Read the test set with a trained net (safetensors, as bytes), once: {rows}."""
    cell, weights = trained
    torch.set_num_threads(1)
    net = make_net(cell, drawn_task(cell.data))
    net.load_state_dict(load_tensors(weights))
    accuracy, _ = evaluate(net.to(cell.on), cell.data.examples("test"), cell.on)
    return {"rows": [_row(cell, AFTER, "test_accuracy", accuracy)]}


# --- what a cell is made of ---


def make_net(cell: Cell, task: DrawnTask) -> Net:
    """The untrained net of a cell; a seed gives the same weights whatever its lambda."""
    torch.manual_seed(cell.seed)
    return Net(NetConfig.from_dict({**task.net, **cell.net}))


def make_settings(cell: Cell, task: DrawnTask) -> Settings:
    training = cell.training
    per_epoch = max(1, len(task.data.train.ids) // training.batch)
    steps = training.steps or max(1, round(training.epochs * per_epoch))
    return Settings(steps=steps, lr=cell.lr, seed=cell.seed, **training.model_dump(exclude={"epochs", "steps"}))


@lru_cache(maxsize=2)
def drawn_task(data: TaskData) -> DrawnTask:
    """The training and validation data of a cell; a process that trains several cells draws them once."""
    train, source, net = data.training()
    return DrawnTask(Data(train, data.examples("validation"), source), {**net, "max_positions": train.ids.shape[1]})


# --- what is measured ---


@torch.no_grad()
def _layer_rows(cell: Cell, net: Net, task: DrawnTask, when: str) -> list[Row]:
    """lambda of every layer, and MEASURED of the embedding (layer 0) and of every block on held-out inputs."""
    net.to(cell.on).eval()
    ids, _, _ = task.data.held_out.batch(slice(cell.measured), cell.on)
    X = net.embed(ids)  # (B, N, d)
    rows = [_row(cell, when, "lambda", lam, layer) for layer, lam in enumerate(net.lams(), 1)]
    for layer in range(len(net.layers) + 1):
        if layer:
            X = net.layers[layer - 1](X)
        shared = shared_of(X)
        found, states = measures.measure_all(shared, MEASURED), measures.status(shared)
        for name in MEASURED:
            for excerpt, (value, status) in enumerate(zip(found[name].tolist(), states, strict=True)):
                rows.append(_row(cell, when, name, value, layer, excerpt, status))
    return rows


def _row(
    cell: Cell, when: str, measure: str, value: float, layer: int | None = None, excerpt: int | None = None,
    status: str = "ok",
) -> Row:  # fmt: skip
    head = {name: getattr(cell, name) for name in ("task", "mixer", "lam", "lr", "seed")}
    dtype = "bfloat16 autocast" if cell.on == "cuda" else "float32"
    data = drawn_task(cell.data).data.source
    place = {"data": data, "dtype": dtype, "when": when, "layer": layer, "excerpt": excerpt}
    return {**head, **place, "measure": measure, "value": float(value), "status": status}
