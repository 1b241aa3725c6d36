"""What work that takes long tells while it goes on."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a run tells while it works; the command line draws it. As they are here, the methods say nothing."""

    def note(self, message: str) -> None:
        return None

    def start(self, total: float) -> None:
        return None

    def grow(self, amount: float) -> None:
        """There is more to do than `start` was told."""
        return None

    def advance(self, amount: float) -> None:
        return None


class Silent(Progress):
    """A Progress that says nothing."""


SILENT = Silent()
