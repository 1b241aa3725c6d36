"""The folders that a page is made from, read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lscollapse.core.files import first_line, odd_kind
from lscollapse.core.outside import shown
from lscollapse.core.table import ANGULAR


class ReportError(ValueError):
    """A folder cannot be shown; one line that says what was expected."""


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run folder; `edited` says so where its table is not the one that the run wrote."""

    name: str
    rows: pd.DataFrame
    manifest: dict[str, Any]
    edited: str = ""

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
    """The tables of `theory bound --out`. Raises ReportError where one is missing, damaged or of another shape."""
    for file in (path / "bounds.csv", path / "curve.csv"):
        if kind := odd_kind(file):
            raise ReportError(f"{file} cannot be read: it is {kind}, no file")
    try:
        bounds = pd.read_csv(path / "bounds.csv", keep_default_na=False)
        curve = pd.read_csv(path / "curve.csv")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} has no readable bounds.csv and curve.csv: {first_line(error)}") from None
    if "to" not in bounds:  # a file of before there were intervals with an end
        bounds["to"] = math.inf
    for file, table, needed, numbers in (
        (path / "bounds.csv", bounds, ("bound", "sign", "reads", "note"), ("lam", "to")),
        (path / "curve.csv", curve, (), ("lam", *ANGULAR)),
    ):
        missing = {*needed, "lam"} - set(table)
        if missing:
            raise ReportError(f"{file} has no column {min(missing)!r}: run `lscollapse theory bound` again")
        for column in set(numbers) & set(table):
            try:
                table[column] = pd.to_numeric(table[column].replace("", math.nan))
            except (ValueError, TypeError) as error:
                raise ReportError(f"{file}, column {column}: {shown(first_line(error))}, give numbers") from None
    return Bounds(name.removeprefix("bound-"), bounds, curve)
