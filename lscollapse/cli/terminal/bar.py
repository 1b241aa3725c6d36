"""A progress bar with an ETA."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lscollapse.core.outside import plain


class Bar:
    """A core.progress.Progress on the terminal; off a terminal it prints notes only. `what` is done meanwhile."""

    def __init__(self, what: str = "measuring") -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not sys.stderr.isatty())
        self.task: TaskID | None = None

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, message: str) -> None:
        self.console.print(plain(message), markup=False, highlight=False)

    def start(self, total: float) -> None:
        self.task = self.progress.add_task("", total=total)

    def grow(self, amount: float) -> None:
        if self.task is not None:
            self.progress.update(self.task, total=(self.progress.tasks[0].total or 0.0) + amount)

    def advance(self, amount: float) -> None:
        if self.task is not None:
            self.progress.advance(self.task, amount)
