"""The layer-major pass: for each layer, for each variant; reduced to measurements at once, no activations kept.

Large lambda. The residual stream of a pre-norm net grows as |lam|^K and would leave float32 at |lam| = 4 and 64 layers.
Its mixer sees norm(X), which does not depend on the scale of X, so X is carried as mantissa * 2^e with one exponent per
excerpt, O is scaled by the same exact power of two when it is added, and log10 of mu is that of the true value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.models import Adapter, adapt
from lscollapse.variants import Variant, check, surgery_on_layer

if TYPE_CHECKING:
    import pandas as pd

# A stream that grows past 2^HIGH is scaled down to 2^LOW: far enough under overflow for sums of squares in float32,
# far enough above one for the RMSNorm's eps to stay negligible.
HIGH, LOW = 40, 20
LOG10_2 = float(np.log10(2.0))


class Stream:
    """The residual stream of one variant: X * 2^exponent per excerpt, and what became of excerpts that left the range."""

    def __init__(self, adapter: Adapter, variant: Variant, X: Tensor) -> None:
        self.variant = variant
        self.X = X
        self.exponent = torch.zeros(len(X), dtype=torch.int64, device=X.device)
        self.status = measures.status(X)
        keeps_pre_norm = variant.layernorm or variant.norm_site == "mixer"
        self.carries_scale = adapter.pre_norm and keeps_pre_norm

    def step(self, adapter: Adapter, layer: int) -> None:
        """X <- block `layer` of this variant."""
        if all(s in ("overflow", "nan") for s in self.status):
            return
        scaled = bool(self.exponent.any())
        o_scale = torch.ldexp(self.X.new_ones(len(self.X)), -self.exponent)[:, None, None] if scaled else None
        with surgery_on_layer(adapter, layer, self.variant, o_scale):
            self.X = adapter.run(layer, self.X)
        if self.carries_scale:
            self._rescale()
        for i, found in enumerate(measures.status(self.X)):
            if self.status[i] == "ok" and found != "ok":
                self.status[i] = "overflow"  # a finite input under finite weights becomes NaN only by way of infinity

    def _rescale(self) -> None:
        largest = self.X.abs().amax((1, 2))
        grown = torch.isfinite(largest) & (largest > 2.0**HIGH)
        if grown.any():
            shift = torch.where(grown, torch.frexp(largest).exponent - LOW, 0)
            self.X = torch.ldexp(self.X, -shift[:, None, None])
            self.exponent += shift


def measure(
    model: Any,
    ids: Tensor | Sequence[Sequence[int]] | np.ndarray,
    variants: Sequence[Variant] = (Variant(),),
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Measure every variant of `model` on every excerpt, layer 0 (embeddings) to K.

    Args:
        model: a transformers model of a supported architecture, in eval mode, or its Adapter.
        ids: token ids, (excerpts, N).
        variants: the arms; each layer's weights are touched once for all of them.
        progress: called after each block pass with the number of excerpts it was for.

    Returns:
        One row per arm, excerpt, layer and measure (docs/table.md lists the columns).

    Raises:
        SurgeryError, UnsupportedModel: a variant or the architecture is not supported.
        ValueError: ids are not (excerpts, N) or fall outside the vocabulary.
    """
    adapter = adapt(model)
    for variant in variants:
        check(adapter, variant)
    tokens = _checked_ids(adapter, ids)
    with torch.inference_mode():
        X = adapter.embed(tokens)
        streams = [Stream(adapter, variant, X) for variant in variants]
        table = _Table(n_tokens=tokens.shape[1])
        first = measures.measure_all(X)
        for stream in streams:
            table.add(adapter, stream, 0, first)
        for layer in range(adapter.n_layers):
            for stream in streams:
                stream.step(adapter, layer)
                table.add(adapter, stream, layer + 1, measures.measure_all(stream.X))
                if progress is not None:
                    progress(len(tokens))
    return table.frame()


def _checked_ids(adapter: Adapter, ids: Any) -> Tensor:
    tokens = torch.as_tensor(np.asarray(ids) if not isinstance(ids, Tensor) else ids).long()
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"ids have shape {tuple(tokens.shape)}, expected (excerpts, tokens), both at least 1")
    vocabulary = adapter.config.vocab_size
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(
            f"token id {int(tokens.max())} is outside the model's vocabulary of {vocabulary}: tokenise with --tokenizer native"
        )
    limit = getattr(adapter.config, "max_position_embeddings", None)
    if limit is not None and tokens.shape[1] > limit:
        raise ValueError(f"{tokens.shape[1]} tokens, but the model has {limit} positions: use --tokens {limit} or fewer")
    return tokens.to(next(adapter.model.parameters()).device)


class _Table:
    """Collects the columns of the long table; the data frame is made once, at the end."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.columns: dict[str, list[Any]] = {}

    def add(self, adapter: Adapter, stream: Stream, layer: int, values: dict[str, Tensor]) -> None:
        variant = stream.variant
        floor = measures.floor(stream.X.dtype)
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        exponent = stream.exponent.cpu().numpy()
        common = {
            "arm": variant.arm(adapter.has_gate),
            "lam": float("nan") if isinstance(variant.lam, tuple) else float(variant.lam),
            "gating": variant.gating if adapter.has_gate else None,
            "layernorm": variant.layernorm,
            "skip_site": variant.skip_site,
            "norm_site": variant.norm_site,
            "dtype": str(stream.X.dtype).removeprefix("torch."),
            "n_tokens": self.n_tokens,
            "layer": layer,
            "floor": floor,
        }
        for name in measures.MEASURES:
            mantissa = arrays[name]
            power = exponent if name == "mu" else np.zeros_like(exponent)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                value = np.ldexp(mantissa, power)
                log10 = np.where(mantissa > 0, np.log10(mantissa), np.nan) + power * LOG10_2
            hidden = (name in measures.VANISHING) & (arrays["relative_mu" if name == "mu" else name] < floor)
            rows = {
                "excerpt": range(len(value)),
                "measure": [name] * len(value),
                "value": value,
                "log10": log10,
                "status": [_status(*row) for row in zip(stream.status, hidden, np.isnan(mantissa), strict=True)],
            }
            for key, constant in common.items():
                self.columns.setdefault(key, []).extend([constant] * len(value))
            for key, column in rows.items():
                self.columns.setdefault(key, []).extend(column)

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.columns).astype({"gating": "boolean", "lam": "float64"})


def _status(stream: str, below_floor: bool, undefined: bool) -> str:
    if stream != "ok":
        return stream
    return "nan" if undefined else "below_floor" if below_floor else "ok"
