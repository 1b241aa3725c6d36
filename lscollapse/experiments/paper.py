"""The paper's experiments as functions: each is a set of variants, and `runs.run` does the rest."""

from __future__ import annotations

import itertools
from io import StringIO
from pathlib import Path

import pandas as pd

from lscollapse.core import registry
from lscollapse.core.config import ConfigError, Experiment
from lscollapse.core.files import read_text
from lscollapse.core.progress import SILENT, Progress
from lscollapse.instrument.identity import LayerDifference, differences
from lscollapse.instrument.surgery import Variant, without_gate
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.runs.loading import load_tasks
from lscollapse.runs.run import run


def sweep_lambda(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """Figures 1 and 2: every lambda, with the gate removed and (unless `config.gating` chooses) with the full architecture.

    Returns the table (its columns: docs/table.md) and leaves it in the run folder `out`.
    """
    return run("sweep-lambda", config, out, sweep_variants, progress)


def sweep_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    """Gate x lambda, with the per-layer lambdas of `lambdas_file` if given; a norm site that the model lacks is its first."""
    both = [False, True] if adapter.has_gate else [True]
    gates = both if config.gating is None else [config.gating]
    per_layer = [read_lambdas(config.lambdas_file, adapter.n_layers)] if config.lambdas_file else []
    lams: list[float | tuple[float, ...]] = [*config.lambdas, *per_layer]
    norm_site = config.norm_site if config.norm_site in adapter.norm_sites else adapter.norm_sites[0]
    return [
        Variant(lam=lam, gating=gating, skip_site=config.skip_site, norm_site=norm_site)
        for gating, lam in itertools.product(gates, lams)
    ]


def ablate_gating(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """Figure 3: gating x LayerNorm at lambda = 1 (or at the per-layer lambdas of `config.lambdas_file`)."""
    return run("ablate-gating", config, out, ablation_variants, progress)


def ablation_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    _needs_gate(adapter)
    lam = read_lambdas(config.lambdas_file, adapter.n_layers) if config.lambdas_file else 1.0
    arms = itertools.product((True, False), (True, False))
    return [Variant(lam, gating, layernorm, config.skip_site, config.norm_site) for gating, layernorm in arms]


def ablate_s4d(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """Figure 4: skip x LayerNorm of a trained S4D on held-out images; without the skip lambda is 0.

    The net is trained with both, and ablated when it is measured. Models of `config` that are no S4D are left out;
    where none remains it is s4d-digits.
    """
    named = [name for name in config.models if registry.resolve(name).architecture in ("s4d", "")]
    config = config.model_copy(update={"models": named or ["s4d-digits"]})
    return run("ablate-s4d", config, out, s4d_variants, progress)


def s4d_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    if adapter.config.model_type != "s4d":
        raise ConfigError(f"{adapter.config.model_type} is no S4D: choose s4d-digits or a folder that holds one")
    return [Variant(lam=lam, layernorm=layernorm) for lam, layernorm in itertools.product((1.0, 0.0), (True, False))]


def all_readings(config: Experiment, out: Path, progress: Progress = SILENT) -> pd.DataFrame:
    """Figures 1 and 3 under every reading of where lambda acts and which norm goes: skip_site x norm_site x gating."""
    return run("all-readings", config, out, reading_variants, progress)


def reading_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    _needs_gate(adapter)
    variants: dict[Variant, None] = {}
    for skip_site in adapter.skip_sites:
        for norm_site in adapter.norm_sites:
            for gating in (True, False):
                variants[Variant(1.0, gating, False, skip_site, norm_site)] = None
        for gating in (True, False):
            variants[Variant(1.0, gating, True, skip_site)] = None
        for lam in config.lambdas:
            variants[Variant(lam, False, True, skip_site)] = None
    return list(variants)


def with_gated_models(config: Experiment) -> Experiment:
    """The same experiment without the embedded models that have no gate."""
    gated = [
        name for name in config.models if registry.resolve(name).architecture not in ("albert", "bert", "llama", "s4d")
    ]
    return config.model_copy(update={"models": gated or config.models})


def check_identity(config: Experiment, progress: Progress = SILENT) -> list[LayerDifference]:
    """How far the instrumented model (lambda = 1) is from the untouched one, layer by layer, for every model."""
    tasks = load_tasks(config, lambda adapter, config: [Variant()], progress)
    return [difference for task in tasks for difference in differences(task.adapter, task.ids)]


def _needs_gate(adapter: Adapter) -> None:
    if not adapter.has_gate:
        raise ConfigError(f"{without_gate(adapter)}: choose a Mamba-2 or Mamba model with --model")


def read_lambdas(file: Path, n_layers: int) -> tuple[float, ...]:
    """Per-layer lambdas from a CSV with columns layer,lam and one line for each layer 1..K."""
    try:
        table = pd.read_csv(StringIO(read_text(file, ConfigError)), float_precision="round_trip").sort_values("layer")
        layers, lams = table["layer"].tolist(), table["lam"].astype(float).tolist()
    except ConfigError:
        raise
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{file} is not a CSV with the columns layer,lam ({' '.join(str(error).split())})") from None
    if layers != list(range(1, n_layers + 1)):
        raise ConfigError(f"{file} gives layers {layers[:3]}..., expected one line for each of 1..{n_layers}")
    return tuple(lams)
