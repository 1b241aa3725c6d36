"""The verbs that look at what is there: `claims`, `compare`, `doctor`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How a table is printed."""

    text = "text"
    markdown = "markdown"
    csv = "csv"
    json = "json"


def claims(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs, `theory verify` or `theory bound`.")] = None,
    theory: Annotated[bool, typer.Option("--theory", help="Put the theory's statements to the test now (20 s).")] = False,
    form: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.text,
) -> None:  # fmt: skip
    """The paper's sentences one by one: agrees, disagrees or not measured, with the numbers. Without a run: the list of them."""
    from lscollapse.cli.terminal import results as console_look
    from lscollapse.reports.claims.sentences import judged, sentences

    if runs or theory:
        console_look.show_claims(judged(runs or [], theory), form)
    else:
        console_look.show_sentences(sentences(), form)


def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of another.")],
    lines: Annotated[int, typer.Option(min=0, help="How many of the largest differences to show.")] = 12,
) -> None:
    """What differs between two runs: configuration, versions, numbers; exit 1 where it is more than the spread over excerpts."""
    from lscollapse.cli.terminal import results as console_look
    from lscollapse.reports import compare as comparing

    comparison = comparing.compare(run_a, run_b)
    console_look.show_comparison(comparison, lines)
    if not comparison.alike:
        raise typer.Exit(1)


def doctor(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of a run.  \\[default: the embedded one]")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="Short name, folder or hub id; repeat for several.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, any setting of the configuration.")] = None,
) -> None:  # fmt: skip
    """What this machine has, and whether the configuration can run on it; exit 1, with the mend, where it cannot."""
    from lscollapse.cli.terminal import results as console_look
    from lscollapse.core import config as schema
    from lscollapse.runs import doctor as examining

    found = examining.examine(schema.load(config, {"models": model or None}, settings))
    console_look.show_checks(found)
    if any(check.mend for check in found):
        raise typer.Exit(1)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, `theory verify` or `theory bound`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page of these runs: interactive figures, the paper's sentences judged, provenance, bounds, warnings."""
    from lscollapse.reports.page import page as reporting

    typer.echo(f"wrote {reporting.write(runs, out)}")
