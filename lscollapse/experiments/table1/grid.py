"""Table 1 of arXiv:2410.10609v3: mixers x lambda modes x learning rates x seeds on MQAR and LRA image -> run folder.

Every cell is one work item: a folder of its own under cells/, rows that are there whole or not at all. Of a mixer and
lambda mode, the learning rate with the best mean validation accuracy is chosen; then its nets read the test set, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas as pd

from lscollapse.core.config import Compute, ConfigError
from lscollapse.core.files import atomic, clear_partials, sha256_file, write_csv, write_json
from lscollapse.core.lock import locked
from lscollapse.core.progress import SILENT, Progress
from lscollapse.core.run_folder import RunFolder
from lscollapse.data import images
from lscollapse.data.examples import SPLITS
from lscollapse.experiments.table1.cell import Cell, cells, test_cell, train_cell
from lscollapse.experiments.table1.schema import Table1
from lscollapse.runs import cluster, processes
from lscollapse.runs.devices import training_workers
from lscollapse.runs.training_state import STATE, Diverged

COLUMNS = (
    "task", "data", "mixer", "lam", "lr", "seed", "dtype", "when", "layer", "excerpt", "measure", "value", "status",
)  # fmt: skip
ARM = ["task", "mixer", "lam"]
T = TypeVar("T")
R = TypeVar("R")
UNDECISIVE = {*Compute.model_fields, "tensorboard", "margin"}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class MapItems(Protocol):
    """Calls a function on items, and `on_result(item, result)` here: `processes.map_items` or `cluster.map_on_nodes`."""

    def __call__(
        self, function: Callable[[T], R], items: Sequence[T], *, on_result: Callable[[T, R], Sequence[T] | None]
    ) -> None: ...


class Table1Folder(RunFolder):
    columns = COLUMNS
    order = ("task", "mixer", "lam", "lr", "seed", "when", "measure", "layer", "excerpt")


def run(config: Table1, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """Train every cell of `config` and return the finished table of the run folder `out`.

    The rows do not depend on who trained which cell, nor on how often the grid was killed and continued. On Ray the
    state of a training is on the node that trains (or on a shared disk); everything else is written here.
    """
    map_items = map_items_of(config)
    identity = {"experiment": "table1", "config": config.model_dump(mode="json", exclude=UNDECISIVE)}
    with Table1Folder(out, identity, progress) as folder:
        if folder.complete:
            progress.note(f"{out} is complete: nothing to compute")
            return folder.rows()
        return _trained(config, folder, map_items, progress)


def _trained(config: Table1, folder: RunFolder, map_items: MapItems, progress: Progress) -> pd.DataFrame:
    """Train and test what is missing in the folder, and finish it."""
    every = list(cells(config, folder.path / "cells"))
    for cell in every:
        _clean(folder, cell)
    missing = [cell for cell in every if not folder.has(cell.key)]
    if len(missing) < len(every):
        progress.note(f"{folder.path} is continued: {len(every) - len(missing)} of {len(every)} cells are there")
    progress.start(len(missing))
    done = len(every) - len(missing)

    def keep(cell: Cell, result: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        store(folder, cell, result)
        progress.note(f"{done} of {len(every)}  {cell.words}: {result['note']}, {result['seconds']:.0f} s")
        progress.advance(1)

    map_items(train_cell, missing, on_result=keep)
    chosen = choose(folder, every)
    read = [cell for cell in chosen if not folder.has(f"{cell.key}-test")]
    map_items(
        test_cell,
        [(cell, (cell.folder / WEIGHTS).read_bytes()) for cell in read],
        on_result=lambda trained, result: folder.add(f"{trained[0].key}-test", frame(result["rows"])),
    )
    keys = [*(cell.key for cell in every), *(f"{cell.key}-test" for cell in chosen)]
    return folder.finish(keys, {"engine": config.engine, "images": _images_record(config)})


def _clean(folder: RunFolder, cell: Cell) -> None:
    """Take away what a kill left of a cell; one whose net is not the one that was trained is trained again."""
    clear_partials(cell.folder)
    if not folder.has(cell.key):
        return
    trained, file = folder.facts(cell.key).get("net"), cell.folder / WEIGHTS
    if trained and (not file.is_file() or sha256_file(file) != trained):
        folder.set_aside(cell.key, f"{file} is not the net that it was measured on")
    else:
        (cell.folder / STATE).unlink(missing_ok=True)


def one_cell(config: Table1, task: str, lr: float | None, steps: int | None, out: Path | None) -> Cell:
    """The cell of a configuration with one mixer, lambda mode and seed; `lr` and `steps` override its own.

    Raises:
        ConfigError: a task that the configuration does not have.
    """
    found = [cell for cell in cells(config, Path("runs/train")) if cell.task == task]
    if not found:
        raise ConfigError(f"no task {task!r} in the configuration: it has {', '.join(config.tasks)}")
    cell = found[0] if lr is None else replace(found[0], lr=lr)
    training = cell.training if steps is None else cell.training.model_copy(update={"steps": steps})
    return replace(cell, training=training, folder=out or Path("runs/train") / cell.key)


def train_one(cell: Cell, progress: Progress = SILENT) -> pd.DataFrame:
    """Train and test one cell in this process; its rows, which are in rows.csv of its folder with the net.

    Raises:
        Diverged: the loss or its gradient was not finite.
        LockError: another process trains there.
    """
    with locked(cell.folder):
        clear_partials(cell.folder)
        result = train_cell(cell, progress)
        if not result["weights"]:
            raise Diverged(result["note"])
        write_net(cell.folder, result)
        rows = frame([*result["rows"], *test_cell((cell, result["weights"]))["rows"]])
        write_csv(cell.folder / "rows.csv", rows)
    return rows


def store(folder: RunFolder, cell: Cell, result: dict[str, Any]) -> None:
    """The trained net, then the rows: with them the cell counts as done, and its training state can go."""
    net = result["weights"]
    if net:
        write_net(cell.folder, result)
    folder.add(cell.key, frame(result["rows"]), net=hashlib.sha256(net).hexdigest() if net else "")
    (cell.folder / STATE).unlink(missing_ok=True)


def write_net(folder: Path, result: dict[str, Any]) -> None:
    """Write the net that `train_cell` gave as config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, result["config"])
    with atomic(folder / WEIGHTS) as temporary:
        temporary.write_bytes(result["weights"])


def choose(folder: RunFolder, every: list[Cell]) -> list[Cell]:
    """The cells of the learning rate with the best mean validation accuracy of each arm.

    A rate at which a net of some seed diverged is not chosen; an arm without any other has no test accuracy. Of equal
    rates the lowest is chosen.
    """
    rows = pd.concat([folder.part(cell.key) for cell in every])
    accuracy = rows[rows["measure"] == "validation_accuracy"]
    means = accuracy.groupby([*ARM, "lr"])["value"].apply(lambda values: values.mean(skipna=False)).dropna()
    best = set(means.groupby(ARM).idxmax())  # (task, mixer, lam, lr)
    return [cell for cell in every if (cell.task, cell.mixer, cell.lam, cell.lr) in best]


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows of one work item as a part of the table."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"layer": "Int64", "excerpt": "Int64"})


def map_items_of(config: Table1) -> MapItems:
    """What shares the cells out: the processes of this machine, or Ray."""
    if config.engine == "ray":
        return partial(cluster.map_on_nodes, address=config.address, num_gpus=config.gpus_per_item or 0)
    return partial(processes.map_items, workers=training_workers(config))


def _images_record(config: Table1) -> dict[str, Any]:
    """What the manifest keeps of the images trained and tested on: their source, number and checksum."""
    if config.image is None:
        return {}
    data = config.image.data
    found = {split: images.grey(data.source, split, data.seed) for split in SPLITS}
    return {split: {"source": part.source, "images": len(part.ids), "sha256": part.sha256}
            for split, part in found.items()}  # fmt: skip
