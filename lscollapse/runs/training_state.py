"""What a training leaves in its folder, read again: the last saved step, and the record of one that diverged.

state.pt is a zip file whose members have checksums. One that is damaged is set aside and named, and the training begins anew:
it ends with the same bits.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from lscollapse.core.files import atomic, changes, odd_kind, read_text
from lscollapse.core.outside import checked, parse_json
from lscollapse.core.progress import Progress

STATE, LOG, RECORD = "state.pt", "log.csv", "diverged.json"
HEADER = "step,seconds,train_loss,held_out_loss,held_out_accuracy"
DAMAGED = ".damaged"  # how the name of a state ends that was set aside


class TrainingError(ValueError):
    """A folder cannot continue this training."""


class Diverged(TrainingError):
    """The loss or its gradient was no finite number; the folder's diverged.json has the record."""


class DivergedRecord(BaseModel):
    """At which step a training stopped, and with what."""

    model_config = ConfigDict(strict=True)

    step: int
    loss: str
    gradient_norm: str
    lr: float


@dataclass
class State:
    """Where a training is, beside its weights and its optimizer."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    log: list[str] = field(default_factory=lambda: [HEADER])


def save(folder: Path, values: dict[str, Any]) -> None:
    """Write state.pt, whole or not at all."""
    with atomic(folder / STATE) as temporary:
        torch.save(values, temporary)


def continued(
    net: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, identity: dict[str, Any], device: str, progress: Progress
) -> State:  # fmt: skip
    """The state that a folder holds, with its weights in `net` and its moments in `optimizer`; a new one where there is none.

    Raises:
        TrainingError: the folder holds a training with another identity.
    """
    held = saved(folder, device, progress)
    if held is None:
        return State()
    different = changes(_plain(held["identity"]), _plain(identity))
    if different:
        raise TrainingError(f"{folder} was trained otherwise ({'; '.join(different[:4])}): give a new folder")
    net.load_state_dict(held["net"])
    optimizer.load_state_dict(held["optimizer"])
    return State(held["step"], held["seconds"], held["losses"], held["log"])


def saved(folder: Path, device: str, progress: Progress) -> dict[str, Any] | None:
    """What state.pt holds, None where there is none or it was damaged."""
    file = folder / STATE
    if not file.exists():
        return None
    held: Any = None
    why = f"it is {kind}" if (kind := odd_kind(file)) else ""
    try:
        why = why or _broken(file)
        held = None if why else torch.load(file, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception:  # whatever the libraries make of bytes that are not what was written
        why = "it is cut off or another program's"
    if not why and isinstance(held, dict) and {"identity", "net", "optimizer", *vars(State())} <= set(held):
        return held
    why = why or "it is no state of a training"
    there = file.replace(file.with_name(STATE + DAMAGED))
    progress.note(f"{file} is damaged ({why}): set aside as {there.name}, the training begins anew")
    return None


def _broken(file: Path) -> str:
    """Which member of a zip file is not what its checksum says, in words."""
    with zipfile.ZipFile(file) as members:
        member = members.testzip()
    return f"{member} in it is not what was written" if member else ""


def diverged(folder: Path) -> DivergedRecord | None:
    """The record of a training that stopped, if the folder has one.

    Raises:
        TrainingError: it cannot be read.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    values = parse_json(read_text(file, TrainingError), str(file), TrainingError)
    return checked(DivergedRecord, values, TrainingError, str(file))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
