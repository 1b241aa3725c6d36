"""Malformed input of every format: the verb that reads it has the right rows or refuses in one line, and leaves nothing behind.

`make fuzz` tries many more. What it found is kept here, a case a fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.formats import FORMATS
from tests.fuzz.search import Tally, search
from tests.verbs import run

EXAMPLES = 200


@pytest.mark.parametrize("name", FORMATS)
def test_the_document_that_is_malformed_is_a_valid_one(name: str, tmp_path: Path) -> None:
    format = FORMATS[name]
    with format.around(tmp_path):
        code, out, err = run(format.given(tmp_path, format.dump(format.document())))
    assert code == 0, out + err


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if not format.slow])
def test_a_malformed_document_is_one_line(name: str) -> None:
    tally = Tally()
    search(name, EXAMPLES, tally)
    assert not tally.faults, "\n".join(map(" <- ".join, tally.faults))
    assert tally.codes[2] > EXAMPLES // 8, f"most of them are no faults: {tally}"
