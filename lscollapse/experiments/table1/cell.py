"""One cell of Table 1: a net trained on a task with one learning rate and one seed, as a function that any process can run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lscollapse import measures
from lscollapse.core.config import ConfigError
from lscollapse.core.progress import SILENT, Progress
from lscollapse.data import images, mqar
from lscollapse.data.examples import Data, Examples, Split
from lscollapse.experiments.table1.schema import Table1
from lscollapse.models.nets.lambda_net import LEARNABLE, Net, NetConfig
from lscollapse.runs.training import Diverged, Settings, evaluate, fit

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
    data: dict[str, Any]
    net: dict[str, Any]
    training: dict[str, Any]
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


@dataclass(frozen=True)
class Task:
    """A task with its data drawn: what the nets train on, and what a net must look like to read it."""

    data: Data
    n_train: int
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
        recipe, data = task.recipe(mixer), task.data.model_dump()  # type: ignore[attr-defined]
        training = recipe.training.model_dump()
        for (mode, lam), lr, seed in itertools.product(modes(config).items(), recipe.lrs, config.seeds):
            net = {**recipe.net.model_dump(), "mixer": mixer, **lam}
            rest = (config.measured, config.device, config.tensorboard)
            cell = Cell(name, mixer, mode, lr, seed, data, net, training, *rest, folder)
            yield replace(cell, folder=folder / cell.key)


def train_cell(cell: Cell, progress: Progress = SILENT) -> dict[str, Any]:
    """Train and measure one net: {rows, config, weights (safetensors, as bytes), seconds, note}.

    The test set is not read.

    A net that diverged has rows with status "nan" and no weights. Called again it gives the same, from where it was.
    """
    torch.set_num_threads(1)
    task, device = task_of(cell), device_of(cell.device)
    net, settings = make_net(cell, task), make_settings(cell, task)
    rows = _layer_rows(cell, net, task, BEFORE)
    try:
        outcome = fit(net, task.data, settings, cell.folder, progress, device, cell.tensorboard)
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
    net, device = make_net(cell, task_of(cell)), device_of(cell.device)
    net.load_state_dict(load_tensors(weights))
    accuracy, _ = evaluate(net.to(device), test_examples(cell), device)
    return {"rows": [_row(cell, AFTER, "test_accuracy", accuracy)]}


def device_of(wanted: str) -> str:
    """`cpu` or `cuda`; "auto" is a GPU where torch sees one. ConfigError for what is not there."""
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if wanted != "auto" and wanted not in there:
        raise ConfigError(f"device {wanted!r} is not there: use auto or {' or '.join(there)}")
    return there[-1] if wanted == "auto" else wanted


# --- what a cell is made of ---


def make_net(cell: Cell, task: Task) -> Net:
    """The untrained net of a cell; a seed gives the same weights whatever its lambda."""
    torch.manual_seed(cell.seed)
    return Net(NetConfig(**{**task.net, **cell.net}))


def make_settings(cell: Cell, task: Task) -> Settings:
    training = dict(cell.training)
    epochs, steps = training.pop("epochs"), training.pop("steps")
    per_epoch = max(1, task.n_train // training["batch"])
    return Settings(steps=steps or max(1, round(epochs * per_epoch)), lr=cell.lr, seed=cell.seed, **training)


def task_of(cell: Cell) -> Task:
    """The training and validation data of a cell; a process that trains several cells draws them once."""
    return _task(cell.task, json.dumps(cell.data))


@lru_cache(maxsize=2)
def _task(name: str, data: str) -> Task:
    values = json.loads(data)
    if name == "mqar":
        config = _mqar(values)
        train, held_out = _recall(values, "train"), _recall(values, "validation")
        V, L = config.vocab_size, config.seq_len
        source = f"MQAR, L = {L}, {config.pairs} pairs, vocabulary {V}, data seed {values['seed']}"
        net = {"reads": "tokens", "output": "each", "vocab_size": V, "n_labels": V, "max_positions": L}
        return Task(Data(train, held_out, source), len(train.ids), net)
    found = images.grey(values["source"], "train", values["seed"])
    train, held_out = _labelled(found), _labelled(images.grey(values["source"], "validation", values["seed"]))
    net = {"reads": "pixels", "output": "pooled", "vocab_size": found.levels, "n_labels": found.n_labels}
    source = f"{found.source}, grey, {train.ids.shape[1]} pixels"
    return Task(Data(train, held_out, source), len(train.ids), {**net, "max_positions": train.ids.shape[1]})


def test_examples(cell: Cell) -> Examples:
    if cell.task == "mqar":
        return _recall(cell.data, "test")
    return _labelled(images.grey(cell.data["source"], "test", cell.data["seed"]))


def _mqar(values: dict[str, Any]) -> mqar.MqarConfig:
    return mqar.MqarConfig(**{field.name: values[field.name] for field in fields(mqar.MqarConfig)})


def _recall(values: dict[str, Any], split: Split) -> Examples:
    return mqar.sequences(_mqar(values), split, values[split], values["seed"])


def _labelled(found: images.Images) -> Examples:
    return Examples(found.ids, found.labels)


# --- what is measured ---


@torch.no_grad()
def _layer_rows(cell: Cell, net: Net, task: Task, when: str) -> list[Row]:
    """lambda of every layer, and MEASURED of the embedding (layer 0) and of every block on held-out inputs."""
    device = device_of(cell.device)
    net.to(device).eval()
    ids, _, _ = task.data.held_out.batch(slice(cell.measured), device)
    X = net.embed(ids)  # (B, N, d)
    rows = [_row(cell, when, "lambda", lam, layer) for layer, lam in enumerate(net.lams(), 1)]
    for layer in range(len(net.layers) + 1):
        if layer:
            X = net.layers[layer - 1](X)
        states, found = measures.status(X), measures.measure_all(X)
        for name in MEASURED:
            for excerpt, (value, status) in enumerate(zip(found[name].tolist(), states, strict=True)):
                rows.append(_row(cell, when, name, value, layer, excerpt, status))
    return rows


def _row(
    cell: Cell, when: str, measure: str, value: float, layer: int | None = None, excerpt: int | None = None,
    status: str = "ok",
) -> Row:  # fmt: skip
    head = {name: getattr(cell, name) for name in ("task", "mixer", "lam", "lr", "seed")}
    dtype = "bfloat16 autocast" if device_of(cell.device) == "cuda" else "float32"
    place = {"data": task_of(cell).data.source, "dtype": dtype, "when": when, "layer": layer, "excerpt": excerpt}
    return {**head, **place, "measure": measure, "value": float(value), "status": status}
