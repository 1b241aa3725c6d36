"""The figures of a finished run folder, drawn in a second process that loads matplotlib while the run loads torch."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from lscollapse.core.progress import SILENT, Progress


def draw_run(
    run: Path, to: Path, yscale: str = "linear", measure: str = "relative_mu", verified: bool = True,
    progress: Progress = SILENT,
) -> list[Path]:  # fmt: skip
    """Draw all figures of the finished run folder `run` into the folder `to`; returns the files.

    Where `verified` is false, a table that was edited since is drawn too, and the captions say so.

    Raises:
        FigureError: none is drawn of this experiment, or its table lacks what they show.
        RunFolderError: it is no finished run.
        OSError: `to` cannot be written.
    """
    from lscollapse.core.files import write_text
    from lscollapse.core.manifest import read_manifest
    from lscollapse.core.rows import edited_words, read_rows
    from lscollapse.reports.claims.sentences import judge_readings
    from lscollapse.reports.figures import draw

    rows, experiment = read_rows(run, verified), read_manifest(run)["identity"].get("experiment", "")
    written = draw.draw(experiment, rows, to, yscale, measure, edited_words(run), progress)
    if experiment == "all-readings":
        written.append(to / draw.READINGS_VERDICTS)
        write_text(written[-1], judge_readings(rows).to_csv(index=False))
    return written


class Painter:
    """`draw_run` of one folder, asked for with `begin` and waited for with `written`.

    It is done by a process of its own where there is a core for it, and where torch is still to be loaded: it then has
    loaded matplotlib when the run ends. Elsewhere, and should that process have been killed, it is done here.
    """

    def __init__(self) -> None:
        self._asked: tuple[Path, Path, str] | None = None
        self._process = _started() if "torch" not in sys.modules and _cores() > 1 else None

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()  # it takes away what it has half-written
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what could not be handed to it
                    pipe.close()  # type: ignore[union-attr]  # both are pipes
            self._process.wait()

    def begin(self, run: Path, yscale: str = "linear") -> None:
        """Ask for the figures of a finished run folder, to be written into it."""
        self._asked = run, run, yscale
        if self._process is not None:
            with suppress(OSError):  # it was killed, which `written` sees
                pickle.dump(self._asked, self._process.stdin)  # type: ignore[arg-type]  # it is a pipe
                self._process.stdin.flush()  # type: ignore[union-attr]  # as above

    def written(self) -> list[Path]:
        """The files, once they are there; errors as of `draw_run`."""
        assert self._asked is not None, "nothing was asked for"
        if self._process is None:
            return draw_run(*self._asked)
        try:
            answer = pickle.load(self._process.stdout)  # type: ignore[arg-type]  # as above
        except (EOFError, OSError, pickle.UnpicklingError):
            return draw_run(*self._asked)
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started() -> subprocess.Popen[bytes]:
    """The second process, in a group of its own: Ctrl-C is for the one that a person started."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import paint; paint()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, process_group=0)  # type: ignore[call-overload, no-any-return]


def paint() -> None:
    """What the second process does: load what drawing needs, wait for one folder, draw it, answer with files or an error."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    _load()
    try:
        asked = pickle.load(sys.stdin.buffer)
    except EOFError:  # the run has ended without figures
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the `finally` of files that are being written
    try:
        answer: Any = draw_run(*asked)
    except Exception as error:
        error.add_note(traceback.format_exc())  # for --debug: the traceback itself cannot be sent
        answer = error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError):  # nobody waits any more
        pickle.dump(answer, answers)
        answers.flush()
    os._exit(0)  # all is written; taking down what is loaded would take half a second


def _load() -> None:
    """Import what drawing needs; parts of matplotlib, and its fonts, are loaded only when something is drawn."""
    from io import BytesIO

    import lscollapse.reports.claims.sentences
    import lscollapse.reports.figures.draw  # noqa: F401  # of what `draw_run` imports
    from lscollapse.reports.figures import style

    figure, axes = style.styled(style.canvas)(1, style.PANEL, ["words"])
    style.styled(style.title)(axes[0, 0], "a", "a title")
    for kind in ("png", "pdf"):
        style.styled(figure.savefig)(BytesIO(), format=kind)
