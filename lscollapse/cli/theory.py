"""The verbs of the theory: `theory verify`, `theory bound`, `theory examples`, and `find-lambda`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lscollapse.cli.options import takes, within
from lscollapse.core.config import Experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

theory = typer.Typer(
    help="What the theorems promise, checked; and what they promise a real model.", no_args_is_help=True
)

Target = Annotated[float, typer.Option(help="Relative mu to keep at the last layer, mean over the excerpts.")]
Tolerance = Annotated[float, typer.Option(help="Relative width of a bracket at which bisection ends.")]
Out = Annotated[Path | None, typer.Option(help="Where to put the files.  \\[default: runs/VERB]")]
MODEL = ("excerpts", "tokens", "source", "tokenizer", "gating", "seed", "offline", "max_memory", "settings")


def _write(folder: Path, texts: dict[str, str]) -> None:
    from lscollapse.core.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
        typer.echo(f"wrote {folder / name}")


def _save(figure: Figure, file: Path) -> None:
    from lscollapse.core.files import atomic

    with atomic(file) as temporary:
        figure.savefig(temporary, format="png", dpi=200)
    typer.echo(f"wrote {file}")


def _csv(rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows).to_csv(index=False, float_format="%.8g")


@theory.command()
def verify(
    instances: Annotated[
        int, typer.Option(help="Random instances of every statement.", callback=within(1, 10**6))
    ] = 1500,
    seed: Annotated[int, typer.Option(help="Of the instances.", callback=within(0, 2**63 - 1))] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to put verify.json and verify.md.")] = None,
) -> None:
    """Put every statement of the paper, and what replaces it, to the test; exit 1 when a corrected one is violated."""
    from lscollapse.cli.terminal.theory import verdicts_table
    from lscollapse.theory.verify import run, to_json, to_markdown

    verdicts = run(instances, seed)
    verdicts_table(verdicts)
    if out is not None:
        _write(out, {"verify.json": to_json(verdicts), "verify.md": to_markdown(verdicts)})
    bad = [verdict.statement for verdict in verdicts if verdict.violated]
    typer.echo(f"{len(verdicts) - len(bad)} of {len(verdicts)} hold as corrected" + "".join(f"; NOT: {n}" for n in bad))
    if bad:
        raise typer.Exit(1)


@theory.command()
@takes("model", "a", "target", "tol", *MODEL, excerpts=8, gating=True)
def bound(
    experiment: Experiment,
    a: Annotated[float, typer.Option("--a", help="Rate of Theorem 4.1, in (0, 1).")] = 0.9,
    target: Target = 0.5,
    tol: Tolerance = 0.02,
    out: Out = None,
) -> None:
    """What each theorem promises this checkpoint on these excerpts, beside the lambda it really needs: table and figure."""
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.cli.terminal.theory import bounds_table
    from lscollapse.experiments.bounds import bounds, find_lambda
    from lscollapse.reports.figures.theory import bounds_figure

    bar = Bar()
    report = bounds.report(find_lambda.load_with_grid(experiment, bar), target, a, tol, bar)
    bounds_table(report)
    folder = out or Path("runs/theory-bound")
    lines = [
        {name: getattr(line, name) for name in ("bound", "sign", "lam", "to", "reads", "note")} for line in report.lines
    ]
    parts = "channels" if "channel" in report.heads[0] else "heads"
    tables = {"bounds": lines, "layers": report.layers, parts: report.heads, "curve": report.found.rows()}
    _write(folder, {f"{name}.csv": _csv(rows) for name, rows in tables.items()})
    _save(bounds_figure(report), folder / "bounds.png")


@theory.command()
def examples(out: Out = None) -> None:
    """Propositions 4.3.1 and 4.3.2: mu and rank-1 residual over lambda and depth, with the paper's and the true threshold."""
    from lscollapse.reports.figures.theory import theory_examples_figure
    from lscollapse.theory.examples import table

    folder = out or Path("runs/theory-examples")
    tables = [table("sys1"), table("sys2")]
    _write(folder, {"examples.csv": _csv([row for each in tables for row in each.rows() if row["layer"] % 10 == 0])})
    _save(theory_examples_figure(*tables), folder / "examples.png")


@takes("model", "target", "tol", "estimate_only", *MODEL, excerpts=8, gating=True)
def find_lambda(
    experiment: Experiment,
    target: Target = 0.5,
    tol: Tolerance = 0.02,
    estimate_only: Annotated[
        bool, typer.Option("--estimate-only", help="Only the cheap estimate of each sign.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where to put curve.csv, every lambda measured.")] = None,
) -> None:
    """The smallest |lambda| of each sign that keeps this model from collapsing, by real forward passes."""
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.cli.terminal.theory import found_table
    from lscollapse.experiments.bounds import find_lambda

    bar = Bar()
    found = find_lambda.find(find_lambda.load_with_grid(experiment, bar), target, tol, estimate_only, bar)
    found_table(found)
    if out is not None and found.points:
        _write(out, {"curve.csv": _csv(found.rows())})
