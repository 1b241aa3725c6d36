"""The verbs of the paper's experiments, Figures 1 to 4, and `figures`, which draws them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lscollapse.cli.options import Edited, Models, Out, Shown, Yscale, takes
from lscollapse.core.config import Experiment

MEASURED = ("dtype", "device", "kernels", "products", "seed", "random_init", "offline", "certified_exit", "stream",
            "max_memory", "quality", "gradients", "engine", "address")  # fmt: skip
TEXTS = ("excerpts", "tokens", "source", "titles", "tokenizer", "skip_site", "norm_site")


@takes("config", "models", "lambdas", "lambdas_file", *TEXTS, "gating", *MEASURED, "settings")
def sweep_lambda(experiment: Experiment, out: Out = None, yscale: Yscale = "linear") -> None:
    """Measure every lambda: Figure 1 (relative mu against layer) and Figure 2 (last layer against lambda)."""
    from lscollapse.reports.painter import Painter

    out = out or Path("runs/sweep-lambda")
    with Painter() as painter:
        from lscollapse.cli.terminal.bar import Bar
        from lscollapse.cli.terminal.paper import claims_table, last_layer_table
        from lscollapse.experiments import paper

        with Bar() as bar:
            rows = paper.sweep_lambda(experiment, out, bar)
        painter.begin(out, yscale)
        last_layer_table(rows)
        claims_table(rows)
        _tell(painter.written())


@takes("config", "model", "lambdas", "lambdas_file", *TEXTS, *MEASURED, "all_readings", "settings")
def ablate_gating(
    experiment: Experiment,
    model: Models = None,
    all_readings: Annotated[
        bool, typer.Option("--all-readings", help="Cross skip_site, norm_site and gating.")
    ] = False,
    out: Out = None,
) -> None:
    """Gating x LayerNorm at lambda = 1: Figure 3. With --all-readings, every place where lambda and the norm could sit."""
    from lscollapse.reports.painter import Painter

    out = out or Path("runs/all-readings" if all_readings else "runs/ablate-gating")
    with Painter() as painter:
        from lscollapse.cli.terminal.bar import Bar
        from lscollapse.cli.terminal.paper import arms_table, claims_table, readings_table
        from lscollapse.experiments import paper

        if model is None:
            experiment = paper.with_gated_models(experiment)
        with Bar() as bar:
            rows = (paper.all_readings if all_readings else paper.ablate_gating)(experiment, out, bar)
        painter.begin(out)
        if all_readings:
            readings_table(rows)
        else:
            arms_table(rows)
            claims_table(rows)
        _tell(painter.written())


@takes("config", "models", "excerpts", "source", "dtype", "device", "seed", "random_init", "offline", "engine", "address",
       "train_arms", "settings")  # fmt: skip
def ablate_s4d(
    experiment: Experiment,
    train_arms: Annotated[bool, typer.Option("--retrain", help="Train each arm as it is, instead of ablating one trained net.")] = False,
    out: Out = None,
) -> None:  # fmt: skip
    """Skip x LayerNorm of a trained S4D on images: Figure 4."""
    from lscollapse.reports.painter import Painter

    out = out or Path("runs/ablate-s4d-retrained" if train_arms else "runs/ablate-s4d")
    with Painter() as painter:
        from lscollapse.cli.terminal.bar import Bar
        from lscollapse.cli.terminal.paper import arms_table, claims_table
        from lscollapse.experiments import paper, retrain

        with Bar("training" if train_arms else "measuring") as bar:
            rows = (retrain.ablate_retrained if train_arms else paper.ablate_s4d)(experiment, out, bar)
        painter.begin(out)
        arms_table(rows)
        claims_table(rows)
        _tell(painter.written())


def figures(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    to: Annotated[Path | None, typer.Option(help="Where to put the figures.  \\[default: each run's folder]")] = None,
    measure: Shown = "relative_mu",
    yscale: Yscale = "linear",
    edited: Edited = False,
) -> None:
    """Draw the figures of finished runs again, without computing."""
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.cli.terminal.results import tell_edited
    from lscollapse.reports.painter import draw_run

    for run in runs:
        with Bar("drawing") as bar:
            written = draw_run(run, to or run, yscale, measure, not edited, bar)
        _tell(written)
    tell_edited(runs)


def _tell(written: list[Path]) -> None:
    for path in written:
        typer.echo(f"wrote {path}")
