"""`measure`: a probe of the first excerpts, then the rest; and the layer-major pass that both are made of.

For each layer, for each variant; made into rows of the long table at once, nothing else kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lscollapse.core.table import DEFAULT_MEASURES, RESOLVE, chosen_measures
from lscollapse.instrument import precision, rounding
from lscollapse.instrument.engines import Engines, dtypes_of
from lscollapse.instrument.readback import Readback
from lscollapse.instrument.rows import Table
from lscollapse.instrument.stream import Stream
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.kernels.fused_measures import shared_of
from lscollapse.passes import Shared


def measure(
    model: Any,
    ids: Tensor | Sequence[Sequence[int]] | np.ndarray,
    variants: Sequence[Variant] = (Variant(),),
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    gains: Sequence[float] | None = None,
    *, resolve: float = RESOLVE, batch: int | None = None, measures: str | Sequence[str] = DEFAULT_MEASURES,
) -> pd.DataFrame:  # fmt: skip
    """Measure every variant of `model` on every excerpt, layer 0 (embeddings) to K, each number with its rounding error.

    Args:
        model: a transformers model of a supported architecture, in eval mode, or its Adapter.
        ids: token ids, (excerpts, N).
        variants: the arms; each layer's weights are touched once for all of them.
        dtype: what every arm computes in. Default: the dtype of the weights; float64 for arms whose blocks have lost their
            norm, and for those that float32 does not resolve (rounding.py) if a float64 copy of the model fits.
        progress: called after each block pass with the number of excerpts it was for.
        gains: bounds of every layer's mixer (early_exit.gains): a variant stops where they prove that no measure can still
            change by more than the dtype resolves; its further rows have status `certified` and the bound.
        resolve: rounding over this, absolute or relative by the measure, makes a row `unresolved`.
        batch: how many excerpts, twins counted, go through the model together, but a pair at least; all by default.
        measures: by name, or "all"; those of core.table.ALWAYS are always among them.

    Returns:
        One row per arm, excerpt, layer and measure (docs/table.md lists the columns).

    Raises:
        SurgeryError, UnsupportedModel: a variant or the architecture is not supported.
        ValueError: ids are not (excerpts, N) or fall outside the vocabulary, or a measure is unknown.
    """
    chosen, adapter = chosen_measures(measures), adapt(model)
    tokens, own = checked_ids(adapter, ids), dict(enumerate(dtypes_of(variants, dtype, adapter.dtype)))
    first, size = min(rounding.PROBED, len(tokens)), batch or rounding.TWINS * len(tokens)

    def rows(start: int, stop: int, dtypes: dict[int, torch.dtype], twins: bool) -> Iterator[pd.DataFrame]:
        return _rows(adapter, tokens[start:stop], start, variants, dtypes, progress, gains, twins, chosen)

    def twice(dtypes: dict[int, torch.dtype]) -> pd.DataFrame:
        pairs = max(1, size // rounding.TWINS)
        parts = [rows(start, min(first, start + pairs), dtypes, True) for start in range(0, first, pairs)]
        return pd.concat([found for part in parts for found in part], ignore_index=True)

    probe = rounding.probe(twice, own, resolve, dtype is None and precision.fits(adapter, torch.float64))
    known, parts = rounding.probed(probe), [probe.drop(columns=["asked", "why"])]
    for start in range(first, len(tokens), size):
        for found in rows(start, start + size, known.dtypes, False):
            parts.append(rounding.written(found, known.rounding, resolve))
    return _in_order(pd.concat(parts, ignore_index=True), chosen)


def _rows(
    adapter: Adapter, tokens: Tensor, start: int, variants: Sequence[Variant], dtypes: dict[int, torch.dtype],
    progress: Callable[[int], None] | None, gains: Sequence[float] | None, twins: bool, chosen: Sequence[str],
) -> Iterator[pd.DataFrame]:  # fmt: skip
    """Of some variants on excerpts that are numbered from `start`, or on them and their twins; those of one dtype together."""
    numbers = rounding.Twins(range(start, start + len(tokens))) if twins else None
    part = tokens.repeat(rounding.TWINS if twins else 1, 1)
    for dtype, own in rounding.of_one_dtype(dtypes).items():
        arms = [variants[number] for number in own]
        rows = measure_pass(adapter, part, arms, dtype, progress, gains, twins=numbers, chosen=chosen)
        rows = rows.assign(variant=rows["variant"].map(dict(enumerate(own))), excerpt=rows["excerpt"] + start)
        yield rounding.without_twins(rows, len(tokens)) if twins else rows


def _in_order(rows: pd.DataFrame, chosen: Sequence[str]) -> pd.DataFrame:
    """By layer, variant, measure and excerpt, as the rows of one pass are."""
    rank = rows["measure"].map({name: number for number, name in enumerate(chosen)})
    order = np.lexsort((rows["excerpt"], rank, rows["variant"], rows["layer"]))
    return rows.iloc[order].reset_index(drop=True)


def measure_pass(
    adapter: Adapter,
    ids: Any,
    variants: Sequence[Variant],
    dtypes: Sequence[torch.dtype] | torch.dtype | None,
    progress: Callable[[int], None] | None = None,
    gains: Sequence[float] | None = None,
    *,
    finished: Callable[[Stream], None] | None = None,
    twins: rounding.Twins | None = None,
    batched: bool | None = None,
    chosen: Sequence[str] = DEFAULT_MEASURES,
) -> pd.DataFrame:
    """The rows of one pass, without `rounding`; arguments as for `measure`.

    Args:
        dtypes: what each variant computes in, or as for `measure`, without float64 where that is for rounding.
        finished: called with every stream when all layers are done; `batched` as for Engines.
        twins: of the ids, which are then (2n, N).
        chosen: the measures, as `core.table.chosen_measures` gives them.
    """
    engines = Engines(adapter, variants, dtypes, batched)
    tokens = checked_ids(adapter, ids)
    table = Table(adapter, tokens.shape[1])
    with torch.no_grad():
        streams = engines.streams(tokens, gains, twins, chosen)
        readback = Readback(streams, late=int(engines.batched))
        _record_embedded(streams, len(tokens))
        readback.send(0)
        table.add(streams, readback.arrived())
        for layer, stream, computed in engines.steps(streams):
            stream.record(layer + 1, shared_of(stream.X) if computed else None)
            if progress is not None:
                progress(len(tokens) * len(stream.arms))
            if stream is streams[-1]:
                readback.send(layer + 1)
                table.add(streams, readback.arrived())
        table.add(streams, readback.arrived(late=0))
        if finished is not None:
            for stream in streams:
                finished(stream)
    return table.frame()


def _record_embedded(streams: Sequence[Stream], n: int) -> None:
    """Let the streams record the n embedded excerpts, which all arms of one dtype share."""
    found: dict[torch.dtype, Shared] = {}
    for stream in streams:
        if stream.dtype not in found:
            found[stream.dtype] = shared_of(stream.X[:n])
        stream.record(0, found[stream.dtype], copies=len(stream.arms))


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
