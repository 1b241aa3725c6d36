"""The verbs of the paper's experiments: Figures 1 to 4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lscollapse.cli import options as o

if TYPE_CHECKING:
    import pandas as pd

    from lscollapse.core.config import Experiment


def experiment_of(given: dict[str, Any]) -> Experiment:
    """The experiment of a verb's options, by their names: a configuration file, flags over it, `--set` over these.

    Options that are no setting of the experiment, such as `out`, are left alone.
    """
    from lscollapse.core import config as schema

    flags = {name: value for name, value in given.items() if name in schema.Experiment.model_fields}
    if given.get("lambdas") is not None:
        flags["lambdas"] = schema.parse_lambdas(given["lambdas"])
    if given.get("model"):
        flags["models"] = [given["model"]] if isinstance(given["model"], str) else given["model"]
    titles = [] if given.get("titles") is None else [f"wikipedia.titles={given['titles']}"]
    return schema.load(given.get("config"), flags, [*(given.get("settings") or []), *titles])


def sweep_lambda(
    config: o.Config = None, model: o.Model = None, lambdas: o.Lambdas = None, lambdas_file: o.LambdasFile = None,
    excerpts: o.Excerpts = None, tokens: o.Tokens = None, source: o.Source = None, titles: o.Titles = None,
    tokenizer: o.Tokenizer = None, skip_site: o.SkipSite = None, norm_site: o.NormSite = None, gating: o.Gating = None,
    dtype: o.Dtype = None, device: o.Device = None, kernels: o.KernelChoice = None, seed: o.Seed = None, random_init: o.RandomInit = None,
    offline: o.Offline = None, certified_exit: o.Exit = None, stream: o.Stream = None, max_memory: o.Memory = None,
    quality: o.Quality = None, gradients: o.Gradients = None, engine: o.Engine = None, address: o.Address = None,
    settings: o.Set = None, out: o.Out = None, yscale: o.Yscale = "linear",
) -> None:  # fmt: skip
    """Measure every lambda: Figure 1 (relative mu against layer) and Figure 2 (last layer against lambda)."""
    given = locals()
    from lscollapse.cli.terminal import paper as console
    from lscollapse.experiments import paper as experiments

    experiment = experiment_of(given)
    out = out or Path("runs/sweep-lambda")
    with console.Bar() as bar:
        rows = experiments.sweep_lambda(experiment, out, bar)
    console.last_layer_table(rows)
    console.claims_table(rows)
    _draw(rows, out, yscale)


def ablate_gating(
    config: o.Config = None, model: o.Model = None, lambdas: o.Lambdas = None, lambdas_file: o.LambdasFile = None,
    excerpts: o.Excerpts = None, tokens: o.Tokens = None, source: o.Source = None, titles: o.Titles = None,
    tokenizer: o.Tokenizer = None, skip_site: o.SkipSite = None, norm_site: o.NormSite = None, dtype: o.Dtype = None,
    device: o.Device = None, kernels: o.KernelChoice = None, seed: o.Seed = None, random_init: o.RandomInit = None,
    offline: o.Offline = None, certified_exit: o.Exit = None, stream: o.Stream = None, max_memory: o.Memory = None,
    quality: o.Quality = None, gradients: o.Gradients = None, engine: o.Engine = None, address: o.Address = None,
    all_readings: Annotated[bool, typer.Option("--all-readings", help="Cross skip_site, norm_site and gating.")] = False,
    settings: o.Set = None, out: o.Out = None,
) -> None:  # fmt: skip
    """Gating x LayerNorm at lambda = 1: Figure 3. With --all-readings, every place where lambda and the norm could sit."""
    given = locals()
    from lscollapse.cli.terminal import paper as console
    from lscollapse.experiments import paper as experiments

    experiment = experiment_of(given)
    if model is None:
        experiment = experiments.with_gated_models(experiment)
    verb = "all-readings" if all_readings else "ablate-gating"
    out = out or Path("runs") / verb
    with console.Bar() as bar:
        rows = (experiments.all_readings if all_readings else experiments.ablate_gating)(experiment, out, bar)
    if all_readings:
        console.readings_table(rows)
    else:
        console.arms_table(rows)
        console.claims_table(rows)
    _draw(rows, out, "linear")


def ablate_s4d(
    config: o.Config = None, model: o.Model = None,
    excerpts: Annotated[int | None, typer.Option(help="How many held-out images.  \\[default: 32]")] = None,
    source: Annotated[str | None, typer.Option(help="digits, cifar10 or a folder.  \\[default: what the net was trained on]")] = None,
    dtype: o.Dtype = None, device: o.Device = None, seed: o.Seed = None, random_init: o.RandomInit = None, offline: o.Offline = None,
    engine: o.Engine = None, address: o.Address = None,
    train_arms: Annotated[bool, typer.Option("--retrain", help="Train each arm as it is, instead of ablating one trained net.")] = False,
    settings: o.Set = None, out: o.Out = None,
) -> None:  # fmt: skip
    """Skip x LayerNorm of a trained S4D on images: Figure 4."""
    given = locals()
    from lscollapse.cli.terminal import paper as console
    from lscollapse.experiments import paper as experiments
    from lscollapse.experiments import retrain

    experiment = experiment_of(given)
    out = out or Path("runs/ablate-s4d-retrained" if train_arms else "runs/ablate-s4d")
    with console.Bar("training" if train_arms else "measuring") as bar:
        rows = (retrain.ablate_s4d if train_arms else experiments.ablate_s4d)(experiment, out, bar)
    console.arms_table(rows)
    console.claims_table(rows)
    _draw(rows, out, "linear")


def figures(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    to: Annotated[Path | None, typer.Option(help="Where to put the figures.  \\[default: each run's folder]")] = None,
    yscale: o.Yscale = "linear",
) -> None:
    """Draw the figures of finished runs again, without computing."""
    from lscollapse.core.run_folder import read_rows

    for run in runs:
        _draw(read_rows(run), to or run, yscale, run)


def _draw(rows: pd.DataFrame, folder: Path, yscale: str, run: Path | None = None) -> None:
    from lscollapse.core.files import write_text
    from lscollapse.core.run_folder import read_manifest
    from lscollapse.reports.claims import sentences as claims
    from lscollapse.reports.figures import draw

    experiment = read_manifest(run or folder)["identity"]["experiment"]
    written = draw.draw(experiment, rows, folder, yscale)
    if experiment == "all-readings":
        written.append(folder / "readings-verdicts.csv")
        write_text(written[-1], claims.judge_readings(rows).to_csv(index=False))
    for path in written:
        typer.echo(f"wrote {path}")
