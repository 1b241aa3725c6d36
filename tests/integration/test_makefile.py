"""What `make figures` and `make figures-check` run, with a stand-in for lscollapse that writes down what it is asked."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make") or not shutil.which("git"), reason="needs make and git")

STAND_IN = '#!/bin/sh\necho "$@" >> "{log}"\n[ "$1" != compare ] || exit {code}\n'
COMPARED = "compare results/reference results/embedded"


def make(folder: Path, code: int, *arguments: str) -> tuple[int, list[str]]:
    """Exit code of make, and the commands; comparing ends with `code`."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    program = folder / "lscollapse"
    program.write_text(STAND_IN.format(log=log, code=code), encoding="utf-8")
    program.chmod(0o755)
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", "setup", f"BIN={folder}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "rror" not in done.stderr or done.returncode, done.stderr  # nor "Error 1 (ignored)"
    return done.returncode, log.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("target", "fails"), [("figures", [False, False, True]), ("figures-check", [False, True, True])]
)
def test_figures_that_differ_fail_the_check_only(target: str, fails: list[bool], tmp_path: Path) -> None:
    """0: they agree, 1: they differ, 2: they cannot be compared."""
    for code, failing in enumerate(fails):
        returned, commands = make(tmp_path, code, target)
        assert commands[-1] == COMPARED and len(commands) == 5
        assert bool(returned) == failing


@pytest.mark.parametrize("target", ["figures", "figures-check"])
def test_the_papers_own_models_have_no_reference(target: str, tmp_path: Path) -> None:
    returned, commands = make(tmp_path, 1, target, "PRESET=paper")
    assert returned == 0
    assert commands[-1].endswith("--to results/paper") and not any(c.startswith("compare") for c in commands)


@pytest.mark.parametrize("preset", ["embedded", "paper"])
def test_a_clone_stays_clean(preset: str, tmp_path: Path) -> None:
    """git ignores every folder that is written."""
    _, commands = make(tmp_path, 0, "figures", f"PRESET={preset}")
    words = " ".join(commands).split()
    written = {after for word, after in itertools.pairwise(words) if word in ("--out", "--to")}
    assert len(written) == 4
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for folder in written:
        subprocess.run(["git", "check-ignore", "-q", f"{folder}/figure1.csv"], cwd=tmp_path, check=True)
