"""What all that is printed shares: a console for sentences, a plain table, and how a lambda and a model are written."""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.table import Table


def plain_console() -> Console:
    """A console that prints sentences as they are: lines are not cut, numbers not coloured."""
    return Console(soft_wrap=True, highlight=False)


def plain_table(title: str | None, *headings: str, left: Collection[str] = (), right: Collection[str] = ()) -> Table:
    """A table without lines; the headings named in `right`, or all but those in `left`, stand above numbers."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right or (left and heading not in left) else "left")
    return table


def value_word(value: float) -> str:
    """A mean of a curve; NaN, which stands where rounding decides it, in a word."""
    return f"{value:.3f}" if value == value else "unresolved"


def model_word(model: str, init: str) -> str:
    """The name of a model, which says so where its weights are random."""
    return f"{model} (random)" if init == "random" else model
