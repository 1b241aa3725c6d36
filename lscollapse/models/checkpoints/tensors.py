"""Tensors of a base model from weights files, memory mapped and under transformers' names. Pickles run no code."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.files import first_line, read_mapping, sha256_file
from lscollapse.core.outside import shown

# At the top of a model: heads and poolers.
_HEADS = re.compile(r"(lm_head|predictions|cls|classifier|sop_classifier|qa_outputs|pooler)\.")
# Masks and counters that old versions of transformers saved beside the weights: computed anew, never read.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|causal_mask|masked_bias|(attn|attention)\.bias)$"
)
MADV_DONTNEED = 4
LARGEST_JSON = 2**24  # bytes: the index of a model of 100,000 tensors
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_PREFIXES = ("backbone.", "albert.", "bert.")
_OLD_NAMES = (
    (re.compile(r"^embedding\.weight$"), "embeddings.weight"),  # mamba_ssm
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),  # BERT as converted from TensorFlow
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what its config says."""


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the base model, under transformers' names, without heads, poolers and old buffers."""
    return {
        _base_name(name): tensor
        for name, tensor in tensors.items()
        if not _HEADS.match(_without_prefix(name)) and not is_old_buffer(name)
    }


def is_old_buffer(name: str) -> bool:
    """Whether a tensor of a file is no weight but a buffer that old versions of transformers saved."""
    return _OLD_BUFFERS.search(name) is not None


def head_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads and poolers that `base_tensors` leaves out."""
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: it is not there, or holds something else.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"no {path.name} in {path.parent}: a checkpoint folder needs it")
    return read_mapping(path, CheckpointError, LARGEST_JSON, _special_float)


def _special_float(value: dict[str, Any]) -> Any:
    """transformers writes an infinite or undefined number of a config as {"__float__": "Infinity"}."""
    if list(value) != ["__float__"]:
        return value
    name = value["__float__"]
    if not isinstance(name, str) or name not in _FLOATS:
        raise ValueError(f'"__float__" must be one of {", ".join(_FLOATS)}, got {shown(name)}')
    return _FLOATS[name]


def is_mapped(file: Path) -> bool:
    """Whether the tensors of a weights file stay in it until they are used.

    Pickles from before PyTorch 1.6 are no zip archives and cannot be mapped.
    """
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or .bin file under its own name; read when used where `is_mapped`, else at once.

    Raises:
        CheckpointError: the file is cut off, damaged, or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped(file))
    except Exception as error:  # whatever a damaged file makes the readers raise
        if is_out_of_memory(error):
            raise
        reason = _forbidden(error) or shown(first_line(error), 200)
        raise CheckpointError(f"{file} cannot be read{size_hint(file)}: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) and t.layout == torch.strided for n, t in content.items()
    ):
        raise CheckpointError(f"{file} is not a state dict: expected names and dense tensors only")
    return content


def _forbidden(error: Exception) -> str:
    """What of a pickle is never read; "" of another error. torch's own words are advice to read it all the same."""
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"{shown(found[1])} in it is no tensor" if found else "it is no pickle of tensors alone"
    return (
        f"{what}, and what else a pickle holds may be code, which is never run: give its tensors as model.safetensors"
    )


def size_hint(file: Path) -> str:
    """What may be wrong with a file that cannot be read, in brackets."""
    with file.open("rb") as handle:
        if handle.read(20).startswith(b"version https://git"):
            return " (it is a Git LFS pointer: run `git lfs pull` in its folder)"
    return f" (cut off or damaged? {file.stat().st_size:,} bytes)"


def forget(tensors: Mapping[str, Tensor]) -> None:
    """Give the pages of mapped tensors back to the system; they are read again from the file when needed.

    Of tensors that lie in no file the values are lost.
    """
    libc = ctypes.CDLL(None)
    for tensor in tensors.values():
        storage = tensor.untyped_storage()  # an expanded tensor has more elements than are in it
        last = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
        # Whole pages only: the first and the last may hold something else too.
        start, end = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(libc, "madvise"):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


@contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Future[str]]:
    """While open, a thread computes `sha256` of files that this one reads too: from the disk they come once."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool.submit(sha256, files)
    finally:
        pool.shutdown(wait=False)


def sha256(files: Sequence[Path]) -> str:
    """Hex sha256 of one file; of several, of the lines that sha256sum prints for them in this order."""
    digests = [sha256_file(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
