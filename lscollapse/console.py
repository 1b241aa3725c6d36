"""What the command line shows: a progress bar with an ETA, and small tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


class Bar:
    """An experiments.Progress on the terminal; off a terminal it prints notes only."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        columns = (TextColumn("measuring"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not sys.stderr.isatty())
        self.task: TaskID | None = None

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def start(self, total: float) -> None:
        self.task = self.progress.add_task("", total=total)

    def advance(self, amount: float) -> None:
        if self.task is not None:
            self.progress.advance(self.task, amount)


def last_layer_table(rows: pd.DataFrame) -> None:
    """Print the mean last-layer relative mu of every model and arm (lines) and lambda (columns)."""
    last = rows[(rows["measure"] == "relative_mu") & (rows["layer"] == rows.groupby("model")["layer"].transform("max"))]
    last = last.assign(lam=last["lam"].map("{:g}".format), subject=last["model"] + (last["init"] == "random").map({True: " (random)", False: ""}))
    lams = sorted(last["lam"].unique(), key=lambda text: (text == "nan", float(text)))
    means = last.groupby(["subject", "arm", "lam"], sort=False)["value"].mean()
    table = Table(title="last-layer relative mu, mean over excerpts", box=box.SIMPLE, title_justify="left")
    table.add_column("model")
    table.add_column("arm")
    for lam in lams:
        table.add_column("per layer" if lam == "nan" else lam, justify="right", no_wrap=True)
    for subject, arm in dict.fromkeys(zip(last["subject"], last["arm"], strict=True)):
        table.add_row(subject, arm, *(f"{means.get((subject, arm, lam), float('nan')):.3f}" for lam in lams))
    Console().print(table)


def models_table() -> None:
    """Print the registry."""
    from lscollapse.models.registry import ENTRIES

    table = Table(box=box.SIMPLE)
    for heading in ("name", "architecture", "parameters", "weights from", "reads"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "parameters" else "left")
    for entry in ENTRIES.values():
        where = f"embedded: {entry.location}" if entry.embedded else f"hub: {entry.location}"
        table.add_row(entry.name, entry.architecture, f"{entry.n_parameters:,}" if entry.n_parameters else "-", where, entry.text)
    Console().print(table)
    print("Any hub id or local folder of these architectures works too.")
