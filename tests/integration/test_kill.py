"""A slice of `make kill-test`: verbs killed before some of their operations on files, and at an instant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are waited for as Linux does it")


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_test", ROOT / "scripts" / "kill_test.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_test"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    module.load()
    return module


@pytest.fixture(scope="module")
def base(harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    harness.inputs(folder)
    return folder


@pytest.mark.parametrize(("name", "times"), [("excerpts", 4), ("train", 5), ("sweep", 3)])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(harness: ModuleType, base: Path, name: str, times: int) -> None:
    case = next(case for case in harness.cases(base, "", False) if case.name == name)
    with harness.scratch(base) as folder:
        harness.left_alone(case, folder)
    assert case.operations >= times and any("rows" in file or "jsonl" in file for file in case.files)
    tally = harness.Tally()
    for last in harness.spread(case.operations, times):
        with harness.scratch(base) as folder:
            harness.killed_and_continued(case, folder, tally, last)
    assert tally.wrong == [] and tally.killed[name, "operation"] == times


def test_what_is_wrong_is_seen(harness: ModuleType, base: Path) -> None:
    """A case whose unkilled run made other bytes, and one file less."""
    case = next(case for case in harness.cases(base, "", False) if case.name == "excerpts")
    with harness.scratch(base) as folder:
        harness.left_alone(case, folder)
    case.files = {"frozen.jsonl": b"another", "gone": b""}
    tally = harness.Tally()
    with harness.scratch(base) as folder:
        harness.killed_and_continued(case, folder, tally, 1)
    (wrong,) = tally.wrong
    assert "gone is missing; frozen.jsonl is another" in wrong
