"""A verb in this process, on input that may be anything: it has the right rows, or refuses in one line, and leaves nothing behind."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from unittest.mock import patch

import httpx
import typer.main

from lscollapse.core.outside import LONGEST
from tests.verbs import run

SECONDS = 10
TELLING = ("compare", "check-identity")  # verbs whose exit code 1 says that there is a difference
ROOM = 2**30  # bytes over what the process had at its start
_peak = [0]


class Hangs(BaseException):
    """A verb that did not come back; no Exception, which the verb might catch."""


@contextmanager
def _soon() -> Iterator[None]:
    """Raises `Hangs` in the block after SECONDS."""
    ringing = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, ringing)


@contextmanager
def _once_made() -> Iterator[None]:
    """What every process makes once, and takes longer than most refusals: the parser of the verbs, and the list of trusted certificates."""
    with (
        patch.object(typer.main, "get_command", _parser),
        patch.object(httpx._transports.default, "create_ssl_context", _certificates),
    ):
        yield


_parser, _certificates = cache(typer.main.get_command), cache(httpx._transports.default.create_ssl_context)


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise Hangs(f"no answer in {SECONDS} s")


def taken(arguments: Sequence[str | Path], root: Path, allowed: Sequence[str]) -> tuple[int, str]:
    """The exit code of the verb, and what is wrong with how it took its input; empty where nothing is.

    Args:
        root: folder that holds all that the verb is given.
        allowed: names in it where the verb may write.
    """
    peak = _peak[0] = _peak[0] or _memory()
    there = _files(root, allowed)
    try:
        with _soon(), _once_made():
            code, out, err = run(arguments)
    except Hangs as hangs:
        return -1, str(hangs)
    except Exception as error:
        return -1, f"{type(error).__name__} came out of main: {error}"[:300]
    wrong = _fault(code, out, err, allowed=(0, 1, 2) if arguments[0] in TELLING else (0, 2))
    if new := _files(root, allowed) - there:
        wrong = wrong or f"it left {sorted(map(str, new))[:3]}"
    if _memory() > peak + ROOM:
        _peak[0] = _memory()
        wrong = wrong or f"it took {(_memory() - peak) / 2**30:.1f} GiB"
    return code, wrong


def _fault(code: int, out: str, err: str, allowed: Sequence[int]) -> str:
    said = out + err
    if code not in allowed:
        return f"exit code {code}: {err[-300:]!r}"
    if odd := {character for character in said if not character.isprintable() and character not in "\n\t"}:
        return f"the terminal was sent {odd!r}"
    if "Traceback" in said:
        return f"a traceback: {said[-300:]!r}"
    if code == 2 and not (err.startswith("lscollapse: ") and err.count("\n") == 1):
        return f"not one line: {err[:600]!r}"
    if len(err) > LONGEST + 1 and code == 2:
        return f"a line of {len(err)} characters: {err[:100]!r}"
    return ""


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _files(root: Path, allowed: Sequence[str]) -> set[Path]:
    return {path for path in root.rglob("*") if path.relative_to(root).parts[0] not in allowed}
