"""Where the files of a checkpoint are: in the package, in a folder, or fetched from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lscollapse.core import hub, registry
from lscollapse.core.registry import Entry
from lscollapse.models.checkpoints.tensors import CheckpointError, read_json


class Where(TypedDict, total=False):
    """How a checkpoint is looked for.

    Attributes:
        revision: of a hub repository, instead of the one that the registry pins.
        cache_dir: for what is fetched; the default is the hub's cache.
        offline: make no call.
    """

    revision: str | None
    cache_dir: str | Path | None
    offline: bool


@dataclass(frozen=True)
class Located:
    """The files of a checkpoint on this machine. `where` names them in errors."""

    entry: Entry
    where: str
    revision: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]


def locate_checkpoint(
    entry: Entry,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    config_only: bool = False,
) -> Located:
    """The files of a registry entry, without those of the weights if `config_only`.

    Raises:
        CheckpointError: a revision of what is not on the hub, or files are missing.
        HubError, AssetError: as `hub.fetch` and `registry.embedded_files`.
    """
    if revision and entry.source != "hub":
        raise CheckpointError(f"{entry.name} is not on the hub: a revision ({revision}) cannot be chosen")
    revision = revision or entry.revision
    if config_only and entry.config is not None:
        return Located(entry, entry.name, "", entry.config, ())
    if entry.source == "package":
        config, file = registry.embedded_files(entry)
        return Located(entry, entry.name, revision, read_json(config), (file,))
    if entry.source == "hub":
        files = ["config.json"] if config_only else None
        folder = hub.fetch(
            entry.location, revision=revision, files=files, cache_dir=hub.storage(cache_dir), offline=offline
        )
        where, revision = entry.location, folder.name
    else:
        folder = Path(entry.location).expanduser()
        where = str(folder)
    weight_files = () if config_only else _weights(folder, where)
    return Located(entry, where, revision, read_json(folder / "config.json"), weight_files)


def _weights(folder: Path, where: str) -> tuple[Path, ...]:
    names = hub.weights_files([path.name for path in folder.iterdir()])
    if hub.INDEX in names:
        names = sorted(set(read_json(folder / hub.INDEX).get("weight_map", {}).values()))
    files = tuple(folder / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        wanted = ", ".join(missing) or f"model.safetensors, {hub.INDEX} or pytorch_model.bin"
        raise CheckpointError(f"no weights in {where}: expected {wanted}")
    return files
