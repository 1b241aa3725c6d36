"""The rows of the long table (docs/table.md), made of what is known of the streams, a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lscollapse import measures, perturbation
from lscollapse.core.table import STATUSES
from lscollapse.instrument.stream import Arm, Stream
from lscollapse.models.adapters.adapter import Adapter

LOG10_2 = float(np.log10(2.0))
CODES = {status: code for code, status in enumerate(STATUSES)}


class Table:
    """Collects arrays; the data frame is made once, at the end, in the order layer, variant, measure, excerpt."""

    def __init__(self, adapter: Adapter, n_tokens: int) -> None:
        self.has_gate = adapter.has_gate
        self.n_tokens = n_tokens
        self._heads: list[dict[str, Any]] = []  # what the rows of one arm, layer and measure have in common
        self._rows: list[dict[str, np.ndarray]] = []  # of each of them

    def add(self, streams: Sequence[Stream], layers: Iterable[int]) -> None:
        """The rows of every measure of the streams, as they are known while each of the `layers` is asked for."""
        for layer in layers:
            for stream in streams:
                self._add(stream, layer)

    def _add(self, stream: Stream, layer: int) -> None:
        known, floor = stream.known, measures.floor(stream.computed)
        arrays = dict(zip(stream.chosen, known.values.T, strict=True))  # (R,) each
        bounds = perturbation.bounds(arrays, known.bound, *stream.X.shape[1:])
        columns = {}
        for name, mantissa in arrays.items():
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                value, log10 = mantissa.copy(), np.where(mantissa > 0, np.log10(mantissa), np.nan)
                if name == "mu":  # the only measure with the size of the stream in it
                    whole = np.floor(known.power)
                    value = np.ldexp(mantissa * np.exp2(known.power - whole), whole.astype(int))
                    log10 = log10 + known.power * LOG10_2
            hidden = (name in measures.VANISHING) & (arrays["relative_mu" if name == "mu" else name] < floor)
            wrong = np.select([np.isnan(mantissa), np.isinf(mantissa), hidden], ["nan", "overflow", "below_floor"], "")
            status = known.status_of(wrong)
            columns[name] = value, log10, status, bounds[name]
        for arm in stream.arms:
            for name, column in columns.items():
                value, log10, status, bound = (part[arm.rows] for part in column)
                self.extend(arm, layer, name, value, log10, status, bound, floor)

    def extend(
        self, arm: Arm, layer: int, measure: str, value: np.ndarray, log10: np.ndarray, status: Sequence[str] | np.ndarray,
        bound: np.ndarray, floor: float = math.nan,
    ) -> None:  # fmt: skip
        """The rows of one measure of one arm, one an excerpt."""
        variant = arm.variant
        self._heads.append(
            {
                "variant": arm.number,
                "arm": variant.arm(self.has_gate),
                "lam": math.nan if isinstance(variant.lam, tuple) else float(variant.lam),
                "gating": variant.gating if self.has_gate else None,
                "layernorm": variant.layernorm,
                "skip_site": variant.skip_site,
                "norm_site": variant.norm_site,
                "dtype": str(arm.computed).removeprefix("torch."),
                "n_tokens": self.n_tokens,
                "layer": layer,
                "floor": floor,
                "measure": measure,
            }
        )
        codes = np.array([CODES[one] for one in status])
        self._rows.append({"value": value, "log10": log10, "status": codes, "bound": bound})

    def frame(self) -> pd.DataFrame:
        order = sorted(range(len(self._heads)), key=lambda i: (self._heads[i]["layer"], self._heads[i]["variant"]))
        rows = [self._rows[i] for i in order]
        counts = [len(part["value"]) for part in rows]
        heads = pd.DataFrame([self._heads[i] for i in order]).astype({"gating": "boolean", "lam": "float64"})
        frame = heads.take(np.repeat(np.arange(len(rows)), counts)).reset_index(drop=True)
        found = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
        status = pd.Series(STATUSES).take(found.pop("status")).reset_index(drop=True)
        excerpt = np.concatenate([np.arange(count) for count in counts])
        value, log10, bound = (found[name] for name in ("value", "log10", "bound"))
        return frame.assign(excerpt=excerpt, value=value, log10=log10, status=status, bound=bound, rounding=math.nan)
