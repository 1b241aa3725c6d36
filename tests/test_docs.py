"""The Python examples of docs/python.md and of the README run, and print what they say they print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import logging

from tests.equivalence import tiny

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(file: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))


def run(file: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> int:
    """Runs the python blocks of a file in one namespace; compares with a text block that follows one. Counts both."""
    found = blocks(file)
    ran = 0
    for (language, code), (following, shown) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "python":
            continue
        exec(compile(code, f"{file}, block {ran}", "exec"), names)
        printed = capsys.readouterr().out
        ran += 1
        if following == "text":
            assert printed == shown, f"{file} shows\n{shown}\nand this is printed\n{printed}"
            ran += 1
    return ran


def test_the_page_on_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()
    assert run("docs/python.md", {}, capsys) == 12


def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It speaks of a model with a gate and its token ids."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": tiny.mamba2(), "input_ids": torch.as_tensor(tiny.ids(2, 8))}
    assert run("README.md", names, capsys) > 0
    assert len(names["rows"])
