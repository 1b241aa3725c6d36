"""Rank collapse watched by a callback of Lightning's Trainer, of the package lightning or pytorch_lightning."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import PreTrainedModel

from lscollapse.instrument.monitor import Watch, uncompiled


def _bases() -> tuple[type, ...]:
    """The Callback of each of Lightning's two names that is installed: a Trainer takes that of its own name only."""
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(import_module(package).Callback)
        except ModuleNotFoundError as error:
            missing = error
    if not found:
        raise ImportError(f"LightningMonitorCallback needs Lightning 2: pip install lightning ({missing})")
    return tuple(found)


class LightningMonitorCallback(Watch, *_bases()):  # type: ignore[misc]  # they may be missing
    """MonitorCallback for Lightning: before the first step and every so many, into the loggers of its Trainer.

    Args:
        ids, every, file, stop_at, on_collapse: as for MonitorCallback; `every` counts the Trainer's `global_step`, which is also
            the step of the loggers. A training that is stopped before the first step takes none; `min_steps` and `min_epochs`
            of the Trainer come first.
        model: where the LightningModule holds the transformers model, "net" or "student.net"; by default its only attribute
            that is one.

    Raises:
        ValueError: none of its attributes is a transformers model, or several are, or it has none of that name.
    """

    def __init__(self, *args: Any, model: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model = model

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        stop = self.begin(self._watched(pl_module), trainer.global_step, trainer.is_global_zero)
        self._hand_on(trainer, stop)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.due(trainer.global_step):
            stop = self.look(self._watched(pl_module), trainer.global_step, trainer.is_global_zero)
            self._hand_on(trainer, stop)

    def _hand_on(self, trainer: Any, stop: bool) -> None:
        """What was found to the loggers themselves: `pl_module.log` would wait for the Trainer's `log_every_n_steps`."""
        trainer.should_stop = trainer.should_stop or stop
        if trainer.is_global_zero:
            found = {key: value for key, value in self.history[-1].items() if key != "step"}
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)

    def _watched(self, module: Any) -> Any:
        kind = type(module).__name__
        if self.model is not None:
            try:
                return module.get_submodule(self.model)
            except AttributeError:
                raise ValueError(f"{kind} has no module {self.model!r}: say where its model is by model=") from None
        models = [name for name, child in module.named_children() if isinstance(uncompiled(child), PreTrainedModel)]
        if len(models) != 1:
            which = ", ".join(models) or "none"
            raise ValueError(
                f"{kind} has not one attribute that is a transformers model, but {which}: say where it is by model="
            )
        return getattr(module, models[0])
