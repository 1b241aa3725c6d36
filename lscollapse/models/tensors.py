"""Tensors of a base model from weights files, memory mapped and under transformers' names. Pickles run no code."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lscollapse.models.hub import sha256_file
from lscollapse.texts import first_line

# At the top of a model: heads and poolers, and a buffer that old versions of transformers saved.
_HEADS = re.compile(
    r"(lm_head|predictions|cls|classifier|sop_classifier|qa_outputs|pooler)\.|embeddings\.position_ids$"
)
MADV_DONTNEED = 4
_FORMAT_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
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


def head_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `base_tensors` leaves out."""
    return {_base_name(name): tensor for name, tensor in tensors.items() if _HEADS.match(_without_prefix(name))}


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


def converted(file: Path, cache_dir: str | Path | None) -> Path:
    """The safetensors copy of a pickled base model, made once; one tensor after the other goes from the mapped file to it.

    It lies under "converted" in `cache_dir`, LSCOLLAPSE_CACHE or ~/.cache/lscollapse, named by the sha256 of `file`.

    Raises:
        CheckpointError: `file` cannot be read, or there is no place for the copy.
    """
    cache = cache_dir or os.environ.get("LSCOLLAPSE_CACHE") or Path.home() / ".cache" / "lscollapse"
    target = Path(cache).expanduser() / "converted" / f"{sha256_file(file)}.safetensors"
    if target.exists():
        return target
    tensors = base_tensors(read_tensors(file))
    unfinished = target.with_suffix(f".{os.getpid()}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(target.parent).free
        if needed > free:
            raise OSError(f"it takes {needed:,} bytes and {free:,} are free")
        _write(tensors, unfinished, mapped=zipfile.is_zipfile(file))
        unfinished.replace(target)
    except (OSError, KeyError) as error:
        raise CheckpointError(
            f"{file} could not be converted into {target.parent} (LSCOLLAPSE_CACHE chooses another place):"
            f" {first_line(error)}"
        ) from error
    finally:
        if unfinished.exists():
            unfinished.unlink()
    return target


def _write(tensors: Mapping[str, Tensor], file: Path, mapped: bool) -> None:
    """A safetensors file, written tensor by tensor; the library's own writer would have all of them in memory."""
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # each then lies on a multiple of its item
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _FORMAT_DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            out.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
            if mapped:
                forget({name: tensors[name]})
        out.flush()
        os.fsync(out.fileno())


def forget(tensors: Mapping[str, Tensor]) -> None:
    """Give the pages of mapped tensors back to the system; they are read again from the file when needed."""
    libc = ctypes.CDLL(None)
    for tensor in tensors.values():
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(libc, "madvise"):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def sha256(files: Sequence[Path]) -> str:
    """Hex sha256 of one file; of several, of the lines that sha256sum prints for them in this order."""
    digests = [sha256_file(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
