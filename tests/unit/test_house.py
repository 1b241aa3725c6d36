"""The house: what is public, which room may import which, how long a file and a function may be."""

from __future__ import annotations

import ast
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lscollapse
from tests import ROOT

PACKAGE = ROOT / "lscollapse"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 300, 50
UPWARD = {  # an import that breaks each contract, and where it is put
    "lower floors": ("core/files.py", "from lscollapse.runs import devices"),
    "joins running and reporting": ("experiments/own_model.py", "from lscollapse.reports import verdict"),
    "need no torch": ("theory/arrays.py", "import torch"),
    "No circle": ("core/table.py", "from lscollapse.core import run_folder"),
}


def test_public_names() -> None:
    public = {
        "MonitorCallback",
        "Variant",
        "__version__",
        "grad_norm",
        "lm_loss",
        "measure",
        "measures",
        "monitor",
        "surgery",
    }
    assert set(lscollapse.__all__) == set(dir(lscollapse)) == public
    for name in public - {"__version__", "measures"}:
        assert getattr(lscollapse, name).__module__.startswith("lscollapse.instrument.")


def test_no_module_hides_a_public_function() -> None:
    modules = {module.name for module in pkgutil.iter_modules(lscollapse.__path__)}
    assert modules & set(lscollapse.__all__) == {"measures"}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package in `folder`."""
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("contract", UPWARD)
def test_the_contracts_can_break(contract: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "lscollapse", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file, line = UPWARD[contract]
    changed = tmp_path / "lscollapse" / file
    changed.write_text(f"{changed.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    done = lint(tmp_path)
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert done.returncode == 1
    assert any(contract in text for text in broken)


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines, decorators and docstring included, of every function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, (node.end_lineno or first) - first + 1


def test_no_file_and_no_function_is_too_long() -> None:
    files = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: lines for name, lines in files.items() if lines > LONGEST_FILE} == {}
    assert [found for file in FILES for found in functions(file) if found[1] > LONGEST_FUNCTION] == []


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_dir()}
    for tier in ("unit", "integration"):
        folders = {
            path.relative_to(ROOT / "tests" / tier) for path in (ROOT / "tests" / tier).rglob("*") if path.is_dir()
        }
        assert {folder for folder in folders if folder.name != "__pycache__"} <= rooms
