"""A C++ source of the package as a library: compiled on first use, kept in the cache, loaded by ctypes.

What is kept is named by all that decides what it is (source, compiler, flags, the CPU's instructions) and by its own
sha256, and is believed only where the two agree and nobody else can have written it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lscollapse.core.files import cache_folder, sha256_file

COMPILERS = ("c++", "g++", "clang++")
NEEDED = ("-std=c++17", "-O3", "-fPIC", "-shared")
# Vectors of this CPU, and loops that may become vectors although a value that is not used might trap. No result changes.
WANTED = ("-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
SECONDS = 30.0


class BuildError(ValueError):
    """There is no library, and why: one line."""


@dataclass(frozen=True)
class Built:
    """A loaded library, the compiler that made it, as it names itself, and why it is not kept, if it is not."""

    library: ctypes.CDLL
    compiler: str
    note: str = ""


def build(source: Path, *, seconds: float = SECONDS) -> Built:
    """The library of a source file, from the cache or compiled now.

    Args:
        source: one C++ file that includes no more than the C++ library.
        seconds: how long the compiler may take before it is killed.

    Raises:
        BuildError: no compiler, one that fails or takes too long, or a library that cannot be loaded.
    """
    compiler = _compiler()
    version = _version(compiler)
    stem = f"{source.stem}-{_key(source, compiler, version)}"
    folder, fault = cache_folder(None) / "native", ""
    try:
        _make_private(folder)
        kept = _kept(folder, stem)
        if kept is not None:
            return Built(_load(kept), version)
        with TemporaryDirectory(prefix=".building-", dir=folder) as building:
            made = _compile(compiler, source, Path(building), seconds)
            library = _load(made)
            made.replace(
                folder / f"{stem}-{sha256_file(made)[:16]}.so"
            )  # at once: another process sees all of it or nothing
        return Built(library, version)
    except OSError as error:
        fault = f"{folder} cannot keep them ({error.strerror or error})"
    with TemporaryDirectory(prefix="lscollapse-") as building:  # a loaded library needs no file
        library = _load(_compile(compiler, source, Path(building), seconds))
    return Built(library, version, f"the native kernels are compiled anew by every process: {fault}")


def cpu_flags() -> str:
    """The maker of this CPU, where it has one by name, and its instructions, as Linux lists them; elsewhere its name."""
    listed, maker = Path("/proc/cpuinfo"), ""
    if listed.is_file():
        with listed.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("vendor_id"):
                    maker = line.partition(":")[2]
                if line.startswith(("flags", "Features")):  # of x86, of Arm
                    return " ".join([*maker.split(), *sorted(line.partition(":")[2].split())])
    return platform.processor() or platform.machine()


def _compiler() -> list[str]:
    """The command that CXX names, else the first compiler there is, by its full path."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for name in [asked[0]] if asked else COMPILERS:
        found = shutil.which(name)
        if found:
            return [found, *asked[1:]]
    raise BuildError(f"there is no C++ compiler ({' '.join(asked) or ', '.join(COMPILERS)})")


def _version(compiler: Sequence[str]) -> str:
    """What the compiler says first of itself."""
    done = _run([*compiler, "--version"], SECONDS)
    return next(iter(done.split("\n")), "").strip() or Path(compiler[0]).name


def _key(source: Path, compiler: Sequence[str], version: str) -> str:
    parts = [sha256_file(source), *compiler, version, *NEEDED, *WANTED, cpu_flags()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _make_private(folder: Path) -> None:
    """Raises OSError where the folder cannot be made, or others could put a library into it, which then would run here."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(folder):
        raise OSError("it is another user's, or others may write to it")


def _is_own(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _kept(folder: Path, stem: str) -> Path | None:
    """A library of that name in the folder that is what its name says."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if _is_own(path) and path.stem == f"{stem}-{sha256_file(path)[:16]}":
            return path
    return None


def _compile(compiler: Sequence[str], source: Path, folder: Path, seconds: float) -> Path:
    """The library, new in `folder`; without the flags that could be done without where the compiler does not take them."""
    made, end = folder / f"{source.stem}.so", time.monotonic() + seconds
    command = [*compiler, *NEEDED, str(source), "-o", str(made)]
    try:
        _run([*command, *WANTED], seconds)
    except _Failed:
        _run(command, end - time.monotonic())
    if not made.is_file():
        raise BuildError(f"{compiler[0]} made nothing of {source.name}")
    return made


class _Failed(BuildError):
    """The compiler ran to its end and said no."""


def _run(command: Sequence[str], seconds: float) -> str:
    """What a command prints. It is killed with all that it started when its time is over."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from error
    try:
        said, complained = process.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise BuildError(f"{command[0]} took more than {seconds:.0f} s") from None
    if process.returncode:
        lines = complained.strip().split("\n")
        line = next((line for line in lines if "error" in line), lines[0])[:200]
        raise _Failed(f"{command[0]} fails ({line or process.returncode})")
    return said


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"what the compiler made cannot be loaded ({error})") from error
