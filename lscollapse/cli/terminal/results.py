"""What `claims`, `compare` and `doctor` show on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lscollapse.cli.terminal.printing import plain_console, plain_table
from lscollapse.core.manifest import MANIFEST
from lscollapse.core.outside import plain
from lscollapse.core.rows import edited_words
from lscollapse.reports.claims.sentences import footnotes
from lscollapse.reports.verdict import VERDICTS

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.reports.compare import Comparison
    from lscollapse.reports.compare_figures import Figures
    from lscollapse.runs.model_checks import Diagnosis

WIDEST_VERDICT = max(map(len, VERDICTS))


def show_claims(rows: pd.DataFrame, form: str) -> None:
    """Print the table of `claims.sentences.judged`: as text sentence by sentence, then how often each model agrees."""
    if form != "text":
        _export(rows, form)
        return
    console = plain_console()
    console.print("what the paper writes, on these runs (thresholds: docs/claims.md)", style="italic")
    width = rows["model"].str.len().max()
    for (claim, sentence), part in rows.groupby(["claim", "sentence"], sort=False):
        console.print(f"{claim}  {sentence}", style="bold", markup=False)
        for row in part.to_dict("records"):
            reading = f"({row['reading']}) " if row["reading"] else ""
            line = f"    {row['verdict']:{WIDEST_VERDICT}}  {row['model']:{width}}  {reading}{row['numbers']}"
            console.print(line.rstrip(), markup=False)
    for note in footnotes(rows):
        console.print(f"note {note}", markup=False)
    default = rows[(rows["reading"] == "") & (rows["model"] != "")]
    table = plain_table(None, "model", *VERDICTS, right=VERDICTS)
    for model in dict.fromkeys(default["model"]):
        own = default.loc[default["model"] == model, "verdict"]
        table.add_row(str(model), *(str((own == verdict).sum()) for verdict in VERDICTS))
    if table.row_count:
        console.print(table)


def tell_edited(runs: Sequence[Path]) -> None:
    """Say on stderr which of these tables were edited after their run."""
    for run in runs:
        if (run / MANIFEST).exists() and (words := edited_words(run)):
            print(words, file=sys.stderr)


def show_sentences(rows: pd.DataFrame, form: str) -> None:
    """Print the sentences that can be judged, each with its threshold."""
    if form != "text":
        _export(rows, form)
        return
    console = plain_console()
    for row in rows.to_dict("records"):
        console.print(f"{row['claim']}  {row['sentence']}", style="bold", markup=False)
        console.print(f"    {row['threshold']}", markup=False)


def _export(rows: pd.DataFrame, form: str) -> None:
    if form == "csv":
        sys.stdout.write(rows.to_csv(index=False))
    elif form == "json":
        sys.stdout.write(json.dumps(rows.to_dict("records"), indent=2, ensure_ascii=False) + "\n")
    else:
        filled = rows.loc[:, (rows != "").any()]
        cells = [list(filled.columns), ["---"] * filled.shape[1], *filled.astype(str).values.tolist()]
        sys.stdout.writelines("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in cells)


def show_comparison(comparison: Comparison, lines: int) -> None:
    """Print what differs in the configuration, the largest differences, what only one run has, and the verdict."""
    console = plain_console()
    _listed(console, "configuration", comparison.configuration)
    _listed(console, "only in A", comparison.only_a)
    _listed(console, "only in B", comparison.only_b)
    _listed(console, "lost to overflow or NaN, or unresolved, in one of them", comparison.lost)
    differing = comparison.differences[comparison.differences["difference"] != 0.0].head(lines)
    if len(differing):
        console.print("largest differences of the mean over excerpts", style="italic")
        console.print("       A        B    B - A   spread    error    ratio  measure, layer: arm", style="dim")
    for row in differing.to_dict("records"):
        numbers = (_number(row[name]) for name in ("a", "b", "difference", "spread", "error", "ratio"))
        where = f"{row['measure']}, layer {row['layer']}: {row['name']}"
        console.print(" ".join(numbers) + f"  {where}", markup=False)
    for note in comparison.notes:
        console.print(note, markup=False)
    console.print(comparison.sentence, style="bold", markup=False)


def show_figures(figures: Figures) -> None:
    """Print a line for each figure, and what was not compared."""
    console = plain_console()
    for line in figures.lines:
        console.print(line, markup=False)


def _number(value: float) -> str:
    return f"{value:8.3g}" if value == value else "       -"


def _listed(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(title, style="italic")
    for line in lines:
        console.print(f"  {line}", markup=False)


def show_checks(checks: Sequence[Diagnosis]) -> None:
    """Print what was found, one line each, with the mend under what does not work, and the verdict."""
    console = plain_console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        state = "no" if check.mend else "ok" if check.good else "--"
        line = plain(f"{state}  {check.name.ljust(width)}  {check.found}")
        console.print(line, style="bold" if check.mend else "", markup=False)
        if check.mend:
            console.print(plain(f"    {'':{width}}  mend: {check.mend}"), markup=False)
    bad = sum(bool(check.mend) for check in checks)
    verdict = f"this configuration cannot run: {bad} to mend" if bad else "this configuration can run"
    console.print(verdict, style="bold")
