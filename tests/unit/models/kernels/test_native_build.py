"""Compiling, keeping and believing the C++: whatever goes wrong is one note, and torch's operations run."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lscollapse.models.kernels import native, native_build
from lscollapse.models.kernels.backends import resolve_kernels
from lscollapse.models.kernels.native_build import BuildError, build

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native_build.COMPILERS)), reason="there is no C++ compiler to test with"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that libraries are kept in, a new one."""
    monkeypatch.setenv("LSCOLLAPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "native"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A source that takes no time to compile."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A compiler that is a script, in CXX."""

    def write(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return write


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_it_is_compiled_once(folder: Path, small: Path, compiler: Callable[[str], Path]) -> None:
    assert build(small).library.answer() == 42
    (made,) = kept(folder)
    before = made.stat().st_mtime_ns
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    built = build(small)
    assert (built.library.answer(), built.note) == (42, "") and made.stat().st_mtime_ns == before
    compiler("exit 1")  # another compiler is asked anew
    with pytest.raises(BuildError):
        build(small)


@pytest.mark.parametrize("change", ["flags of the CPU", "flags", "source"])
def test_what_decides_a_library_names_it(
    folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    build(small)
    if change == "source":
        small.write_text('extern "C" int answer() { return 43; }\n')
    elif change == "flags":
        monkeypatch.setattr(native_build, "WANTED", ("-O1",))
    else:
        monkeypatch.setattr(native_build, "cpu_flags", lambda: "fpu sse2 avx1024")
    assert build(small).library.answer() == (43 if change == "source" else 42)
    assert len(kept(folder)) == 2


def test_the_flags_of_a_cpu_are_those_that_linux_lists() -> None:
    listed = Path("/proc/cpuinfo")
    if not listed.is_file():
        pytest.skip("no /proc/cpuinfo")
    words = listed.read_text().split()
    assert native_build.cpu_flags() and all(flag in words for flag in native_build.cpu_flags().split())


def test_what_is_cut_off_or_changed_is_not_believed(folder: Path, small: Path) -> None:
    build(small)
    (made,) = kept(folder)
    whole = made.read_bytes()
    for wrong in (b"", whole[: len(whole) // 2], whole + b"more"):
        made.unlink()  # not written over: it is mapped into this process
        made.write_bytes(wrong)
        assert build(small).library.answer() == 42 and made.read_bytes() == whole


def test_what_a_killed_process_left_is_not_believed(folder: Path, small: Path, tmp_path: Path) -> None:
    """The compiler kills the process that called it, half-way through its output."""
    script = tmp_path / "killing"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo fake && exit\n'
        'for out; do [ "$last" = -o ] && echo half > "$out"; last="$out"; done\nkill -9 $PPID\n'
    )
    script.chmod(0o755)
    program = f"from pathlib import Path\nfrom lscollapse.models.kernels.native_build import build\nbuild(Path({str(small)!r}))"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"CXX": str(script)})
    assert done.returncode == -9 and [path.suffix for path in kept(folder)] != [".so"]
    assert build(small).library.answer() == 42


def test_two_processes_at_once(folder: Path, small: Path) -> None:
    program = f"""
from pathlib import Path
from lscollapse.models.kernels.native_build import build
input()
built = build(Path({str(small)!r}))
print(built.library.answer(), built.note)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", program], **pipes) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in both] == ["42", "42"]
    assert build(small).note == "" and not any(path.is_dir() for path in kept(folder))


@pytest.mark.parametrize("fault", ["file", "others may write", "another user's"])
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(
    folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A file in the place of the folder; a folder, or a library in it, that another user could have written."""
    build(small)
    if fault == "file":
        shutil.rmtree(folder)
        folder.write_text("")
    elif fault == "others may write":
        folder.chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    built = build(small)
    assert built.library.answer() == 42
    assert built.note.startswith("the native kernels are compiled anew by every process: ") and "\n" not in built.note
    assert folder.is_file() if fault == "file" else len(kept(folder)) == 1


def test_a_library_that_others_may_write_is_made_anew(folder: Path, small: Path) -> None:
    build(small)
    kept(folder)[0].chmod(0o666)
    assert build(small).library.answer() == 42
    assert stat.S_IMODE(kept(folder)[0].stat().st_mode) & 0o022 == 0


def test_a_read_only_folder(folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept there is used; what is not is compiled for the process. (Permissions do not bind root.)"""
    build(small)

    class ReadOnly(TemporaryDirectory[str]):
        def __init__(self, prefix: str, dir: Path | None = None) -> None:
            if dir is not None:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            super().__init__(prefix=prefix)

    monkeypatch.setattr(native_build, "TemporaryDirectory", ReadOnly)
    assert build(small).note == ""
    small.write_text('extern "C" int answer() { return 43; }\n')
    built = build(small)
    assert built.library.answer() == 43 and "(Read-only file system)" in built.note
    assert len(kept(folder)) == 1


def test_flags_that_a_compiler_does_not_know_are_left_out(
    folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "WANTED", ("-march=no-such-cpu",))
    assert build(small).library.answer() == 42


def test_no_compiler(folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        build(small)
    monkeypatch.setenv("CXX", "icpx -O2")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler \(icpx -O2\)"):
        build(small)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'small.cpp:1: error: no' >&2\necho more >&2\nexit 1", "fails (small.cpp:1: error: no)"),
        ("exit 3", "fails (3)"),
        ("exit 0", "made nothing of between.cpp"),
        ('for out; do [ "$last" = -o ] && echo "no library" > "$out"; last="$out"; done', "cannot be loaded"),
    ],
)
def test_a_compiler_that_does_not_do_its_work_is_a_note(
    folder: Path, compiler: Callable[[str], Path], script: str, said: str
) -> None:
    compiler(script)
    found, note = native.load.__wrapped__()
    assert found is None and "\n" not in note and note.endswith("torch operations run instead")
    assert note.startswith("the native kernels cannot be compiled: ") and said in note
    assert kept(folder) == []


def test_a_compiler_that_hangs_is_killed_with_its_children(
    folder: Path, compiler: Callable[[str], Path], tmp_path: Path
) -> None:
    compiler(f"sleep 600 &\necho $! > {tmp_path}/child\nwait")
    found, note = native.load.__wrapped__(seconds=0.5)
    assert found is None and "took more than" in note
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.is_file() or state.read_text().split()[2] == "Z"


def test_wrong_numbers_are_a_note(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign in the decay; beside it a change that is none, and a library without the functions."""
    right = native.SOURCE.read_text(encoding="utf-8")
    monkeypatch.setattr(native_build, "NEEDED", ("-std=c++17", "-O0", "-fPIC", "-shared"))  # quick to compile
    for number, (line, wrong) in enumerate(
        [
            ("exponential((float)(last - m.cum[j]))", "exponential((float)(m.cum[j] - last))"),
            ("constexpr char VECTORS", 'extern "C" const char *other() { return ""; }\nconstexpr char VECTORS'),
        ]
    ):
        assert line in right
        source = tmp_path / f"wrong{number}.cpp"
        source.write_text(right.replace(line, wrong, 1), encoding="utf-8")
    found, note = native.load.__wrapped__(tmp_path / "wrong0.cpp")
    assert found is None and "are off by" in note and note.endswith("torch operations run instead")
    found, note = native.load.__wrapped__(tmp_path / "wrong1.cpp")
    assert found is not None and note == ""
    missing = tmp_path / "missing.cpp"
    missing.write_text('extern "C" int answer() { return 42; }\n')
    found, note = native.load.__wrapped__(missing)
    assert found is None and "lack a function" in note


def test_a_note_says_why_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler: torch operations run instead"))
    for kernels in ("auto", "native"):
        found = resolve_kernels(kernels, "cpu")
        torch_kernels = resolve_kernels("torch", "cpu")
        assert found.note == "no compiler: torch operations run instead" and found.native is None and not found.widens
        assert found.backend == torch_kernels.backend and found.scan is torch_kernels.scan
