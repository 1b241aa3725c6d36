"""The layer-major pass: for each layer, for each variant; reduced to measurements at once, no activations kept.

Large lambda. The residual stream of a pre-norm net grows as |lam|^K and would leave float32 at |lam| = 4 and 64 layers.
It is carried as X * 2^exponent (models/carried.py), and log10 of mu is that of the true value.

Certified exit (certify.py). From the layer at which an excerpt is certified on its X stands still, with its exponent, its
measures and all; what later layers would do to it is one factor, the product of their lambdas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.instrument import early_exit, precision
from lscollapse.instrument.surgery import Variant, check, surgery_on_layer
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.kernels.mamba2_block import Mamba2Block
from lscollapse.models.numerics.carried import Carried, lose_unsquarable
from lscollapse.models.numerics.scores import scores_in_range

if TYPE_CHECKING:
    import pandas as pd

LOG10_2 = float(np.log10(2.0))


class Stream:
    """The residual stream of one variant and what became of its excerpts.

    The stream is X * 2^carried.exponent; of a certified excerpt, times `sign` * 2^`skipped` besides.

    Attributes:
        status: of each excerpt, `ok` or how it left the range.
        values: the measures of X.
        bound: of the certified excerpts, how far the values can be off: what the weights prove, and rounding (B,).
        skipped, sign: log2 and sign of the product of the lambdas since an excerpt was certified, (B,).
    """

    def __init__(self, adapter: Adapter, variant: Variant, X: Tensor, dtype: torch.dtype) -> None:
        self.variant = variant
        self.dtype = dtype
        self.computed = dtype  # of float64 the narrowest among its operations (Engines.stream): what the rows say
        self.X = X
        self.carried = Carried(len(X))
        self.status = measures.status(X)
        self.carries_scale = adapter.pre_norm and not variant.removes_block_norm
        self.values: dict[str, np.ndarray] = {}
        self.bound = np.full(len(X), np.nan)
        self.skipped = np.zeros(len(X))
        self.sign = np.ones(len(X))
        self.handed: dict[int, Any] = {}  # what the blocks hand to later ones beside X (see Adapter.run)
        self._left: list[float] | None = None
        self._proved = self.bound

    @property
    def running(self) -> bool:
        """Whether the next block has to be computed: some excerpt is finite and not certified."""
        return any(s == "ok" and np.isnan(b) for s, b in zip(self.status, self.bound, strict=True))

    @property
    def power(self) -> np.ndarray:
        """log2 of the size of the stream over that of X, (B,)."""
        return self.carried.exponent + self.skipped

    def certify_with(self, gains: Sequence[float]) -> None:
        if early_exit.applies(self.variant):
            self._left = early_exit.remaining(gains, self.variant, self.dtype)

    def record(self, layer: int, values: dict[str, Tensor] | None) -> None:
        """Take the measures of X, the input of block `layer`; None where X is what it was."""
        settled = ~np.isnan(self.bound)
        if settled.any():
            lam = self.variant.lam_at(layer - 1)
            self.skipped[settled] += np.log2(abs(lam))
            self.sign[settled] *= np.sign(lam)
        if values is None:
            return
        self.values = {name: value.cpu().numpy() for name, value in values.items()}
        self._proved = np.full(len(self.bound), np.nan)
        if self._left is not None:
            bound = early_exit.relative_change(self._left[layer], self.X, self.carried.exponent)
            proved = ~settled & (bound < torch.finfo(self.dtype).eps)
            self._proved = np.where(proved, np.maximum(bound, measures.floor(self.computed)), np.nan)

    def settle(self) -> None:
        """From the next layer on, the excerpts just proved keep their values."""
        if self._left is not None:
            self.bound = np.where(np.isnan(self.bound), self._proved, self.bound)

    def step(self, adapter: Adapter, layer: int, own: Mamba2Block | None) -> None:
        """X <- block `layer` of this variant."""
        if not self.carries_scale and not self.variant.removes_block_norm:
            self.X = lose_unsquarable(self.X)
        before, exponent = self.X, self.carried.exponent
        self.X = self._block(adapter, layer, own)
        if self.carries_scale:
            self.X = self.carried.fit(self.X)
        settled = ~np.isnan(self.bound)
        if settled.any():
            frozen = torch.from_numpy(settled).to(before.device)
            self.X[frozen] = before[frozen]
            self.carried.exponent = np.where(settled, exponent, self.carried.exponent)
        for i, found in enumerate(measures.status(self.X)):
            if self.status[i] == "ok" and found != "ok":
                self.status[i] = "overflow"  # a finite input under finite weights becomes NaN only by way of infinity

    def _block(self, adapter: Adapter, layer: int, own: Mamba2Block | None) -> Tensor:
        """The block's output, in the scale that it is carried in from then on."""
        variant = self.variant
        lam = variant.lam_at(layer) if variant.acts else 1.0
        own_scale = not self.carries_scale or (lam == 1.0 and not self.carried.exponent.any())
        if own is None:
            watched = scores_in_range() if variant.removes_block_norm else nullcontext()
            with watched, surgery_on_layer(adapter, layer, variant, None if own_scale else self.carried):
                return adapter.run(layer, self.X, self.handed)
        on_mixer = variant.acts and variant.skip_site == "mixer"
        factors = {} if own_scale else self.carried.plan(self.X, 1.0 if on_mixer else lam)._asdict()
        return own(
            self.X,
            lam=lam,
            gating=variant.gating,
            layernorm=variant.layernorm,
            skip_site=variant.skip_site if variant.acts else "residual",
            norm_site=variant.norm_site,
            **factors,
        )


def measure(
    model: Any,
    ids: Tensor | Sequence[Sequence[int]] | np.ndarray,
    variants: Sequence[Variant] = (Variant(),),
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    gains: Sequence[float] | None = None,
    finished: Callable[[Stream], None] | None = None,
) -> pd.DataFrame:
    """Measure every variant of `model` on every excerpt, layer 0 (embeddings) to K.

    Args:
        model: a transformers model of a supported architecture, in eval mode, or its Adapter.
        ids: token ids, (excerpts, N).
        variants: the arms; each layer's weights are touched once for all of them.
        dtype: what every arm computes in. Default: the dtype of the model's weights, and float64 for arms whose blocks have
            lost their norm, since their values leave float32 within a few layers.
        progress: called after each block pass with the number of excerpts it was for.
        gains: bounds of every layer's mixer (certify.gains): a variant then stops where they prove that nothing measured
            can still change by more than the dtype's resolution; its further rows have status `certified` and the bound.
        finished: called with the stream of each variant, in order, when all layers are done.

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
    with torch.no_grad():
        engines = Engines(adapter, variants, dtype)
        table = Table(n_tokens=tokens.shape[1])
        embedded = {kind: engines.embed(tokens, kind) for kind in set(engines.dtypes)}
        streams = [engines.stream(v, embedded[kind], kind) for v, kind in zip(variants, engines.dtypes, strict=True)]
        if gains is not None:
            for stream in streams:
                stream.certify_with(gains)
        first = {kind: measures.measure_all(X) for kind, X in embedded.items()}
        for number, stream in enumerate(streams):
            stream.record(0, first[stream.dtype])
            table.add(adapter, number, stream, 0)
        for layer in range(adapter.n_layers):
            blocks = engines.blocks(layer, {s.dtype for s in streams if s.running})
            for number, stream in enumerate(streams):
                stream.settle()
                values = None
                if stream.running:
                    stream.step(engines.adapter(stream.dtype), layer, blocks[stream.dtype])
                    values = measures.measure_all(stream.X)
                stream.record(layer + 1, values)
                table.add(adapter, number, stream, layer + 1)
                if progress is not None:
                    progress(len(tokens))
        if finished is not None:
            for stream in streams:
                finished(stream)
    return table.frame()


class Engines:
    """Which dtype each variant computes in, and what computes a block in that dtype."""

    def __init__(self, adapter: Adapter, variants: Sequence[Variant], dtype: torch.dtype | None) -> None:
        self._original = adapter
        self._adapters = {adapter.dtype: adapter} if adapter.has_own_blocks or adapter.dtype != torch.float64 else {}
        self._computed: dict[torch.dtype, torch.dtype] = {}
        self.dtypes = [dtype or (torch.float64 if v.removes_block_norm else adapter.dtype) for v in variants]

    def adapter(self, dtype: torch.dtype) -> Adapter:
        """The model in `dtype`: itself, or a converted copy where its modules have to compute in another one."""
        if dtype not in self._adapters:
            original = self._original
            self._adapters[dtype] = original if original.has_own_blocks else precision.converted(original, dtype)
        return self._adapters[dtype]

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The first residual stream; float32 at least where the package's own blocks keep it so.

        Before the first one, an excerpt goes through the float64 copy of a model, to see whether all of that is float64.
        """
        adapter = self.adapter(dtype)
        if dtype not in self._computed:
            probed = dtype == torch.float64 and not adapter.has_own_blocks  # elsewhere wider operations only help
            self._computed[dtype] = precision.computed_in(adapter, tokens[:1]) if probed else dtype
        X = adapter.embed(tokens)
        return X.to(torch.promote_types(dtype, torch.float32)) if adapter.has_own_blocks else X

    def stream(self, variant: Variant, X: Tensor, dtype: torch.dtype) -> Stream:
        """The stream of a variant that starts with an embedded X."""
        stream = Stream(self._original, variant, X, dtype)
        stream.computed = self._computed[dtype]
        return stream

    def blocks(self, layer: int, dtypes: set[torch.dtype]) -> dict[torch.dtype, Mamba2Block | None]:
        """The package's own block `layer` in every dtype; None where the model's module computes it."""
        adapters = {dtype: self.adapter(dtype) for dtype in dtypes}
        return {dtype: a.own_block(layer, dtype) if a.has_own_blocks else None for dtype, a in adapters.items()}


def checked_ids(adapter: Adapter, ids: Any) -> Tensor:
    """ids as a tensor (excerpts, N) on the model's device, or a ValueError that says what is wrong with them."""
    tokens = torch.as_tensor(np.asarray(ids) if not isinstance(ids, Tensor) else ids).long()
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"ids have shape {tuple(tokens.shape)}, expected (excerpts, tokens), both at least 1")
    vocabulary = adapter.vocabulary
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        worst = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise ValueError(
            f"token id {worst} is outside the model's vocabulary of {vocabulary}: tokenise with --tokenizer native"
        )
    limit = adapter.longest
    if limit is not None and tokens.shape[1] > limit:
        raise ValueError(
            f"{tokens.shape[1]} tokens, but the model has {limit} positions: use --tokens {limit} or fewer"
        )
    return tokens.to(adapter.device)


class Table:
    """Collects the columns of the long table; the data frame is made once, at the end."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.columns: dict[str, list[Any]] = {}

    def add(self, adapter: Adapter, number: int, stream: Stream, layer: int) -> None:
        """The rows of every measure of a variant's X at one layer."""
        floor = measures.floor(stream.computed)
        arrays, power = stream.values, stream.power
        bounds = measures.bounds(arrays, stream.bound, *stream.X.shape[1:])
        for name in measures.MEASURES:
            mantissa = arrays[name]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                value, log10 = mantissa, np.where(mantissa > 0, np.log10(mantissa), np.nan)
                if name == "mu":
                    whole = np.floor(power)
                    value = np.ldexp(mantissa * np.exp2(power - whole), whole.astype(int))
                    log10 = log10 + power * LOG10_2
            hidden = (name in measures.VANISHING) & (arrays["relative_mu" if name == "mu" else name] < floor)
            flags = zip(stream.status, hidden, np.isnan(mantissa), ~np.isnan(stream.bound), strict=True)
            status = [_status(*row) for row in flags]
            self.extend(adapter, number, stream, layer, name, value, log10, status, bounds[name], floor)

    def extend(
        self, adapter: Adapter, number: int, stream: Stream, layer: int, measure: str,
        value: Sequence[float] | np.ndarray, log10: Sequence[float] | np.ndarray, status: list[str],
        bound: Sequence[float] | np.ndarray, floor: float,
    ) -> None:  # fmt: skip
        """The rows of one measure, one an excerpt."""
        variant = stream.variant
        common = {
            "variant": number,
            "arm": variant.arm(adapter.has_gate),
            "lam": float("nan") if isinstance(variant.lam, tuple) else float(variant.lam),
            "gating": variant.gating if adapter.has_gate else None,
            "layernorm": variant.layernorm,
            "skip_site": variant.skip_site,
            "norm_site": variant.norm_site,
            "dtype": str(stream.computed).removeprefix("torch."),
            "n_tokens": self.n_tokens,
            "layer": layer,
            "floor": floor,
            "measure": measure,
        }
        rows = {"excerpt": range(len(value)), "value": value, "log10": log10, "status": status, "bound": bound}
        for key, constant in common.items():
            self.columns.setdefault(key, []).extend([constant] * len(value))
        for key, column in rows.items():
            self.columns.setdefault(key, []).extend(column)

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.columns).astype({"gating": "boolean", "lam": "float64", "bound": "float64"})


def _status(stream: str, below_floor: bool, undefined: bool, certified: bool) -> str:
    if stream != "ok":
        return stream
    return "nan" if undefined else "below_floor" if below_floor else "certified" if certified else "ok"
