"""The verbs that train: `train`, one cell of Table 1, and `table1`, the grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lscollapse.cli import options as o

if TYPE_CHECKING:
    import pandas as pd

Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file as in configs/table1; flags override it.  \\[default: embedded]"),
]


def train(
    task: Annotated[str, typer.Option(help="mqar or image.")] = "mqar",
    mixer: Annotated[str, typer.Option(help="attention, linear, mamba or mamba2.")] = "attention",
    lam: Annotated[str, typer.Option(help="A number, fixed in all layers, or learnable.")] = "1",
    lam_init: Annotated[float | None, typer.Option(help="Where a learnable lambda starts.  \\[default: -1]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  \\[default: the first of the configuration]")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer.  \\[default: as configured]")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the data.")] = 0,
    config: Config = None, device: o.Device = None, settings: o.Set = None,
    out: Annotated[Path | None, typer.Option(help="Where to train.  \\[default: runs/train/CELL]")] = None,
) -> None:  # fmt: skip
    """Train one net of Table 1 and read the test set once; killed and started again it continues to the same numbers."""
    from lscollapse.cli.terminal import paper as console
    from lscollapse.experiments.table1 import grid as table1

    flags = {"mixers": [mixer], "lams": [lam], "seeds": [seed], "device": device}
    flags["lam_inits"] = None if lam_init is None else [lam_init]
    cell = table1.one_cell(_load(config, flags, settings), task, lr, steps, out)
    with console.Bar("training") as bar:
        bar.note(f"{cell.words}, in {cell.folder}")
        rows = table1.train_one(cell, bar)
    typer.echo(_one_result(rows))
    typer.echo(f"wrote {cell.folder / 'rows.csv'}")


def table1(
    config: Config = None, device: o.Device = None,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine.  \\[default: one for each core]")] = None,
    engine: o.Engine = None, address: o.Address = None, settings: o.Set = None,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/table1"),
    to: Annotated[Path | None, typer.Option(help="Where to put table and figures.  \\[default: the run folder]")] = None,
) -> None:  # fmt: skip
    """Fixed against learnt lambda: mixers x lambda modes x learning rates x seeds, the table and its figures."""
    from lscollapse.cli.terminal import paper as console
    from lscollapse.core.files import write_text
    from lscollapse.experiments.table1.grid import run
    from lscollapse.reports import table1 as table1_report
    from lscollapse.reports.figures import table1 as figures_table1

    flags = {"device": device, "workers": workers, "engine": engine, "address": address}
    grid = _load(config, flags, settings)
    with console.Bar("training") as bar:
        rows = run(grid, out, bar)
    to = to or out
    if to != out:
        to.mkdir(parents=True, exist_ok=True)
        write_text(to / "manifest.json", (out / "manifest.json").read_text(encoding="utf-8"))
    typer.echo(table1_report.markdown(rows, grid.margin))
    for path in [*table1_report.write(rows, grid.margin, to), *figures_table1.draw(rows, to)]:
        typer.echo(f"wrote {path}")


def _load(config: Path | None, flags: dict[str, Any], settings: list[str] | None) -> Any:
    from lscollapse.core import config as schema
    from lscollapse.experiments.table1.schema import Table1

    return schema.load(config or schema.shipped("table1/embedded.yaml"), flags, settings, Table1)


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
