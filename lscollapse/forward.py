"""The layer-major pass: for each layer, for each variant; reduced to measurements at once, no activations kept.

Large lambda. The residual stream of a pre-norm net grows as |lam|^K and would leave float32 at |lam| = 4 and 64 layers.
Its mixer sees norm(X), which does not depend on the scale of X, so X is carried as mantissa * 2^e with one exponent per
excerpt, O is scaled by the same exact power of two when it is added, and log10 of mu is that of the true value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.models import Adapter, adapt
from lscollapse.models.adapter import NativeBlock
from lscollapse.variants import Variant, check, surgery_on_layer

if TYPE_CHECKING:
    import pandas as pd

# A stream that grows past 2^HIGH is scaled down to 2^LOW: far enough under overflow for sums of squares in float32,
# far enough above one for the RMSNorm's eps to stay negligible.
HIGH, LOW = 40, 20
LOG10_2 = float(np.log10(2.0))


class Stream:
    """The residual stream of one variant: X * 2^exponent per excerpt, and what became of excerpts that left the range."""

    def __init__(self, adapter: Adapter, variant: Variant, X: Tensor, dtype: torch.dtype) -> None:
        self.variant = variant
        self.dtype = dtype
        self.X = X
        self.exponent = torch.zeros(len(X), dtype=torch.int64, device=X.device)
        self.status = measures.status(X)
        self.carries_scale = adapter.pre_norm and not variant.removes_block_norm

    @property
    def lost(self) -> bool:
        """Whether no excerpt is finite any more."""
        return all(status != "ok" for status in self.status)

    def step(self, adapter: Adapter, layer: int, native: NativeBlock | None) -> None:
        """X <- block `layer` of this variant."""
        o_scale = None
        if self.exponent.any():
            o_scale = torch.ldexp(self.X.new_ones(len(self.X)), -self.exponent)[:, None, None]
        variant = self.variant
        if native is not None:
            self.X = native(
                self.X,
                lam=variant.lam_at(layer) if variant.acts else 1.0,
                gating=variant.gating,
                layernorm=variant.layernorm,
                skip_site=variant.skip_site if variant.acts else "residual",
                norm_site=variant.norm_site,
                o_scale=1.0 if o_scale is None else o_scale,
            )
        else:
            with surgery_on_layer(adapter, layer, variant, o_scale):
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
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Measure every variant of `model` on every excerpt, layer 0 (embeddings) to K.

    Args:
        model: a transformers model of a supported architecture, in eval mode, or its Adapter.
        ids: token ids, (excerpts, N).
        variants: the arms; each layer's weights are touched once for all of them.
        dtype: what every arm computes in. Default: the dtype of the model's weights, and float64 for arms whose blocks have
            lost their norm, since their values leave float32 within a few layers.
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
    tokens = checked_ids(adapter, ids)
    with torch.inference_mode():
        engines = Engines(adapter, variants, dtype)
        table = _Table(n_tokens=tokens.shape[1])
        streams = [Stream(adapter, v, engines.embed(tokens, kind), kind) for v, kind in engines.dtypes.items()]
        first = measures.measure_all(adapter.embed(tokens))
        for stream in streams:
            table.add(adapter, stream, 0, first)
        for layer in range(adapter.n_layers):
            blocks = engines.blocks(layer)
            for stream in streams:
                if not stream.lost:
                    stream.step(engines.adapter(stream.dtype), layer, blocks[stream.dtype])
                table.add(adapter, stream, layer + 1, measures.measure_all(stream.X))
                if progress is not None:
                    progress(len(tokens))
    return table.frame()


class Engines:
    """Which dtype each variant computes in, and what computes a block in that dtype."""

    def __init__(self, adapter: Adapter, variants: Sequence[Variant], dtype: torch.dtype | None) -> None:
        own = next(adapter.model.parameters()).dtype
        self._adapters = {own: adapter}
        self.dtypes = {v: dtype or (torch.float64 if v.removes_block_norm else own) for v in variants}

    def adapter(self, dtype: torch.dtype) -> Adapter:
        """The model in `dtype`: itself, or a converted copy where its modules have to compute in another one."""
        if dtype not in self._adapters:
            original = next(iter(self._adapters.values()))
            needs_copy = original.native_block(0, dtype) is None
            model = copy.deepcopy(original.model).to(dtype) if needs_copy else original.model
            self._adapters[dtype] = adapt(model)
        return self._adapters[dtype]

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The first residual stream; float32 at least where the package's own blocks keep it so."""
        adapter = self.adapter(dtype)
        X = adapter.embed(tokens)
        return X.to(torch.promote_types(dtype, torch.float32)) if adapter.native_block(0, dtype) else X

    def blocks(self, layer: int) -> dict[torch.dtype, NativeBlock | None]:
        """The package's own block `layer` for every dtype in use; None where the model's module computes it."""
        return {dtype: self.adapter(dtype).native_block(layer, dtype) for dtype in set(self.dtypes.values())}


def checked_ids(adapter: Adapter, ids: Any) -> Tensor:
    """ids as a tensor (excerpts, N) on the model's device, or a ValueError that says what is wrong with them."""
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
        raise ValueError(
            f"{tokens.shape[1]} tokens, but the model has {limit} positions: use --tokens {limit} or fewer"
        )
    return tokens.to(next(adapter.model.parameters()).device)


class _Table:
    """Collects the columns of the long table; the data frame is made once, at the end."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.columns: dict[str, list[Any]] = {}

    def add(self, adapter: Adapter, stream: Stream, layer: int, values: dict[str, Tensor]) -> None:
        variant = stream.variant
        floor = measures.floor(stream.dtype)
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        exponent = stream.exponent.cpu().numpy()
        common = {
            "arm": variant.arm(adapter.has_gate),
            "lam": float("nan") if isinstance(variant.lam, tuple) else float(variant.lam),
            "gating": variant.gating if adapter.has_gate else None,
            "layernorm": variant.layernorm,
            "skip_site": variant.skip_site,
            "norm_site": variant.norm_site,
            "dtype": str(stream.dtype).removeprefix("torch."),
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
