"""What the theorems promise for a real checkpoint on its excerpts, beside what lambda it really needs.

Constants are measured on the model as it is (lambda = 1). A certificate "with measured gains" is computed at the lambda
it certifies: the gains are those of the trajectory under that very lambda, so it holds for these excerpts without
further assumption; "from weights" holds for every input of that embedding norm. Both are for the worst excerpt.

What they are about. Theorem 4.1 speaks of a net Y' = rownorm((M + lam I) Y); a real block also has projections, a
convolution, gates, several heads and a feed-forward part, which it ignores (C_V = I is taken, as in section 5.1 of
arXiv:2410.10609v3). The pre-norm certificate is about the whole net. The angle certificate is about the attention
sublayers (of S4D: the mixers) of a post-norm net, on the inputs that they really get: together they turn rows by no more
than what keeps the target. The feed-forward skip and the affine norms between them turn rows too, by what lambda does
not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lscollapse import measures
from lscollapse.core.progress import SILENT, Progress
from lscollapse.experiments.bounds import s4d
from lscollapse.experiments.bounds.find_lambda import find
from lscollapse.experiments.bounds.gains import Pass, gains_at, head_rows
from lscollapse.instrument.early_exit import spectral_bound
from lscollapse.instrument.forward import checked_ids
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.albert import AlbertAdapter
from lscollapse.models.adapters.bert import BertAdapter
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.adapters.s4d import S4DAdapter
from lscollapse.runs.loading import LoadedTask
from lscollapse.theory import certificates, theorem41
from lscollapse.theory.arrays import Array
from lscollapse.theory.stretches import MEASURES, NOTHING, SIGNS, Found, Kept, Line, Report

PAPER_LAMBDA, PAPER_A = 937.924, 0.9  # the remark in section 5.1 on Mamba-2
WORDS = {"relative_mu": "relative mu", "rank1_residual": "rank-1 residual"}
LIMIT = 2.0**24  # of the search for a certified |lambda|


def report(
    task: LoadedTask, target: float = 0.5, a: float = 0.9, tol: float = 0.02, progress: Progress = SILENT
) -> Report:
    """Bounds and the measured critical lambda of one loaded model (find_lambda.load_with_grid).

    Args:
        target: relative mu to keep at the last layer.
        a: rate of Theorem 4.1, in (0, 1): it promises mu^2 >= a^K mu_0^2.
        tol: of the measured critical lambda.

    Raises:
        TheoryError, SearchError: a, target or tol outside (0, 1).
        UnsupportedModel: none of Mamba-2, BERT, ALBERT and S4D, or another skip than the residual.
    """
    adapter, K = task.adapter, task.adapter.n_layers
    if not isinstance(adapter, Mamba2Adapter | BertAdapter | AlbertAdapter | S4DAdapter):
        raise UnsupportedModel(f"no bounds for {adapter.config.model_type}: they are for Mamba-2, BERT, ALBERT and S4D")
    if task.variants[0].skip_site != "residual":
        raise UnsupportedModel("the bounds are about the residual skip: leave skip_site out")
    theorem41.lambda_star(a, 1.0)  # refuses a before anything is computed
    found = find(task, target, tol, progress=progress)
    progress.note(f"{task.info.name}: gains and mixing matrices")
    own = gains_at(task, 1.0)
    is_s4d = isinstance(adapter, S4DAdapter)
    heads = s4d.channel_rows(adapter, task.ids.shape[1]) if is_s4d else list(head_rows(task))
    layers = _layer_rows(own, heads)
    C_M = max(row["C_M"] for row in heads)
    first = float(own.first.min())
    remarks = [_remark(C_M, K, first)]
    if is_s4d:
        layers = [row | more for row, more in zip(layers, s4d.layer_rows(task, heads), strict=True)]
        remarks += s4d.remarks(heads, layers)
    lines = _theorem41(a, K, C_M, first, heads)
    progress.note(f"{task.info.name}: certificates")
    lines += _prenorm(task, target) if adapter.pre_norm else _angles(task, target, first, layers)
    lines += [line for name in MEASURES for sign in SIGNS for line in _measured(found, sign, name)]
    return Report(found, a, C_M, first, lines, layers, heads, remarks)


def _measured(found: Found, sign: int, measure: str) -> list[Line]:
    """One line a stretch over the target; one that says so where there is none, or where missing values leave it open."""
    stretches = found.intervals(sign, measure)
    if math.isnan(found.smallest(sign, measure)):
        stretches.append(Kept(math.nan, NOTHING))
    stretches = stretches or [Kept(NOTHING, NOTHING)]
    return [Line(f"measured, {WORDS[measure]}", sign, low, to=high) for low, high in stretches]


# --- the bounds ---


def _theorem41(a: float, K: int, C_M: float, first: float, heads: list[dict[str, Any]]) -> list[Line]:
    keeps = f"mu^2 over {a:g}^{K} = {a**K:.2g} of the input's"
    lines = [
        Line(f"Theorem 4.1, condition (7) alone, a = {a:g}", 0, theorem41.lambda_star(a, C_M), "b is infinite there"),
        Line(f"Theorem 4.1 with b, a = {a:g}", 0, theorem41.lambda_required(a, K, C_M, first**2), keeps),
    ]
    if "S" in heads[0]:
        S = max(row["S"] for row in heads)
        note = f"S up to {S:.3g}, c = 0: the C_V of a head has rank d/h"
        lines.append(Line("Theorem 4.1 with each head's own C_V", 0, theorem41.lambda_star(a, C_M, 0.0, S), note))
    if "spectral" in heads[0]:
        C = max(row["spectral"] for row in heads)
        lam = theorem41.lambda_required(a, K, C, first**2, variant="repaired")
        lines.append(Line(f"Theorem 4.1 repaired, with ||M||_2, a = {a:g}", 0, lam, f"||M||_2 <= {C:.3g} by the FFT"))
    return lines


def _remark(C_M: float, K: int, first: float) -> str:
    implied = theorem41.implied_C_M(PAPER_LAMBDA, PAPER_A)
    own = theorem41.lambda_star(PAPER_A, C_M)
    deepest = theorem41.k_max(PAPER_LAMBDA, PAPER_A, C_M, first**2)
    promise = f"{deepest:.1f} layers" if deepest > 0.0 else "nothing"
    return (
        f"section 5.1: |lambda| > {PAPER_LAMBDA:g} at a = {PAPER_A:g} is condition (7) for C_M = {implied:.2f};"
        f" this model has C_M = {C_M:.2f}, which makes it {own:.1f}."
        f" At |lambda| = {PAPER_LAMBDA:g} Theorem 4.1 with b certifies {promise} of its {K}."
    )


def _prenorm(task: LoadedTask, target: float) -> list[Line]:
    if not task.adapter.bounded_mixer:
        return []
    adapter, N = task.adapter, task.ids.shape[1]
    rows = task.gains or [adapter.mixer_bound(k, spectral_bound) for k in range(adapter.n_layers)]
    G = np.array(rows) * math.sqrt(N)
    largest = float(G.max())
    X = adapter.embed(checked_ids(adapter, task.ids)).double()
    pairs = list(zip(measures.relative_mu(X).tolist(), torch.linalg.vector_norm(X, dim=(1, 2)).tolist(), strict=True))
    here = max(certificates.prenorm_lambda_required(m, target, G, r) for m, r in pairs)
    ever = max(certificates.prenorm_lambda_required_infinite(m, target, largest, r) for m, r in pairs)
    lines = [
        Line("pre-norm certificate, weights only, this depth", 0, here),
        Line("pre-norm certificate, weights only, every depth", 0, ever, "layers after these bounded by the largest G"),
    ]

    def keeps_ever(run: Pass) -> Array:
        beyond = [certificates.prenorm_turn_infinite(run.lam, largest, r) for r in run.final_norm]
        return _keeps(run, run.frobenius, np.array(beyond))

    name = "pre-norm certificate, measured gains"
    lines += _certified(task, target, f"{name}, this depth", lambda run: _keeps(run, run.frobenius))
    return lines + _certified(task, target, f"{name}, every depth", keeps_ever)


def _keeps(run: Pass, gains: Array, beyond: Array | float = 0.0) -> Array:
    """Lower bounds on relative mu, (B,): layers turn by arcsin(gains / |lambda|), (K, B), at most, later ones by `beyond`."""
    ends = [certificates.from_ratios(m, r)[-1] for m, r in zip(run.first, (gains / abs(run.lam)).T, strict=True)]
    return np.sin(np.maximum(0.0, np.arcsin(ends) - beyond))


def _angles(task: LoadedTask, target: float, first: float, layers: list[dict[str, Any]]) -> list[Line]:
    if "feed_forward_gain" in layers[0]:
        alone, largest = "attention sublayers alone", max(row["feed_forward_gain"] for row in layers)
        turn = f"the feed-forward part, with skip 1, has row gains up to {largest:.2f} whatever lambda is"
    else:
        alone, turned = "mixers alone", sum(row["norm_turn"] for row in layers)
        spare = math.degrees(math.asin(first) - math.asin(target))
        turn = (
            f"the norms' weights and biases turn rows by up to {turned:.0f} degrees in all, whatever lambda is, and"
            f" {max(0.0, spare):.1f} may be lost"
        )
    lines = _certified(task, target, f"Theorem 4.1*, {alone}", lambda run: _keeps(run, run.row))
    return [*lines, Line("Theorem 4.1*, whole blocks", 0, NOTHING, turn)]


def _certified(task: LoadedTask, target: float, bound: str, keeps: Callable[[Pass], Array]) -> list[Line]:
    """One line a sign; `keeps` is what the gains measured at a lambda certify of each excerpt."""
    return [Line(bound, sign, *_smallest_certified(task, target, sign, keeps)) for sign in SIGNS]


def _smallest_certified(
    task: LoadedTask, target: float, sign: int, keeps: Callable[[Pass], Array]
) -> tuple[float, str]:
    """Smallest |lambda| whose own pass certifies the target on every excerpt, to 5 %, and what is certified there."""
    certified: dict[float, float] = {}

    def holds(size: float) -> bool:
        certified[size] = float(keeps(gains_at(task, sign * size)).min())
        return certified[size] >= target

    high = 16.0
    while not holds(high):
        high *= 4.0
        if high > LIMIT:
            return NOTHING, ""
    low = high / 4.0
    while low > 1e-3 and holds(low):
        high, low = low, low / 4.0
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high, f"certifies relative mu >= {certified[high]:.3f} there"


def _layer_rows(own: Pass, heads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a layer: the largest gains over the excerpts, at lambda = 1, and C_M over heads and excerpts."""
    rows = []
    for layer, (row, frobenius) in enumerate(zip(own.row, own.frobenius, strict=True), start=1):
        C_M = max(head["C_M"] for head in heads if head["layer"] == layer)
        entry = {"layer": layer, "gain": float(row.max()), "tau": float(frobenius.max()), "C_M": C_M}
        if own.feed_forward is not None:
            entry["feed_forward_gain"] = float(own.feed_forward[layer - 1].max())
            entry["S"] = max(head["S"] for head in heads if head["layer"] == layer)
        rows.append(entry)
    return rows
