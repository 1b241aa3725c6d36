"""What the verbs of the paper's experiments show on the terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Console

from lscollapse.cli.terminal.printing import lambda_word, model_word, plain_console, plain_table
from lscollapse.reports.claims.sentences import judge, judge_readings
from lscollapse.reports.verdict import AGREE, DISAGREE, NOT_MEASURED


def last_layer_table(rows: pd.DataFrame) -> None:
    """Print the mean last-layer relative mu: a line per lambda, a column per model and arm."""
    last = rows[(rows["measure"] == "relative_mu") & (rows["layer"] == rows.groupby("model")["layer"].transform("max"))]
    arms = last.groupby(["lam", "model", "init", "arm"], sort=False, dropna=False)["value"]
    means = arms.agg(lambda values: values.mean(skipna=False))  # an excerpt that lacks the last layer leaves no mean
    curves = list(dict.fromkeys(zip(last["model"], last["init"], last["arm"], strict=True)))
    headings = ["lambda", *(f"{model_word(model, init)}\n{arm}" for model, init, arm in curves)]
    table = plain_table("last-layer relative mu, mean over excerpts", *headings, right=headings)
    for lam in sorted(last["lam"].unique()):
        found = (means.get((lam, *curve), "") for curve in curves)
        cells = ("" if mean == "" else "missing" if mean != mean else f"{mean:.3f}" for mean in found)
        table.add_row(lambda_word(lam), *cells)
    Console().print(table)


def arms_table(rows: pd.DataFrame) -> None:
    """Print of every arm the first, least and last mean relative mu, and the layer at which it overflowed."""
    relative = rows[rows["measure"] == "relative_mu"]
    headings = ("model", "arm", "lambda", "dtype", "first", "least", "last", "overflow")
    table = plain_table("relative mu, mean over excerpts", *headings, left=("model", "arm", "dtype"))
    for (model, init, arm, _, dtype), part in relative.groupby(
        ["model", "init", "arm", "lam", "dtype"], sort=False, dropna=False
    ):
        lost = part.loc[part["status"].isin(["overflow", "nan"]), "layer"]
        finite = part[part["layer"] < lost.min()] if len(lost) else part
        curve = finite.groupby("layer")["value"].mean()
        ends = f"layer {lost.min()}" if len(lost) else "none"
        least = f"{curve.min():.3f} (layer {curve.idxmin()})" if len(curve) else "-"
        table.add_row(
            model_word(str(model), str(init)),
            str(arm),
            lambda_word(part["lam"].iloc[0]),
            str(dtype),
            f"{curve.iloc[0]:.3f}" if len(curve) else "-",
            least,
            "missing" if len(lost) else f"{curve.iloc[-1]:.3f}",
            ends,
        )
    Console().print(table)


def claims_table(rows: pd.DataFrame) -> None:
    """Print the verdict on each sentence of the paper that these rows can judge, with its numbers."""
    console = plain_console()
    console.print("what the paper writes, on these models (thresholds: docs/claims.md)", style="italic")
    for finding in judge(rows):
        if finding.verdict != NOT_MEASURED or finding.numbers:
            console.print(
                f"  {finding.claim}  {finding.model}  [bold]{finding.verdict}[/bold]  {finding.sentence}", markup=True
            )
            console.print(f"             {finding.numbers}", style="dim", markup=False)


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
