"""Two folders of figures side by side, point by point: the files of numbers that `lscollapse figures` writes beside them.

A figure is compared where the second folder has it, for that is the one made now: what only the first has, because
another command makes it, is named and is no difference. Two means agree within AGREES.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lscollapse.core.files import first_line, read_text
from lscollapse.core.table import ABSOLUTE, AGREES, UNRESOLVED, lambda_word
from lscollapse.reports.figures.draw import drawn_in
from lscollapse.reports.figures.points import KEYS, FigureError
from lscollapse.reports.figures.quality import POINT

SIDE_BY_SIDE = ("relative_mu", "lm_loss")  # the columns of means of the figure of losses, which has no `measure`


@dataclass(frozen=True)
class Figures:
    """What differs between the figures of folders A and B.

    Attributes:
        lines: one for each figure of B, and one that names those that only A has.
        alike: whether A has every figure of B and all their points agree.
    """

    lines: list[str]
    alike: bool


def are_figures(a: Path, b: Path) -> bool:
    """Whether both folders hold figures, and not runs (whose figures lie in the run's folder).

    Raises:
        FigureError: one does and the other does not.
    """
    held = [not (folder / "manifest.json").exists() and bool(drawn_in(folder)) for folder in (a, b)]
    if any(held) and not all(held):
        ours, other = (a, b) if held[0] else (b, a)
        raise FigureError(
            f"{ours} holds figures and {other} does not: give two folders of figures, or of finished runs"
        )
    return all(held)


def compare_figures(a: Path, b: Path) -> Figures:
    """Compare the points of every figure that folder B has.

    Raises:
        FigureError: a file is damaged, or is not what `lscollapse figures` writes.
    """
    ours, theirs = drawn_in(a), drawn_in(b)
    lines, alike = [], True
    for name, file in theirs.items():
        line, same = _compared(_points(ours[name]), _points(file)) if name in ours else ("only in B", False)
        lines.append(f"{name}: {line}")
        alike &= same
    rest = [name for name in ours if name not in theirs]
    if rest:
        lines.append(f"only in A, not compared: {', '.join(rest)}")
    return Figures(lines, alike)


def _points(file: Path) -> pd.DataFrame:
    """KEYS, `mean` and `drawn` of every point of a figure; all text but lambda and mean."""
    text = read_text(file, FigureError)
    try:
        data = pd.read_csv(io.StringIO(text), dtype=dict.fromkeys((*KEYS, "drawn"), str))
        if "measure" not in data and {*POINT, *SIDE_BY_SIDE} <= set(data):
            data = data.melt([*POINT, "drawn"], list(SIDE_BY_SIDE), "measure", "mean").assign(layer="last")
            data["drawn"] = data["drawn"].replace({"True": "point", "False": "masked"})
        data = data[[*KEYS, "mean", "drawn"]].astype({"lam": float, "mean": float})
    except (ValueError, KeyError) as error:
        raise FigureError(f"{file} is not the points of a figure ({first_line(error)}): draw it again") from None
    if not text.endswith("\n") or data[["model", "measure", "drawn"]].isna().any(axis=None):
        raise FigureError(f"{file} is cut off or has cells missing: draw it again")
    if data.duplicated(list(KEYS)).any():
        raise FigureError(f"{file} has a point twice: draw it again")
    return data


def _compared(a: pd.DataFrame, b: pd.DataFrame) -> tuple[str, bool]:
    """The sentence about one figure, and whether it is the same."""
    points = a.merge(b, "outer", list(KEYS), suffixes=("_a", "_b"), indicator="side")
    unresolved = (points[["drawn_a", "drawn_b"]] == UNRESOLVED).any(axis=1)
    points = points[~unresolved]
    both = points[points["side"] == "both"]
    # A point on the floor is one at the most that it can be; a masked one is none.
    fates = both[(both["drawn_a"] == "masked") != (both["drawn_b"] == "masked")]
    steps = _steps(both).drop(fates.index)
    parts = [_differing(both, steps) if len(steps) else ""]
    if len(fates):
        how = f"{_name(fates)} ({fates['drawn_a'].iloc[0]}, now {fates['drawn_b'].iloc[0]})"
        parts.append(f"{len(fates)} of {_count(len(both))} drawn otherwise, such as {how}")
    for side, name in (("left_only", "A"), ("right_only", "B")):
        alone = points[points["side"] == side]
        parts.append(f"{_count(len(alone))} only in {name}, such as {_name(alone)}" if len(alone) else "")
    same = len(steps) == len(points) > 0 and bool((steps <= AGREES).all())
    if points.empty:
        parts.append("nothing to compare")
    if unresolved.any():
        parts.append(f"{_count(int(unresolved.sum()), 'unresolved ')} left out")
    return "; ".join(part for part in parts if part), same


def _steps(both: pd.DataFrame) -> pd.Series:
    """How far the means of each point are apart: 0 where neither is shown, infinite where one is no number."""
    a, b = both["mean_a"], both["mean_b"]
    with np.errstate(divide="ignore", invalid="ignore"):
        step = (b - a).abs()
        step = step.where(both["measure"].isin(ABSOLUTE), step / a.abs())
    hidden = both["drawn_a"].eq("masked") & both["drawn_b"].eq("masked")
    return step.mask((a == b) | hidden, 0.0).fillna(np.inf)


def _differing(both: pd.DataFrame, steps: pd.Series) -> str:
    """Where the means differ most, and in how many points; or that they agree."""
    over = int((steps > AGREES).sum())
    if not over:
        return f"agrees within {_tolerance()} ({_count(len(steps))})"
    worst = both.loc[[steps.idxmax()]]
    a, b, measure = worst[["mean_a", "mean_b", "measure"]].iloc[0]
    most = steps.max()
    far = f"{most:.2g}" if measure in ABSOLUTE else f"{100 * most:.2g} %"
    where = f"{_name(worst)} ({a:.5g}, now {b:.5g})"  # five digits show any difference over AGREES
    return f"differs by up to {far} at {where}, {over:,} of {_count(len(steps))} over {_tolerance()}"


def _name(points: pd.DataFrame) -> str:
    """The first point in words."""
    model, init, arm, lam, layer, measure = points[["model", "init", "arm", "lam", "layer", "measure"]].iloc[0]
    weights = " (random)" if init == "random" else ""
    return f"{model}{weights}, {arm}, lambda {lambda_word(lam)}, layer {layer}, {measure}"


def _count(number: int, kind: str = "") -> str:
    return f"{number:,} {kind}point{'s' * (number != 1)}"


def _tolerance() -> str:
    return np.format_float_scientific(AGREES, trim="-", exp_digits=1)
