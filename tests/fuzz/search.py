"""So many malformed documents of a format through the verb that reads it; what went wrong is counted and kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.fuzz.formats import FORMATS, OUT
from tests.fuzz.mutations import documents
from tests.fuzz.shell import taken

KEPT = 20  # faults that are kept with what made them


@dataclass
class Tally:
    """Verbs by exit code, and what was wrong."""

    codes: Counter[int] = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)  # what was wrong, and the document
    wrong: int = 0

    def add(self, code: int, fault: str, data: bytes) -> None:
        self.codes[code] += 1
        self.wrong += bool(fault)
        if fault and len(self.faults) < KEPT:
            self.faults.append((fault, repr(data[:1500])))

    def __str__(self) -> str:
        return ", ".join([*(f"{n} exit {code}" for code, n in sorted(self.codes.items())), f"{self.wrong} faults"])


def search(name: str, examples: int, tally: Tally, seed: int | None = None) -> None:
    """Draw `examples` documents of the format `name`, the same ones each time for a seed."""
    format = FORMATS[name]

    def holds(data: bytes) -> None:
        with TemporaryDirectory(prefix="malformed-") as given:
            root = Path(given)
            tally.add(*taken(format.given(root, data), root, OUT), data)

    drawn = hypothesis.given(documents(format.document(), format.dump))(holds)
    checks = list(HealthCheck)
    hypothesis.seed(seed or 0)(
        hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate]
        )(drawn)
    )()
