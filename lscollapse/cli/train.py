"""The verbs that train: `train`, one cell of Table 1, and `table1`, the grid."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lscollapse.cli.options import takes

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.experiments.table1.schema import Table1

takes_table1 = partial(takes, schema="lscollapse.experiments.table1.schema:Table1", file="table1/embedded.yaml")


@takes_table1("task", "mixer", "lam", "lam_init", "lr", "steps", "seed", "config", "device", "settings")
def train(
    grid: Table1,
    task: Annotated[str, typer.Option(help="mqar or image.")] = "mqar",
    mixer: Annotated[str, typer.Option(help="attention, linear, mamba or mamba2.")] = "attention",
    lam: Annotated[str, typer.Option(help="A number, fixed in all layers, or learnable.")] = "1",
    lam_init: Annotated[float | None, typer.Option(help="Where a learnable lambda starts.  \\[default: -1]")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.  \\[default: the first of the configuration]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer.  \\[default: as configured]")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the data.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to train.  \\[default: runs/train/CELL]")] = None,
) -> None:
    """Train one net of Table 1 and read the test set once; killed and started again it continues to the same numbers."""
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.core.config import ConfigError
    from lscollapse.core.outside import checked
    from lscollapse.experiments.table1.grid import one_cell, train_one
    from lscollapse.experiments.table1.schema import Override

    own = checked(Override, {"lr": lr, "steps": steps}, ConfigError)
    cell = one_cell(grid, task, own.lr, own.steps, out)
    with Bar("training") as bar:
        bar.note(f"{cell.words}, in {cell.folder}")
        rows = train_one(cell, bar)
    typer.echo(_one_result(rows))
    typer.echo(f"wrote {cell.folder / 'rows.csv'}")


@takes_table1("config", "device", "workers", "engine", "address", "settings")
def table1(
    grid: Table1,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/table1"),
    to: Annotated[
        Path | None, typer.Option(help="Where to put table and figures.  \\[default: the run folder]")
    ] = None,
) -> None:
    """Fixed against learnt lambda: mixers x lambda modes x learning rates x seeds, the table and its figures."""
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.core.files import write_text
    from lscollapse.experiments.table1.grid import run
    from lscollapse.reports import table1
    from lscollapse.reports.figures.table1 import draw

    with Bar("training") as bar:
        rows = run(grid, out, bar)
    to = to or out
    if to != out:
        to.mkdir(parents=True, exist_ok=True)
        write_text(to / "manifest.json", (out / "manifest.json").read_text(encoding="utf-8"))
    typer.echo(table1.markdown(rows, grid.margin))
    for path in [*table1.write(rows, grid.margin, to), *draw(rows, to)]:
        typer.echo(f"wrote {path}")


def _one_result(rows: pd.DataFrame) -> str:
    after = rows[rows["when"] == "after"].groupby(["measure", "layer"], dropna=False)["value"].mean()
    before = rows[rows["when"] == "before"].groupby(["measure", "layer"], dropna=False)["value"].mean()

    def layers(values: pd.Series, measure: str) -> str:
        return " ".join(f"{value:.3f}" for value in values.loc[measure])

    parts = [f"{name} accuracy {100 * after.loc[f'{name}_accuracy'].iloc[0]:.1f} %" for name in ("validation", "test")]
    parts.append(f"lambda by layer {layers(after, 'lambda')}")
    parts += [f"relative mu by layer {when} {layers(values, 'relative_mu')}"
              for when, values in (("before", before), ("after", after))]  # fmt: skip
    return "\n".join(parts)
