"""Rank collapse watched while a net trains: relative mu and rank-1 residual of every layer on a few fixed excerpts.

    MonitorCallback(ids).attach(trainer)         # transformers.Trainer
    values = monitor(model, ids, step=step)      # a training loop of one's own

Nothing of the training changes by it: the measurement is a forward pass in eval mode without gradients, after which modes,
gradients and random numbers are as they were.

Warnings, on the mean over the excerpts, where a layer from the first block on has it lowest:

    collapsed   relative mu under 0.5 (core.table.COLLAPSED), or the rank-1 residual, which also sees rows going to +u and -u
    early       either of the two under 0.6: within 0.1 (core.table.RISE) of it
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lscollapse import measures
from lscollapse.core.table import COLLAPSED, RISE
from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.identity import layer_outputs
from lscollapse.models.adapt import adapt

EARLY = COLLAPSED + RISE
WATCHED = ("relative_mu", "rank1_residual")
HEALTHY, WARNED, OVER = 0, 1, 2  # values of `collapse`

log = logging.getLogger("lscollapse")


def monitor(model: Any, ids: Any, step: int = 0) -> dict[str, float]:
    """Relative mu and rank-1 residual of every layer, mean over the excerpts.

    Args:
        model: a transformers model of any architecture that `measure` takes, in training or eval mode.
        ids: token ids of a few excerpts, (excerpts, N); 4 of 128 tokens are enough.
        step: of the training, for the record.

    Returns:
        `step`; `relative_mu/00` .. `relative_mu/K` and `rank1_residual/00` .. (two digits at least; 00 is the embedding);
        `collapse`: 0 healthy, 1 early warning, 2 collapsed (thresholds: see the module).

    Raises:
        UnsupportedModel: no adapter for the architecture.
        ValueError: ids are not (excerpts, N) or fall outside the vocabulary.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    with undisturbed(model):
        adapter = adapt(model)
        outputs = layer_outputs(adapter, checked_ids(adapter, ids))
    values: dict[str, float] = {"step": step}
    for name in WATCHED:
        measure = getattr(measures, name)
        values |= {f"{name}/{layer:02d}": float(measure(Y).mean()) for layer, Y in enumerate(outputs)}
    lowest = min(value for _, value in (worst(values, name) for name in WATCHED))
    values["collapse"] = OVER if not lowest >= COLLAPSED else WARNED if lowest < EARLY else HEALTHY
    return values


def worst(values: dict[str, float], measure: str) -> tuple[int, float]:
    """The layer from the first block on that has the lowest value of a measure, and that value; NaN counts as lowest."""
    layers = {int(key.partition("/")[2]): value for key, value in values.items() if key.startswith(f"{measure}/")}
    layer = min((k for k in layers if k > 0), key=lambda k: layers[k] if layers[k] == layers[k] else -1.0)
    return layer, layers[layer]


def warning(values: dict[str, float]) -> str:
    """What `monitor` found wrong, in one line; "" where all is well."""
    if values["collapse"] == HEALTHY:
        return ""
    lowest = {name: worst(values, name) for name in WATCHED}
    missing = any(value != value for _, value in lowest.values())
    kind = "rank collapse" if values["collapse"] == OVER else "rank collapse is near"
    kind = "values are not finite, so that nothing can be said of rank collapse" if missing else kind
    found = ", ".join(f"{name} {value:.3f} at layer {layer}" for name, (layer, value) in lowest.items())
    return f"step {values['step']:g}: {kind}: lowest {found} (collapsed under {COLLAPSED:g}, warning under {EARLY:g})"


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Eval mode without gradients; then every module's mode and torch's random numbers are as they were."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class MonitorCallback(TrainerCallback):
    """Measures before the first step and every so many steps, logs, and warns when the net comes near to collapse.

    The values go into the Trainer's log (state.log_history, and so TensorBoard, W&B and the console), which a measurement
    makes it write, into a CSV if one is asked for, and into `history`. A warning is logged when the state gets worse, to
    the logger "lscollapse". Of several processes the first measures; weights must be whole in it (no FSDP, no ZeRO-3).

    Args:
        ids: as for `monitor`.
        every: steps between measurements.
        file: CSV with the columns step, layer, relative_mu, rank1_residual; a training that goes on continues it.
    """

    def __init__(self, ids: Any, every: int = 100, file: str | Path | None = None) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: give the number of steps between measurements, 1 or more")
        self.ids, self.every = ids, every
        self.file = None if file is None else Path(file)
        self.history: list[dict[str, float]] = []
        self._unlogged: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> MonitorCallback:
        """Make it the first callback: those that come before it, as those of `report_to` would, do not see its values."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._continue_file(state.global_step)
            self._measure(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step % self.every == 0:
            values = self._measure(kwargs["model"], state.global_step)
            self._unlogged = {key: value for key, value in values.items() if key != "step"}
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kwargs["logs"].update(self._unlogged)
        state.log_history[-1].update(self._unlogged)
        self._unlogged = {}

    def _measure(self, model: Any, step: int) -> dict[str, float]:
        values = monitor(model, self.ids, step)
        before = self.history[-1]["collapse"] if self.history else HEALTHY
        self.history.append(values)
        if values["collapse"] > before:
            log.warning(warning(values))
        if self.file is not None:
            with self.file.open("a", encoding="utf-8", newline="") as handle:
                csv.writer(handle).writerows(_lines(values))
        return values

    def _continue_file(self, step: int) -> None:
        """Keep what the file holds of earlier steps of this training."""
        if self.file is None:
            return
        kept = []
        if step > 0 and self.file.is_file():
            with self.file.open(encoding="utf-8", newline="") as handle:
                kept = [line for line in list(csv.reader(handle))[1:] if int(line[0]) < step]
        with self.file.open("w", encoding="utf-8", newline="") as handle:
            csv.writer(handle).writerows([("step", "layer", *WATCHED), *kept])


def _lines(values: dict[str, float]) -> Iterator[tuple[str, ...]]:
    layers = [key.partition("/")[2] for key in values if key.startswith("relative_mu/")]
    for layer in layers:
        yield f"{values['step']:g}", str(int(layer)), *(f"{values[f'{name}/{layer}']:.6g}" for name in WATCHED)
