"""`lscollapse measure`: a model of the user's, as it is, and whether it collapses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lscollapse.core.config import Experiment
from lscollapse.core.progress import SILENT, Progress
from lscollapse.data.corpus import is_frozen
from lscollapse.experiments.paper import sweep_variants
from lscollapse.runs.run import run


def measure_own(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """The models of `config` at its lambdas, gate on unless `config.gating` is False; leaves the run folder `out`.

    Text is read in a model's own tokens unless `config.tokenizer` says otherwise, or a frozen source does.
    """
    if reads_own_tokens(config):
        config = config.model_copy(update={"tokenizer": "native"})
    config = config.model_copy(update={"gating": config.gating is not False})
    return run("measure", config, out, sweep_variants, progress)


def reads_own_tokens(config: Experiment) -> bool:
    """Whether `measure` gives the models text in their own tokens."""
    return config.tokenizer == "native" or (config.tokenizer is None and not is_frozen(config.source))
