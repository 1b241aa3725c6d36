"""The smallest |lambda| of each sign that keeps a model from collapsing, by real forward passes.

The last-layer curve over lambda is not monotone in general, so nothing is inferred from one bracket: a grid from 0 to
LARGEST is measured for both signs, every change of side of the target is bisected, and the answer says on which of the
tested |lambda| the model is over the target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lscollapse.core.config import Experiment
from lscollapse.core.progress import SILENT, Progress
from lscollapse.instrument import forward
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapters.adapter import Edit, HookSet
from lscollapse.models.adapters.s4d import S4DAdapter
from lscollapse.runs.loading import Subject, load_subjects
from lscollapse.theory import flow
from lscollapse.theory.arrays import Array, unit_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lscollapse.models import Adapter

MEASURES = ("relative_mu", "rank1_residual")
SIGNS = (1, -1)
SMALLEST = 2.0**-4
GRID = (0.0, *(2.0**k for k in range(-4, 5)), *(4.0**k for k in range(3, 7)))  # of |lambda|
LARGEST = GRID[-1]
FLOW_STEP = 0.1
CHEAP = 2  # excerpts that an estimate reads


class SearchError(ValueError):
    """A target or tolerance outside its range."""


class Kept(NamedTuple):
    """One stretch of tested |lambda| on which a measure is over the target; both ends were measured and are over it."""

    low: float
    high: float


def in_words(low: float, high: float) -> str:
    """A stretch of |lambda| as every table, figure and page writes it; high infinite: no end; low infinite: it is empty, NaN: not
    known."""
    if np.isnan(low):
        return "not known, values are missing"
    if not np.isfinite(low):
        return "none suffices"
    if np.isfinite(high):
        return f"{number(low)} only" if low == high else f"{number(low)} to {number(high)}"
    return "no collapse" if low == 0.0 else f"from {number(low)}"


def number(lam: float) -> str:
    """From 1000 on with four digits, below with three: further ones differ from one processor to another."""
    return f"{lam:.3g}" if lam < 999.5 else f"{float(f'{lam:.4g}'):,.0f}"


class Estimate(NamedTuple):
    """|lambda| of one sign guessed from few excerpts: 0 when no collapse is in sight, infinity when nothing suffices, NaN where
    values are missing."""

    lam: float
    how: str
    high: float = float("inf")  # where it ceases to suffice

    @property
    def reads(self) -> str:
        return in_words(self.lam, self.high)


@dataclass
class Found:
    """What `find` measured.

    Attributes:
        arm: in words, without lambda.
        n_layers, n_excerpts, n_tokens: of the passes.
        estimates: sign -> Estimate.
        points: lambda -> {measure: mean of the last layer over the excerpts}; NaN where an excerpt lacks it.
    """

    model: str
    arm: str
    n_layers: int
    n_excerpts: int
    n_tokens: int
    target: float
    tol: float
    estimates: dict[int, Estimate] = field(default_factory=dict)
    points: dict[float, dict[str, float]] = field(default_factory=dict)

    def curve(self, sign: int, measure: str) -> tuple[Array, Array]:
        """Tested |lambda| of one sign, ascending from 0, and the measure there."""
        sizes = sorted(abs(lam) for lam in self.points if lam * sign >= 0.0)
        return np.array(sizes), np.array([self.points[sign * size][measure] for size in sizes])

    def kept(self, sign: int, measure: str) -> list[Kept]:
        """The stretches of |lambda| over the target, ascending."""
        sizes, values = self.curve(sign, measure)
        runs = itertools.groupby(zip(sizes, values, strict=True), key=lambda pair: bool(pair[1] >= self.target))
        stretches = [[float(size) for size, _ in run] for over, run in runs if over]
        return [Kept(stretch[0], stretch[-1]) for stretch in stretches]

    def intervals(self, sign: int, measure: str) -> list[Kept]:
        """The same; the last has no end (infinity) where the largest tested |lambda| is over the target."""
        stretches = self.kept(sign, measure)
        if stretches and stretches[-1].high == self.curve(sign, measure)[0][-1]:
            stretches[-1] = Kept(stretches[-1].low, float("inf"))
        return stretches

    def missing(self, sign: int, measure: str) -> list[float]:
        """The tested |lambda| whose last layer is missing in some excerpt, ascending."""
        sizes, values = self.curve(sign, measure)
        return [float(size) for size in sizes[np.isnan(values)]]

    def smallest(self, sign: int, measure: str) -> float:
        """Smallest |lambda| from which on every tested one is over the target; 0 when all are, infinity when none is.

        NaN, which is no answer, where a value is missing above the largest tested |lambda| that is under the target.
        """
        sizes, values = self.curve(sign, measure)
        under = sizes[values < self.target]
        if len(under) and under[-1] == sizes[-1]:
            return float("inf")
        above = sizes > under[-1] if len(under) else sizes >= 0.0
        return float("nan") if np.isnan(values[above]).any() else float(sizes[above][0])

    def rank_warning(self) -> str | None:
        """What to say where a negative lambda keeps relative mu over the target but not the rank-1 residual."""
        sizes, spread = self.curve(-1, "relative_mu")
        rank1 = self.curve(-1, "rank1_residual")[1]
        lost = (sizes > 0.0) & (spread >= self.target) & (rank1 < self.target)
        if not lost.any():
            return None
        worst, at = min(zip(rank1[lost].tolist(), sizes[lost].tolist(), strict=True))
        where = ", ".join(in_words(*stretch) for stretch in self.intervals(-1, "relative_mu"))
        return (
            f"negative lambda: relative mu is over {self.target:g} for |lambda| {where}, but the rank-1 residual falls"
            f" to {worst:.3f} (lambda = {-at:.4g}): rows gather on one line (+u and -u), which relative mu cannot see"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dict a tested lambda, ascending."""
        return [{"lam": lam, **self.points[lam]} for lam in sorted(self.points)]


def load(config: Experiment, progress: Progress = SILENT) -> Subject:
    """The one model of `config` with its excerpts; variants are the grid, with the gate unless `config.gating` is False."""
    return next(load_subjects(config, _grid_variants, progress))


def _grid_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    lams = sorted({sign * size for sign in SIGNS for size in GRID})
    return [Variant(lam=lam, gating=config.gating is not False, skip_site=config.skip_site) for lam in lams]


def find(
    subject: Subject, target: float, tol: float = 0.02, estimate_only: bool = False, progress: Progress = SILENT
) -> Found:
    """Estimate, then bracket and bisect with real forwards, both signs at once.

    Args:
        target: of relative mu and of the rank-1 residual at the last layer, means over the excerpts; in (0, 1).
        tol: width of a bracket, relative to |lambda| (to 1/16 below 1/16), at which bisection ends.
        estimate_only: stop after the estimates.

    Raises:
        SearchError: target or tol outside (0, 1).
    """
    if not (0.0 < target < 1.0 and 0.0 < tol < 1.0):
        raise SearchError(f"target = {target}, tol = {tol}: both lie strictly between 0 and 1")
    arm = subject.variants[0].arm(subject.adapter.has_gate)
    n_excerpts, n_tokens = subject.ids.shape
    found = Found(subject.info.name, arm, subject.adapter.n_layers, n_excerpts, n_tokens, target, tol)
    found.estimates = estimates(subject, target)
    if estimate_only:
        return found
    near = [e.lam * factor for e in found.estimates.values() for factor in (0.8, 1.25) if 0.0 < e.lam < LARGEST]
    wanted: Iterable[float] = {sign * size for sign in SIGNS for size in (*GRID, *near)}
    while wanted:
        progress.note(f"{subject.info.name}: measuring {len(set(wanted))} values of lambda")
        found.points |= measure(subject, wanted)
        wanted = {lam for sign in SIGNS for name in MEASURES for lam in _midpoints(found, sign, name)}
    return found


def _midpoints(found: Found, sign: int, name: str) -> list[float]:
    """The middle of every bracket that is still too wide: neighbours on different sides of the target."""
    sizes, values = found.curve(sign, name)
    known = ~np.isnan(values)  # at a missing value there is no side of the target
    over = values >= found.target
    brackets = zip(sizes[:-1], sizes[1:], over[:-1], over[1:], known[:-1] & known[1:], strict=True)
    return [
        float(sign * (low + high) / 2)
        for low, high, before, after, both in brackets
        if both and before != after and high - low > found.tol * max(high, SMALLEST)
    ]


def measure(subject: Subject, lams: Iterable[float], excerpts: int | None = None) -> dict[float, dict[str, float]]:
    """Last-layer means over the first `excerpts` excerpts (all by default) for every lambda, several a pass."""
    first = subject.variants[0]
    variants = [Variant(lam=lam, gating=first.gating, skip_site=first.skip_site) for lam in sorted(set(lams))]
    ids, tile = subject.ids[:excerpts], subject.plan
    parts = []
    for low, start in itertools.product(range(0, len(variants), tile.variants), range(0, len(ids), tile.excerpts)):
        part = variants[low : low + tile.variants]
        own = ids[start : start + tile.excerpts]
        rows = forward.measure(subject.adapter, own, part, subject.compute_dtype, gains=subject.gains)
        parts.append(rows[(rows["layer"] == subject.adapter.n_layers) & rows["measure"].isin(MEASURES)])
    values = np.stack([np.concatenate([p.loc[p["measure"] == n, "value"] for p in parts]) for n in MEASURES])
    lams = np.concatenate([p.loc[p["measure"] == MEASURES[0], "lam"] for p in parts])
    return {
        float(lam): dict(zip(MEASURES, values[:, lams == lam].mean(1).tolist(), strict=True)) for lam in np.unique(lams)
    }


# --- estimates ---


def estimates(subject: Subject, target: float) -> dict[int, Estimate]:
    """The critical |lambda| of each sign from CHEAP excerpts.

    Post-norm: K / tau* of the flow that the attention sublayers follow for large |lambda| (theory.flow); feed-forward and
    affine norms, which lambda does not act on, are left out. Pre-norm: the turn of layer k falls as |lambda|^-(k+1)
    instead of 1/|lambda|, so that there is no such flow; the grid itself is passed through the net. So it is for S4D,
    where a step of the flow takes all 32 mixers, and a flow that never crosses the target takes longer than the search.
    """
    if subject.adapter.pre_norm or isinstance(subject.adapter, S4DAdapter):
        return _estimates_forward(subject, target)
    return {sign: _estimate_flow(subject, target, sign) for sign in SIGNS}


def _estimates_forward(subject: Subject, target: float) -> dict[int, Estimate]:
    points = measure(subject, (sign * size for sign in SIGNS for size in GRID), CHEAP)
    rough = Found("", "", 0, 0, 0, target, 1.0, points=points)
    out = {}
    for sign in SIGNS:
        low, high = (rough.intervals(sign, "relative_mu") or [Kept(np.inf, np.inf)])[-1]
        if np.isnan(rough.smallest(sign, "relative_mu")):
            low, high = np.nan, np.inf
        before = GRID[GRID.index(low) - 1] if 0.0 < low < np.inf else low
        lam = float(np.sqrt(low * before)) if before > 0.0 else low
        out[sign] = Estimate(lam, f"{CHEAP} excerpts through the net, |lambda| by factors of 2 to 4", high)
    return out


def _estimate_flow(subject: Subject, target: float, sign: int) -> Estimate:
    """The largest over the excerpts of K / tau*; the time is cut where |lambda| would be under 1/2."""
    adapter = subject.adapter
    K, lams = adapter.n_layers, []
    for ids in subject.ids[:CHEAP]:
        X = adapter.embed(forward.checked_ids(adapter, ids[None])).detach()
        mixer, Y0 = attention_flow(adapter, X)
        lams.append(flow.critical_lambda(mixer, Y0, K, target, sign, FLOW_STEP, tau_max=2.0 * K).lam)
    return Estimate(max(lams), f"K/tau* of the attention sublayers, {len(lams)} excerpts")


def attention_flow(adapter: Adapter, X: Tensor) -> tuple[Any, Array]:
    """(mixer, Y0) for theory.flow: Y0 the unit rows of X (1, N, d), mixer(Y) the mean over the layers of O / row norm.

    The layers' own attention, at the mean row norm of X, which LayerNorm keeps nearly constant.
    """
    size = float(torch.linalg.vector_norm(X, dim=-1).mean())
    blocks = {id(adapter.block(layer)): layer for layer in range(adapter.n_layers)}
    weight = {layer: len(adapter.layers_of(adapter.block(layer))) / adapter.n_layers for layer in blocks.values()}

    def mixer(Y: Array) -> Array:
        Z = torch.as_tensor(Y[None] * size, dtype=X.dtype, device=X.device)
        handed: dict[int, Any] = {}  # later layers may need what earlier ones make of Z
        O = sum(
            share * sublayers(adapter, layer, Z, handed=handed)[0][1][0].double() for layer, share in weight.items()
        )
        return torch.as_tensor(O).numpy(force=True) / size

    return mixer, unit_rows(X[0].double().cpu().numpy())


@dataclass
class _Recorder(Edit):
    """An edit that changes nothing but lambda at the first skip, and keeps what each skip of the block adds up."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, X: Tensor, O: Tensor) -> Tensor:
        self.seen.append((X, O))
        return (self.lam() if len(self.seen) == 1 else 1.0) * X + O


def sublayers(
    adapter: Adapter, layer: int, X: Tensor, lam: float = 1.0, handed: dict[int, Any] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(X, O) of every skip of block `layer` for the block's input X (B, N, d): the mixer's, then the feed-forward's.

    lam acts on the first skip only (skip_site `residual`); handed as for `Adapter.run`. The model is left as it was.
    """
    both = "both" in adapter.skip_sites
    edit = _Recorder(lambda: lam, True, False, True, True, "both" if both else "residual", "both")
    hooks = HookSet()
    try:
        adapter.install(adapter.block(layer), edit, hooks)
        with torch.no_grad():
            adapter.run(layer, X, handed)
    finally:
        hooks.remove()
    return edit.seen
