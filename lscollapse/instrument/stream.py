"""The residual streams of the variants of one model, and what takes them from block to block.

Large lambda. The residual stream of a pre-norm net grows as |lam|^K and would leave float32 at |lam| = 4 and 64 layers.
It is carried as X * 2^exponent (models/numerics/carried.py), and log10 of mu is that of the true value.

Early exit (early_exit.py). From the layer at which an excerpt is certified on its X stands still, with its exponent, its
measures and all; what later layers would do to it is one factor, the product of their lambdas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.instrument import early_exit, precision, rounding
from lscollapse.instrument.surgery import Variant, check, surgery_on_layer
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.kernels.mamba2_block import Mamba2Block
from lscollapse.models.numerics.carried import Carried, lose_unsquarable
from lscollapse.models.numerics.scores import scores_in_range


class Stream:
    """The residual stream of one variant and what became of its excerpts.

    The stream is X * 2^carried.exponent; of a certified excerpt, times `sign` * 2^`skipped` besides.

    Attributes:
        number: of the variant among those that are measured together.
        dtype: of the stream.
        computed: what the rows say that it was computed in; of float64 the narrowest dtype among its operations.
        status: of each excerpt, `ok` or how it left the range.
        values: the measures of X.
        bound: of the certified excerpts, how far the values can be off: what the weights prove, and rounding (B,).
        skipped, sign: log2 and sign of the product of the lambdas since an excerpt was certified, (B,).
        twins: which excerpts are twins of others, whose X is shaken after every block (rounding.py); None where none is.
    """

    def __init__(
        self, adapter: Adapter, number: int, variant: Variant, X: Tensor, dtype: torch.dtype,
        computed: torch.dtype | None = None, gains: Sequence[float] | None = None, twins: rounding.Twins | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.variant = variant
        self.dtype = dtype
        self.computed = computed or dtype
        self.twins = twins
        self.X = self._shaken(X, 0)  # (B, N, d)
        self.carried = Carried(len(X))
        self.status = measures.status(X)
        self.carries_scale = adapter.pre_norm and not variant.removes_block_norm
        self.values: dict[str, np.ndarray] = {}
        self.bound = np.full(len(X), np.nan)
        self.skipped = np.zeros(len(X))
        self.sign = np.ones(len(X))
        self.handed: dict[int, Any] = {}  # what the blocks hand to later ones beside X (see Adapter.run)
        exits = gains is not None and early_exit.applies(variant)
        self._left = early_exit.remaining(gains or (), variant, dtype) if exits else None  # e_k of every layer
        self._proved = self.bound

    def _shaken(self, X: Tensor, layer: int) -> Tensor:
        return X if self.twins is None else self.twins.shaken(X, layer, rounding.unit(X, self.computed))

    @property
    def settled(self) -> np.ndarray:
        """Which excerpts are certified, so that their X stands still, (B,)."""
        settled: np.ndarray = ~np.isnan(self.bound)
        return settled

    @property
    def running(self) -> bool:
        """Whether the next block has to be computed: some excerpt is finite and not certified."""
        return any(s == "ok" and not settled for s, settled in zip(self.status, self.settled, strict=True))

    @property
    def power(self) -> np.ndarray:
        """log2 of the size of the stream over that of X, (B,)."""
        return self.carried.exponent + self.skipped

    def record(self, layer: int, values: dict[str, Tensor] | None) -> None:
        """Take the measures of X, the input of block `layer`; None where X is what it was."""
        settled = self.settled
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
            self.bound = np.where(self.settled, self.bound, self._proved)

    def step(self, adapter: Adapter, layer: int, block: Mamba2Block | None) -> None:
        """X <- block `layer` of this variant, (B, N, d) -> (B, N, d); by `block`, or the model's module where that is None."""
        if not self.carries_scale and not self.variant.removes_block_norm:
            self.X = lose_unsquarable(self.X)
        before, exponent = self.X, self.carried.exponent
        self.X = self._output(adapter, layer, block)
        if self.carries_scale:
            self.X = self.carried.fit(self.X)
        self.X = self._shaken(self.X, layer + 1)
        settled = self.settled
        if settled.any():
            frozen = torch.from_numpy(settled).to(before.device)
            self.X[frozen] = before[frozen]
            self.carried.exponent = np.where(settled, exponent, self.carried.exponent)
        for i, status in enumerate(measures.status(self.X)):
            if self.status[i] == "ok" and status != "ok":
                self.status[i] = "overflow"  # a finite input under finite weights becomes NaN only by way of infinity

    def _output(self, adapter: Adapter, layer: int, block: Mamba2Block | None) -> Tensor:
        """The block's output, (B, N, d), in the scale that it is carried in from then on."""
        variant = self.variant
        lam = variant.lam_at(layer) if variant.acts else 1.0
        unscaled = not self.carries_scale or (lam == 1.0 and not self.carried.exponent.any())
        if block is None:
            watched = scores_in_range() if variant.removes_block_norm else nullcontext()
            with watched, surgery_on_layer(adapter, layer, variant, None if unscaled else self.carried):
                return adapter.run(layer, self.X, self.handed)
        # At skip_site `mixer` lambda is inside O, and the sum round the block is X + O.
        on_mixer = variant.acts and variant.skip_site == "mixer"
        factors = {} if unscaled else self.carried.plan(self.X, 1.0 if on_mixer else lam)._asdict()
        return block(
            self.X,
            lam=lam,
            gating=variant.gating,
            layernorm=variant.layernorm,
            skip_site=variant.skip_site if variant.acts else "residual",
            norm_site=variant.norm_site,
            **factors,
        )


def dtypes_of(variants: Sequence[Variant], dtype: torch.dtype | None, weights: torch.dtype) -> list[torch.dtype]:
    """What each variant computes in: `dtype`, or where that is None the dtype of the weights, and float64 where the blocks have
    lost their norm, since their values leave float32 within a few layers."""
    return [dtype or (torch.float64 if v.removes_block_norm else weights) for v in variants]


class Engines:
    """Which dtype each variant computes in, and what computes a block in that dtype.

    Raises:
        SurgeryError: a variant is not possible for this model.
    """

    def __init__(
        self, adapter: Adapter, variants: Sequence[Variant], dtypes: Sequence[torch.dtype] | torch.dtype | None
    ) -> None:
        """`dtypes` as for `dtypes_of`, or one for each variant."""
        for variant in variants:
            check(adapter, variant)
        self._original = adapter
        self._variants = variants
        # The modules of a float64 model may hold float32 constants: they are replaced by a copy's (precision.py).
        self._adapters = {adapter.dtype: adapter} if adapter.has_own_blocks or adapter.dtype != torch.float64 else {}
        if dtypes is None or isinstance(dtypes, torch.dtype):
            dtypes = dtypes_of(variants, dtypes, adapter.dtype)
        self._dtypes = list(dtypes)

    def adapter(self, dtype: torch.dtype) -> Adapter:
        """The model in `dtype`: itself, or a copy in that dtype where the model's own modules compute the blocks."""
        if dtype not in self._adapters:
            original = self._original
            self._adapters[dtype] = original if original.has_own_blocks else precision.converted(original, dtype)
        return self._adapters[dtype]

    def streams(
        self, tokens: Tensor, gains: Sequence[float] | None = None, twins: rounding.Twins | None = None
    ) -> list[Stream]:
        """The stream of every variant, in order, at the embedded tokens (B, N); `gains` as for `measure`, `twins` of the tokens."""
        starts = {dtype: self._start(tokens, dtype) for dtype in set(self._dtypes)}
        arms = zip(self._variants, self._dtypes, strict=True)
        return [
            Stream(self._original, number, variant, starts[dtype][0], dtype, starts[dtype][1], gains, twins)
            for number, (variant, dtype) in enumerate(arms)
        ]

    def _start(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
        """The first residual stream, and the narrowest dtype that it is computed in.

        The stream is float32 at least where the package's own blocks keep it so. Before the first one, an excerpt goes
        through the float64 copy of a model, to see whether all of that is float64.
        """
        adapter = self.adapter(dtype)
        probed = dtype == torch.float64 and not adapter.has_own_blocks  # elsewhere wider operations only help
        computed = precision.computed_in(adapter, tokens[:1]) if probed else dtype
        X = adapter.embed(tokens)  # (B, N) -> (B, N, d)
        return X.to(torch.promote_types(dtype, torch.float32)) if adapter.has_own_blocks else X, computed

    def steps(self, streams: Sequence[Stream]) -> Iterator[tuple[int, Stream, bool]]:
        """Take all streams through layer 0, then all through layer 1, and so on: a layer's weights are touched once.

        Yields:
            The layer, the stream, and whether its X was computed anew, which it is not where no excerpt is running.
        """
        for layer in range(self._original.n_layers):
            dtypes = {stream.dtype for stream in streams if stream.running}
            blocks = {dtype: self.block(layer, dtype) for dtype in dtypes}
            for stream in streams:
                stream.settle()
                running = stream.running
                if running:
                    stream.step(self.adapter(stream.dtype), layer, blocks[stream.dtype])
                yield layer, stream, running

    def block(self, layer: int, dtype: torch.dtype) -> Mamba2Block | None:
        """The package's own block `layer` in `dtype`; None where the model's module computes it."""
        adapter = self.adapter(dtype)
        return adapter.own_block(layer, dtype) if adapter.has_own_blocks else None
