"""The program `lscollapse`: its verbs in panels, and how it ends."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from lscollapse.cli.model import measure
from lscollapse.cli.paper import ablate_gating, ablate_s4d, figures, sweep_lambda
from lscollapse.cli.prepare import check_identity, excerpts, fetch, models, verify_kernels
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
    (PREPARE, (doctor, check_identity, excerpts, fetch, verify_kernels, models)),
):
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)
app.add_typer(theory, name="theory", rich_help_panel=MODEL)


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


def program() -> None:
    """Entry point: `main` in a process of its own, which ends at once.

    Python would take down what is loaded piece by piece, which with torch takes a second. What was registered to be done at
    the end is done, for the first function that is registered is the last one called.
    """
    code = 1  # of an error that nobody foresaw, whose traceback is printed before

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
        raise


def main() -> None:
    """All verbs; errors of the input are one line and exit code 2."""
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
    program()
