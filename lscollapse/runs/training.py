"""The one training loop: AdamW, a linear warm-up, then a cosine or a constant rate; continued exactly where it was killed.

What a step does depends on the weights, the optimizer and the step's number alone: the order of the data and the dropout
of a step are drawn from (seed, epoch) and (seed, step). So a saved step is all that there is to save, and a run that was
killed and continued ends with the same bits on a CPU.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lscollapse.core.config import Count, Section, Seed
from lscollapse.core.files import write_json, write_text
from lscollapse.core.progress import SILENT, Progress
from lscollapse.data.examples import Data, Examples
from lscollapse.runs import training_state
from lscollapse.runs.training_state import LOG, RECORD, Diverged, DivergedRecord, State

EVALUATED_AT_ONCE = 256  # examples
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimisation(Section):
    """What a configuration says of a training.

    Attributes:
        batch: examples a step; those that fill no batch wait for the next epoch.
        warmup: part of all steps in which the rate rises linearly.
        schedule: what follows: `cosine` to zero, or `constant`.
        clip: greatest norm of the gradient.
        loss: `cross_entropy`, or `paper_code`: the authors' public code gives softmax(logits) to the cross-entropy, which
            takes the softmax again.
        evaluate_every: steps between two looks at the held-out examples; None: an epoch.
        save_every, save_seconds: the state is written after so many steps, or seconds, and at the end.
    """

    batch: Count = 64
    weight_decay: float = Field(default=0.1, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = Field(default=1.0, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    loss: Literal["cross_entropy", "paper_code"] = "cross_entropy"
    evaluate_every: Count | None = None
    save_every: Count = 1000
    save_seconds: float = Field(default=60.0, ge=0)


class Settings(Optimisation):
    """What decides the weights, beside the net and the data.

    Attributes:
        steps: of the optimizer, over all epochs.
        lr: the highest learning rate; parameter groups may set a lower one (`highest_lr`).
    """

    steps: Count
    lr: float = Field(default=1e-3, gt=0)
    seed: Seed = 0


@dataclass
class Outcome:
    """A finished training: seconds over all its starts, the accuracy and loss on the held-out examples at the end."""

    steps: int
    seconds: float
    accuracy: float
    loss: float
    train_loss: float


def rate(step: int, settings: Settings) -> float:
    """The learning rate of a step, 0..steps-1, relative to the highest."""
    first = max(1, round(settings.warmup * settings.steps))
    if step < first:
        return (step + 1) / first
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - first) / (settings.steps - first)))


def rows_of(step: int, n_examples: int, settings: Settings) -> np.ndarray:
    """Which examples a step sees: a new order every epoch."""
    size = min(settings.batch, n_examples)
    epoch, number = divmod(step, n_examples // size)
    return _order(settings.seed, epoch, n_examples)[number * size : (number + 1) * size]


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, n_examples: int) -> np.ndarray:
    """Drawn once an epoch: a permutation of 100,000 takes longer than a step of a small net on a GPU."""
    return np.random.default_rng([seed, epoch]).permutation(n_examples)


def loss_of(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Mean loss; logits (..., classes), labels (...)."""
    logits = logits.float().flatten(0, -2)  # (labels, classes)
    return F.cross_entropy(logits.softmax(-1) if kind == "paper_code" else logits, labels.flatten())


@torch.no_grad()
def evaluate(net: nn.Module, examples: Examples, device: str, kind: str = "cross_entropy") -> tuple[float, float]:
    """Accuracy and mean loss over all labels, without dropout."""
    net.eval()
    right, total, count = 0, 0.0, 0
    for first in range(0, len(examples.ids), EVALUATED_AT_ONCE):
        ids, labels, at = examples.batch(slice(first, first + EVALUATED_AT_ONCE), device)
        logits = _logits(net, ids, at, device)
        right += int((logits.argmax(-1) == labels).sum())
        total += float(loss_of(logits, labels, kind)) * labels.numel()
        count += labels.numel()
    net.train()
    return right / count, total / count


def _logits(net: nn.Module, ids: Tensor, at: Tensor | None, device: str) -> Tensor:
    """(B, N) ids -> (B, classes), or (B, P, classes) at the positions asked for; bfloat16 products on a GPU, else float32."""
    with torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext():
        logits: Tensor = net(ids) if at is None else net(ids, at)
    return logits


def fit(
    net: nn.Module, data: Data, settings: Settings, folder: Path, progress: Progress = SILENT, device: str = "cpu",
    tensorboard: bool = True,
) -> Outcome:  # fmt: skip
    """Train `net` in place, or continue the training that `folder` holds.

    Args:
        net: gives logits for (ids) or (ids, at), and `parameter_groups(weight_decay)`.
        folder: gets state.pt (the last saved step), log.csv and TensorBoard's events.

    Raises:
        Diverged: the loss or the gradient became infinite or NaN, now or when the folder was trained before.
        TrainingError: the folder holds a training with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if record := training_state.diverged(folder):
        raise Diverged(_diverged(record, folder))
    net.to(device).train()
    groups = net.parameter_groups(settings.weight_decay)  # type: ignore[operator]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    identity = {"settings": settings.model_dump(), "data": data.source, "net": net.config.to_dict()}  # type: ignore[union-attr, operator]
    state = training_state.continued(net, optimizer, folder, identity, device, progress)
    if state.step:
        progress.note(f"{folder} is continued at step {state.step} of {settings.steps}")
    progress.start(settings.steps - state.step)
    writer = _writer(folder, state.step) if tensorboard else None
    try:
        return _train(net, optimizer, data, settings, folder, identity, state, progress, device, writer)
    finally:
        if writer is not None:
            writer.close()


def _train(
    net: Any, optimizer: torch.optim.Optimizer, data: Data, settings: Settings, folder: Path, identity: dict[str, Any],
    state: State, progress: Progress, device: str, writer: Any,
) -> Outcome:  # fmt: skip
    n_examples = len(data.train.ids)
    every = settings.evaluate_every or max(1, n_examples // settings.batch)
    began = time.monotonic() - state.seconds
    saved = time.monotonic()
    while state.step < settings.steps:
        ids, labels, at = data.train.batch(rows_of(state.step, n_examples, settings), device)
        if data.augment is not None:
            ids = data.augment(ids, [settings.seed, state.step])
        loss, norm = _step(net, optimizer, (ids, labels, at), settings, state.step, device)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            record = DivergedRecord(step=state.step + 1, loss=str(loss), gradient_norm=str(norm), lr=settings.lr)
            write_json(folder / RECORD, record.model_dump())
            raise Diverged(_diverged(record, folder))
        state.step += 1
        state.losses.append(loss)
        progress.advance(1)
        last = state.step == settings.steps
        if state.step % every == 0 or last:
            state.seconds = time.monotonic() - began
            _report(net, data, settings, state, progress, device, writer)
        if state.step % settings.save_every == 0 or last or time.monotonic() - saved >= settings.save_seconds:
            state.seconds = time.monotonic() - began
            write_text(folder / LOG, "\n".join(state.log) + "\n")
            parts = {"identity": identity, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
            training_state.save(folder, {**parts, **asdict(state)})
            saved = time.monotonic()
    *_, train_loss, loss, accuracy = map(float, state.log[-1].split(","))
    return Outcome(state.step, state.seconds, accuracy, loss, train_loss)


def _step(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor | None], settings: Settings,
    step: int, device: str,
) -> tuple[float, float]:  # fmt: skip
    """One update, if the gradient is finite; returns the loss before it and the norm of the gradient before clipping."""
    ids, labels, at = batch
    for group in optimizer.param_groups:
        group["lr"] = min(settings.lr, group.get("highest_lr", math.inf)) * rate(step, settings)
    torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout of this step, the same in a continued run
    logits = _logits(net, ids, at, device)
    loss = loss_of(logits, labels, settings.loss)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)  # what loss.backward() calls, with types
    norm = float(nn.utils.clip_grad_norm_(net.parameters(), settings.clip))
    if math.isfinite(norm):
        optimizer.step()
    return float(loss.detach()), norm


def _report(
    net: Any, data: Data, settings: Settings, state: State, progress: Progress, device: str, writer: Any
) -> None:
    accuracy, held_out = evaluate(net, data.held_out, device, settings.loss)
    train = sum(state.losses) / len(state.losses)
    state.losses.clear()
    state.log.append(f"{state.step},{state.seconds:.1f},{train:.6g},{held_out:.6g},{accuracy:.6g}")
    left = state.seconds / state.step * (settings.steps - state.step)
    progress.note(
        f"step {state.step} of {settings.steps}  loss {train:.4f}  held out {100 * accuracy:.1f} %"
        f"  left {int(left) // 60}:{int(left) % 60:02d}"
    )
    if writer is None:
        return
    scalars = {"loss/train": train, "loss/held_out": held_out, "accuracy/held_out": accuracy}
    scalars["rate"] = settings.lr * rate(state.step - 1, settings)
    lams = net.lams() if hasattr(net, "lams") else []
    scalars |= {f"lambda/layer {layer}": lam for layer, lam in enumerate(lams, 1)}
    for name, value in scalars.items():
        writer.add_scalar(name, value, state.step)


def _writer(folder: Path, step: int) -> Any:
    """TensorBoard's, where it is installed; events after `step`, of a run that was killed, are taken back."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _diverged(record: DivergedRecord, folder: Path) -> str:
    return (
        f"loss {record.loss}, gradient {record.gradient_norm} at step {record.step}: training stopped, lower the"
        f" learning rate ({record.lr:g}); {folder / RECORD} has the record"
    )
