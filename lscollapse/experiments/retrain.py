"""S4D trained on images: the shipped net, Figure 4's, and the four arms of `ablate-s4d --retrain`, each trained as it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from lscollapse.core.config import Experiment, S4DTraining
from lscollapse.core.files import atomic, clear_partials, read_text, sha256_file, write_json, write_text
from lscollapse.core.lock import locked
from lscollapse.core.outside import parse_json
from lscollapse.core.progress import SILENT, Progress
from lscollapse.data import images
from lscollapse.data.examples import Data, Examples
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.nets.s4d import S4D, S4DConfig
from lscollapse.runs import processes
from lscollapse.runs.devices import device, training_workers
from lscollapse.runs.run import run
from lscollapse.runs.training import Outcome, Settings, evaluate, fit
from lscollapse.runs.training_state import LOG, STATE, Diverged, TrainingError

WEIGHTS, TRAINED = "model.safetensors", "training.json"  # the second is written last
ARMS = tuple(itertools.product((1.0, 0.0), (True, False)))  # lam, layernorm
KEPT_WHOLE = ("log_dt", "A_imag")  # float32 in a checkpoint: in half precision their product, a phase, would be off


def ablate_retrained(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """Figure 4 with each arm trained: skip x LayerNorm, four nets from the same seed, on the same held-out images.

    `config.retrain` says how they are trained. An arm whose training diverged is left out, and named. The nets are in
    `out`/nets, where a training that was killed continues, with their accuracies in arms.csv.
    """
    training, nets = config.retrain, out / "nets"
    name = f"s4d-{Path(training.data).name}-retrained"
    arms = [ArmToTrain(training, lam, norm, nets / _arm_name(lam, norm) / name, device(config)) for lam, norm in ARMS]
    found: dict[str, dict[str, Any]] = {}

    def keep(arm: ArmToTrain, line: dict[str, Any]) -> None:
        found[line["arm"]] = line
        progress.note(f"{line['arm']}: {line['note']}")
        progress.advance(1)

    progress.start(len(arms))
    with locked(nets):
        for folder in (nets, *(part for arm in arms for part in (arm.folder, arm.folder.parent))):
            clear_partials(folder)
        processes.map_items(train_arm, arms, on_result=keep, workers=training_workers(config))
        lines = [found[_arm_name(lam, norm)] for lam, norm in ARMS]
        write_text(nets / "arms.csv", pd.DataFrame(lines).to_csv(index=False))
    trained = [str(arm.folder) for arm, line in zip(arms, lines, strict=True) if line["test_accuracy"] is not None]
    if not trained:
        raise Diverged(f"no arm could be trained: lower retrain.lr ({training.lr:g})")
    return run("ablate-s4d", config.model_copy(update={"models": trained}), out, own_variant, progress)


def own_variant(adapter: Adapter, config: Experiment) -> list[Variant]:
    """The one variant of a net: the arm that it was trained as."""
    return [Variant(lam=adapter.config.lam, layernorm=adapter.config.layernorm)]


@dataclass(frozen=True)
class ArmToTrain:
    """One net to be trained; `folder` gets its checkpoint, the folder above it the state of the training."""

    training: S4DTraining
    lam: float
    layernorm: bool
    folder: Path
    device: str


def train_arm(arm: ArmToTrain) -> dict[str, Any]:
    """Train one arm and write its checkpoint: {arm, lam, layernorm, test_accuracy (None: diverged), steps, note}."""
    line: dict[str, Any] = {"arm": arm.folder.parent.name, "lam": arm.lam, "layernorm": arm.layernorm}
    try:
        state = arm.folder.parent
        outcome = train_net(arm.training, state, device=arm.device, lam=arm.lam, layernorm=arm.layernorm)
    except Diverged as error:
        return {**line, "test_accuracy": None, "steps": None, "note": str(error)}
    if not _is_exported(arm.folder):
        export(state, arm.folder)
    note = f"test accuracy {100 * outcome.accuracy:.1f} % after {outcome.steps} steps, {outcome.seconds:.0f} s"
    return {**line, "test_accuracy": outcome.accuracy, "steps": outcome.steps, "note": note}


def train_net(
    training: S4DTraining, folder: Path, progress: Progress = SILENT, device: str = "cpu", compiled: bool = False,
    **arm: Any,
) -> Outcome:  # fmt: skip
    """Train an S4D, or continue the training that `folder` holds; nothing is chosen by the test images' accuracy.

    Args:
        compiled: compile the layers; needs a C++ compiler.
        arm: `lam` and `layernorm` of the net.
    """
    train, test = images.read_images(training.data, "train"), images.read_images(training.data, "test")
    given = {"levels": train.levels, "channels": train.channels, "num_labels": train.n_labels, "data": training.data}
    net = untrained(S4DConfig.from_dict({**training.model, **given, **arm}), training.seed)
    if compiled:
        for layer in net.layers:
            layer.compile()
    settings = Settings(
        steps=training.epochs * (len(train.ids) // training.batch), betas=(0.9, 0.98),
        **training.model_dump(include={"batch", "lr", "weight_decay", "warmup", "seed", "save_every"}),
    )  # fmt: skip
    learnt, held_out = (Examples(part.ids, part.labels) for part in (train, test))
    data = Data(learnt, held_out, train.source, images.cropped if training.crops else None)
    return fit(net, data, settings, folder, progress, device)


def untrained(config: S4DConfig, seed: int) -> S4D:
    """The net that a seed draws."""
    torch.manual_seed(seed)
    return S4D(config)


def export(state_folder: Path, folder: Path) -> dict[str, Any]:
    """Write the checkpoint (half precision but for KEPT_WHOLE), its config and its training record, which is returned."""
    state = torch.load(state_folder / STATE, map_location="cpu", weights_only=True)
    settings = state["identity"]["settings"]
    net = untrained(S4DConfig.from_dict(state["identity"]["net"]), settings["seed"])
    train, test = images.read_images(net.config.data, "train"), images.read_images(net.config.data, "test")
    examples = Examples(test.ids, test.labels)
    before, _ = evaluate(net, examples, "cpu")
    tensors = {
        name: value.contiguous() if name.endswith(KEPT_WHOLE) else value.half().contiguous()
        for name, value in state["net"].items()
    }
    net.load_state_dict(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    write_json(folder / "config.json", net.config.to_dict())
    write_text(folder / "loss.csv", (state_folder / LOG).read_text(encoding="utf-8"))
    record = {
        "parameters": sum(value.numel() for value in tensors.values()),
        "data": train.source,
        "training_images": len(train.ids),
        "test_images": len(test.ids),
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "test_accuracy": {"trained": evaluate(net, examples, "cpu")[0], "untrained": before},
        **{name: settings[name] for name in ("batch", "lr", "weight_decay", "warmup", "seed")},
        "sha256": sha256_file(folder / WEIGHTS),
    }
    write_json(folder / TRAINED, record)
    return record


def _is_exported(folder: Path) -> bool:
    """Whether a checkpoint is there and is the one of which its training record tells."""
    try:
        record = parse_json(read_text(folder / TRAINED, TrainingError), TRAINED, TrainingError)
        return bool(record["sha256"] == sha256_file(folder / WEIGHTS))
    except (OSError, TrainingError, KeyError, TypeError):
        return False


def _arm_name(lam: float, layernorm: bool) -> str:
    return f"{'skip' if lam else 'no-skip'}-{'norm' if layernorm else 'no-norm'}"
