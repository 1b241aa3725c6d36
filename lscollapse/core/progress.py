"""What long work tells while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """What `run` tells while it works; the CLI draws it."""

    def note(self, message: str) -> None: ...

    def start(self, total: float) -> None: ...

    def advance(self, amount: float) -> None: ...


@dataclass(frozen=True)
class Silent:
    """A Progress that says nothing."""

    def note(self, message: str) -> None:
        return None

    def start(self, total: float) -> None:
        return None

    def advance(self, amount: float) -> None:
        return None


SILENT = Silent()
