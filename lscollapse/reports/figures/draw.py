"""The rows of an experiment -> all its figures, saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from lscollapse.core.progress import SILENT, Progress
from lscollapse.reports.figures import style
from lscollapse.reports.figures.paper import figure1, figure2, figure3, figure4, figure_readings
from lscollapse.reports.figures.points import FigureError, with_columns
from lscollapse.reports.figures.quality import figure_quality
from lscollapse.reports.figures.wording import embedded_note


class Drawing(NamedTuple):
    """One kind of figure: `draw` gives it and the numbers that it plots.

    Attributes:
        stem: of the files' names.
        experiments: whose rows it is drawn of.
        each: a figure for each model, given as `model`; else one of all.
        takes: which of `yscale` and `measure` are parameters of `draw`.
        wanted: the models of a table that it shows; a figure without any is not drawn.
    """

    stem: str
    experiments: tuple[str, ...]
    draw: Callable[..., tuple[Figure, pd.DataFrame]]
    each: bool = True
    takes: tuple[str, ...] = ()
    wanted: Callable[[pd.DataFrame, list[str]], list[str]] = lambda _rows, models: models


def _swept(rows: pd.DataFrame, models: list[str]) -> list[str]:
    return models if rows["lam"].nunique() > 1 else []


def _scored(rows: pd.DataFrame, models: list[str]) -> list[str]:
    return [model for model in models if (rows.loc[rows["model"] == model, "measure"] == "lm_loss").any()]


PAPERS = "relative_mu"  # the measure of the paper's figures
SWEEPS = ("sweep-lambda", "measure")
DRAWINGS = (
    Drawing("figure1", SWEEPS, figure1, takes=("yscale", "measure")),
    Drawing("figure2", SWEEPS, figure2, each=False, takes=("yscale",), wanted=_swept),
    Drawing("quality", SWEEPS, figure_quality, each=False, wanted=_scored),
    Drawing("figure3", ("ablate-gating",), figure3, takes=("measure",)),
    Drawing("figure4", ("ablate-s4d",), figure4),
    Drawing("readings", ("all-readings",), figure_readings),
)
READINGS_VERDICTS = "readings-verdicts.csv"  # beside the figure of readings, and none itself


def draw(
    experiment: str,
    rows: pd.DataFrame,
    folder: str | Path,
    yscale: str = "linear",
    measure: str = PAPERS,
    aside: str = "",
    progress: Progress = SILENT,
) -> list[Path]:
    """Save the figures of one experiment, those of DRAWINGS; of another measure than the paper's those that show it.

    Of a figure for each model, the first model with a gate (else the first) gives figure1, another one figure1-NAME; of
    angular mu figure1-angular and figure1-angular-NAME. `aside` ends every caption. Raises FigureError for an experiment without figures.
    """
    offered = [drawing for drawing in DRAWINGS if measure == PAPERS or "measure" in drawing.takes]
    drawings = [drawing for drawing in offered if experiment in drawing.experiments]
    if not drawings:
        known = ", ".join(dict.fromkeys(name for drawing in offered for name in drawing.experiments))
        of_measure = "" if measure == PAPERS else f" of {measure}"
        raise FigureError(f"no figure{of_measure} is drawn of {experiment!r}: only of {known}")
    rows = with_columns(rows)
    models = list(dict.fromkeys([*rows["model"][rows["gating"].notna()], *rows["model"]]))
    stems = {model: "" if model == models[0] else "-" + re.sub(r"[^\w.-]+", "_", model) for model in models}

    def note(shown: list[str]) -> str:
        return " ".join(filter(None, (embedded_note(shown), aside)))

    plans: list[tuple[str, Callable[[], tuple[Figure, pd.DataFrame]]]] = []
    for drawing in drawings:
        options = {name: {"yscale": yscale, "measure": measure}[name] for name in drawing.takes}
        stem = drawing.stem + ("" if measure == PAPERS else f"-{measure.removesuffix('_mu')}")
        shown = drawing.wanted(rows, models)
        if drawing.each:
            for model in shown:
                made = partial(drawing.draw, rows, model=model, note=note([model]), **options)
                plans.append((stem + stems[model], made))
        elif shown:
            plans.append((stem, partial(drawing.draw, rows, note=note(shown), **options)))
    progress.start(len(plans))
    written = []
    for name, figure_of in plans:
        written += style.save(*figure_of(), folder, name)
        progress.advance(1)
    return written


def drawn_in(folder: Path) -> dict[str, Path]:
    """The files of points beside the figures in a folder, by the figure's name, in the order of DRAWINGS."""
    found: dict[str, Path] = {}
    for drawing in DRAWINGS:
        others = sorted(folder.glob(f"{drawing.stem}-*.csv")) if drawing.each else []
        files = (folder / f"{drawing.stem}.csv", *others)
        found |= {file.stem: file for file in files if file.is_file() and file.name != READINGS_VERDICTS}
    return found
