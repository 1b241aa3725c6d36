"""The verbs that look at what is there: `claims`, `compare`, `report`, and `doctor` at the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lscollapse.cli.options import Edited, takes, within
from lscollapse.core.config import Experiment


def claims(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs, `theory verify` or `theory bound`.")] = None,
    theory: Annotated[bool, typer.Option("--theory", help="Put the theory's statements to the test now (20 s).")] = False,
    form: Annotated[Literal["text", "markdown", "csv", "json"], typer.Option("--format", help="How to print it.")] = "text",
    edited: Edited = False,
) -> None:  # fmt: skip
    """The paper's sentences one by one: agrees, disagrees or not measured, with the numbers. Without a run: the list of them."""
    from lscollapse.cli.terminal.results import show_claims, show_sentences, tell_edited
    from lscollapse.reports.claims.sentences import judged, sentences

    if runs or theory:
        show_claims(judged(runs or [], theory, not edited), form)
        tell_edited(runs or [])
    else:
        show_sentences(sentences(), form)


def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a finished run, or of figures.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of another.")],
    lines: Annotated[
        int,
        typer.Option(help="How many of the largest differences between runs to show.", callback=within(0, 10**6)),
    ] = 12,
    edited: Edited = False,
) -> None:
    """What differs between two runs: configuration, versions, numbers; exit 1 where it is more than the spread over excerpts.

    Of two folders of figures: a line for each figure of the second; exit 1 where one is missing or a point differs.
    """
    from lscollapse.cli.terminal.results import show_comparison, show_figures
    from lscollapse.reports import compare, compare_figures

    if compare_figures.are_figures(run_a, run_b):
        figures = compare_figures.compare_figures(run_a, run_b)
        show_figures(figures)
        alike = figures.alike
    else:
        comparison = compare.compare(run_a, run_b, not edited)
        show_comparison(comparison, lines)
        alike = comparison.alike
    if not alike:
        raise typer.Exit(1)


@takes("config", "models", "settings")
def doctor(experiment: Experiment) -> None:
    """What this machine has, and whether the configuration can run on it; exit 1, with the mend, where it cannot."""
    from lscollapse.cli.terminal.results import show_checks
    from lscollapse.runs.doctor import examine

    found = examine(experiment)
    show_checks(found)
    if any(check.mend for check in found):
        raise typer.Exit(1)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, `theory verify` or `theory bound`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    edited: Edited = False,
) -> None:
    """One self-contained page of these runs: interactive figures, the paper's sentences judged, provenance, bounds, warnings."""
    from lscollapse.cli.terminal.results import tell_edited
    from lscollapse.reports.page.page import write

    typer.echo(f"wrote {write(runs, out, not edited)}")
    tell_edited(runs)
