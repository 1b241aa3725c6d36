"""One process writes to a folder: a second one is told who it is. A lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lscollapse.core.files import odd_kind
from lscollapse.core.outside import shown

LOCK = ".lock"  # the file in a folder that a process holds while it writes there; it says who
_WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has no locks


class LockError(ValueError):
    """Another process writes to the folder: one line, which says who."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, made if absent, in the block. What a process that was killed held is nobody's.

    Raises:
        LockError: another process holds it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    handle = _held(folder, file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who waits for it finds that it is another file
        handle.close()


def _held(folder: Path, file: Path) -> IO[str]:
    while True:
        if kind := "a link" if file.is_symlink() else odd_kind(file):
            raise LockError(f"{file} is {kind}: remove it, it is the lock of {folder}")
        handle = file.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with handle:
                raise LockError(_refusal(folder, handle)) from None
        except OSError as error:
            if error.errno not in _WITHOUT:
                raise
        if _is(handle, file):
            handle.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            handle.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}))
            handle.flush()
            return handle
        handle.close()  # its holder has ended in between, and has taken it away


def _is(handle: IO[str], file: Path) -> bool:
    """Whether the open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _refusal(folder: Path, handle: IO[str]) -> str:
    handle.seek(0)
    try:
        who = json.loads(handle.read(1000))
        words = f"process {who['pid']:d} on {shown(who['host'])}, since {shown(who['since'])}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        words = "another process"
    return f"{folder} is being written by {words}: wait for it, or give another folder with --out"
