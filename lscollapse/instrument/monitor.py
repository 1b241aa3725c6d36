"""Rank collapse watched while a net trains: measures of every layer on a few fixed excerpts.

    MonitorCallback(ids).attach(trainer)                    # transformers.Trainer, in trainer.py
    Trainer(callbacks=[LightningMonitorCallback(ids)])      # Lightning's, in lightning.py
    values = monitor(model, ids, step=step)                 # a training loop of one's own

Nothing of the training changes by it: the measurement is a forward pass in eval mode without gradients, after which modes,
gradients and random numbers are as they were.

States, by the means over the excerpts, where a layer from the first block on has it lowest:

    collapsed   relative mu under 0.5 (core.table.COLLAPSED), or the rank-1 residual, which also sees rows going to +u and -u
    early       either of the two under 0.6: within 0.1 (core.table.RISE) of it

A layer whose longest row has more than 10 (core.table.MASSIVE) times the median norm is judged by directions: by angular mu and
the angular rank-1 residual in the place of the two, which that one row decides. A value that is NaN counts as collapsed.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.core.table import ANGULAR, COLLAPSED, MASSIVE, RISE, massive_words
from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.identity import layer_outputs
from lscollapse.models.adapt import adapt

EARLY = COLLAPSED + RISE
WATCHED = (*ANGULAR, *ANGULAR.values(), "row_norm_ratio", "longest_row")
STATES = ("healthy", "early", "collapsed")  # by the values 0, 1, 2 of `collapse`

log = logging.getLogger("lscollapse")


class Values(dict[str, float]):
    """What `monitor` measured; `warning` says in one line what is wrong with it, "" where nothing is."""

    warning: str = ""


def monitor(model: Any, ids: Any, step: int = 0) -> Values:
    """Relative mu, rank-1 residual, both of the directions, and the longest row of every layer, mean over the excerpts.

    Args:
        model: a transformers model of any architecture that `measure` takes, in training or eval mode.
        ids: token ids of a few excerpts, (excerpts, N); 4 of 128 tokens are enough.
        step: of the training, for the record.

    Returns:
        A dictionary: `step`; `relative_mu/00` .. `relative_mu/K` (two digits at least; 00 is the embedding) and the same for
        each of WATCHED, `longest_row` being the position of most excerpts; `collapse`: 0 healthy, 1 early warning, 2 collapsed
        (thresholds: see the module). Its attribute `warning` says in one line what is wrong, "" where nothing is.

    Raises:
        UnsupportedModel: no adapter for the architecture.
        ValueError: ids are not (excerpts, N) or fall outside the vocabulary.
    """
    model = uncompiled(model)
    with undisturbed(model):
        adapter = adapt(model)
        outputs = layer_outputs(adapter, checked_ids(adapter, ids))
    found = torch.stack([_measured(Y) for Y in outputs], 1)  # (measures, K + 1, excerpts)
    each = dict(zip(WATCHED, found, strict=True))
    curves = {name: of.mean(-1).tolist() for name, of in each.items()}
    curves["longest_row"] = each["longest_row"].mode(-1).values.tolist()
    values = Values(step=step)
    for name, curve in curves.items():
        values |= {f"{name}/{layer:02d}": value for layer, value in enumerate(curve)}
    massive = [layer for layer, ratio in enumerate(curves["row_norm_ratio"]) if layer > 0 and ratio > MASSIVE]
    lowest = [_lowest(curves, name, massive) for name in ANGULAR]
    over, near = (any(not value >= limit for _, _, value in lowest) for limit in (COLLAPSED, EARLY))
    values["collapse"] = int(over) + int(near)
    if near:
        values.warning = f"step {step:g}: {_words(lowest, over)}"
        if massive:
            ratio = max(curves["row_norm_ratio"][layer] for layer in massive)
            which = massive_words(massive, ratio, each["longest_row"][massive].flatten().tolist())
            values.warning += f"; {which}: judged by directions there"
    return values


def uncompiled(model: Any) -> Any:
    """The model itself where torch.compile wrapped it."""
    return getattr(model, "_orig_mod", model)


def _measured(Y: Tensor) -> Tensor:
    """Of one layer's output (excerpts, N, d) the measures WATCHED, (measures, excerpts)."""
    return torch.stack(list(measures.measure_all(Y, WATCHED).values())).cpu()


def _lowest(curves: dict[str, list[float]], name: str, massive: list[int]) -> tuple[str, int, float]:
    """What judged the layer from the first block on that has it lowest, that layer, and the value; NaN counts as lowest."""
    judges = [ANGULAR[name] if layer in massive else name for layer in range(len(curves[name]))]
    found = [(judge, layer, curves[judge][layer]) for layer, judge in enumerate(judges)]
    return min(found[1:], key=lambda one: one[2] if one[2] == one[2] else -1.0)


def _words(lowest: list[tuple[str, int, float]], over: bool) -> str:
    kind = "rank collapse" if over else "rank collapse is near"
    if any(value != value for _, _, value in lowest):
        kind = "values are no numbers, so that nothing can be said of rank collapse"
    found = ", ".join(f"{measure} {value:.3f} at layer {layer}" for measure, layer, value in lowest)
    return f"{kind}: lowest {found} (collapsed under {COLLAPSED:g}, warning under {EARLY:g})"


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


class Watch:
    """What the callbacks share: measures every so many steps, keeps the values, warns, calls you, says when to stop.

    Of several processes the first measures and the others hear from it, by torch.distributed, whether to stop.
    """

    def __init__(
        self,
        ids: Any,
        every: int = 100,
        file: str | Path | None = None,
        stop_at: str | None = None,
        on_collapse: Callable[[Values], Any] | None = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every}: give the number of steps between measurements, 1 or more")
        if stop_at not in (None, *STATES[1:]):
            raise ValueError(f"stop_at is {stop_at!r}: give {' or '.join(map(repr, STATES[1:]))}, or None to go on")
        if on_collapse is not None and not callable(on_collapse):
            raise ValueError(f"on_collapse is {on_collapse!r}: give a function of the values, or None")
        self.ids, self.every, self.stop_at, self.on_collapse = ids, every, stop_at, on_collapse
        self.file = None if file is None else Path(file)
        self.history: list[Values] = []
        self._state = self._step = 0  # of the last measurement

    def begin(self, model: Any, step: int, first: bool) -> bool:
        """Measures before the first step of a training; returns what `look` does."""
        self._state = 0
        if first:
            self._continue_file(step)
        return self.look(model, step, first)

    def due(self, step: int) -> bool:
        """Whether a multiple of `every` came since the last measurement: steps may go by two, or stand still."""
        return step // self.every > self._step // self.every

    def look(self, model: Any, step: int, first: bool) -> bool:
        """Measures in the first process; whether the training is to stop, in every process that asks at this step."""
        self._step = step
        if first:
            values, before = monitor(model, self.ids, step), self._state
            self._state = int(values["collapse"])
            self.history.append(values)
            self._write(values)
            if self._state > before:
                log.warning(values.warning)
            if self.on_collapse is not None and STATES[self._state] == "collapsed" != STATES[before]:
                self.on_collapse(values)
        if self.stop_at is None:
            return False
        return _of_the_first(first and self._state >= STATES.index(self.stop_at))

    def _write(self, values: Values) -> None:
        if self.file is None:
            return
        layers = [key.partition("/")[2] for key in values if key.startswith(f"{WATCHED[0]}/")]
        with self.file.open("a", encoding="utf-8", newline="") as handle:
            for layer in layers:
                line = (f"{values[f'{name}/{layer}']:.6g}" for name in WATCHED)
                csv.writer(handle).writerow((f"{values['step']:g}", int(layer), *line))

    def _continue_file(self, step: int) -> None:
        """Keep what the file holds of earlier steps of this training; columns that it had not are empty."""
        if self.file is None:
            return
        kept = []
        if step > 0 and self.file.is_file():
            with self.file.open(encoding="utf-8", newline="") as handle:
                kept = [line for line in csv.DictReader(handle) if int(line["step"]) < step]
        with self.file.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, ("step", "layer", *WATCHED))
            writer.writeheader()
            writer.writerows(kept)


def _of_the_first(flag: bool) -> bool:
    """What the first process of a training says, in all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    said = [flag]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]
