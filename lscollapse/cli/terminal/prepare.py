"""What `check-identity`, `verify-kernels` and `models` show on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from lscollapse.cli.terminal.printing import plain_table
from lscollapse.core.registry import ENTRIES

if TYPE_CHECKING:
    from lscollapse.instrument.identity import LayerDifference
    from lscollapse.models.kernels.verify import KernelCheck

SOURCES = {"package": "embedded", "wheel": "lscollapse fetch", "hub": "hub"}


def identity_table(differences: list[LayerDifference], tolerance: float = 1e-5) -> bool:
    """Print the largest differences of each path and their layers; True where all are within `tolerance`.

    Where values are not finite nothing is said of identity but which layers they are.
    """
    lost = [d.layer for d in differences if d.output != d.output or d.mu != d.mu]
    if lost:
        print(
            f"not known whether it is identical: from layer {min(lost)} of {max(d.layer for d in differences)} on values are"
            " missing (they leave the range of the dtype, or all rows are equal)"
        )
        return False
    headings = ("path", "output, relative", "at layer", "mu, relative", "at layer")
    table = plain_table("instrumented against untouched, largest over layers and excerpts", *headings, left=("path",))
    for path in dict.fromkeys(d.path for d in differences):
        own = [d for d in differences if d.path == path]
        output, mu = max(own, key=lambda d: d.output), max(own, key=lambda d: d.mu)
        table.add_row(path, f"{output.output:.1e}", str(output.layer), f"{mu.mu:.1e}", str(mu.layer))
    Console().print(table)
    good = all(d.output <= tolerance and d.mu <= tolerance for d in differences)
    print(f"{'identical' if good else 'NOT identical'} within {tolerance:g}")
    return good


def kernels_table(rows: Sequence[KernelCheck]) -> None:
    """Print error against tolerance and time against the torch path of every check."""
    headings = ("operation", "case", "runs on", "largest error", "tolerance", "", "seconds", "torch")
    table = plain_table("kernels against a float64 recurrence", *headings, left=("operation", "case", "runs on", ""))
    for row in rows:
        torch_seconds = "-" if row.torch_seconds is None else f"{row.torch_seconds:.4f}"
        verdict = "ok" if row.ok else "OVER"
        numbers = (f"{row.error:.1e}", f"{row.tolerance:.0e}", verdict, f"{row.seconds:.4f}", torch_seconds)
        table.add_row(row.name, str(row.case), row.backend, *numbers)
    Console().print(table)


def models_table() -> None:
    """Print every model that can be loaded by a short name, and where its weights come from."""
    table = Table(box=box.SIMPLE)
    for heading in ("name", "architecture", "parameters", "weights from", "reads"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "parameters" else "left")
    for entry in ENTRIES.values():
        where = f"{SOURCES[entry.source]}: {entry.location}"
        parameters = f"{entry.n_parameters:,}" if entry.n_parameters else "-"
        table.add_row(entry.name, entry.architecture, parameters, where, entry.text)
    Console().print(table)
    print("Any hub id, local folder or GGUF file of a transformers model works too.")
