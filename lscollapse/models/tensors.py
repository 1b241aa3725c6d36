"""Tensors of a base model from weights files, memory mapped and under transformers' names. Pickles run no code."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lscollapse.models.hub import sha256_file

# At the top of a model: heads and poolers, and a buffer that old versions of transformers saved.
_HEADS = re.compile(
    r"(lm_head|predictions|cls|classifier|sop_classifier|qa_outputs|pooler)\.|embeddings\.position_ids$"
)
_PREFIXES = ("backbone.", "albert.", "bert.")
_OLD_NAMES = (
    (re.compile(r"^embedding\.weight$"), "embeddings.weight"),  # mamba_ssm
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),  # BERT as converted from TensorFlow
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what its config says."""


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the base model, under the names they have in transformers; heads and poolers are left out."""
    return {_base_name(name): tensor for name, tensor in tensors.items() if not _HEADS.match(_without_prefix(name))}


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _base_name(name: str) -> str:
    name = _without_prefix(name)
    for pattern, new in _OLD_NAMES:
        name = pattern.sub(new, name)
    return name


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or .bin file under its own name, mapped: nothing is read before it is used.

    Raises:
        CheckpointError: the file is cut off, damaged, or holds anything but tensors.
    """
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise CheckpointError(f"{file} cannot be read{_size_hint(file)}: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{file} is not a state dict: expected names and tensors only")
    return content


def _size_hint(file: Path) -> str:
    with file.open("rb") as handle:
        if handle.read(20).startswith(b"version https://git"):
            return " (it is a Git LFS pointer: run `git lfs pull` in its folder)"
    return f" (cut off or damaged? {file.stat().st_size:,} bytes)"


def first_line(error: Exception) -> str:
    """What an exception says, cut to its first line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def converted(file: Path, cache_dir: str | Path | None) -> Path:
    """The safetensors copy of a pickled base model, made once; tensors go from the mapped file straight to the new one.

    It lies under "converted" in `cache_dir`, LSCOLLAPSE_CACHE or ~/.cache/lscollapse, named by the sha256 of `file`.

    Raises:
        CheckpointError: `file` cannot be read, or there is no place for the copy.
    """
    from safetensors.torch import save_file

    cache = cache_dir or os.environ.get("LSCOLLAPSE_CACHE") or Path.home() / ".cache" / "lscollapse"
    target = Path(cache).expanduser() / "converted" / f"{sha256_file(file)}.safetensors"
    if target.exists():
        return target
    tensors = {name: tensor.contiguous() for name, tensor in base_tensors(read_tensors(file)).items()}
    unfinished = target.with_suffix(f".{os.getpid()}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata={"format": "pt", "converted_from": file.name})
        unfinished.replace(target)
    except Exception as error:
        if unfinished.exists():
            unfinished.unlink()
        raise CheckpointError(
            f"{file} could not be converted into {target.parent} (LSCOLLAPSE_CACHE chooses another place):"
            f" {first_line(error)}"
        ) from error
    return target


def sha256(files: Sequence[Path]) -> str:
    """Hex sha256 of one file; of several, of the lines that sha256sum prints for them in this order."""
    digests = [sha256_file(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
