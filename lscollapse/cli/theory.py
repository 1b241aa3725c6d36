"""The verbs of the theory: `theory verify`, `theory bound`, `theory examples`, and `find-lambda`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

theory = typer.Typer(
    help="What the theorems promise, checked; and what they promise a real model.", no_args_is_help=True
)

ModelName = Annotated[str, typer.Argument(help="Short name, folder or hub id.")]
Target = Annotated[float, typer.Option(help="Relative mu to keep at the last layer, mean over the excerpts.")]
Tolerance = Annotated[float, typer.Option(help="Relative width of a bracket at which bisection ends.")]
Excerpts = Annotated[int, typer.Option(help="How many excerpts.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of each excerpt.  \\[default: 128]")]
Source = Annotated[
    str | None, typer.Option(help="packaged, wikipedia, datasets, smiles, or a .txt, .jsonl or .parquet file.")
]
Tokenizer = Annotated[str | None, typer.Option(help="bert, native, or a folder or hub id.  \\[default: bert]")]
Gating = Annotated[bool, typer.Option("--gating/--no-gating", help="Without the gate: lambda stands in its place.")]
Seed = Annotated[int | None, typer.Option(help="Which excerpts are drawn.  \\[default: 0]")]
Offline = Annotated[bool | None, typer.Option("--offline", help="Make no call to the hub.")]
Memory = Annotated[str | None, typer.Option("--max-memory", help="Bound on memory when streaming.  \\[default: 2GiB]")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, any setting of the configuration; repeat for several.")
]
Out = Annotated[Path | None, typer.Option(help="Where to put the files.  \\[default: runs/VERB]")]


def _subject(model: str, settings: list[str] | None, bar: Any, **flags: Any) -> Any:
    from lscollapse.core import config
    from lscollapse.experiments.bounds import find_lambda

    return find_lambda.load_with_grid(config.load(None, {"models": [model], **flags}, settings), bar)


def _write(folder: Path, texts: dict[str, str]) -> None:
    from lscollapse.core.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
        typer.echo(f"wrote {folder / name}")


def _csv(rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows).to_csv(index=False, float_format="%.8g")


@theory.command()
def verify(
    instances: Annotated[int, typer.Option(help="Random instances of every statement.")] = 1500,
    seed: Annotated[int, typer.Option(help="Of the instances.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to put verify.json and verify.md.")] = None,
) -> None:
    """Put every statement of the paper, and what replaces it, to the test; exit 1 when a corrected one is violated."""
    from lscollapse.cli.terminal import theory as console_theory
    from lscollapse.theory import verify as checks

    verdicts = checks.run(instances, seed)
    console_theory.verdicts_table(verdicts)
    if out is not None:
        _write(out, {"verify.json": checks.to_json(verdicts), "verify.md": checks.to_markdown(verdicts)})
    bad = [verdict.statement for verdict in verdicts if verdict.violated]
    typer.echo(f"{len(verdicts) - len(bad)} of {len(verdicts)} hold as corrected" + "".join(f"; NOT: {n}" for n in bad))
    if bad:
        raise typer.Exit(1)


@theory.command()
def bound(
    model: ModelName,
    a: Annotated[float, typer.Option("--a", help="Rate of Theorem 4.1, in (0, 1).")] = 0.9,
    target: Target = 0.5, tol: Tolerance = 0.02, excerpts: Excerpts = 8, tokens: Tokens = None, source: Source = None,
    tokenizer: Tokenizer = None, gating: Gating = True, seed: Seed = None, offline: Offline = None, max_memory: Memory = None,
    settings: Set = None, out: Out = None,
) -> None:  # fmt: skip
    """What each theorem promises this checkpoint on these excerpts, beside the lambda it really needs: table and figure."""
    from lscollapse.cli.terminal import paper as console
    from lscollapse.cli.terminal import theory as console_theory
    from lscollapse.experiments.bounds import bounds as guarantees
    from lscollapse.reports.figures import theory as figures_theory

    bar = console.Bar()
    subject = _subject(
        model, settings, bar, excerpts=excerpts, tokens=tokens, source=source, tokenizer=tokenizer, gating=gating,
        seed=seed, offline=offline, max_memory=max_memory,
    )  # fmt: skip
    report = guarantees.report(subject, target, a, tol, bar)
    console_theory.bounds_table(report)
    folder = out or Path("runs/theory-bound")
    lines = [
        {name: getattr(line, name) for name in ("bound", "sign", "lam", "to", "reads", "note")} for line in report.lines
    ]
    parts = "channels" if "channel" in report.heads[0] else "heads"
    tables = {"bounds": lines, "layers": report.layers, parts: report.heads, "curve": report.found.rows()}
    _write(folder, {f"{name}.csv": _csv(rows) for name, rows in tables.items()})
    figures_theory.bounds_figure(report).savefig(folder / "bounds.png", dpi=200)
    typer.echo(f"wrote {folder / 'bounds.png'}")


@theory.command()
def examples(out: Out = None) -> None:
    """Propositions 4.3.1 and 4.3.2: mu and rank-1 residual over lambda and depth, with the paper's and the true threshold."""
    from lscollapse.reports.figures import theory as figures_theory
    from lscollapse.theory.examples import table

    folder = out or Path("runs/theory-examples")
    tables = [table("sys1"), table("sys2")]
    _write(folder, {"examples.csv": _csv([row for each in tables for row in each.rows() if row["layer"] % 10 == 0])})
    figures_theory.theory_examples_figure(*tables).savefig(folder / "examples.png", dpi=200)
    typer.echo(f"wrote {folder / 'examples.png'}")


def find_lambda(
    model: ModelName, target: Target = 0.5, tol: Tolerance = 0.02,
    estimate_only: Annotated[bool, typer.Option("--estimate-only", help="Only the cheap estimate of each sign.")] = False,
    excerpts: Excerpts = 8, tokens: Tokens = None, source: Source = None, tokenizer: Tokenizer = None,
    gating: Gating = True, seed: Seed = None, offline: Offline = None, max_memory: Memory = None, settings: Set = None,
    out: Annotated[Path | None, typer.Option(help="Where to put curve.csv, every lambda measured.")] = None,
) -> None:  # fmt: skip
    """The smallest |lambda| of each sign that keeps this model from collapsing, by real forward passes."""
    from lscollapse.cli.terminal import paper as console
    from lscollapse.cli.terminal import theory as console_theory
    from lscollapse.experiments.bounds import find_lambda

    bar = console.Bar()
    subject = _subject(
        model, settings, bar, excerpts=excerpts, tokens=tokens, source=source, tokenizer=tokenizer, gating=gating,
        seed=seed, offline=offline, max_memory=max_memory,
    )  # fmt: skip
    found = find_lambda.find(subject, target, tol, estimate_only, bar)
    console_theory.found_table(found)
    if out is not None and found.points:
        _write(out, {"curve.csv": _csv(found.rows())})
