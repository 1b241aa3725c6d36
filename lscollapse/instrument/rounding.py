"""What rounding makes of every number: Monte Carlo arithmetic at block boundaries.

A twin of an excerpt goes through the net beside it. Before the first block and after every block the twin's X is multiplied by
1 + u xi, entry by entry, xi being +1 or -1 at random and u one unit in the last place of what the arm computes in. What the
net makes of that difference it makes of its own rounding too: where the twins stay together rounding decides nothing, where
they part it decides the value. D. S. Parker, "Monte Carlo Arithmetic" (1997); Verificarlo (arXiv:1509.01347) does the same
after every operation.

`rounding` of a variant, layer and measure is SAFETY times the largest |twin - original| of the first PROBED excerpts, in that
layer or within NEAR layers of it, since two twins may meet by chance in one layer; and no less than what the floor of the
dtype leaves open of a measure that goes to zero. That of the stable rank follows from the rank-1 residual's, that of mu from
relative mu's and the norm's. It is the same on all rows of that variant, layer and measure, however a run was tiled.
SAFETY and NEAR were calibrated against float64 (docs/rounding.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.table import ABSOLUTE, KNOWN, LOGARITHMIC, LOST, NOT_WIDENED, UNRESOLVED
from lscollapse.measures import VANISHING
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.perturbation import log10_mu_change, stable_rank_change

PROBED = 2  # excerpts that get a twin: the first ones
TWINS = 2  # copies of such an excerpt: itself and its twin
SAFETY = 16.0
NEAR = 2  # layers
SHAKING = int.from_bytes(b"rounding")  # names the random signs
# Of a block that keeps X in float32 and rounds to bfloat16 only what its products take. Rounding to nearest moves a number by
# 0.21 units (root mean square, see measures.floor), and here it moves O alone, not the skip beside it.
OPERANDS_ONLY = 1 / 16
PLACE = ["variant", "layer", "measure"]
AGGREGATES = (("apart", "max"), ("value", "min"), ("value", "max"), ("floor", "max"))


@dataclass(frozen=True)
class Twins:
    """A batch of the excerpts `numbers` and, after them, a twin of each."""

    numbers: Sequence[int]
    _made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def shaken(self, X: Tensor, layer: int, unit: float) -> Tensor:
        """X of layer `layer`, the twins multiplied by 1 + unit * xi; the originals as they are, bit for bit.

        X: (2n, N, d), or of several arms, one after the other.
        """
        if self._made and next(iter(self._made))[0] != layer:
            self._made.clear()
        asked = layer, unit, X.shape[1:], X.dtype, X.device
        if asked not in self._made:  # layer by layer, every variant asks for the same
            self._made[asked] = self._factor(X, layer, unit)
        factor = self._made[asked]
        return (X.view(-1, *factor.shape) * factor).flatten(0, 1)

    def _factor(self, X: Tensor, layer: int, unit: float) -> Tensor:
        """What the rows of one arm are multiplied by, (2n, N, d)."""
        signs = torch.from_numpy(np.stack([_signs(number, layer, *X.shape[1:]) for number in self.numbers]))
        signs = signs.pin_memory() if X.is_cuda else signs  # so that the copy waits for nothing
        factor = X.new_ones(2 * len(signs), *X.shape[1:])
        factor[len(signs) :] += unit * signs.to(X.device, X.dtype, non_blocking=True)
        return factor


def _signs(excerpt: int, layer: int, n: int, d: int) -> np.ndarray:
    """Random signs, (n, d), the same on every machine and for every variant."""
    stream = np.random.SeedSequence(0, spawn_key=(SHAKING, excerpt, layer))
    bits = np.unpackbits(np.frombuffer(np.random.Generator(np.random.PCG64(stream)).bytes(-(-n * d // 8)), np.uint8))
    return 2 * bits[: n * d].reshape(n, d).astype(np.int8) - 1


def unit(X: Tensor, computed: torch.dtype) -> float:
    """u for a stream X of the package's own blocks or a model's, in units of X, where the arm computes in `computed`."""
    spacing = torch.finfo(computed).eps
    operands_only = computed == torch.bfloat16 and X.dtype != computed
    return spacing * (OPERANDS_ONLY if operands_only else 1.0)


# --- from twins to an estimate ---


def without_twins(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The rows of the n originals of one pass over them and their twins, with `apart`: how far each is from its twin.

    Of `mu` it is how far log10 of the norm of Y is: what relative mu adds is in the rows of that.
    """
    number = rows["value"].where(~rows["measure"].isin(LOGARITHMIC), rows["log10"]).to_numpy().copy()
    mu, relative = ((rows["measure"] == name).to_numpy() for name in ("mu", "relative_mu"))
    number[mu] -= rows.loc[relative, "log10"].to_numpy()[: mu.sum()]  # none where mu is not measured
    pairs, lost = number.reshape(-1, 2 * n), rows["status"].isin(LOST).to_numpy().reshape(-1, 2 * n)
    with np.errstate(invalid="ignore"):
        apart = np.abs(pairs[:, n:] - pairs[:, :n])
    apart = np.where(lost[:, n:] != lost[:, :n], np.inf, apart)
    originals = np.tile(np.arange(2 * n) < n, len(apart))
    return rows[originals].assign(apart=apart.ravel())


def estimated(rows: pd.DataFrame, resolve: float) -> pd.DataFrame:
    """The originals of a whole probe with `rounding` and what becomes of their status; `apart` is gone."""
    by_layer = [rows.groupby(PLACE)[column].agg(how).unstack("measure") for column, how in AGGREGATES]
    apart, least, most, floor = by_layer  # (variant, layer) x measures each
    error = apart.copy()
    for shift in range(-NEAR, NEAR + 1):
        error = error.combine(apart.groupby(level="variant").shift(shift), np.fmax)
    still = rows["status"].eq("certified").groupby([rows["variant"], rows["layer"]]).all()  # X stands still there
    before = error.mask(still).groupby(level="variant").ffill().where(still)
    error = SAFETY * before.fillna(error)
    for name in set(error) & set(VANISHING) - set(LOGARITHMIC):
        error[name] = np.fmax(error[name], floor[name] * np.minimum(1.0, floor[name] / least[name]))
    if "mu" in error:
        error["mu"] += log10_mu_change(least["relative_mu"].to_numpy(), error["relative_mu"].to_numpy())
    if "stable_rank" in error:
        r, s, b = (table.to_numpy() for table in (most["rank1_residual"], most["stable_rank"], error["rank1_residual"]))
        error["stable_rank"] = stable_rank_change(r, s, np.minimum(b, 1.0), rows["n_tokens"].max())
    if "lm_loss" in error:  # itself a number of the dtype, in which twins may come out as one
        unit_of = {name: torch.finfo(getattr(torch, name)).eps for name in rows["dtype"].unique()}
        error["lm_loss"] = np.fmax(
            error["lm_loss"], most["lm_loss"] * rows.groupby(PLACE[:2])["dtype"].first().map(unit_of)
        )
    return written(rows.drop(columns="apart"), error, resolve)


def written(rows: pd.DataFrame, rounding: pd.DataFrame, resolve: float) -> pd.DataFrame:
    """`rows` with their `rounding`, given by variant and layer with a column a measure; `unresolved` where it is over the tolerance.

    Args:
        resolve: the tolerance, absolute for ABSOLUTE measures, else relative to the value. A number under the floor is known
            to be there, whatever is left of its `mu`.
    """
    place = pd.MultiIndex.from_frame(rows[["variant", "layer"]])
    at = rounding.index.get_indexer(place), rounding.columns.get_indexer(pd.Index(rows["measure"]))
    error = rounding.to_numpy()[at]
    hidden = (rows["status"] == "below_floor") & rows["measure"].isin(LOGARITHMIC)
    over = ~(error <= tolerances(rows, resolve))  # also where nothing is known, since no excerpt with a twin got there
    status = rows["status"].mask(over & ~hidden & rows["status"].isin(KNOWN), UNRESOLVED)
    return rows.assign(rounding=error, status=status)


def tolerances(rows: pd.DataFrame, resolve: float) -> np.ndarray:
    """The most that `rounding` of each row may be where the tolerance is `resolve`, in the units of `rounding`."""
    absolute, logarithmic = rows["measure"].isin(ABSOLUTE), rows["measure"].isin(LOGARITHMIC)
    relative = np.where(logarithmic, np.log10(1.0 + resolve), resolve * rows["value"].abs())
    most: np.ndarray = np.where(absolute, resolve, relative)
    return most


# --- the probe of a run ---


@dataclass(frozen=True)
class Probed:
    """What a probe found: the dtype that each variant runs in, in order, and the `rounding` of its numbers, as for `written`."""

    dtypes: dict[int, torch.dtype]
    rounding: pd.DataFrame = field(default_factory=pd.DataFrame)


def probe(
    twice: Callable[[dict[int, torch.dtype]], pd.DataFrame], dtypes: dict[int, torch.dtype], resolve: float, widen: bool
) -> pd.DataFrame:  # fmt: skip
    """The rows of the first excerpts, in a dtype for each variant that resolves them where there is one.

    Args:
        twice: measures the variants of these numbers in these dtypes, on the first excerpts with a twin each; gives what
            `without_twins` makes of it.
        dtypes: what each variant is to compute in.
        widen: whether variants that float32 does not resolve may run in float64.

    Returns:
        The rows, with two columns more: `asked`, the dtype that the variant is to run in, and `why`, what float32 did not
        resolve of it ("" where it did).
    """
    rows = _asked(estimated(twice(dtypes), resolve), dtypes)
    narrow = [number for number, dtype in dtypes.items() if dtype == torch.float32]
    left = rows[rows["variant"].isin(narrow) & (rows["status"] == UNRESOLVED)]
    left = left[~left["measure"].isin(NOT_WIDENED)]
    why = {number: _why(left[left["variant"] == number]) for number in sorted(left["variant"].unique().tolist())}
    rows = rows.assign(why=rows["variant"].map(dict.fromkeys(dtypes, "") | why))
    if not widen or not why:
        return rows
    wide = dict.fromkeys(why, torch.float64)
    try:
        again = _asked(estimated(twice(wide), resolve), wide)
    except Exception as error:
        if isinstance(error, UnsupportedModel) or is_out_of_memory(error):
            return rows  # there is no float64 of this model, or no room for it
        raise
    again = again.assign(why=again["variant"].map(why))
    return pd.concat([rows[~rows["variant"].isin(why)], again], ignore_index=True)


def _asked(rows: pd.DataFrame, dtypes: dict[int, torch.dtype]) -> pd.DataFrame:
    return rows.assign(asked=rows["variant"].map({number: _name(dtype) for number, dtype in dtypes.items()}))


def _why(rows: pd.DataFrame) -> str:
    of = rows[rows["measure"] == "relative_mu"]
    of = of if len(of) else rows
    worst = of.sort_values("rounding").to_dict("records")[-1]
    known = f", to {worst['rounding']:.2g}" if np.isfinite(worst["rounding"]) else ""
    return f"{worst['measure']} of layer {worst['layer']}{known}"


def probed(rows: pd.DataFrame) -> Probed:
    """What the rows of a `probe` say of the rest of a run."""
    asked = rows[["variant", "asked"]].drop_duplicates().sort_values("variant").itertuples(index=False, name=None)
    dtypes = {number: getattr(torch, name) for number, name in asked}
    return Probed(dtypes, rows.drop_duplicates(PLACE).set_index(PLACE)["rounding"].unstack("measure"))


def of_one_dtype(dtypes: dict[int, torch.dtype]) -> dict[torch.dtype, tuple[int, ...]]:
    """The numbers of the variants of each dtype, in order."""
    return {dtype: tuple(n for n, own in dtypes.items() if own == dtype) for dtype in dict.fromkeys(dtypes.values())}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
