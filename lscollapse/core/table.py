"""The long table: its columns, their order, and the thresholds that everything that reads it shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # config.py reads thresholds from here, and --help is to load nothing heavy
    import pandas as pd

COLUMNS = (
    "model", "revision", "checkpoint_sha256", "init", "text", "tokenizer", "arm", "lam", "gating", "layernorm", "skip_site",
    "norm_site", "dtype", "backend", "seed", "excerpt", "n_tokens", "layer", "measure", "value", "log10", "status", "bound",
    "floor", "rounding",
)  # fmt: skip
# `status` of a value that is known: as it stands, up to its bound, or under the floor. Of one that is not, UNRESOLVED or LOST.
KNOWN = ("ok", "certified", "below_floor")
UNRESOLVED = "unresolved"  # rounding may have moved it by more than the tolerance
LOST = ("overflow", "nan")
STATUSES = (*KNOWN, UNRESOLVED, *LOST)
# In the order of a table's rows. What is no DEFAULT_MEASURES is measured where it is asked for.
MEASURES = (
    "mu", "relative_mu", "rank1_residual", "stable_rank", "mean_cosine", "dong_residual", "angular_mu",
    "angular_rank1_residual", "row_norm_ratio", "longest_row", "effective_rank",
)  # fmt: skip
OTHER_MEASURES = ("lm_loss", "grad_norm")  # that a run is asked for by a flag of their own
TRAINING_MEASURES = (
    "relative_mu", "rank1_residual", "lambda", "validation_accuracy", "validation_loss", "train_loss", "steps", "parameters",
    "test_accuracy",
)  # fmt: skip  # of Table 1
INITS = ("trained", "random")  # weights
DEFAULT_MEASURES = tuple(name for name in MEASURES if name not in ("angular_rank1_residual", "effective_rank"))
# Whatever is asked for: the rounding of others follows from the first two, and there is no verdict without the rest.
ALWAYS = ("relative_mu", "rank1_residual", "angular_mu", "row_norm_ratio", "longest_row")
# What is asked of the directions of the rows alone, in the place of what one long row can decide.
ANGULAR = {"relative_mu": "angular_mu", "rank1_residual": "angular_rank1_residual"}
POSITION = "longest_row"  # a number of which no mean is taken
# Measures of at most about 1, and the position, of which two values are compared as they stand; of others as a share of the value.
ABSOLUTE = (*ANGULAR, *ANGULAR.values(), "mean_cosine", "dong_residual", POSITION)
# That float32 leaves them open makes no arm run in float64: the gradient has none, and of rows that agree any may be the longest.
NOT_WIDENED = ("grad_norm", POSITION)
LOGARITHMIC = ("mu", "row_norm_ratio", "grad_norm")  # of any size: their `rounding` is that of `log10`
RESOLVE = 0.01  # the tolerance, where none is given
ORDER = ("subject", "variant", "layer", "measure", "excerpt")  # of the rows, whatever the work items were
PIXELS = "pixels"  # stands in the table where a text has its tokenizer
# Fixed before any run was judged. A layer counts as collapsed when its mean relative mu is under COLLAPSED: independent Gaussian
# rows have about 1, equal ones 0, and under one half the mean row alone makes more than three quarters of ||Y||^2. A curve rises
# (or drops) when it gains (or loses) at least RISE between two layers: some four standard deviations over excerpts, 0.02 to 0.03.
COLLAPSED, RISE = 0.5, 0.1
# A row is massive over MASSIVE times the median norm: one of 128 rows then has 44 % of ||Y||^2, so that it decides relative mu
# and the rank-1 residual nearly alone. The embedded models with their norms stay under 4, SmolLM2's first token has 167. Of N
# rows one of ratio q has q^2 / (q^2 + N - 1) where the others are alike: of 2,048 it has 44 % at 40.
MASSIVE = 10.0
# Where relative mu is over COLLAPSED and the rank-1 residual under LITTLE of it, one direction has more than three quarters of
# what relative mu counts as spread out: its square is at most 1 - r^2 / m^2 of it.
LITTLE = 0.5
# Of test accuracy (of 1), fixed before the grid was run: a smaller loss by learning lambda does not count. Six of the
# eight differences in the paper's Table 1, of which it says that learning does not affect the performance, are smaller.
MARGIN = 0.02
# Two figures agree where no mean differs by more: as it stands for ABSOLUTE measures, as a share of itself else. Another
# processor moves resolved values by less, and no figure and no number of three digits shows less.
AGREES = 1e-4


def chosen_measures(names: str | Sequence[str]) -> tuple[str, ...]:
    """The named measures, or "all", and those of ALWAYS, in the order of the table's rows.

    Raises:
        ValueError: no measure has such a name.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    if "all" in wanted:
        return MEASURES
    if unknown := sorted(map(str, wanted - set(MEASURES))):
        raise ValueError(
            f"unknown measure {unknown[0]!r}: give a list, [mu, stable_rank], of {', '.join(MEASURES)}; or all"
        )
    return tuple(name for name in MEASURES if name in wanted.union(ALWAYS))


def lambda_word(lam: float) -> str:
    """A lambda in plain text; NaN stands for a schedule, one for each layer."""
    return "per layer" if lam != lam else f"{lam:g}"


def known(rows: pd.DataFrame) -> pd.Series:
    """The values that are known, NaN where one is not."""
    return rows["value"].where(rows["status"].isin(KNOWN))


def known_ratio(rows: pd.DataFrame) -> pd.Series:
    """The same, but that an infinite `row_norm_ratio`, whose status is overflow, is known: the median row is zero."""
    infinite = rows["value"].eq(math.inf) & (rows["measure"] == "row_norm_ratio")
    return known(rows).mask(infinite, math.inf)


def reads_pixels(rows: pd.DataFrame) -> bool:
    """Whether every row of a table was measured on images."""
    return "tokenizer" in rows and set(rows["tokenizer"]) == {PIXELS}


def layer_words(layers: Sequence[int]) -> str:
    """Ascending layers in words, neighbours together: "layer 3", "layers 3 to 5 and 9"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    *before, last = (f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {' and '.join(filter(None, (', '.join(before), last)))}"


def times_words(ratio: float) -> str:
    """A ratio of norms in words: "170 times"."""
    many = "infinitely many" if math.isinf(ratio) else f"{ratio:,.0f}" if ratio < 1e6 else f"{ratio:.0e}"
    return f"{many} times"


def massive_words(layers: Sequence[int], ratio: float, positions: Iterable[float], unit: str = "token") -> str:
    """That one row is massive, and which: "token 0 has up to 170 times the median row norm at layers 11 to 27".

    Args:
        layers: where, ascending.
        ratio: the largest `row_norm_ratio` of these layers, each the mean over the excerpts; infinite where the median is zero.
        positions: `longest_row` of every excerpt at these layers; NaN where it is not known.
        unit: what a row is of.
    """
    places = list(positions)
    known_places = [int(place) for place in places if place == place]
    who = f"one {unit}"
    if known_places:
        ((place, times),) = Counter(known_places).most_common(1)
        if times == len(places):
            who = f"{unit} {place}"
        elif 2 * times > len(known_places):
            who += f" ({place} in {times} of {len(places)} outputs)"
        else:
            who += " (not the same in all outputs)"
    most = "up to " if len(layers) > 1 and math.isfinite(ratio) else ""
    return f"{who} has {most}{times_words(ratio)} the median row norm at {layer_words(layers)}"
