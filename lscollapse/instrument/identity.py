"""Is the instrumented model the model? lam = 1, gate and norms on, against the untouched transformers forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.surgery import Variant, surgery_on_layer
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.edit import first_of
from lscollapse.models.adapters.replayed import first_argument
from lscollapse.models.numerics.carried import Carried
from lscollapse.models.numerics.widened import computing_in


class LayerDifference(NamedTuple):
    """Largest difference over the excerpts at one layer, relative to the untouched model."""

    layer: int
    path: str
    output: float  # ||Y - Y_ref||_F / ||Y_ref||_F
    mu: float  # |mu - mu_ref| / mu_ref


def differences(model: Any, ids: Any) -> Iterator[LayerDifference]:
    """Compare every layer's output and mu with what the untouched model computes for the same ids (excerpts, N).

    Two paths are checked: `hooks`, the model's own blocks with every edit hook in place and lambda = 1 (so lam*X + O is
    formed anew), and, where the architecture has them, the package's own blocks (`native`).
    """
    adapter = adapt(model)
    tokens = checked_ids(adapter, ids)
    with torch.no_grad():
        reference = layer_outputs(adapter, tokens)
        streams = {"hooks": adapter.embed(tokens)}  # (B, N) -> (B, N, d)
        if adapter.has_own_blocks:
            streams["native"] = streams["hooks"]
        for path, X in streams.items():
            yield _difference(0, path, X, reference[0])
        handed: dict[int, Any] = {}
        for layer in range(adapter.n_layers):
            for path in streams:
                streams[path] = _step(adapter, layer, path, streams[path], handed)
                yield _difference(layer + 1, path, streams[path], reference[layer + 1])


def layer_outputs(adapter: Adapter, tokens: Tensor) -> list[Tensor]:
    """Embedding and block outputs of one plain forward, seen by hooks that change nothing."""
    seen: list[Tensor] = []

    def first_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(first_argument(args, kwargs))

    def output(_module: Any, _args: tuple[Any, ...], value: Any) -> None:
        seen.append(first_of(value))

    handles = [adapter.block(0).register_forward_pre_hook(first_input, with_kwargs=True)]
    handles += [block.register_forward_hook(output) for block in adapter.distinct_blocks]
    try:
        with computing_in(adapter.dtype):
            adapter.forward(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _step(adapter: Adapter, layer: int, path: str, X: Tensor, handed: dict[int, Any]) -> Tensor:
    if path == "native":
        block = adapter.own_block(layer, X.dtype)
        return block(X, lam=1.0, gating=True, layernorm=True, skip_site="residual", norm_site="both")
    with surgery_on_layer(adapter, layer, Variant(), Carried(X)):
        return adapter.run(layer, X, handed)


def _difference(layer: int, path: str, Y: Tensor, reference: Tensor) -> LayerDifference:
    Y, reference = Y.double(), reference.double()
    size = torch.linalg.vector_norm(reference, dim=(1, 2))  # (B, N, d) -> (B,)
    output = torch.linalg.vector_norm(Y - reference, dim=(1, 2)) / size
    mu = measures.mu(reference)
    return LayerDifference(layer, path, float(output.max()), float(((measures.mu(Y) - mu).abs() / mu).max()))
