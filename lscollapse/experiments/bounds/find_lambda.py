"""The smallest |lambda| of each sign that keeps a model from collapsing, by real forward passes.

The last-layer curve over lambda is not monotone in general, so nothing is inferred from one bracket: a grid from 0 to
LARGEST is measured for both signs, every change of side of the target is bisected, and the answer says on which of the
tested |lambda| the model is over the target.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lscollapse.core.config import Experiment
from lscollapse.core.progress import SILENT, Progress
from lscollapse.core.table import known_ratio
from lscollapse.instrument.forward import checked_ids, measure
from lscollapse.instrument.sublayers import sublayers
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.s4d import S4DAdapter
from lscollapse.runs.loading import LoadedTask, load_tasks
from lscollapse.theory import flow
from lscollapse.theory.arrays import Array, unit_rows
from lscollapse.theory.stretches import BESIDE, MEASURES, SIGNS, Estimate, Found, Kept

SMALLEST = 2.0**-4
GRID = (0.0, *(2.0**k for k in range(-4, 5)), *(4.0**k for k in range(3, 7)))  # of |lambda|
LARGEST = GRID[-1]
FLOW_STEP = 0.1
CHEAP = 2  # excerpts that an estimate reads


class SearchError(ValueError):
    """A target or tolerance outside its range."""


def load_with_grid(config: Experiment, progress: Progress = SILENT) -> LoadedTask:
    """The one model of `config` with its excerpts; variants are the grid, with the gate unless `config.gating` is False."""
    return next(load_tasks(config, _grid_variants, progress))


def _grid_variants(adapter: Adapter, config: Experiment) -> list[Variant]:
    lams = sorted({sign * size for sign in SIGNS for size in GRID})
    return [Variant(lam=lam, gating=config.gating is not False, skip_site=config.skip_site) for lam in lams]


def find(
    task: LoadedTask, target: float, tol: float = 0.02, estimate_only: bool = False, progress: Progress = SILENT
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
    arm = task.variants[0].arm(task.adapter.has_gate)
    n_excerpts, n_tokens = task.ids.shape
    found = Found(task.info.name, arm, task.adapter.n_layers, n_excerpts, n_tokens, target, tol)
    found.estimates = estimates(task, target)
    if estimate_only:
        return found
    near = [e.lam * factor for e in found.estimates.values() for factor in (0.8, 1.25) if 0.0 < e.lam < LARGEST]
    wanted: Iterable[float] = {sign * size for sign in SIGNS for size in (*GRID, *near)}
    while wanted:
        progress.note(f"{task.info.name}: measuring {len(set(wanted))} values of lambda")
        found.points |= last_means(task, wanted, progress=progress)
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


def last_means(
    task: LoadedTask, lams: Iterable[float], excerpts: int | None = None, progress: Progress = SILENT
) -> dict[float, dict[str, float]]:
    """Last-layer means over the first `excerpts` excerpts (all by default) for every lambda, several a pass.

    NaN where one of them is not known, because it left the range or because rounding decides it.
    """
    first, names = task.variants[0], (*MEASURES, *BESIDE)
    variants = [Variant(lam=lam, gating=first.gating, skip_site=first.skip_site) for lam in sorted(set(lams))]
    tiles, dtype = [task.plans.own, *filter(None, [task.plans.wide])], task.compute_dtype
    if task.plans.wide is None and dtype is None:
        dtype = torch.float32  # there is no room for arms in float64
    together = min(min(each.probe.variants, each.rest.variants) for each in tiles)
    batch = min(each.rest.excerpts for each in tiles)
    options: dict[str, Any] = {"gains": task.gains, "resolve": task.resolve, "batch": batch}
    parts = []
    for low in range(0, len(variants), together):
        rows = measure(task.adapter, task.ids[:excerpts], variants[low : low + together], dtype, **options)
        parts.append(rows[(rows["layer"] == task.adapter.n_layers) & rows["measure"].isin(names)])
    last = pd.concat(parts)
    wide = sorted(set(last.loc[last["dtype"] == "float64", "lam"])) if task.dtype == "auto" else []
    if wide:
        said = ", ".join(f"{lam:.4g}" for lam in wide)
        progress.note(f"{task.info.name}: in float64, since float32 does not resolve them: lambda {said}")
    means = (
        last.assign(known=known_ratio(last))
        .groupby(["lam", "measure"])["known"]
        .agg(lambda values: values.mean(skipna=False))
    )
    return {lam: {name: float(means[lam, name]) for name in names} for lam in map(float, last["lam"].unique())}


# --- estimates ---


def estimates(task: LoadedTask, target: float) -> dict[int, Estimate]:
    """The critical |lambda| of each sign from CHEAP excerpts.

    Post-norm: K / tau* of the flow that the attention sublayers follow for large |lambda| (theory.flow); feed-forward and
    affine norms, which lambda does not act on, are left out. Pre-norm: the turn of layer k falls as |lambda|^-(k+1)
    instead of 1/|lambda|, so that there is no such flow; the grid itself is passed through the net. So it is for S4D,
    where a step of the flow takes all 32 mixers, and a flow that never crosses the target takes longer than the search.
    """
    if task.adapter.pre_norm or isinstance(task.adapter, S4DAdapter):
        return _estimates_forward(task, target)
    return {sign: _estimate_flow(task, target, sign) for sign in SIGNS}


def _estimates_forward(task: LoadedTask, target: float) -> dict[int, Estimate]:
    points = last_means(task, (sign * size for sign in SIGNS for size in GRID), CHEAP)
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


def _estimate_flow(task: LoadedTask, target: float, sign: int) -> Estimate:
    """The largest over the excerpts of K / tau*; the time is cut where |lambda| would be under 1/2."""
    adapter = task.adapter
    K, lams = adapter.n_layers, []
    for ids in task.ids[:CHEAP]:
        X = adapter.embed(checked_ids(adapter, ids[None])).detach()
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
