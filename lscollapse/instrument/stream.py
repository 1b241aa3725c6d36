"""The residual streams of the arms of one model, and what takes them from block to block.

Large lambda. The residual stream of a pre-norm net grows as |lam|^K and would leave float32 at |lam| = 4 and 64 layers.
It is carried as X * 2^exponent (models/numerics/carried.py), and log10 of mu is that of the true value.

Early exit (early_exit.py). From the layer at which an excerpt is certified on its X stands still, with its exponent, its
measures and all; what later layers would do to it is one factor, the product of their lambdas.

What decides how the next block is computed stays on the device; what the rows of the table need is known later (known.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lscollapse import measures
from lscollapse.core.table import DEFAULT_MEASURES
from lscollapse.instrument import early_exit, rounding
from lscollapse.instrument.known import Known
from lscollapse.instrument.surgery import Variant, surgery_on_layer
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.kernels.mamba2_block import Mamba2Block
from lscollapse.models.numerics.carried import Carried, Lambda, Split, any_of, frexp, largest_entries, lose_unsquarable
from lscollapse.models.numerics.scores import scores_in_range
from lscollapse.passes import Shared


class Arm(NamedTuple):
    """One variant of a stream, the `number`-th of those measured together, and which rows are its excerpts."""

    number: int
    variant: Variant
    rows: slice
    computed: torch.dtype


class Stream:
    """The residual stream of arms that differ in lambda alone, (R, N, d): the excerpts of the first, then of the second, ...

    The stream is X * 2^carried.exponent; of a certified row, times known.sign * 2^known.skipped besides.

    Attributes:
        variant: the first of the arms, for what all of them share.
        dtype: of the stream.
        computed: what the rows say that it was computed in; of float64 the narrowest dtype among its operations.
        rows: which rows X is of; the others have left the batch.
        lost: which rows have left the range, and how: 0 for none, else the place in table.LOST from 1 on, (R,).
        bound: of the certified rows, log2 of how far the values can be off by what the weights prove; NaN of others, (R,).
        chosen: the measures that are made of X, by name.
        recorded: what `record` noted of X last, (R, measures + known.STATE).
        twins: which excerpts are twins of others, whose X is shaken after every block (rounding.py); None where none is.
    """

    def __init__(
        self, adapter: Adapter, arms: dict[int, Variant], X: Tensor, dtype: torch.dtype,
        computed: torch.dtype | None = None, gains: Sequence[float] | None = None, twins: rounding.Twins | None = None,
        chosen: Sequence[str] = DEFAULT_MEASURES,
    ) -> None:  # fmt: skip
        """X: the embedded excerpts (B, N, d), the same for all arms, which are given by their numbers; `chosen`: measures."""
        self.variants = list(arms.values())
        self.variant = self.variants[0]
        self.dtype = dtype
        self.computed = computed or dtype
        self.twins = twins
        self.chosen = tuple(chosen)
        each = [slice(i * len(X), (i + 1) * len(X)) for i in range(len(arms))]
        self.arms = [Arm(number, arms[number], rows, self.computed) for number, rows in zip(arms, each, strict=True)]
        self.X = self._shaken(X.repeat(len(arms), 1, 1) if len(arms) > 1 else X, 0)  # (R, N, d)
        self.rows = np.arange(len(self.X))
        self.carried = Carried(self.X)
        self.carries_scale = adapter.pre_norm and not self.variant.removes_block_norm
        self.known = Known.of(len(self.X), len(self.chosen))
        self.recorded = self.X.new_empty(0)
        self.handed: dict[int, Any] = {}  # what the blocks hand to later ones beside X (see Adapter.run)
        self._largest: Tensor | None = largest_entries(self.X)
        # A finite input under finite weights becomes NaN only by way of infinity.
        self._how = torch.where(self._largest.isnan(), 2.0, 1.0).double()  # (R,), what `lost` is of a row that is lost
        self.lost = torch.where(self._largest < math.inf, 0.0, self._how)  # nor is NaN under infinity
        self.bound = self._next_bound = torch.full_like(self.lost, math.nan)
        self._still = self.bound == self.bound
        self._gone: list[tuple[np.ndarray, Tensor]] = []  # rows that have left, and their X
        lams = [[variant.lam_at(layer) for layer in range(adapter.n_layers)] for variant in self.variants]
        self._lams = np.repeat(np.array(lams).T, len(X), axis=1)  # (K, R)
        there = torch.from_numpy(self._lams).to(X.device)
        self._lams_there = torch.stack([there, *frexp(there)])  # (3, K, R), lambda, its m and p
        self._left: Tensor | None = None  # (K + 1, R), log2 of e_k of every layer
        if gains is not None and any(map(early_exit.applies, self.variants)):
            left = [early_exit.remaining(gains, variant, dtype) for variant in self.variants]
            self._left = torch.tensor(left, dtype=torch.float64).log2().T.repeat_interleave(len(X), 1).to(X.device)

    def _shaken(self, X: Tensor, layer: int) -> Tensor:
        return X if self.twins is None else self.twins.shaken(X, layer, rounding.unit(X, self.computed))

    @property
    def running(self) -> bool:
        """Whether the next block has to be computed, as far as is known: some row is finite and not certified."""
        return bool(self.known.running[self.rows].any())

    @property
    def largest(self) -> Tensor:
        """The largest entries of X, (R,)."""
        if self._largest is None:
            self._take(largest_entries(self.X))
        assert self._largest is not None
        return self._largest

    def _take(self, largest: Tensor) -> None:
        self._largest = largest
        self.lost = torch.where(largest < math.inf, self.lost, self._how)

    def record(self, layer: int, shared: Shared | None, copies: int = 1) -> None:
        """Note the measures of X, the input of block `layer`, and its state; None where X is what it was.

        shared: of X, or of the part of it of which there are so many `copies`.
        """
        if shared is None:
            self.recorded = self.recorded[:0]
            return
        found = measures.measure_all(shared, self.chosen)
        values = [value.repeat(copies) if copies > 1 else value for value in found.values()]
        if self._largest is None:
            self._take(shared.peak)
        if self._left is not None:
            shortest = shared.shortest.repeat(copies) if copies > 1 else shared.shortest
            change = early_exit.log2_change(self._left[layer], shortest, self.carried.down)
            proved = torch.where(change < math.log2(torch.finfo(self.dtype).eps), change, math.nan)
            self._next_bound = torch.where(self._still, self.bound, proved)
        self._note(values)

    def _note(self, values: Sequence[Tensor]) -> None:
        state = (self.carried.down, self.lost, self.bound, self._next_bound)
        self.recorded = torch.stack([*values, *state], 1)

    def learn(self, layer: int, rows: np.ndarray, found: np.ndarray) -> None:
        """Let `known` be of `layer`, given what was recorded of it."""
        lams = self._lams[layer - 1] if layer else None
        self.known.learn(rows, found, lams, measures.floor(self.computed))

    def read(self) -> None:
        """Let `known` be of X as it is, without its measures; waits for the device."""
        self._take(self.largest)
        self._note([torch.full_like(self.bound, math.nan)] * len(self.chosen))
        self.learn(0, self.rows, self.recorded.numpy(force=True))

    def settle(self) -> None:
        """From the next layer on, the rows just proved keep their values."""
        if self._left is not None:
            self.bound = self._next_bound
            self._still = self.bound == self.bound  # not NaN

    def leave(self) -> None:
        """Take the rows out of the batch that are known to need no further block."""
        stay = self.known.running[self.rows]
        if stay.all():
            return
        going, staying = (
            torch.from_numpy(np.flatnonzero(part)).to(self.X.device, non_blocking=True) for part in (~stay, stay)
        )
        self._gone.append((self.rows[~stay], self.X[going]))
        self.rows = self.rows[stay]
        largest = self.largest
        for name in ("X", "lost", "_how", "bound", "_next_bound", "_still"):
            setattr(self, name, getattr(self, name).index_select(0, staying))
        self._largest = largest.index_select(0, staying)
        self.carried.down = self.carried.down.index_select(0, staying)
        self._lams_there = self._lams_there.index_select(2, staying)
        self._left = None if self._left is None else self._left.index_select(1, staying)

    def whole(self) -> Tensor:
        """X of all rows, also of those that have left."""
        if not self._gone:
            return self.X
        X = self.X.new_empty(len(self._lams[0]), *self.X.shape[1:])
        for rows, part in [*self._gone, (self.rows, self.X)]:
            X[torch.from_numpy(rows).to(X.device)] = part
        return X

    def step(self, adapter: Adapter, layer: int, block: Mamba2Block | None) -> None:
        """X <- block `layer` of every arm, (R, N, d) -> (R, N, d); by `block`, or the model's module where that is None."""
        still = None if self._left is None else self._still
        if block is None:
            self._by_module(adapter, layer, still)
        else:
            self.X = self._by_block(block, layer, still)
        self.X = self._shaken(self.X, layer + 1)
        self._largest = None

    def _lam(self, layer: int) -> tuple[Lambda, Split]:
        """Lambda of block `layer`, of one arm as a number, and as it is split; 1 where it does not act."""
        if self.variant.acts and len(self.variants) > 1:
            lam, mantissa, power = self._lams_there[:, layer].unbind()
            return lam, (mantissa, power)
        number = self.variant.lam_at(layer) if self.variant.acts else 1.0
        return number, frexp(number)

    def _by_block(self, block: Mamba2Block, layer: int, still: Tensor | None) -> Tensor:
        """The output of the package's own block, which takes an X of any size: the next one's factors bring it into range."""
        variant, (lam, split) = self.variant, self._lam(layer)
        # At skip_site `mixer` lambda is inside O, and the sum round the block is X + O.
        on_mixer = variant.acts and variant.skip_site == "mixer"
        factors: dict[str, Tensor] = {}
        if self.carries_scale:
            factors = self.carried.plan(self.largest, frexp(1.0) if on_mixer else split, still)._asdict()
        elif still is not None:
            lams = lam if isinstance(lam, Tensor) else torch.full_like(self.bound, lam)
            factors = {"skip": torch.where(still, 1.0, lams), "o_scale": (~still).double()}
        return block(
            self.X,
            lam=lam,
            gating=variant.gating,
            layernorm=variant.layernorm,
            skip_site=variant.skip_site if variant.acts else "residual",
            norm_site=variant.norm_site,
            **factors,
        )

    def _by_module(self, adapter: Adapter, layer: int, still: Tensor | None) -> None:
        """The output of the model's own module under hooks, in the scale that it is carried in from then on."""
        variant, (lam, _) = self.variant, self._lam(layer)
        if not self.carries_scale and not variant.removes_block_norm:
            self.X = lose_unsquarable(self.X, self.largest)
        before, down = self.X, self.carried.down
        plain = not self.carries_scale or (not isinstance(lam, Tensor) and lam == 1.0 and not any_of(down != 0))
        watched = scores_in_range() if variant.removes_block_norm else nullcontext()
        lams = lam if isinstance(lam, Tensor) else None
        with watched, surgery_on_layer(adapter, layer, variant, None if plain else self.carried, lams):
            self.X = adapter.run(layer, self.X, self.handed)
        if self.carries_scale:
            self.X = self.carried.fit(self.X)
        if still is not None and any_of(still):
            self.X = torch.where(still[:, None, None], before, self.X)
            self.carried.down = torch.where(still, down, self.carried.down)
