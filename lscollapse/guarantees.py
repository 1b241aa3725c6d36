"""What the theorems promise for a real checkpoint on its excerpts, beside what lambda it really needs.

Constants are measured on the model as it is (lambda = 1). A certificate "with measured gains" is computed at the lambda
it certifies: the gains are those of the trajectory under that very lambda, so it holds for these excerpts without
further assumption; "from weights" holds for every input of that embedding norm. Both are for the worst excerpt.

What they are about. Theorem 4.1 speaks of a net Y' = rownorm((M + lam I) Y); a real block also has projections, a
convolution, gates, several heads and a feed-forward part, which it ignores (C_V = I is taken, as in section 5.1 of
arXiv:2410.10609v3). The pre-norm certificate is about the whole net. The angle certificate is about the attention
sublayers of a post-norm net, on the inputs that they really get: together they turn rows by no more than what keeps the
target. The feed-forward skip and the affine norms between them turn rows too, by what lambda does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lscollapse import certify, forward, measures, ssd
from lscollapse.models import UnsupportedModel
from lscollapse.models.mamba2 import Mamba2Adapter
from lscollapse.search import MEASURES, SIGNS, Found, find, sublayers
from lscollapse.subjects import SILENT, Progress, Subject
from lscollapse.theory import certificates, constants, theorem41
from lscollapse.theory.arrays import Array
from lscollapse.variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from lscollapse.models import Adapter

PAPER_LAMBDA, PAPER_A = 937.924, 0.9  # the remark in section 5.1 on Mamba-2
LIMIT = 2.0**24  # of the search for a certified |lambda|
NOTHING = float("inf")


class Step(NamedTuple):
    """One layer of a pass: X and O of every skip (the mixer's first), (B, N, d); X is carried as X * 2^exponent."""

    X: Tensor
    parts: list[tuple[Tensor, Tensor]]
    exponent: Tensor


class Mixing(NamedTuple):
    """The mixing matrices of a layer, Ms (B, h, N, N), and S of each head's C_V (h,); None where there is no C_V."""

    Ms: Array
    S: Array | None


@dataclass(frozen=True)
class Pass:
    """Gains of all layers at one lambda, per excerpt.

    Attributes:
        first: relative mu that a certificate starts from, (B,): of X_0, with unit rows for a post-norm net.
        row: max_i ||O_i|| / ||X_i||, (K, B); for a post-norm net without the channel mean, which its norm removes.
        frobenius: ||O||_F / ||X||_F, (K, B).
        feed_forward: `row` of the second skip, (K, B), or None.
        final_norm: ||X_K||_F, (B,).
    """

    lam: float
    first: Array
    row: Array
    frobenius: Array
    feed_forward: Array | None
    final_norm: Array


@dataclass(frozen=True)
class Line:
    """One bound: the |lambda| from which it holds (infinity: it certifies nothing), for which sign (0: both)."""

    bound: str
    sign: int
    lam: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Everything `lscollapse theory bound` shows; layers and heads are rows for a table."""

    found: Found
    a: float
    C_M: float
    first: float
    lines: list[Line]
    layers: list[dict[str, Any]]
    heads: list[dict[str, Any]]
    remark: str


def report(
    subject: Subject, target: float = 0.5, a: float = 0.9, tol: float = 0.02, progress: Progress = SILENT
) -> Report:
    """Bounds and the measured critical lambda of one loaded model (search.load).

    Args:
        target: relative mu to keep at the last layer.
        a: rate of Theorem 4.1, in (0, 1): it promises mu^2 >= a^K mu_0^2.
        tol: of the measured critical lambda.

    Raises:
        TheoryError, SearchError: a, target or tol outside (0, 1).
        UnsupportedModel: neither Mamba-2 nor attention, or another skip than the residual.
    """
    adapter, K = subject.adapter, subject.adapter.n_layers
    if not isinstance(adapter, Mamba2Adapter) and not hasattr(adapter.block(0), "attention"):
        raise UnsupportedModel(f"no bounds for {adapter.config.model_type}: they are for Mamba-2, BERT and ALBERT")
    if subject.variants[0].skip_site != "residual":
        raise UnsupportedModel("the bounds are about the residual skip: leave skip_site out")
    theorem41.lambda_star(a, 1.0)  # refuses a before anything is computed
    found = find(subject, target, tol, progress=progress)
    progress.note(f"{subject.info.name}: gains and mixing matrices")
    own = measure(subject, 1.0)
    heads = list(head_rows(subject))
    C_M = max(row["C_M"] for row in heads)
    first = float(own.first.min())
    lines = _theorem41(a, K, C_M, first, heads)
    progress.note(f"{subject.info.name}: certificates")
    lines += _prenorm(subject, target) if adapter.pre_norm else _angles(subject, target, own)
    for name in MEASURES:
        lines += [Line(f"measured, {_words(name)}", sign, found.smallest(sign, name)) for sign in SIGNS]
    remark = _remark(C_M, K, first)
    return Report(found, a, C_M, first, lines, _layer_rows(own, heads), heads, remark)


def _words(measure: str) -> str:
    return {"relative_mu": "relative mu", "rank1_residual": "rank-1 residual"}[measure]


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


def _prenorm(subject: Subject, target: float) -> list[Line]:
    if not subject.adapter.bounded_mixer:
        return []
    adapter, N = subject.adapter, subject.ids.shape[1]
    rows = subject.gains or [adapter.mixer_bound(k, certify.spectral_bound) for k in range(adapter.n_layers)]
    G = np.array(rows) * math.sqrt(N)
    largest = float(G.max())
    X = adapter.embed(forward.checked_ids(adapter, subject.ids)).double()
    pairs = list(zip(measures.relative_mu(X).tolist(), torch.linalg.vector_norm(X, dim=(1, 2)).tolist(), strict=True))
    here = max(certificates.prenorm_lambda_required(m, target, G, r) for m, r in pairs)
    ever = max(certificates.prenorm_lambda_required_infinite(m, target, largest, r) for m, r in pairs)
    lines = [
        Line("pre-norm certificate, weights only, this depth", 0, here),
        Line("pre-norm certificate, weights only, every depth", 0, ever, "layers after these bounded by the largest G"),
    ]

    def here_measured(run: Pass) -> Array:
        return _lower(run.first, run.frobenius / abs(run.lam), 0.0)

    def ever_measured(run: Pass) -> Array:
        beyond = [certificates.prenorm_turn_infinite(run.lam, largest, r) for r in run.final_norm]
        return _lower(run.first, run.frobenius / abs(run.lam), np.array(beyond))

    for depth, bounds in (("this depth", here_measured), ("every depth", ever_measured)):
        for sign in SIGNS:
            lam, taken = _smallest_certified(subject, target, sign, bounds)
            lines.append(Line(f"pre-norm certificate, measured gains, {depth}", sign, lam, taken))
    return lines


def _lower(first: Array, ratios: Array, beyond: Array | float) -> Array:
    """Lower bounds on relative mu, (B,): turns of arcsin(ratios), (K, B), and `beyond` more, from relative mu `first`."""
    ends = [certificates.from_ratios(m, r)[-1] for m, r in zip(first, ratios.T, strict=True)]
    return np.sin(np.maximum(0.0, np.arcsin(ends) - beyond))


def _angles(subject: Subject, target: float, own: Pass) -> list[Line]:
    def bounds(run: Pass) -> Array:
        return _lower(run.first, run.row / abs(run.lam), 0.0)

    lines = []
    for sign in SIGNS:
        lam, taken = _smallest_certified(subject, target, sign, bounds)
        lines.append(Line("Theorem 4.1*, attention sublayers alone", sign, lam, taken))
    if own.feed_forward is not None:
        turn = (
            f"the feed-forward part, with skip 1, has row gains up to {own.feed_forward.max():.2f} whatever lambda is"
        )
        lines.append(Line("Theorem 4.1*, whole blocks", 0, NOTHING, turn))
    return lines


def _smallest_certified(
    subject: Subject, target: float, sign: int, bounds: Callable[[Pass], Array]
) -> tuple[float, str]:
    """Smallest |lambda| whose own pass certifies the target on every excerpt, to 5 %, and what is certified there."""
    certified: dict[float, float] = {}

    def holds(size: float) -> bool:
        certified[size] = float(bounds(measure(subject, sign * size)).min())
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


# --- constants of one model ---


def measure(subject: Subject, lam: float) -> Pass:
    """Gains of every layer under `lam`, on all excerpts of the subject."""
    adapter, tile = subject.adapter, subject.plan.excerpts
    parts = [_measure(subject, subject.ids[i : i + tile], lam) for i in range(0, len(subject.ids), tile)]
    columns = zip(*parts, strict=True)
    first, row, frobenius, second, final = (np.concatenate(column, axis=-1) for column in columns)
    return Pass(lam, first, row, frobenius, None if adapter.pre_norm else second, final)


def _measure(subject: Subject, ids: Any, lam: float) -> tuple[Array, ...]:
    adapter = subject.adapter
    centre = not adapter.pre_norm
    rows, frobenius, second, final = [], [], [], np.empty(0)
    for layer, step in enumerate(trace(adapter, ids, lam, subject.variants[0].gating)):
        if layer == 0:
            X = _normalised(step.X) if centre else step.X
            first = measures.relative_mu(X).numpy(force=True)
        if not step.parts:
            norm = torch.linalg.vector_norm(step.X.double(), dim=(1, 2))
            final = torch.ldexp(norm, step.exponent).numpy(force=True)
            break
        gains = [_gains(*part, step.exponent, centre) for part in step.parts]
        rows.append(gains[0][0])
        frobenius.append(gains[0][1])
        second.append(gains[-1][0])
    return first, np.array(rows), np.array(frobenius), np.array(second), final


def _normalised(X: Tensor) -> Tensor:
    X = X.double() - X.double().mean(-1, keepdim=True)
    return X / torch.linalg.vector_norm(X, dim=-1, keepdim=True)


def _gains(X: Tensor, O: Tensor, exponent: Tensor, centre: bool) -> tuple[Array, Array]:
    """(max_i ||O_i|| / ||X_i||, ||O||_F / ||X||_F) of every excerpt, (B,) each."""
    X, O = X.double(), O.double()
    frobenius = torch.linalg.vector_norm(O, dim=(1, 2)) / torch.linalg.vector_norm(X, dim=(1, 2))
    if centre:
        X, O = X - X.mean(-1, keepdim=True), O - O.mean(-1, keepdim=True)
    row = (torch.linalg.vector_norm(O, dim=-1) / torch.linalg.vector_norm(X, dim=-1)).amax(-1)
    return tuple(torch.ldexp(gain, -exponent).numpy(force=True) for gain in (row, frobenius))  # type: ignore[return-value]


def trace(adapter: Adapter, ids: Any, lam: float, gating: bool = True) -> Iterator[Step]:
    """The pass of one lambda, layer by layer; the last Step holds X_K and no parts."""
    variant, dtype = Variant(lam=lam, gating=gating), adapter.dtype
    with torch.no_grad():
        engines = forward.Engines(adapter, [variant], None)
        stream = forward.Stream(adapter, variant, engines.embed(forward.checked_ids(adapter, ids), dtype), dtype)
        for layer in range(adapter.n_layers):
            X, native = stream.X, engines.blocks(layer, {dtype})[dtype]
            if native is None:
                parts = sublayers(adapter, layer, X, lam)
            else:
                O = native(
                    X, lam=0.0, gating=gating, layernorm=True, skip_site="residual", norm_site="both", o_scale=1.0
                )
                parts = [(X, O)]
            yield Step(X, parts, stream.exponent.clone())
            stream.step(adapter, layer, native)
        yield Step(stream.X, [], stream.exponent)


def head_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """One row a layer and head: C_M = max over the excerpts of ||M||_F at lambda = 1; for attention S and c too."""
    gating = subject.variants[0].gating
    ids = subject.ids[: subject.plan.excerpts]
    for layer, step in enumerate(trace(subject.adapter, ids, 1.0, gating)):
        if not step.parts:
            return
        Ms, S = mixing(subject.adapter, layer, torch.ldexp(step.X.double(), step.exponent[:, None, None]))
        sizes = np.linalg.norm(Ms, axis=(2, 3))  # (B, h)
        for head, C_M in enumerate(sizes.max(0)):
            row = {"layer": layer + 1, "head": head, "C_M": float(C_M)}
            yield row if S is None else row | {"S": float(S[head]), "c": 0.0}


def mixing(adapter: Adapter, layer: int, X: Tensor) -> Mixing:
    """The mixing matrices of block `layer` for its input X (B, N, d), in float64."""
    with torch.no_grad():
        if isinstance(adapter, Mamba2Adapter):
            return _mamba2_mixing(adapter, layer, X.double())
        return _attention_mixing(adapter, layer, X)


def _mamba2_mixing(adapter: Mamba2Adapter, layer: int, X: Tensor) -> Mixing:
    """From the B, C and dt that in_proj, convolution and SiLU make of norm(X); D is in M."""
    t = {name: tensor.detach().double() for name, tensor in adapter.tensors(layer).items()}
    s = adapter.shape
    u = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + s.eps) * t["norm.weight"]
    bias = t.get("mixer.in_proj.bias")
    projected = F.linear(u, t["mixer.in_proj.weight"][s.inner :], None if bias is None else bias[s.inner :])
    xBC, dt = projected.split([s.conv_dim, s.heads], dim=-1)
    xBC = ssd.conv(xBC.cpu(), t["mixer.conv1d.weight"].cpu(), _cpu(t.get("mixer.conv1d.bias")))
    B, C = (part.unflatten(-1, (s.groups, s.state)) for part in xBC[..., s.inner :].chunk(2, dim=-1))
    B, C = (part.repeat_interleave(s.heads // s.groups, 2).transpose(1, 2).numpy() for part in (B, C))  # (B, h, N, n)
    dt = F.softplus(dt + t["mixer.dt_bias"], threshold=40.0).clamp(*s.dt_limit).numpy(force=True)
    A, D = (-t["mixer.A_log"].exp()).numpy(force=True), t["mixer.D"].numpy(force=True)
    return Mixing(np.array([constants.mamba2_heads(*one, A, D) for one in zip(C, B, dt, strict=True)]), None)


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _attention_mixing(adapter: Adapter, layer: int, X: Tensor) -> Mixing:
    """softmax(Q K^T / sqrt(d_h)) of every head, and ||W_V^h W_O^h||_2."""
    block, heads = adapter.block(layer).attention, adapter.config.num_attention_heads
    own = getattr(block, "self", block)
    out = block.output.dense if own is not block else block.dense
    X = X.to(own.query.weight.dtype)
    q, k = (part(X).unflatten(-1, (heads, -1)).transpose(1, 2).double() for part in (own.query, own.key))
    Ms = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    W_V = own.value.weight.double().unflatten(0, (heads, -1))  # (h, e, d)
    W_O = out.weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # (h, d, e)
    S = torch.linalg.matrix_norm(W_O @ W_V, 2)
    return Mixing(Ms.numpy(force=True), S.numpy(force=True))


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
