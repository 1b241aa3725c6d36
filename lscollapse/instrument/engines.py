"""What computes the arms of one model together: in which dtype, as which batches, and block by block."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from lscollapse.core.table import DEFAULT_MEASURES
from lscollapse.instrument import precision, rounding
from lscollapse.instrument.stream import Stream
from lscollapse.instrument.surgery import Variant, check
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.kernels.backends import ieee
from lscollapse.models.kernels.mamba2_block import Mamba2Block


def dtypes_of(variants: Sequence[Variant], dtype: torch.dtype | None, weights: torch.dtype) -> list[torch.dtype]:
    """What each variant computes in: `dtype`, or where that is None the dtype of the weights, and float64 where the blocks have
    lost their norm, since their values leave float32 within a few layers."""
    return [dtype or (torch.float64 if v.removes_block_norm else weights) for v in variants]


class Engines:
    """Which dtype each variant computes in, and what computes a block in that dtype.

    Attributes:
        batched: whether arms that differ in lambda alone are one batch, whose rows leave it when they are done. On a GPU,
            which is kept busy so; on a CPU a batch gains nothing, and the rows of an arm would depend on the others.

    Raises:
        SurgeryError: a variant is not possible for this model.
    """

    def __init__(
        self, adapter: Adapter, variants: Sequence[Variant], dtypes: Sequence[torch.dtype] | torch.dtype | None,
        batched: bool | None = None,
    ) -> None:  # fmt: skip
        """`dtypes` as for `dtypes_of`, or one for each variant; `batched` by the device where it is not given."""
        for variant in variants:
            check(adapter, variant)
        if adapter.device.type == "cuda":
            ieee()
        self._original = adapter
        self._variants = variants
        self.batched = adapter.device.type != "cpu" if batched is None else batched
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
        self, tokens: Tensor, gains: Sequence[float] | None = None, twins: rounding.Twins | None = None,
        chosen: Sequence[str] = DEFAULT_MEASURES,
    ) -> list[Stream]:  # fmt: skip
        """The streams of all variants at the embedded tokens (B, N); `gains` as for `measure`, `twins` of the tokens, `chosen`
        measures."""
        batches: dict[Hashable, dict[int, Variant]] = {}
        for number, variant in enumerate(self._variants):
            batches.setdefault(self._batch_of(number), {})[number] = variant
        starts = {dtype: self._start(tokens, dtype) for dtype in set(self._dtypes)}
        dtypes = [self._dtypes[next(iter(arms))] for arms in batches.values()]
        return [
            Stream(self._original, arms, starts[dtype][0], dtype, starts[dtype][1], gains, twins, chosen)
            for arms, dtype in zip(batches.values(), dtypes, strict=True)
        ]

    def _batch_of(self, number: int) -> Hashable:
        """What the arms of one batch have in common."""
        variant, dtype = self._variants[number], self._dtypes[number]
        own = self._original.has_own_blocks
        inside = variant.skip_site == "mixer" and not own  # there lambda is a parameter of the module
        if not self.batched or inside or not (own or self._original.any_batch):
            return number
        return dtype, variant.gating, variant.layernorm, variant.skip_site, variant.norm_site

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
            The layer, the stream, and whether its X was computed anew, which it is not where no row is running.
        """
        for layer in range(self._original.n_layers):
            for stream in streams:
                stream.settle()
                if self.batched and stream.twins is None and self._original.has_own_blocks:
                    stream.leave()
            dtypes = {stream.dtype for stream in streams if stream.running}
            blocks = {dtype: self.block(layer, dtype) for dtype in dtypes}
            for stream in streams:
                running = stream.running
                if running:
                    stream.step(self.adapter(stream.dtype), layer, blocks[stream.dtype])
                yield layer, stream, running

    def ends(self, tokens: Tensor, twins: rounding.Twins | None = None) -> list[Stream]:
        """The streams as they come out of the last layer, without measures on the way; `known` is of then."""
        streams = self.streams(tokens, twins=twins)
        for _ in self.steps(streams):
            pass
        for stream in streams:
            stream.read()
        return streams

    def block(self, layer: int, dtype: torch.dtype) -> Mamba2Block | None:
        """The package's own block `layer` in `dtype`; None where the model's module computes it."""
        adapter = self.adapter(dtype)
        return adapter.own_block(layer, dtype) if adapter.has_own_blocks else None
