"""The program `lscollapse`: its verbs in panels, and how it ends."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
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
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    global show_traceback, running
    show_traceback, running = debug, context.invoked_subcommand
    if not debug:  # what the hub's client and `datasets` print beside our one line; read when they are imported
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")  # of libraries, to whoever calls them


show_traceback = False
QUIET = {
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
running: str | None = None  # the verb that runs
# Verbs that go on from where they were stopped.
CONTINUED = ("sweep-lambda", "ablate-gating", "ablate-s4d", "measure", "table1", "train", "fetch")


def program() -> None:
    """Entry point: `main` in a process of its own, which ends at once.

    Python would take down what is loaded piece by piece, which with torch takes a second. What was registered to be done at
    the end is done, for the first function that is registered is the last one called.
    """
    code = 1  # with --debug, of an error whose traceback is printed before

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
    """All verbs. What the input or the machine is at fault for is one line and exit code 2, what nobody foresaw one and 70."""
    from lscollapse.core import allocation

    allocation.keep_freed_memory()
    try:
        _refuse_unwritten(sys.argv[1:])
        app()
    except KeyboardInterrupt:
        _say("stopped" + ("; the same command continues" if running in CONTINUED else ""))
        sys.exit(130)
    except Exception as error:
        if show_traceback:
            raise
        if isinstance(error, ValueError) and _is_ours(error):
            _say(str(error))
        elif isinstance(error, OSError):
            what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
            kept = "; what was written so far is kept, the same command continues"
            _say(what + (kept if running in CONTINUED else ""))
        elif allocation.is_out_of_memory(error):
            _say("there is not enough memory for this: use fewer --excerpts or --tokens, a smaller batch, net or model")
        else:
            kind, (file, line) = type(error).__name__, _place(error)
            said = str(error).strip().partition("\n")[0][:120]
            what = f"{kind} at {file}:{line}: {said}"
            _say(
                f"a fault of lscollapse ({what}): report it on its issue tracker, with what the same command shows with --debug"
            )
            sys.exit(70)
        sys.exit(2)


def _say(message: str) -> None:
    from lscollapse.core.outside import one_line

    typer.echo(one_line(f"lscollapse: {message}"), err=True)


def _refuse_unwritten(arguments: list[str]) -> None:
    """Raise for bytes that are no UTF-8 and for control characters: they could be written neither here nor in a run folder."""
    from lscollapse.core.outside import shown, unwritten

    for argument in arguments:
        if found := unwritten(argument.replace("\n", "")):
            raise ValueError(
                f"an argument holds {shown(found)}, which is no character that can be printed: rename what it names"
                f" ({shown(argument)})"
            )


def _is_ours(error: ValueError) -> bool:
    """Whether this package wrote the message: then it is about the input."""
    package = Path(__file__).parents[1]
    return type(error).__module__.startswith("lscollapse.") or package in Path(_frames(error)[-1].filename).parents


def _place(error: BaseException) -> tuple[str, int | None]:
    """Where in this package an error came up, as file and line."""
    package = Path(__file__).parents[1]
    own = [frame for frame in _frames(error) if package in Path(frame.filename).parents]
    last = own[-1] if own else _frames(error)[-1]
    return Path(last.filename).name, last.lineno


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


if __name__ == "__main__":
    program()
