"""Options that several verbs share, as Typer annotations: one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[str, typer.Argument(help="Short name, folder or hub id.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file; flags override it.")]
Model = Annotated[list[str] | None, typer.Option("--model", help="Short name, folder or hub id; repeat for several.")]
Lambdas = Annotated[str | None, typer.Option(help='Comma-separated, such as "-2,0,0.5,1".')]
LambdasFile = Annotated[
    Path | None, typer.Option(help="CSV layer,lam: one lambda per layer, measured beside the others.")
]
Excerpts = Annotated[int | None, typer.Option(help="How many excerpts.  \\[default: 32]")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of each excerpt.  \\[default: 128]")]
Source = Annotated[
    str | None, typer.Option(help="packaged, wikipedia, datasets, smiles, or a .txt, .jsonl or .parquet file.")
]
Titles = Annotated[Path | None, typer.Option(help="File with one Wikipedia title a line (source wikipedia).")]
Tokenizer = Annotated[str | None, typer.Option(help="bert, native, or a folder or hub id.  \\[default: bert]")]
SkipSite = Annotated[
    str | None, typer.Option(help="residual; mixer for Mamba; ffn or both for transformers.  \\[default: residual]")
]
NormSite = Annotated[
    str | None, typer.Option(help="Which norm LN=False removes: mixer, block or both.  \\[default: both]")
]
Gating = Annotated[
    bool | None, typer.Option("--gating/--no-gating", help="Only with, or only without the gate.  \\[default: both]")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.  \\[default: float32]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.  \\[default: auto]")]
KernelChoice = Annotated[str | None, typer.Option("--kernels", help="auto, torch or triton.  \\[default: auto]")]
Seed = Annotated[int | None, typer.Option(help="Which excerpts are drawn, and random initial weights.  \\[default: 0]")]
RandomInit = Annotated[bool | None, typer.Option("--random-init", help="Measure freshly initialised weights too.")]
Offline = Annotated[bool | None, typer.Option("--offline", help="Make no call to the hub.")]
Exit = Annotated[
    bool | None, typer.Option("--certified-exit/--no-certified-exit", help="Skip layers that provably change nothing.")
]
Stream = Annotated[
    str | None, typer.Option(help="Read weights layer by layer: auto, always or never.  \\[default: auto]")
]
Memory = Annotated[str | None, typer.Option("--max-memory", help="Bound on memory when streaming.  \\[default: 2GiB]")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, any setting of the configuration; repeat for several.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder.  \\[default: runs/VERB]")]
Yscale = Annotated[str, typer.Option(help="linear or log vertical axis.")]
Quality = Annotated[
    bool | None, typer.Option("--quality", help="Language-model loss of every variant on the same excerpts too.")
]
Gradients = Annotated[
    bool | None, typer.Option("--gradients", help="Norm of the loss gradient at every layer too, in float32.")
]
Engine = Annotated[
    str | None, typer.Option(help="local, or ray: work items as tasks of a Ray cluster.  \\[default: local]")
]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster: auto or HOST:PORT.  \\[default: start one here]")]
