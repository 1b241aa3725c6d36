"""Typer verbs, a few lines each; what they do is elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lscollapse.cli import options as o
from lscollapse.cli.model import measure
from lscollapse.cli.paper import ablate_gating, ablate_s4d, experiment_of, figures, sweep_lambda
from lscollapse.cli.results import claims, compare, doctor, report
from lscollapse.cli.theory import find_lambda, theory
from lscollapse.cli.train import table1, train

app = typer.Typer(
    help="Is my deep sequence model collapsing, and what would stop it? Rank collapse and lambda-skip connections.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PAPER, MODEL, RESULTS, PREPARE = "The paper's experiments", "Your model", "Results", "Prepare and check"

for panel, verbs in (
    (PAPER, (sweep_lambda, ablate_gating, ablate_s4d, table1, train)),
    (MODEL, (measure, find_lambda)),
    (RESULTS, (figures, report, claims, compare)),
    (PREPARE, (doctor,)),
):
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)
app.add_typer(theory, name="theory", rich_help_panel=MODEL)


@app.command(rich_help_panel=PREPARE)
def check_identity(
    model: o.ModelName,
    excerpts: Annotated[int, typer.Option(help="How many excerpts.")] = 2,
    tokens: o.Tokens = None, source: o.Source = None, tokenizer: o.Tokenizer = None, dtype: o.Dtype = None,
    offline: o.Offline = None, settings: o.Set = None,
) -> None:  # fmt: skip
    """Compare the instrumented model (lambda = 1, gate and norms on) with the untouched one; exit 1 over 1e-5. Run this first."""
    given = locals()
    from lscollapse.cli.terminal import paper as console
    from lscollapse.experiments import paper as experiments

    experiment = experiment_of(given)
    if not console.identity_table(experiments.check_identity(experiment, console.Bar())):
        raise typer.Exit(1)


@app.command(rich_help_panel=PREPARE)
def excerpts(
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    source: o.Source = None, titles: o.Titles = None, excerpts: o.Excerpts = None, tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None, seed: o.Seed = None, config: o.Config = None, settings: o.Set = None,
) -> None:  # fmt: skip
    """Freeze the excerpts to a file that every command takes as --source, so that somebody else runs on the same ids."""
    given = locals()
    from lscollapse.data import corpus, tokenizers
    from lscollapse.experiments import paper as experiments

    experiment = experiment_of(given)
    chosen = tokenizers.named(experiment.tokenizer) if experiment.tokenizer else None
    drawn = experiments.load_corpus(experiment, chosen)
    corpus.freeze(drawn, out)
    for remark in drawn.remarks:
        typer.echo(remark, err=True)
    typer.echo(
        f"wrote {len(drawn.excerpts)} excerpts of {drawn.source} to {out} ({drawn.skipped} texts were too short)"
    )


@app.command(rich_help_panel=PREPARE)
def fetch(
    model: Annotated[str, typer.Argument(help="Short name or hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.  \\[default: the pinned one]")] = None,
) -> None:
    """Download a model from the hub, resumable, checked by size and sha256, so that --offline runs find it."""
    from lscollapse.core import hub, registry

    entry = registry.resolve(model)
    if entry.source != "hub":
        typer.echo(f"{model} needs no download")
        return
    typer.echo(hub.fetch(entry.location, revision=revision or entry.revision or None))


@app.command(rich_help_panel=PREPARE)
def verify_kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kernels: Annotated[str, typer.Option(help="auto, torch or triton.")] = "auto",
) -> None:
    """Compare scan, conv, gated norm and a whole block with a float64 recurrence; exit 1 over tolerance."""
    from lscollapse.cli.terminal import paper as console
    from lscollapse.models.kernels import verify

    rows = verify.verify(device, kernels)
    console.kernels_table(rows)
    if not verify.passed(rows):
        raise typer.Exit(1)


@app.command(rich_help_panel=PREPARE)
def models() -> None:
    """List the models that can be loaded by a short name, and where their weights come from."""
    from lscollapse.cli.terminal.paper import models_table

    models_table()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lscollapse {version('lscollapse')}")
        raise typer.Exit()


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    global show_traceback
    show_traceback = debug


show_traceback = False


def main() -> None:
    """Entry point: errors of the input are one line and exit code 2."""
    from lscollapse.core import allocation

    allocation.keep_freed_memory()
    try:
        app()
    except ValueError as error:
        if show_traceback:
            raise
        typer.echo(f"lscollapse: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        if show_traceback:
            raise
        what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
        typer.echo(f"lscollapse: {what}; what was measured so far is kept, the same command continues", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("lscollapse: stopped; the same command continues the run", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
