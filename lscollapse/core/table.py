"""The long table: its columns, their order, and the thresholds that everything that reads it shares."""

from __future__ import annotations

from collections.abc import Sequence
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
DEFAULT_MEASURES = tuple(name for name in MEASURES if name != "effective_rank")
ALWAYS = ("relative_mu", "rank1_residual")  # whatever is asked for: others and their rounding follow from them
# What is asked of the directions of the rows alone, in the place of what one long row can decide.
ANGULAR = {"relative_mu": "angular_mu", "rank1_residual": "angular_rank1_residual"}
# Measures of at most about 1, and the position, of which two values are compared as they stand; of others as a share of the value.
ABSOLUTE = (*ANGULAR, *ANGULAR.values(), "mean_cosine", "dong_residual", "longest_row")
# That float32 leaves them open makes no arm run in float64: the gradient has none, and of rows that agree any may be the longest.
NOT_WIDENED = ("grad_norm", "longest_row")
LOGARITHMIC = ("mu", "grad_norm")  # may leave the range of float64: their `rounding` is that of `log10`
RESOLVE = 0.01  # the tolerance, where none is given
ORDER = ("subject", "variant", "layer", "measure", "excerpt")  # of the rows, whatever the work items were
PIXELS = "pixels"  # stands in the table where a text has its tokenizer
# Fixed before any run was judged: a layer counts as collapsed when its mean relative mu is under COLLAPSED (iid Gaussian
# rows have about 1); a curve rises (or drops) when it gains (or loses) at least RISE between two layers.
COLLAPSED, RISE = 0.5, 0.1
# A row is massive from MASSIVE times the median norm on: with 128 rows it then has 44 % of ||Y||^2, so that it decides relative mu
# and the rank-1 residual nearly alone. The models here that have none stay under 4, SmolLM2's first token has 170.
MASSIVE = 10.0
MARGIN = 0.02  # of test accuracy (of 1): a smaller loss by learning lambda does not count
# Two figures agree where no mean differs by more: as it stands for ABSOLUTE measures, as a share of itself else.
AGREES = 1e-4


def chosen_measures(names: Sequence[str]) -> tuple[str, ...]:
    """The named measures and those of ALWAYS, in the order of the table's rows.

    Raises:
        ValueError: no measure has such a name.
    """
    unknown = sorted(set(names) - set(MEASURES))
    if unknown:
        raise ValueError(f"unknown measure {unknown[0]!r}: known are {', '.join(MEASURES)}")
    return tuple(name for name in MEASURES if name in {*names, *ALWAYS})


def lambda_word(lam: float) -> str:
    """A lambda in plain text; NaN stands for a schedule, one for each layer."""
    return "per layer" if lam != lam else f"{lam:g}"


def known(rows: pd.DataFrame) -> pd.Series:
    """The values that are known, NaN where one is not."""
    return rows["value"].where(rows["status"].isin(KNOWN))


def reads_pixels(rows: pd.DataFrame) -> bool:
    """Whether every row of a table was measured on images."""
    return "tokenizer" in rows and set(rows["tokenizer"]) == {PIXELS}
