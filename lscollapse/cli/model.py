"""The verb `measure`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lscollapse.cli.options import Model, Yscale, takes
from lscollapse.core.config import Experiment


@takes("model", "lambdas", "lambdas_file", "excerpts", "tokens", "source", "tokenizer", "skip_site", "gating", "dtype",
       "device", "seed", "random_init", "offline", "stream", "max_memory", "settings", lambdas="1", gating=True)  # fmt: skip
def measure(
    experiment: Experiment,
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Run folder.  \\[default: runs/measure/MODEL]")] = None,
    yscale: Yscale = "linear",
) -> None:
    """Does this model collapse? Any encoder or decoder of transformers: rank-collapse measures layer by layer, and a verdict."""
    from lscollapse.reports.painter import Painter

    out = out or Path("runs/measure") / re.sub(r"[^\w.-]+", "_", model.strip("/.").rpartition("/")[2])
    with Painter() as painter:
        from lscollapse.cli.terminal.bar import Bar
        from lscollapse.cli.terminal.model import show
        from lscollapse.experiments import own_model

        with Bar() as bar:
            rows = own_model.measure_own(experiment, out, bar)
        painter.begin(out, yscale)
        show(rows, own_tokens=own_model.reads_own_tokens(experiment))
        for path in painter.written():
            typer.echo(f"wrote {path}")
