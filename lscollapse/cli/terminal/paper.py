"""What the command line shows: a progress bar with an ETA, and small tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from lscollapse.instrument.identity import LayerDifference
    from lscollapse.models.kernels.verify import KernelCheck


class Bar:
    """An experiments.Progress on the terminal; off a terminal it prints notes only. `what` is done meanwhile."""

    def __init__(self, what: str = "measuring") -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not sys.stderr.isatty())
        self.task: TaskID | None = None

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def start(self, total: float) -> None:
        self.task = self.progress.add_task("", total=total)

    def advance(self, amount: float) -> None:
        if self.task is not None:
            self.progress.advance(self.task, amount)


def last_layer_table(rows: pd.DataFrame) -> None:
    """Print the mean last-layer relative mu: a line per lambda, a column per model and arm."""
    last = rows[(rows["measure"] == "relative_mu") & (rows["layer"] == rows.groupby("model")["layer"].transform("max"))]
    arms = last.groupby(["lam", "model", "init", "arm"], sort=False, dropna=False)["value"]
    means = arms.agg(lambda values: values.mean(skipna=False))  # an excerpt that lacks the last layer leaves no mean
    table = Table(title="last-layer relative mu, mean over excerpts", box=box.SIMPLE, title_justify="left")
    table.add_column("lambda", justify="right")
    subjects = list(dict.fromkeys(zip(last["model"], last["init"], last["arm"], strict=True)))
    for model, init, arm in subjects:
        table.add_column(f"{model}{_of(init)}\n{arm}", justify="right")
    for lam in sorted(last["lam"].unique()):
        found = (means.get((lam, *subject), "") for subject in subjects)
        cells = ("" if mean == "" else "missing" if mean != mean else f"{mean:.3f}" for mean in found)
        table.add_row("per layer" if lam != lam else f"{lam:g}", *cells)
    Console().print(table)


def arms_table(rows: pd.DataFrame) -> None:
    """Print of every arm the first, least and last mean relative mu, and the layer at which it overflowed."""
    relative = rows[rows["measure"] == "relative_mu"]
    table = Table(title="relative mu, mean over excerpts", box=box.SIMPLE, title_justify="left")
    for heading in ("model", "arm", "lambda", "dtype", "first", "least", "last", "overflow"):
        table.add_column(heading, justify="left" if heading in ("model", "arm", "dtype") else "right")
    for (model, init, arm, lam, dtype), part in relative.groupby(
        ["model", "init", "arm", "lam", "dtype"], sort=False, dropna=False
    ):
        lost = part.loc[part["status"].isin(["overflow", "nan"]), "layer"]
        finite = part[part["layer"] < lost.min()] if len(lost) else part
        curve = finite.groupby("layer")["value"].mean()
        ends = f"layer {lost.min()}" if len(lost) else "none"
        least = f"{curve.min():.3f} (layer {curve.idxmin()})" if len(curve) else "-"
        table.add_row(
            f"{model}{_of(str(init))}",
            str(arm),
            "per layer" if lam != lam else f"{lam:g}",
            str(dtype),
            f"{curve.iloc[0]:.3f}" if len(curve) else "-",
            least,
            "missing" if len(lost) else f"{curve.iloc[-1]:.3f}",
            ends,
        )
    Console().print(table)


def claims_table(rows: pd.DataFrame) -> None:
    """Print the verdict on each sentence of the paper that these rows can judge, with its numbers."""
    from lscollapse.reports.claims import sentences as claims
    from lscollapse.reports.verdict import NOT_MEASURED

    console = Console(soft_wrap=True, highlight=False)
    console.print("what the paper writes, on these models (thresholds: docs/claims.md)", style="italic")
    for finding in claims.judge(rows):
        if finding.verdict != NOT_MEASURED or finding.numbers:
            console.print(
                f"  {finding.claim}  {finding.model}  [bold]{finding.verdict}[/bold]  {finding.sentence}", markup=True
            )
            console.print(f"             {finding.numbers}", style="dim", markup=False)


def readings_table(rows: pd.DataFrame) -> None:
    """Print which reading of the paper agrees with which of its sentences."""
    from lscollapse.reports.claims import sentences as claims
    from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED

    verdicts = claims.judge_readings(rows)
    cells = verdicts.set_index(["claim", "model", "skip_site", "norm_site"])["verdict"]
    sentences = dict(zip(verdicts["claim"], verdicts["sentence"], strict=True))
    table = Table(title="which readings agree with the paper", box=box.SIMPLE, title_justify="left")
    for heading in ("model", "skip", "norm removed", *sentences):
        table.add_column(heading.replace("figure ", ""), no_wrap=heading in sentences)
    marks = {AGREE: "yes", DISAGREE: "no", NOT_MEASURED: "-"}
    for reading in dict.fromkeys(zip(verdicts["model"], verdicts["skip_site"], verdicts["norm_site"], strict=True)):
        table.add_row(*reading, *(marks[cells[(claim, *reading)]] for claim in sentences))
    Console().print(table)
    for claim, sentence in sentences.items():
        print(f"  {claim.removeprefix('figure ')}  {sentence}")


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
    table = Table(
        title="instrumented against untouched, largest over layers and excerpts", box=box.SIMPLE, title_justify="left"
    )
    for heading in ("path", "output, relative", "at layer", "mu, relative", "at layer"):
        table.add_column(heading, justify="left" if heading == "path" else "right")
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
    table = Table(title="kernels against a float64 recurrence", box=box.SIMPLE, title_justify="left")
    for heading in ("operation", "case", "runs on", "largest error", "tolerance", "", "seconds", "torch"):
        table.add_column(
            heading, justify="right" if heading in ("largest error", "tolerance", "seconds", "torch") else "left"
        )
    for row in rows:
        torch_seconds = "-" if row.torch_seconds is None else f"{row.torch_seconds:.4f}"
        verdict = "ok" if row.ok else "OVER"
        numbers = (f"{row.error:.1e}", f"{row.tolerance:.0e}", verdict, f"{row.seconds:.4f}", torch_seconds)
        table.add_row(row.name, str(row.case), row.backend, *numbers)
    Console().print(table)


def _of(init: str) -> str:
    return " (random)" if init == "random" else ""


def models_table() -> None:
    """Print the registry."""
    from lscollapse.core.registry import ENTRIES

    table = Table(box=box.SIMPLE)
    for heading in ("name", "architecture", "parameters", "weights from", "reads"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "parameters" else "left")
    for entry in ENTRIES.values():
        where = f"embedded: {entry.location}" if entry.embedded else f"hub: {entry.location}"
        table.add_row(
            entry.name, entry.architecture, f"{entry.n_parameters:,}" if entry.n_parameters else "-", where, entry.text
        )
    Console().print(table)
    print("Any hub id or local folder of a transformers model works too.")
