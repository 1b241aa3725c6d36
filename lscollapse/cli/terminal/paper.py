"""What the verbs of the paper's experiments show on the terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Console

from lscollapse.cli.terminal.printing import model_word, plain_console, plain_table, value_word
from lscollapse.core.table import UNRESOLVED, lambda_word
from lscollapse.reports.claims.sentences import footnotes, judge, judge_readings
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED, arms, unresolved_words


def last_layer_table(rows: pd.DataFrame) -> None:
    """Print the mean last-layer relative mu: a line per lambda, a column per model and arm."""
    last = rows[(rows["measure"] == "relative_mu") & (rows["layer"] == rows.groupby("model")["layer"].transform("max"))]
    keys = ["lam", "model", "init", "arm"]
    # An excerpt that lacks the last layer leaves no mean, and so does one that is unresolved there.
    means = last.groupby(keys, sort=False, dropna=False)["value"].agg(lambda values: values.mean(skipna=False))
    unresolved = set(last.loc[last["status"] == UNRESOLVED, keys].itertuples(index=False, name=None))
    curves = list(dict.fromkeys(zip(last["model"], last["init"], last["arm"], strict=True)))
    headings = ["lambda", *(f"{model_word(model, init)}\n{arm}" for model, init, arm in curves)]
    table = plain_table("last-layer relative mu, mean over excerpts", *headings, right=headings)
    for lam in sorted(last["lam"].unique()):
        found = {(lam, *curve): means.get((lam, *curve), "") for curve in curves}
        cells = ("" if mean == "" else "missing" if mean != mean else "unresolved" if arm in unresolved else f"{mean:.3f}"
                 for arm, mean in found.items())  # fmt: skip
        table.add_row(lambda_word(lam), *cells)
    Console().print(table)


def arms_table(rows: pd.DataFrame) -> None:
    """Print of every arm the first, least and last mean relative mu, the layer at which it overflowed, and what is unresolved."""
    found = list(arms(rows))
    headings = ("model", "arm", "lambda", "dtype", "first", "least", "last", "overflow")
    table = plain_table("relative mu, mean over excerpts", *headings, left=("model", "arm", "dtype"))
    for arm in found:
        curve, lost = arm.curves["relative_mu"], arm.lost
        table.add_row(
            model_word(arm.model, arm.init),
            arm.arm,
            lambda_word(arm.lam),
            arm.dtype,
            value_word(curve.iloc[0]) if len(curve) else "-",
            f"{curve.min():.3f} (layer {curve.idxmin()})" if curve.notna().any() else "-",
            "missing" if lost else value_word(curve.iloc[-1]),
            f"layer {lost.layer}" if lost else "none",
        )
    Console().print(table)
    for arm in found:
        if arm.unresolved:
            name = f"{model_word(arm.model, arm.init)}, {arm.arm}, lambda {lambda_word(arm.lam)}"
            plain_console().print(f"{name}: {unresolved_words(arm.unresolved, arm.dtype)}", markup=False)


def claims_table(rows: pd.DataFrame) -> None:
    """Print the verdict on each sentence of the paper that these rows can judge, with its numbers."""
    console = plain_console()
    console.print("what the paper writes, on these models (thresholds: docs/claims.md)", style="italic")
    found = list(judge(rows))
    for finding in found:
        if finding.verdict != NOT_MEASURED or finding.numbers:
            console.print(
                f"  {finding.claim}  {finding.model}  [bold]{finding.verdict}[/bold]  {finding.sentence}", markup=True
            )
            console.print(f"             {finding.numbers}", style="dim", markup=False)
    for note in footnotes(pd.DataFrame(found)):
        console.print(f"  note {note}", style="dim", markup=False)


def readings_table(rows: pd.DataFrame) -> None:
    """Print which reading of the paper agrees with which of its sentences."""
    verdicts = judge_readings(rows)
    cells = verdicts.set_index(["claim", "model", "skip_site", "norm_site"])["verdict"]
    sentences = dict(zip(verdicts["claim"], verdicts["sentence"], strict=True))
    table = plain_table("which readings agree with the paper", "model", "skip", "norm removed")
    for heading in sentences:
        table.add_column(heading.replace("figure ", ""), no_wrap=True)
    marks = {AGREE: "yes", DISAGREE: "no", NOT_MEASURED: "-"}
    for reading in dict.fromkeys(zip(verdicts["model"], verdicts["skip_site"], verdicts["norm_site"], strict=True)):
        table.add_row(*reading, *(marks[cells[(claim, *reading)]] for claim in sentences))
    Console().print(table)
    for claim, sentence in sentences.items():
        print(f"  {claim.removeprefix('figure ')}  {sentence}")
