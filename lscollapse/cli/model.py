"""The verb `measure`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lscollapse.cli import options as o
from lscollapse.reports import verdict

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from lscollapse.reports.verdict import ArmCurves


def measure(
    model: o.ModelName,
    lambdas: Annotated[str | None, typer.Option(help='Comma-separated, such as "-2,0,0.5,1".  \\[default: 1, the model as it is]')] = None,
    lambdas_file: o.LambdasFile = None, excerpts: o.Excerpts = None, tokens: o.Tokens = None,
    source: Annotated[str | None, typer.Option(help="packaged, wikipedia, datasets, or a .txt, .jsonl or .parquet file; for ViT digits or a folder of pictures.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="native, bert, or a folder or hub id.  \\[default: native]")] = None,
    skip_site: o.SkipSite = None,
    gating: Annotated[bool, typer.Option("--gating/--no-gating", help="Without the gate; refused where none is known.")] = True,
    dtype: o.Dtype = None, device: o.Device = None, seed: o.Seed = None, random_init: o.RandomInit = None,
    offline: o.Offline = None, stream: o.Stream = None, max_memory: o.Memory = None, settings: o.Set = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.  \\[default: runs/measure/MODEL]")] = None,
    yscale: o.Yscale = "linear",
) -> None:  # fmt: skip
    """Does this model collapse? Any encoder or decoder of transformers: rank-collapse measures layer by layer, and a verdict."""
    from lscollapse.cli.terminal import paper as console
    from lscollapse.core import config
    from lscollapse.experiments import own_model
    from lscollapse.reports.figures import draw

    experiment = config.load(
        None,
        {
            "models": [model], "lambdas": config.parse_lambdas(lambdas or "1"), "lambdas_file": lambdas_file,
            "excerpts": excerpts, "tokens": tokens, "source": source, "tokenizer": tokenizer, "skip_site": skip_site,
            "gating": gating, "dtype": dtype, "device": device, "seed": seed, "random_init": random_init,
            "offline": offline, "stream": stream, "max_memory": max_memory,
        },
        settings,
    )  # fmt: skip
    out = out or Path("runs/measure") / re.sub(r"[^\w.-]+", "_", model.strip("/.").rpartition("/")[2])
    with console.Bar() as bar:
        rows = own_model.measure(experiment, out, bar)
    show(rows, own_tokens=own_model.reads_own_tokens(experiment))
    for path in draw.draw("measure", rows, out, yscale):
        typer.echo(f"wrote {path}")


def show(rows: pd.DataFrame, own_tokens: bool) -> None:
    """Print what was read, first, worst and last value of every measure, and the verdict on each variant."""
    from rich.console import Console

    from lscollapse.core.table import reads_pixels
    from lscollapse.models.adapters.generic import BACKEND
    from lscollapse.reports.figures.wording import describe

    console = Console(soft_wrap=True, highlight=False)
    console.print(describe(rows), markup=False)
    if not reads_pixels(rows):
        tokens = ", ".join(rows["tokenizer"].unique())
        own = " (the model's own; the paper feeds every model BERT's: --tokenizer bert)"
        console.print(f"Tokens: {tokens}{own if own_tokens and tokens != 'bert-base-uncased' else ''}.", markup=False)
    if BACKEND in set(rows["backend"]):
        console.print("No adapter of its own: blocks and residual sums were found, and tested on these excerpts.")
    found = list(verdict.arms(rows))
    for title, arms in itertools.groupby(found, _title):
        console.print(_table(title, arms))
    for arm in found:
        console.print(f"{_title(arm)}, lambda {_lambda(arm)}: {verdict.verdict(arm)}", markup=False)


def _table(title: str, arms: Iterable[ArmCurves]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=f"{title}: mean over excerpts", box=box.SIMPLE, title_justify="left")
    for heading in ("lambda", "measure", "embedding", "worst", "layer", "last"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for arm in arms:
        lam = _lambda(arm)
        for measure, curve in arm.curves.items():
            first = f"{curve.iloc[0]:.3f}" if len(curve) else "-"
            worst = arm.worst(measure)
            value, layer = ("-", "-") if worst is None else (f"{worst[0]:.3f}", str(worst[1]))
            last = "missing" if arm.lost else f"{curve.iloc[-1]:.3f}"
            table.add_row(lam, measure.replace("_", " "), first, value, layer, last)
            lam = ""
    return table


def _title(arm: ArmCurves) -> str:
    return f"{arm.model}{' (random)' if arm.init == 'random' else ''}, {arm.arm}"


def _lambda(arm: ArmCurves) -> str:
    return "per layer" if arm.lam != arm.lam else f"{arm.lam:g}"
