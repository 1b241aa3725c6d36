"""One arm of an experiment as a `Variant`, and `surgery`: forward hooks that make a loaded model compute it.

    with lscollapse.surgery(model, Variant(lam=-2.0, gating=False)):
        model(input_ids)

The hooks count their firings: one that did not fire as often as its block ran is an error, because then the model took a
path on which the edit had no effect. On exit, also after an exception, the model is as it was, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.edit import CALLS, Edit, HookSet, edited
from lscollapse.models.numerics.carried import Carried


class SurgeryError(ValueError):
    """A variant cannot be made of this model, or an edit did not take effect."""


@dataclass(frozen=True)
class Variant:
    """One arm of an experiment.

    Attributes:
        lam: strength of the skip, Eq. (3): one value for all layers, or a tuple with one per layer.
        gating: False removes the multiplicative gate; refused where a model has none, or none is known.
        layernorm: False removes the norms named by `norm_site`.
        skip_site: where lambda acts: `residual` (lam*X + O around the mixer), `mixer` (Mamba-2: lam*V added to the scan
            output in place of the gate, so without effect while the gate is on), `ffn` or `both` (post-norm transformers:
            the feed-forward skip, or both skips).
        norm_site: `both`, `mixer` (the gated norm before out_proj) or `block` (the norms of the block itself).
    """

    lam: float | tuple[float, ...] = 1.0
    gating: bool = True
    layernorm: bool = True
    skip_site: str = "residual"
    norm_site: str = "both"

    def __post_init__(self) -> None:
        values = self.lam if isinstance(self.lam, tuple) else (self.lam,)
        if not all(isinstance(v, int | float) and abs(v) <= sys.float_info.max for v in values):
            raise SurgeryError(f"lambda must be finite numbers, got {self.lam!r}")

    def lam_at(self, layer: int) -> float:
        """Lambda of layer 0..K-1."""
        return float(self.lam[layer]) if isinstance(self.lam, tuple) else float(self.lam)

    @property
    def acts(self) -> bool:
        """Whether lambda acts at all: at `mixer` it stands in place of the gate, so with the gate on it is absent."""
        return self.skip_site != "mixer" or not self.gating

    @property
    def removes_block_norm(self) -> bool:
        """Whether the norms of the block itself are gone, so that its values may grow without bound."""
        return not self.layernorm and self.norm_site != "mixer"

    def arm(self, has_gate: bool | None = True) -> str:
        """Short name of the arm, without lambda; without the gate where the model has none, or none is known."""
        words = [] if not has_gate else ["gate"] if self.gating else ["no gate"]
        words.append("LN" if self.layernorm else "no LN" if self.norm_site == "both" else f"no {self.norm_site} LN")
        if self.skip_site != "residual":
            words.append(f"{self.skip_site} skip" if self.skip_site != "both" else "both skips")
        return ", ".join(words)


def check(adapter: Adapter, variant: Variant) -> None:
    """Raise SurgeryError where the model has no such skip, norm or gate, or another number of layers."""
    what = adapter.config.model_type
    if not variant.gating and not adapter.has_gate:
        raise SurgeryError(f"{without_gate(adapter)}: measure it with its mixers as they are (leave out --no-gating)")
    sites = (("skip_site", variant.skip_site, adapter.skip_sites), ("norm_site", variant.norm_site, adapter.norm_sites))
    for name, wanted, known in sites:
        if wanted not in known:
            absent = "does not exist in" if adapter.knows_sites else "is not known of"
            raise SurgeryError(f"{name} {wanted!r} {absent} {what}: use one of {', '.join(known)}")
    if not variant.layernorm and not adapter.knows_sites:
        raise SurgeryError(f"the norms of {what} are not known here, so they cannot be removed: leave them on")
    if isinstance(variant.lam, tuple) and len(variant.lam) != adapter.n_layers:
        raise SurgeryError(f"{len(variant.lam)} lambdas for {adapter.n_layers} layers of {what}: give one per layer")


def without_gate(adapter: Adapter) -> str:
    """Why the gate of a model cannot be removed."""
    what = adapter.config.model_type
    if adapter.has_gate is None:
        return f"whether the mixers of {what} have a gate, and where, is not known here, so it cannot be removed"
    return f"{what} has no gate that could be removed"


@contextmanager
def surgery(model: Any, variant: Variant) -> Iterator[Adapter]:
    """Make every block of `model` compute `variant` while the context is open.

    Args:
        model: a transformers model with or without a head, or an Adapter; in eval mode.
        variant: what to compute.

    Yields:
        The adapter of the model.

    Raises:
        SurgeryError: the variant does not exist for the model, or a hook did not fire.
    """
    adapter = adapt(model)
    check(adapter, variant)
    with _edited(adapter, adapter.distinct_blocks, adapter.layers_of, variant):
        yield adapter


@contextmanager
def surgery_on_layer(
    adapter: Adapter, layer: int, variant: Variant, carried: Carried | None = None, lams: Tensor | None = None
) -> Iterator[None]:
    """The same for one call of one layer, with the block's sums formed anew in the scale that X is carried in.

    lams: a lambda for each excerpt (B,), in place of the variant's.
    """
    with _edited(adapter, [adapter.block(layer)], lambda block: [layer], variant, carried, lams):
        yield


@contextmanager
def _edited(
    adapter: Adapter,
    blocks: list[Any],
    layers_of: Callable[[Any], list[int]],
    variant: Variant,
    carried: Carried | None = None,
    lams: Tensor | None = None,
) -> Iterator[None]:
    if adapter.model.training:
        raise SurgeryError(
            "the model is in training mode, where fused kernels bypass the hooks: call model.eval() first"
        )

    def edit_of(block: Any, hooks: HookSet) -> Edit:
        edit = _edit(layers_of(block), variant, carried, hooks)
        return edit if lams is None else replace(edit, lam=lambda: lams, changes_sum=True)

    with edited(adapter.install, blocks, edit_of) as installed:
        yield
    for hooks in installed:
        calls = hooks.counts[CALLS]
        idle = [name for name, count in hooks.counts.items() if count != calls]
        if idle or calls == 0:
            which = ", ".join(idle) or "all"
            raise SurgeryError(f"hooks that did not fire as often as their block ({calls} calls): {which}")


def _edit(layers: list[int], variant: Variant, carried: Carried | None, hooks: HookSet) -> Edit:
    """The edit of a block that computes `layers`, one a call and round again; its hooks count the calls."""
    lams = {variant.lam_at(layer) for layer in layers}
    on_mixer = variant.skip_site == "mixer"
    return Edit(
        lam=lambda: variant.lam_at(layers[(hooks.counts[CALLS] - 1) % len(layers)]),
        changes_sum=carried is not None or (not on_mixer and lams != {1.0}),
        changes_mixer=on_mixer and variant.acts and lams != {0.0},
        gating=variant.gating,
        layernorm=variant.layernorm,
        skip_site=variant.skip_site,
        norm_site=variant.norm_site,
        carried=carried,
    )
