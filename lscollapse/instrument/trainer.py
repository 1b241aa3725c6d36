"""Rank collapse watched by a callback of transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lscollapse.instrument.monitor import Watch


class MonitorCallback(Watch, TrainerCallback):
    """Measures before the first step and every so many steps, logs, and warns when the net comes near to collapse.

    The values go into the Trainer's log (state.log_history, and so TensorBoard, W&B and the console), which a measurement
    makes it write, into a CSV if one is asked for, and into `history`. A warning is logged when the state gets worse, to
    the logger "lscollapse". Of several processes the first measures, and all stop together; weights must be whole in it (no
    FSDP, no ZeRO-3).

    Args:
        ids: as for `monitor`.
        every: steps between measurements.
        file: CSV with the columns step, layer and the measures; a training that goes on continues it.
        stop_at: "early" or "collapsed": the training ends at the first measurement with that state or a worse one. Where that
            is the one before the first step, the Trainer takes at most one step.
        on_collapse: your function of the values, called in the first process, after they were written, by a measurement
            that finds the net collapsed where the one before did not; the first of a training too. What it raises ends the
            training.
    """

    _logged = 0  # how many values of `history` the Trainer's log is done with

    def attach(self, trainer: Trainer) -> MonitorCallback:
        """Make it the first callback: those that come before it, as those of `report_to` would, do not see its values."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.begin(kwargs["model"], state.global_step, state.is_world_process_zero):
            control.should_training_stop = True
        self._logged = len(self.history)  # the Trainer has no log yet

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.due(state.global_step):
            if self.look(kwargs["model"], state.global_step, state.is_world_process_zero):
                control.should_training_stop = True
            control.should_log = True  # in every process: to log, they add up their losses

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for values in self.history[self._logged :]:
            found = {key: value for key, value in values.items() if key != "step"}
            kwargs["logs"].update(found)
            state.log_history[-1].update(found)
        self._logged = len(self.history)
