"""A configuration and a set of variants become a run folder: models loaded, excerpts drawn, work items measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from lscollapse.core.config import Experiment
from lscollapse.core.manifest import RunFolderError, read_manifest
from lscollapse.core.progress import Progress
from lscollapse.core.run_folder import RunFolder
from lscollapse.runs import cluster, processes
from lscollapse.runs.devices import device, worker_devices
from lscollapse.runs.excerpts import provenance
from lscollapse.runs.loading import LoadedTask, Task, Variants, load_tasks
from lscollapse.runs.memory import release
from lscollapse.runs.schedule import Schedule
from lscollapse.runs.work import Item, measure_item

# Settings that do not decide the rows. What `wikipedia` led to is in the tasks' identities; the rest of it, a contact and
# perhaps a private endpoint, is nobody's business.
UNDECISIVE = {
    "cache_dir", "offline", "device", "models", "stream", "max_memory", "workers", "wikipedia", "engine", "address",
    "gpus_per_item", "retrain",
}  # fmt: skip


def run(name: str, config: Experiment, out: Path, variants: Variants, progress: Progress) -> pd.DataFrame:
    """Measure `variants` of every model of `config` and return the finished table of the run folder `out`.

    The rows do not depend on how the run was tiled, shared among processes, killed and continued; on a GPU, whose
    products round differently in tiles of different sizes, up to that rounding. Memory decides one thing: whether arms that
    float32 does not resolve may run in float64, which is fixed when a run begins.
    """
    if config.engine == "local":
        return _run(name, config, out, variants, progress)
    with cluster.connection(config.address):  # before the models are loaded, so that what is amiss is said at once
        return _run(name, config, out, variants, progress)


def _run(name: str, config: Experiment, out: Path, variants: Variants, progress: Progress) -> pd.DataFrame:
    here = _here(config)
    loaded = list(load_tasks(here, variants, progress))
    tasks = _as_begun(out, [task.alone for task in loaded])
    decisive = config.model_dump(mode="json", exclude=UNDECISIVE)
    identity = {"experiment": name, "config": decisive, "subjects": [task.identity for task in tasks]}
    with RunFolder(out, identity, progress) as folder:
        if folder.complete:
            progress.note(f"{out} is complete: nothing to compute")
            return folder.rows()
        facts = {"excerpts": {task.info.name: provenance(task.corpus) for task in tasks}, "device": device(here)}
        stored = {task.info.name: task.info.stored for task in tasks if task.info.stored}
        facts |= {"weights": stored} if stored else {}
        return _measured(config, folder, Schedule(tasks, folder, progress), loaded, facts, progress)


def _measured(
    config: Experiment, folder: RunFolder, schedule: Schedule, loaded: list[LoadedTask], facts: dict[str, Any],
    progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    """Measure what is missing in the folder, and finish it with `facts`. `loaded` is emptied where others measure."""
    on_ray, devices = config.engine == "ray", worker_devices(_here(config))
    missing = schedule.first()

    def keep(item: Item, rows: pd.DataFrame) -> list[Item]:
        folder.add(item.key, rows)
        return schedule.after(item)

    def keep_and_tell(item: Item, rows: pd.DataFrame) -> list[Item]:
        further = keep(item, rows)
        progress.advance(item.cost)
        return further

    def measured(item: Item) -> pd.DataFrame:
        return measure_item(item, loaded[item.number].adapter, config, progress)

    if on_ray and missing:
        loaded.clear()  # the workers load the models themselves
        facts |= cluster.measure_on_nodes(missing, config, keep_and_tell, progress)
    elif len(devices) > 1 and schedule.left > 1:
        loaded.clear()
        release()
        processes.measure_on(devices[: schedule.left], missing, config, keep_and_tell)
    else:
        processes.map_items(measured, missing, on_result=keep, workers=1)
    return folder.finish(schedule.keys, facts | {"rounding": schedule.found})


def _here(config: Experiment) -> Experiment:
    """As this process computes: on Ray the nodes have devices and kernels, and it only plans."""
    return config.model_copy(update={"device": "cpu", "kernels": "auto"}) if config.engine == "ray" else config


def _as_begun(out: Path, tasks: list[Task]) -> list[Task]:
    """The tasks without float64 for arms that float32 does not resolve where the run `out` was begun with no room for it."""
    try:
        known = read_manifest(out)["identity"].get("subjects", [])
    except RunFolderError:  # nothing has begun there
        return tasks
    if not isinstance(known, list) or len(known) != len(tasks) or not all(isinstance(begun, dict) for begun in known):
        return tasks  # another run, which RunFolder refuses
    return [
        replace(task, plans=replace(task.plans, wide=None)) if begun.get("float64") else task
        for task, begun in zip(tasks, known, strict=True)
    ]
