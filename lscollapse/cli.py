"""Typer verbs, a few lines each; what they do is elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lscollapse import __version__
from lscollapse.cli_theory import find_lambda, theory

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    help="Is my deep sequence model collapsing, and what would stop it? Rank collapse and lambda-skip connections.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file; flags override it.")]
Model = Annotated[list[str] | None, typer.Option("--model", help="Short name, folder or hub id; repeat for several.")]
Lambdas = Annotated[str | None, typer.Option(help='Comma-separated, such as "-2,0,0.5,1".')]
LambdasFile = Annotated[
    Path | None, typer.Option(help="CSV layer,lam: one lambda per layer, measured beside the others.")
]
Excerpts = Annotated[int | None, typer.Option(help="How many excerpts.  [default: 32]")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of each excerpt.  [default: 128]")]
Source = Annotated[
    str | None, typer.Option(help="packaged, wikipedia, datasets, smiles, or a .txt, .jsonl or .parquet file.")
]
Titles = Annotated[Path | None, typer.Option(help="File with one Wikipedia title a line (source wikipedia).")]
Tokenizer = Annotated[str | None, typer.Option(help="bert, native, or a folder or hub id.  [default: bert]")]
SkipSite = Annotated[
    str | None, typer.Option(help="residual or mixer; ffn or both for BERT and ALBERT.  [default: residual]")
]
NormSite = Annotated[
    str | None, typer.Option(help="Which norm LN=False removes: mixer, block or both.  [default: both]")
]
Gating = Annotated[
    bool | None, typer.Option("--gating/--no-gating", help="Only with, or only without the gate.  [default: both]")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.  [default: float32]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.  [default: auto]")]
KernelChoice = Annotated[str | None, typer.Option("--kernels", help="auto, torch or triton.  [default: auto]")]
Seed = Annotated[int | None, typer.Option(help="Which excerpts are drawn, and random initial weights.  [default: 0]")]
RandomInit = Annotated[bool | None, typer.Option("--random-init", help="Measure freshly initialised weights too.")]
Offline = Annotated[bool | None, typer.Option("--offline", help="Make no call to the hub.")]
Exit = Annotated[
    bool | None, typer.Option("--certified-exit/--no-certified-exit", help="Skip layers that provably change nothing.")
]
Stream = Annotated[
    str | None, typer.Option(help="Read weights layer by layer: auto, always or never.  [default: auto]")
]
Memory = Annotated[str | None, typer.Option("--max-memory", help="Bound on memory when streaming.  [default: 2GiB]")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, any setting of the configuration; repeat for several.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder.  [default: runs/VERB]")]
Yscale = Annotated[str, typer.Option(help="linear or log vertical axis.")]


def _experiment(
    config: Path | None, settings: list[str] | None, lambdas: str | None, model: list[str] | None, **flags: Any
) -> Any:
    from lscollapse import config as schema

    if lambdas is not None:
        flags["lambdas"] = schema.parse_lambdas(lambdas)
    return schema.load(config, {"models": model or None, **flags}, settings)


def _titles(titles: Path | None) -> list[str]:
    return [] if titles is None else [f"wikipedia.titles={titles}"]


@app.command()
def sweep_lambda(
    config: Config = None, model: Model = None, lambdas: Lambdas = None, lambdas_file: LambdasFile = None,
    excerpts: Excerpts = None, tokens: Tokens = None, source: Source = None, titles: Titles = None,
    tokenizer: Tokenizer = None, skip_site: SkipSite = None, norm_site: NormSite = None, gating: Gating = None,
    dtype: Dtype = None, device: Device = None, kernels: KernelChoice = None, seed: Seed = None, random_init: RandomInit = None,
    offline: Offline = None, certified_exit: Exit = None, stream: Stream = None, max_memory: Memory = None,
    settings: Set = None, out: Out = None, yscale: Yscale = "linear",
) -> None:  # fmt: skip
    """Measure every lambda: Figure 1 (relative mu against layer) and Figure 2 (last layer against lambda)."""
    from lscollapse import console, experiments

    experiment = _experiment(
        config, [*(settings or []), *_titles(titles)], lambdas, model, lambdas_file=lambdas_file, excerpts=excerpts,
        tokens=tokens, source=source, tokenizer=tokenizer, skip_site=skip_site, norm_site=norm_site, gating=gating,
        dtype=dtype, device=device, kernels=kernels, seed=seed, random_init=random_init, offline=offline, certified_exit=certified_exit,
        stream=stream, max_memory=max_memory,
    )  # fmt: skip
    out = out or Path("runs/sweep-lambda")
    with console.Bar() as bar:
        rows = experiments.sweep_lambda(experiment, out, bar)
    console.last_layer_table(rows)
    console.claims_table(rows)
    _draw(rows, out, yscale)


@app.command()
def ablate_gating(
    config: Config = None, model: Model = None, lambdas: Lambdas = None, lambdas_file: LambdasFile = None,
    excerpts: Excerpts = None, tokens: Tokens = None, source: Source = None, titles: Titles = None,
    tokenizer: Tokenizer = None, skip_site: SkipSite = None, norm_site: NormSite = None, dtype: Dtype = None,
    device: Device = None, kernels: KernelChoice = None, seed: Seed = None, random_init: RandomInit = None,
    offline: Offline = None, certified_exit: Exit = None, stream: Stream = None, max_memory: Memory = None,
    all_readings: Annotated[bool, typer.Option("--all-readings", help="Cross skip_site, norm_site and gating.")] = False,
    settings: Set = None, out: Out = None,
) -> None:  # fmt: skip
    """Gating x LayerNorm at lambda = 1: Figure 3. With --all-readings, every place where lambda and the norm could sit."""
    from lscollapse import console, experiments

    experiment = _experiment(
        config, [*(settings or []), *_titles(titles)], lambdas, model, lambdas_file=lambdas_file, excerpts=excerpts,
        tokens=tokens, source=source, tokenizer=tokenizer, skip_site=skip_site, norm_site=norm_site, dtype=dtype,
        device=device, kernels=kernels, seed=seed, random_init=random_init, offline=offline, certified_exit=certified_exit, stream=stream,
        max_memory=max_memory,
    )  # fmt: skip
    if model is None:
        experiment = experiments.with_gated_models(experiment)
    verb = "all-readings" if all_readings else "ablate-gating"
    out = out or Path("runs") / verb
    with console.Bar() as bar:
        rows = (experiments.all_readings if all_readings else experiments.ablate_gating)(experiment, out, bar)
    if all_readings:
        console.readings_table(rows, out)
    else:
        console.arms_table(rows)
        console.claims_table(rows)
    _draw(rows, out, "linear")


@app.command()
def ablate_s4d(
    config: Config = None, model: Model = None,
    excerpts: Annotated[int | None, typer.Option(help="How many held-out images.  [default: 32]")] = None,
    source: Annotated[str | None, typer.Option(help="digits, cifar10 or a folder.  [default: what the net was trained on]")] = None,
    dtype: Dtype = None, device: Device = None, seed: Seed = None, random_init: RandomInit = None, offline: Offline = None,
    settings: Set = None, out: Out = None,
) -> None:  # fmt: skip
    """Skip x LayerNorm of a trained S4D on images: Figure 4."""
    from lscollapse import console, experiments

    experiment = _experiment(
        config, settings, None, model, excerpts=excerpts, source=source, dtype=dtype, device=device, seed=seed,
        random_init=random_init, offline=offline,
    )  # fmt: skip
    out = out or Path("runs/ablate-s4d")
    with console.Bar() as bar:
        rows = experiments.ablate_s4d(experiment, out, bar)
    console.arms_table(rows)
    console.claims_table(rows)
    _draw(rows, out, "linear")


@app.command()
def check_identity(
    model: Annotated[str, typer.Argument(help="Short name, folder or hub id.")],
    excerpts: Annotated[int, typer.Option(help="How many excerpts.")] = 2,
    tokens: Tokens = None, source: Source = None, tokenizer: Tokenizer = None, dtype: Dtype = None,
    offline: Offline = None, settings: Set = None,
) -> None:  # fmt: skip
    """Compare the instrumented model (lambda = 1, gate and norms on) with the untouched one; exit 1 over 1e-5. Run this first."""
    from lscollapse import console, experiments

    experiment = _experiment(
        None, settings, None, [model], excerpts=excerpts, tokens=tokens, source=source, tokenizer=tokenizer, dtype=dtype,
        offline=offline,
    )  # fmt: skip
    if not console.identity_table(experiments.check_identity(experiment, console.Bar())):
        raise typer.Exit(1)


@app.command()
def figures(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    to: Annotated[Path | None, typer.Option(help="Where to put the figures.  [default: each run's folder]")] = None,
    yscale: Yscale = "linear",
) -> None:
    """Draw the figures of finished runs again, without computing."""
    from lscollapse.results import read_rows

    for run in runs:
        _draw(read_rows(run), to or run, yscale, run)


def _draw(rows: pd.DataFrame, folder: Path, yscale: str, run: Path | None = None) -> None:
    from lscollapse import figures
    from lscollapse.results import read_manifest

    experiment = read_manifest(run or folder)["identity"]["experiment"]
    for path in figures.draw(experiment, rows, folder, yscale):
        typer.echo(f"wrote {path}")


@app.command()
def excerpts(
    out: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    source: Source = None, titles: Titles = None, excerpts: Excerpts = None, tokens: Tokens = None,
    tokenizer: Tokenizer = None, seed: Seed = None, config: Config = None, settings: Set = None,
) -> None:  # fmt: skip
    """Freeze the excerpts to a file that every command takes as --source, so that somebody else runs on the same ids."""
    from lscollapse import corpus, experiments

    experiment = _experiment(
        config, [*(settings or []), *_titles(titles)], None, None, excerpts=excerpts, tokens=tokens, source=source,
        tokenizer=tokenizer, seed=seed,
    )  # fmt: skip
    chosen = corpus.tokenizer(experiment.tokenizer) if experiment.tokenizer else None
    drawn = experiments.load_corpus(experiment, chosen)
    corpus.freeze(drawn, out)
    typer.echo(
        f"wrote {len(drawn.excerpts)} excerpts of {drawn.source} to {out} ({drawn.skipped} texts were too short)"
    )


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="Short name or hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.  [default: the pinned one]")] = None,
) -> None:
    """Download a model from the hub, resumable, checked by size and sha256, so that --offline runs find it."""
    from lscollapse.models import hub, registry

    entry = registry.resolve(model)
    if entry.source != "hub":
        typer.echo(f"{model} needs no download")
        return
    typer.echo(hub.fetch(entry.location, revision=revision or entry.revision or None))


@app.command()
def verify_kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kernels: Annotated[str, typer.Option(help="auto, torch or triton.")] = "auto",
) -> None:
    """Compare scan, conv, gated norm and a whole block with a float64 recurrence; exit 1 over tolerance."""
    from lscollapse import console, verify

    rows = verify.verify(device, kernels)
    console.kernels_table(rows)
    if not verify.passed(rows):
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List the models that can be loaded by a short name, and where their weights come from."""
    from lscollapse.console import models_table

    models_table()


app.add_typer(theory, name="theory")
app.command()(find_lambda)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lscollapse {__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    global show_traceback
    show_traceback = debug


show_traceback = False


def main() -> None:
    """Entry point: errors of the input are one line and exit code 2."""
    from lscollapse import allocation

    allocation.keep_freed_memory()
    try:
        app()
    except ValueError as error:
        if show_traceback:
            raise
        typer.echo(f"lscollapse: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except OSError as error:
        if show_traceback:
            raise
        what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
        typer.echo(f"lscollapse: {what}; what was measured so far is kept, the same command continues", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("lscollapse: stopped; the same command continues the run", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
