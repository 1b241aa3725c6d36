"""`lscollapse measure`: a model of the user's, as it is, and whether it collapses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from lscollapse.claims import COLLAPSED
from lscollapse.config import Experiment
from lscollapse.experiments import sweep_variants
from lscollapse.runs import SILENT, Progress, run

if TYPE_CHECKING:
    import pandas as pd

WORST = {"relative_mu": "min", "rank1_residual": "min", "stable_rank": "min", "mean_cosine": "max"}  # of a curve


class Arm(NamedTuple):
    """One variant of one model: a curve over layers 0..K, mean over excerpts, for each measure of WORST.

    `lost` is the layer from which on an excerpt's values left the dtype, None where none did; curves end before it.
    """

    model: str
    init: str
    arm: str
    lam: float
    dtype: str
    curves: dict[str, pd.Series]
    lost: int | None

    def worst(self, measure: str) -> tuple[float, int]:
        """The value nearest to collapse from layer 1 on (0 is the embedding), and its layer."""
        curve = self.curves[measure].iloc[1:]
        layers, values = curve.index.to_numpy(), curve.to_numpy()
        at = values.argmin() if WORST[measure] == "min" else values.argmax()
        return float(values[at]), int(layers[at])


def measure(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """The models of `config` at its lambdas, gate on unless `config.gating` is False; leaves the run folder `out`.

    Text is read in a model's own tokens unless `config.tokenizer` says otherwise, or a frozen source does.
    """
    if reads_own_tokens(config):
        config = config.model_copy(update={"tokenizer": "native"})
    config = config.model_copy(update={"gating": config.gating is not False})
    return run("measure", config, out, sweep_variants, progress)


def reads_own_tokens(config: Experiment) -> bool:
    """Whether `measure` gives the models text in their own tokens."""
    return config.tokenizer == "native" or (config.tokenizer is None and not _is_frozen(config.source))


def _is_frozen(source: str) -> bool:
    """Whether a source is a file of excerpts that are token ids already."""
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8") as lines:
        try:
            return "ids" in json.loads(next(lines, "{}"))
        except ValueError:
            return False  # the reader of the source says what is wrong with it


def arms(rows: pd.DataFrame) -> Iterator[Arm]:
    """Every variant of a table."""
    keys = ["model", "init", "arm", "lam", "dtype"]
    for key, part in rows.groupby(keys, sort=False, dropna=False):
        model, init, arm, lam, dtype = cast("tuple[str, str, str, float, str]", key)
        lost = part.loc[part["status"].isin(["overflow", "nan"]) & (part["measure"] == "relative_mu"), "layer"]
        end = int(lost.min()) if len(lost) else None
        held = part if end is None else part[part["layer"] < end]
        means = held.groupby(["measure", "layer"])["value"].mean()
        yield Arm(model, init, arm, lam, dtype, {name: means[name] for name in WORST}, end)


def verdict(arm: Arm) -> str:
    """Whether it collapses, by the threshold of claims.py on relative mu, with the numbers."""
    curve = arm.curves["relative_mu"].iloc[1:]
    if curve.empty:
        return f"its values leave {arm.dtype} in layer 1: nothing can be said"
    under = curve.index[curve < COLLAPSED]
    lowest, at = arm.worst("relative_mu")
    last, end = float(curve.iloc[-1]), int(curve.index[-1])
    if not len(under):
        text = f"does not collapse: relative mu stays over {COLLAPSED:g}; lowest {lowest:.3f} (layer {at}), last {last:.3f}"
    elif last >= COLLAPSED:
        text = f"falls under {COLLAPSED:g} and recovers: relative mu is lowest in layer {at} ({lowest:.3f}), last {last:.3f}"
    else:
        over = curve.index[curve >= COLLAPSED]
        since = int(over[-1]) + 1 if len(over) else 1
        text = (
            f"collapses: relative mu is under {COLLAPSED:g} from layer {since} on; lowest {lowest:.3f} (layer {at}),"
            f" last {last:.3f}"
        )
    if arm.lost is not None:
        text += f"; its values leave {arm.dtype} in layer {arm.lost}"
    rank1 = float(arm.curves["rank1_residual"][end])
    if last >= COLLAPSED and rank1 < last / 2:
        text += (
            f"; but the rank-1 residual of the last is {rank1:.3f}: one direction carries nearly everything (rows at +u and"
            " -u, or a few long rows), which relative mu does not see"
        )
    return text
