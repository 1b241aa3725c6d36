"""Examples with their labels: what nets are trained and tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Examples:
    """One split.

    Attributes:
        ids: (n, N) integers, what the net reads.
        labels: (n,) classes, or (n, P) one for each position of `at`.
        at: (n, P) the positions that are asked for, or None where the net gives one output a sequence.
    """

    ids: np.ndarray
    labels: np.ndarray
    at: np.ndarray | None = None

    def batch(self, rows: slice | np.ndarray, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids, labels and at of some rows as int64 on the device."""

        def take(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values[rows].astype(np.int64)).to(device)

        return take(self.ids), take(self.labels), None if self.at is None else take(self.at)


@dataclass(frozen=True)
class Data:
    """What is trained on, and what the accuracy is reported on meanwhile; `source` names both, with their seed.

    Attributes:
        augment: (ids, seed) -> ids, changes the examples of a step anew each time they are seen.
    """

    train: Examples
    held_out: Examples
    source: str
    augment: Callable[[Tensor, Any], Tensor] | None = None
