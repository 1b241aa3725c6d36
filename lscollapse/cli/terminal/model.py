"""What `measure` shows on the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pandas as pd
from rich.table import Table

from lscollapse.cli.terminal.printing import model_word, plain_console, plain_table, value_word
from lscollapse.core.table import lambda_word, reads_pixels
from lscollapse.models.adapters.generic import BACKEND
from lscollapse.reports.figures.wording import describe
from lscollapse.reports.verdict import ArmCurves, arms, verdict


def show(rows: pd.DataFrame, own_tokens: bool) -> None:
    """Print what was read, first, worst and last value of every measure, and the verdict on each variant."""
    console = plain_console()
    console.print(describe(rows), markup=False)
    if not reads_pixels(rows):
        tokens = ", ".join(rows["tokenizer"].unique())
        aside = " (the model's own; the paper feeds every model BERT's: --tokenizer bert)"
        console.print(f"Tokens: {tokens}{aside if own_tokens and tokens != 'bert-base-uncased' else ''}.", markup=False)
    if rows["backend"].str.startswith(BACKEND).any():
        console.print("No adapter of its own: blocks and residual sums were found, and tested on these excerpts.")
    found = list(arms(rows))
    for title, own in itertools.groupby(found, _title):
        console.print(_table(title, own))
    for arm in found:
        console.print(f"{_title(arm)}, lambda {lambda_word(arm.lam)}: {verdict(arm)}", markup=False)


def _table(title: str, arms: Iterable[ArmCurves]) -> Table:
    headings = ("lambda", "measure", "embedding", "worst", "layer", "last")
    table = plain_table(f"{title}: mean over excerpts", *headings, left=("measure",))
    for arm in arms:
        lam = lambda_word(arm.lam)
        for measure, curve in arm.curves.items():
            first = value_word(curve.iloc[0]) if len(curve) else "-"
            worst = arm.worst(measure)
            value, layer = ("-", "-") if worst is None else (f"{worst[0]:.3f}", str(worst[1]))
            zero = len(curve) and curve.index[-1] in arm.undefined[measure]
            last = "missing" if arm.lost else "undefined" if zero else value_word(curve.iloc[-1])
            table.add_row(lam, measure.replace("_", " "), first, value, layer, last)
            lam = ""
    return table


def _title(arm: ArmCurves) -> str:
    return f"{model_word(arm.model, arm.init)}, {arm.arm}"
