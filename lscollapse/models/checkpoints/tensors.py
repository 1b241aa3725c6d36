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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lscollapse.core.files import cache_folder, first_line, read_text, sha256_file

# At the top of a model: heads and poolers.
_HEADS = re.compile(r"(lm_head|predictions|cls|classifier|sop_classifier|qa_outputs|pooler)\.")
# Masks and counters that old versions of transformers saved beside the weights: computed anew, never read.
_OLD_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|causal_mask|masked_bias|(attn|attention)\.bias)$"
)
MADV_DONTNEED = 4
PIECE = 2**23  # elements of a tensor that are looked at together
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
    """The tensors of the base model, under the names they have in transformers, without heads, poolers and old buffers."""
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


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, as errors quote them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def refuse_misfits(found: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise a CheckpointError for names of tensors that are `missing`, `unexpected` or `of another shape`, if there are any."""
    parts = [f"{len(names)} {what} ({some_of(names)})" for what, names in found.items() if names]
    if parts:
        raise CheckpointError(f"the weights of {where} do not fit its config.json: tensors " + ", ".join(parts))


def refuse_kinds(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a CheckpointError that names the first tensor which is not of float64, float32, float16 or bfloat16.

    Integers, truth values and 8-bit floats are codes whose scales stand elsewhere; a complex number has no place to go.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FORMAT_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"the weights of {where} cannot be measured: {name} is of dtype {kind}, readable are"
                f" {', '.join(str(dtype).removeprefix('torch.') for dtype in _FORMAT_DTYPES)}: give the checkpoint"
                " that was not quantised"
            )


def refuse_values(tensors: Mapping[str, Tensor], where: str, mapped: bool = False) -> None:
    """Raise a CheckpointError that names the first tensor with a value that is not finite; every value is looked at once.

    Args:
        mapped: the tensors lie in a mapped file, and what was looked at is forgotten.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        for piece in tensor.detach().flatten().split(PIECE):
            # The extremes of a tensor with NaN are NaN. This reads many times faster than isfinite.
            if len(piece) and not all(torch.isfinite(extreme) for extreme in torch.aminmax(piece)):
                _refuse_tensor(name, tensor.detach(), where)
            if mapped:
                forget({name: piece})


def _refuse_tensor(name: str, tensor: Tensor, where: str) -> None:
    undefined, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    kind = str(tensor.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"the weights of {where} are damaged: {name} holds {undefined:,} NaN and {infinite:,} infinite of its"
        f" {tensor.numel():,} values in {kind}: every layer after them would be lost; give another checkpoint"
    )


def refuse_zeros(name: str, embedding: Tensor, where: str) -> None:
    """Raise a CheckpointError where all rows of an embedding (V, e) are zero: every token would be the same."""
    if not any(piece.any() for piece in embedding.detach().split(max(1, PIECE // max(1, embedding.shape[1])))):
        raise CheckpointError(
            f"the weights of {where} tell no token from another: {name} {tuple(embedding.shape)} holds zeros only;"
            " give another checkpoint"
        )


def zero_rows(embedding: Tensor, ids: Iterable[int], padding: int | None) -> list[int]:
    """Of these token ids those whose row of the embedding (V, e) is zero, ascending; the padding token's may be."""
    used = sorted(set(ids) - {padding})
    if not used:
        return []
    rows = embedding.detach()[torch.tensor(used, device=embedding.device)]  # (U, e)
    return [token for token, zero in zip(used, (rows == 0).all(1).tolist(), strict=True) if zero]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: it is not there, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}: a checkpoint folder needs it")
    try:
        content = json.loads(read_text(path, CheckpointError), object_hook=_special_float)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again")
    return content


def _special_float(value: dict[str, Any]) -> Any:
    """transformers writes an infinite or undefined number of a config as {"__float__": "Infinity"}."""
    return float(value["__float__"]) if list(value) == ["__float__"] else value


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
        CheckpointError: `file` cannot be read, holds other numbers than floats, or there is no place for the copy.
    """
    target = cache_folder(cache_dir) / "converted" / f"{sha256_file(file)}.safetensors"
    if target.exists():
        return target
    tensors = base_tensors(read_tensors(file))
    refuse_kinds(tensors, str(file))
    unfinished = target.with_suffix(f".{os.getpid()}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(target.parent).free
        if needed > free:
            raise OSError(f"it takes {needed:,} bytes and {free:,} are free")
        _write(tensors, unfinished, mapped=zipfile.is_zipfile(file))
        unfinished.replace(target)
    except OSError as error:
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
