"""Malformed input of every format: the verb that reads it has the right rows or refuses in one line, and leaves nothing behind.

`make fuzz` tries many more. What it found is kept here, a case a fault.
"""

from __future__ import annotations

import pytest

from tests.fuzz.formats import FORMATS
from tests.fuzz.search import Tally, search

EXAMPLES = 200


@pytest.mark.parametrize("name", FORMATS)
def test_a_malformed_document_is_one_line(name: str) -> None:
    tally = Tally()
    search(name, EXAMPLES, tally)
    assert not tally.faults, "\n".join(map(" <- ".join, tally.faults))
    assert tally.codes[2] > EXAMPLES // 8, f"most of them are no faults: {tally}"
