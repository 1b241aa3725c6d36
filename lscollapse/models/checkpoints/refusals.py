"""What a checkpoint is refused for, in one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lscollapse.core.outside import shown
from lscollapse.models.checkpoints.tensors import CheckpointError, forget

READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PIECE = 2**23  # elements of a tensor that are looked at together


def token_embedding(model: Any) -> tuple[str, Tensor] | None:
    """Name and matrix (V, e) of which a token id takes a row; None where it is not known, or ids are pixels."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    names = (name for name, parameter in model.named_parameters() if parameter is weight)
    return (next(names, "the token embedding"), weight) if weight.ndim == 2 else None


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, as errors quote them."""
    return ", ".join(map(shown, names[:most])) + (", ..." if len(names) > most else "")


def refuse_misfits(misfits: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise a CheckpointError if there are tensors `missing`, `unexpected` or `of another shape`, with their names."""
    parts = [f"{len(names)} {what} ({some_of(names)})" for what, names in misfits.items() if names]
    if parts:
        raise CheckpointError(f"the weights of {where} do not fit its config: tensors " + ", ".join(parts))


def other_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which tensors are `of another shape` than expected, and which shape they have, as `refuse_misfits` takes them."""
    return [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]


def refuse_kinds(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a CheckpointError that names the first tensor which is not of float64, float32, float16 or bfloat16.

    Integers, truth values and 8-bit floats are codes whose scales stand elsewhere; a complex number has no place to go.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in READABLE:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"the weights of {where} cannot be measured: {shown(name)} is of dtype {kind}, readable are"
                f" {', '.join(str(dtype).removeprefix('torch.') for dtype in READABLE)}: give the checkpoint"
                " that was not quantised"
            )


def refuse_values(tensors: Mapping[str, Tensor], where: str, mapped: bool = False) -> None:
    """Raise a CheckpointError that names the first tensor with a value that is not finite; each is looked at once.

    Args:
        mapped: the tensors lie in a mapped file, and what was looked at is forgotten.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        for piece in torch.split(tensor.detach().flatten(), PIECE):
            # The extremes of a tensor with NaN are NaN. This reads many times faster than isfinite.
            if len(piece) and not all(torch.isfinite(extreme) for extreme in torch.aminmax(piece)):
                _refuse_tensor(name, tensor.detach(), where)
            if mapped:
                forget({name: piece})


def _refuse_tensor(name: str, tensor: Tensor, where: str) -> None:
    undefined, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    kind = str(tensor.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"the weights of {where} are damaged: {shown(name)} holds {undefined:,} NaN and {infinite:,} infinite of its"
        f" {tensor.numel():,} values in {kind}: every layer after them would be lost; give another checkpoint"
    )


def refuse_zeros(name: str, embedding: Tensor, where: str) -> None:
    """Raise a CheckpointError where all rows of an embedding (V, e) are zero: every token would be the same."""
    rows = max(1, PIECE // max(1, embedding.shape[1]))
    if not any(piece.any() for piece in torch.split(embedding.detach(), rows)):
        raise CheckpointError(
            f"the weights of {where} tell no token from another: {shown(name)} {tuple(embedding.shape)} holds zeros only;"
            " give another checkpoint"
        )


def zero_rows(embedding: Tensor, ids: Iterable[int], padding: int | None) -> list[int]:
    """Of these token ids those whose row of the embedding (V, e) is zero, ascending; the padding token's may be."""
    used = sorted(set(ids) - {padding})
    if not used:
        return []
    rows = embedding.detach()[torch.tensor(used, device=embedding.device)]  # (U, e)
    return [token for token, zero in zip(used, (rows == 0).all(1).tolist(), strict=True) if zero]
