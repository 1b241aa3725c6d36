"""lscollapse: rank collapse in deep sequence models, and the lambda-skip that prevents it (arXiv:2410.10609v3).

Glossary, paper -> code:

    X^(k), Y^(k)   X, Y            input and output of block k, (N, d)
    O^(k)          O               output of the mixer: what is added to the skip
    lambda         lam             strength of the skip, lam*X + O           Variant.lam
    mu, Eq. (5)    mu              ||Y - mean row||_F                         measures.mu
    mu / ||Y||_F   relative_mu     what the paper's figures plot, in [0, 1]   measures.relative_mu
    -              rank1_residual  distance to the nearest rank-1 matrix      measures.rank1_residual

Public names (docs/python.md has examples of each); everything else is private:

    Variant, surgery(model, variant)              one arm of an experiment; the model computes it while a context is open
    measure(model, ids, variants) -> DataFrame    every measure of every layer
    lm_loss, grad_norm(model, ids, variants)      language-model loss; norm of its gradient at every layer
    monitor(model, ids), MonitorCallback(ids)     collapse watched while a net trains, by transformers' Trainer,
    LightningMonitorCallback(ids)                 or Lightning's
    measures                                      the measures themselves, tensor -> numbers
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lscollapse import measures
    from lscollapse.instrument.forward import measure
    from lscollapse.instrument.gradients import grad_norm
    from lscollapse.instrument.lightning import LightningMonitorCallback as LightningMonitorCallback
    from lscollapse.instrument.lm_loss import lm_loss
    from lscollapse.instrument.monitor import monitor
    from lscollapse.instrument.surgery import Variant, surgery
    from lscollapse.instrument.trainer import MonitorCallback

    __version__: str

# Without LightningMonitorCallback: `from lscollapse import *` must not need Lightning.
__all__ = [
    "MonitorCallback",
    "Variant",
    "__version__",
    "grad_norm",
    "lm_loss",
    "measure",
    "measures",
    "monitor",
    "surgery",
]

_HOMES = {
    "LightningMonitorCallback": "lightning",
    "MonitorCallback": "trainer",
    "Variant": "surgery",
    "grad_norm": "gradients",
    "lm_loss": "lm_loss",
    "measure": "forward",
    "monitor": "monitor",
    "surgery": "surgery",
}


def __getattr__(name: str) -> Any:
    """The public names, imported on first use so that `lscollapse --help` does not load torch."""
    if name == "__version__":
        return metadata.version("lscollapse")
    if name == "measures":
        return import_module("lscollapse.measures")
    if name not in _HOMES:
        raise AttributeError(f"module 'lscollapse' has no attribute {name!r}")
    return getattr(import_module(f"lscollapse.instrument.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
