"""Train S4D on pixel sequences. The defaults make s4d-digits, on one CPU core; a configuration gives other data.

    python scripts/train_s4d.py --out runs/s4d-digits
    python scripts/train_s4d.py --out runs/s4d-digits --export lscollapse/models/weights/s4d-digits
    python scripts/train_s4d.py --out runs/s4d-cifar10 --config configs/training/figure4.yaml

Killed and started again it continues from the last save and ends with the same weights, bit for bit. The exported folder
is a checkpoint that every command takes as --model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor

from lscollapse.nets.s4d import S4D, S4DConfig
from lscollapse.tasks import images

KEPT_WHOLE = (
    "log_dt",
    "A_imag",
)  # float32 in the exported file: in half precision their product, a phase, would be off


@dataclass(frozen=True)
class Training:
    """What decides the weights. `model` has fields of S4DConfig other than those that follow from the data."""

    data: str = "digits"
    epochs: int = 16
    batch: int = 24
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # part of all steps
    seed: int = 0
    save_every: int = 30  # steps
    model: dict[str, Any] = field(default_factory=dict)


def initial(training: Training, train: images.Images) -> S4D:
    given = {"levels": train.levels, "channels": train.channels, "num_labels": train.n_labels, "data": training.data}
    config = S4DConfig.from_dict({**training.model, **given})
    torch.manual_seed(training.seed)
    return S4D(config)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Relative to the peak: linear warm-up, then a cosine to zero."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def batch_rows(n_images: int, training: Training, step: int) -> np.ndarray:
    """Which images step `step` sees: a new order every epoch; images that fill no batch wait for the next epoch."""
    per_epoch = n_images // training.batch
    epoch, number = divmod(step, per_epoch)
    order = np.random.default_rng([training.seed, epoch]).permutation(n_images)
    return order[number * training.batch : (number + 1) * training.batch]


@torch.no_grad()
def accuracy(model: S4D, split: images.Images, device: str, batch: int = 64) -> float:
    model.eval()
    right = 0
    for first in range(0, len(split.ids), batch):
        logits = model(torch.from_numpy(split.ids[first : first + batch]).to(device))
        right += int((logits.argmax(1).cpu() == torch.from_numpy(split.labels[first : first + batch])).sum())
    model.train()
    return right / len(split.ids)


def save_atomic(state: object, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(
    training: Training, out: Path, device: str = "cpu", compiled: bool = False, report: Callable[[str], None] = print
) -> None:
    """Train, or continue the training that `out` holds; `report` gets a line an epoch."""
    out.mkdir(parents=True, exist_ok=True)
    train_split, test_split = images.load(training.data, "train"), images.load(training.data, "test")
    model = initial(training, train_split).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(training.lr, training.weight_decay), betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    file, log = out / "state.pt", out / "loss.csv"
    step, spent, losses, lines = 0, 0.0, [], ["step,seconds,train_loss,test_accuracy"]
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["training"] != asdict(training):
            raise SystemExit(f"{file} was trained with other settings {state['training']}: use another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, losses, lines = state["step"], state["seconds"], state["losses"], state["log"]
        report(f"continuing at step {step}")
    if compiled:
        for layer in model.layers:
            layer.compile()
    per_epoch = len(train_split.ids) // training.batch
    steps = training.epochs * per_epoch
    began = time.monotonic() - spent
    while step < steps:
        rows = batch_rows(len(train_split.ids), training, step)
        ids, labels = (torch.from_numpy(a[rows]).to(device) for a in (train_split.ids, train_split.labels))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, steps, training.warmup)
        torch.manual_seed(training.seed * 1_000_003 + step)  # dropout of this step, the same in a continued run
        loss = update(model, optimizer, ids, labels)
        losses.append(loss)
        step += 1
        if not math.isfinite(loss):
            raise SystemExit(f"loss is {loss} at step {step}: lower lr")
        spent = time.monotonic() - began
        if step % per_epoch == 0 or step == steps:
            correct = accuracy(model, test_split, device)
            lines.append(f"{step},{spent:.0f},{sum(losses) / len(losses):.4f},{correct:.4f}")
            losses.clear()
            report(lines[-1])
        if step % training.save_every == 0 or step == steps:
            log.write_text("\n".join(lines) + "\n")
            save_atomic(
                {
                    "training": asdict(training),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": spent,
                    "losses": losses,
                    "log": lines,
                },
                file,
            )


def update(model: S4D, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> float:
    loss = F.cross_entropy(model(ids), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def export(out: Path, folder: Path) -> None:
    """Write the checkpoint (half precision but for KEPT_WHOLE), its config and its training record."""
    state = torch.load(out / "state.pt", weights_only=True)
    training = Training(**state["training"])
    train_split, test_split = images.load(training.data, "train"), images.load(training.data, "test")
    model = initial(training, train_split)
    untrained = accuracy(model, test_split, "cpu")
    tensors = {
        name: value.cpu().contiguous() if name.endswith(KEPT_WHOLE) else value.cpu().half().contiguous()
        for name, value in state["model"].items()
    }
    model.load_state_dict(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    record = {
        "parameters": sum(value.numel() for value in tensors.values()),
        "data": train_split.source,
        "training_images": len(train_split.ids),
        "test_images": len(test_split.ids),
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "test_accuracy": {"trained": accuracy(model, test_split, "cpu"), "untrained": untrained},
        **{key: value for key, value in asdict(training).items() if key not in ("data", "model", "save_every")},
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "loss.csv").write_text("\n".join(state["log"]) + "\n")
    print(json.dumps(record, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the training state and the loss curve")
    parser.add_argument("--export", type=Path, help="write the checkpoint here instead of training")
    parser.add_argument("--config", type=Path, help="YAML file with fields of Training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="needs a C++ compiler")
    args = parser.parse_args()
    if args.export:
        return export(args.out, args.export)
    values = yaml.safe_load(args.config.read_text()) if args.config else {}
    train(Training(**values), args.out, args.device, args.compile, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
