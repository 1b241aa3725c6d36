"""The folders that a page is made from, read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lscollapse.core.files import first_line


class ReportError(ValueError):
    """A folder cannot be shown; one line that says what was expected."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run folder."""

    name: str
    rows: pd.DataFrame
    manifest: dict[str, Any]

    @property
    def experiment(self) -> str:
        return str(self.manifest["identity"].get("experiment", ""))


@dataclass(frozen=True)
class Bounds:
    """What `theory bound` left in a folder: bounds.csv and curve.csv."""

    name: str
    bounds: pd.DataFrame
    curve: pd.DataFrame


def named(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder once, named without the way to it, and by a number where another has that name."""
    names: dict[Path, str] = {}
    for path in folders:
        own = path.resolve().name
        same = sum(other.resolve().name == own for other in names)
        names.setdefault(path, f"{own} ({same + 1})" if same else own)
    return names


def read_bounds(path: Path, name: str) -> Bounds:
    try:
        bounds = pd.read_csv(path / "bounds.csv", keep_default_na=False, float_precision="round_trip")
        curve = pd.read_csv(path / "curve.csv", float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} has no readable bounds.csv and curve.csv: {first_line(error)}") from None
    if "to" not in bounds:  # a file of before there were intervals with an end
        bounds["to"] = math.inf
    return Bounds(name.removeprefix("bound-"), bounds, curve)
