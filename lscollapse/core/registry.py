"""Short names of the models and where their weights come from. Reads no weights and imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lscollapse.core import assets
from lscollapse.core.files import GGUF, expanded, is_gguf
from lscollapse.core.outside import plain, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class ModelNameError(ValueError):
    """The name is neither a known model, nor a folder, nor a hub id."""


@dataclass(frozen=True)
class Entry:
    """One model that can be loaded.

    Attributes:
        architecture: "mamba2", "albert", "bert", "llama" or "s4d"; "" for a path or hub id until its config is read.
        source: "package", that comes with the installation, "wheel", that `lscollapse fetch` installs, or where else.
        location: the data package, the folder, the GGUF file, or the hub id, as `source` says.
        revision: package version or hub revision; "main" is resolved to a commit when it is fetched, "" for a folder.
        text: what the model reads, "english", "smiles" or "images".
        n_parameters: of the base model without pooler and heads, asserted on loading; None where it is not known ahead.
        config: contents of config.json where they are published, so that random weights of this shape need no download.
    """

    name: str
    architecture: str
    source: Literal["package", "wheel", "folder", "file", "hub"]
    location: str
    revision: str = ""
    text: Literal["english", "smiles", "images"] = "english"
    n_parameters: int | None = None
    config: Mapping[str, Any] | None = None

    @property
    def embedded(self) -> bool:
        """True where the weights come with the installed packages and nothing is downloaded."""
        return self.source == "package"


def _mamba2(size: str, d_model: int, n_layer: int, n_parameters: int, revision: str = "main") -> Entry:
    """Mamba-2 as released (Dao and Gu, 2024)."""
    config = {
        "d_model": d_model, "d_intermediate": 0, "n_layer": n_layer, "vocab_size": 50288, "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [], "rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }  # fmt: skip
    repository = f"state-spaces/mamba2-{size}"
    return Entry(f"mamba2-{size}", "mamba2", "hub", repository, revision, n_parameters=n_parameters, config=config)


def _albert(size: str, n_parameters: int, revision: str = "main") -> Entry:
    """ALBERT, one shared layer (Lan et al., 2020)."""
    return Entry(f"albert-{size}", "albert", "hub", f"albert/albert-{size}", revision, n_parameters=n_parameters)


_BERT = "86b5e0934494bd15c9632b12f734a8a67f723594"  # of the hub repository
_ALL = (
    # Mamba-2 with the BERT vocabulary, trained by scripts/train_tiny_mamba2.py on Wikipedia summaries
    Entry("mamba2-tiny", "mamba2", "package", "lscollapse", n_parameters=9_547_712),
    # S4D, 32 layers, hidden 128, trained by scripts/train_s4d.py on 8x8 digits, not on CIFAR-10
    Entry("s4d-digits", "s4d", "package", "lscollapse", text="images", n_parameters=1_598_986),
    # BERT, 6 layers, hidden 384: all-MiniLM-L6-v2
    Entry("minilm-l6", "bert", "package", assets.MINILM, "0.1.0", n_parameters=22_565_376),
    # ALBERT, 12 layers, hidden 256, trained on chemical reactions (SMILES), not English: rxnmapper
    Entry("albert-smiles", "albert", "package", assets.SMILES_WEIGHTS.package, "0.4.3", "smiles", 701_824),
    # Llama, 30 layers, hidden 576: SmolLM2-135M-Instruct as a GGUF file
    Entry("smollm2-135m", "llama", "wheel", assets.SMOLLM2.package, "0.1.2", n_parameters=134_515_008),
    _mamba2("130m", 768, 24, 128_989_632),
    _mamba2("370m", 1024, 48, 368_346_624),
    _mamba2("780m", 1536, 48, 780_161_280),
    _mamba2("1.3b", 2048, 48, 1_343_757_312),
    _mamba2("2.7b", 2560, 64, 2_702_599_680, "99b226cc377d131cccc610ed4346db564f381f1e"),
    _albert("base-v1", 11_092_992),  # 12 layers, hidden 768
    _albert("large-v1", 16_634_368),  # 24 layers, hidden 1024
    _albert("xlarge-v1", 54_528_512),  # 24 layers, hidden 2048
    _albert("xxlarge-v1", 205_814_272),  # 12 layers, hidden 4096
    _albert("base-v2", 11_092_992, "8e2f239c5f8a2c0f253781ca60135db913e5c80c"),
    _albert("large-v2", 16_634_368),
    _albert("xlarge-v2", 54_528_512),
    _albert("xxlarge-v2", 205_814_272),
    # BERT, 12 layers, hidden 768 (Devlin et al., 2019)
    Entry("bert-base-uncased", "bert", "hub", "google-bert/bert-base-uncased", _BERT, n_parameters=108_891_648),
)
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ALL}
ALIASES = {"s4d": "s4d-digits"}


def resolve(name_or_path: str | Path) -> Entry:
    """The entry of a short name, a local folder or GGUF file, or a hub id "owner/name", in this order.

    Raises:
        ModelNameError: none of them; names the nearest short name.
    """
    name = ALIASES.get(str(name_or_path), str(name_or_path))
    if name in ENTRIES:
        return ENTRIES[name]
    path, said = expanded(name), shown(name, 200)
    if os.path.isdir(path):
        return Entry(name=plain(path.resolve().name), architecture="", source="folder", location=str(path))
    if is_gguf(path):
        return Entry(name=plain(path.stem), architecture="", source="file", location=str(path))
    if os.path.exists(path):
        raise ModelNameError(
            f"{said} is {'a file' if path.is_file() else 'a pipe or a device'}: give the folder that holds config.json and the weights, or a {GGUF} file"
        )
    if path.suffix == GGUF:
        raise ModelNameError(f"there is no file {said}")
    if isinstance(name_or_path, str) and "/" in name:
        return Entry(name=name, architecture="", source="hub", location=hub_id(name), revision="main")
    if "/" in name or "\\" in name:
        raise ModelNameError(f"no folder {said}, and it is not a hub id of the form owner/name")
    near = difflib.get_close_matches(name[:80], ENTRIES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ModelNameError(
        f"unknown model {said!r}{hint}: known are {', '.join(ENTRIES)}; or a folder, a {GGUF} file, or a hub id owner/name"
    )


def hub_id(name: str) -> str:
    """`name`, which is no folder here, where it can be a hub id "owner/name".

    Raises:
        ModelNameError: it has another form, or its first part is a folder here: that is a mistyped path, and asking the
            hub for it would take long and tell nothing.
    """
    parent, _, last = name.rpartition("/")
    if not _HUB_ID.fullmatch(name):
        raise ModelNameError(f"no folder {shown(name, 200)}, and it is not a hub id of the form owner/name")
    if Path(parent).is_dir():
        near = difflib.get_close_matches(last, [path.name for path in Path(parent).iterdir() if path.is_dir()], n=1)
        hint = f" (did you mean {parent}/{near[0]}?)" if near else ""
        raise ModelNameError(
            f"the folder {parent} has no folder {last}{hint}; for {name} of the hub, work where there is no folder {parent}"
        )
    return name


def fetched_file(entry: Entry) -> Path:
    """The weights of a model of a package that `lscollapse fetch` installs.

    Raises:
        AssetError: it is not installed, or the file is not the pinned one.
    """
    if entry.name == "smollm2-135m":
        return assets.locate(assets.SMOLLM2)
    raise assets.AssetError(f"{entry.name} is no model that is fetched as a package")


def embedded_files(entry: Entry) -> tuple[Path, Path]:
    """config.json and the weights file of an embedded model.

    Raises:
        AssetError: the package that holds them is not installed, or a file is missing or altered.
    """
    if entry.name == "minilm-l6":
        return assets.locate(assets.MINILM_CONFIG), assets.locate(assets.MINILM_WEIGHTS)
    if entry.name == "albert-smiles":
        return assets.locate(assets.SMILES_CONFIG), assets.locate(assets.SMILES_WEIGHTS)
    folder = Path(__file__).parents[1] / "models" / "weights" / entry.name
    files = folder / "config.json", folder / "model.safetensors"
    if not all(file.is_file() for file in files):
        raise assets.AssetError(f"the weights of {entry.name} are missing from the installed package: install it again")
    return files
