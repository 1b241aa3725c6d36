"""The constants of one model on its excerpts: gains ||O|| / ||X|| of every layer under a lambda, and mixing matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse import measures
from lscollapse.instrument.engines import Engines
from lscollapse.instrument.forward import checked_ids
from lscollapse.instrument.sublayers import sublayers
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.bert import BertAdapter
from lscollapse.models.adapters.mamba2 import Mamba2Adapter
from lscollapse.models.kernels import ssd
from lscollapse.runs.loading import LoadedTask
from lscollapse.theory import constants
from lscollapse.theory.arrays import Array


class Step(NamedTuple):
    """One layer of a pass: X and O of every skip (the mixer's first), (B, N, d); X is carried as X * 2^exponent."""

    X: Tensor
    parts: list[tuple[Tensor, Tensor]]
    exponent: np.ndarray  # (B,)


@dataclass(frozen=True)
class Pass:
    """Gains of all layers at one lambda, per excerpt.

    Attributes:
        first: relative mu that a certificate starts from, (B,): of X_0, with unit rows for a post-norm net.
        row: max_i ||O_i|| / ||X_i||, (K, B); for a post-norm net without the channel mean, which its norm removes.
        frobenius: ||O||_F / ||X||_F, (K, B).
        feed_forward: `row` of the second skip, (K, B); None where there is none.
        final_norm: ||X_K||_F, (B,).
    """

    lam: float
    first: Array
    row: Array
    frobenius: Array
    feed_forward: Array | None
    final_norm: Array


def gains_at(task: LoadedTask, lam: float) -> Pass:
    """Gains of every layer under `lam`, on all excerpts of the task."""
    tile = task.plan.excerpts
    parts = [_tile_gains(task, task.ids[i : i + tile], lam) for i in range(0, len(task.ids), tile)]
    columns = zip(*parts, strict=True)
    first, row, frobenius, second, final = (np.concatenate(column, axis=-1) for column in columns)
    return Pass(lam, first, row, frobenius, second if len(second) else None, final)


def _tile_gains(task: LoadedTask, ids: Any, lam: float) -> tuple[Array, ...]:
    adapter = task.adapter
    centre = not adapter.pre_norm
    rows, frobenius, second, final = [], [], [], np.empty(0)
    for layer, step in enumerate(trace(adapter, ids, lam, task.variants[0].gating, task.compute_dtype)):
        if layer == 0:
            X = normalised(step.X) if centre else step.X
            first = measures.relative_mu(X).numpy(force=True)
        if not step.parts:
            norm = torch.linalg.vector_norm(step.X.double(), dim=(1, 2))
            with np.errstate(over="ignore"):
                final = np.ldexp(norm.numpy(force=True), step.exponent)
            break
        gains = [_gains(*part, step.exponent, centre) for part in step.parts]
        rows.append(gains[0][0])
        frobenius.append(gains[0][1])
        second += [gain[0] for gain in gains[1:]]
    return first, np.array(rows), np.array(frobenius), np.array(second).reshape(len(second), len(ids)), final


def normalised(X: Tensor) -> Tensor:
    """Rows without their channel mean, of unit norm, in float64: what a LayerNorm sees of X (..., N, d)."""
    X = X.double() - X.double().mean(-1, keepdim=True)
    unit: Tensor = X / torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return unit


def _gains(X: Tensor, O: Tensor, exponent: np.ndarray, centre: bool) -> tuple[Array, Array]:
    """(max_i ||O_i|| / ||X_i||, ||O||_F / ||X||_F) of every excerpt, (B,) each."""
    X, O = X.double(), O.double()
    frobenius = torch.linalg.vector_norm(O, dim=(1, 2)) / torch.linalg.vector_norm(X, dim=(1, 2))  # (B, N, d) -> (B,)
    if centre:
        X, O = X - X.mean(-1, keepdim=True), O - O.mean(-1, keepdim=True)
    row = (torch.linalg.vector_norm(O, dim=-1) / torch.linalg.vector_norm(X, dim=-1)).amax(-1)  # (B, N) -> (B,)
    return np.ldexp(row.numpy(force=True), -exponent), np.ldexp(frobenius.numpy(force=True), -exponent)


def trace(
    adapter: Adapter, ids: Any, lam: float, gating: bool = True, dtype: torch.dtype | None = None
) -> Iterator[Step]:
    """The pass of one lambda, layer by layer, by default in the weights' dtype; the last Step holds X_K and no parts."""
    engines = Engines(adapter, [Variant(lam=lam, gating=gating)], dtype)
    with torch.no_grad():
        (stream,) = engines.streams(checked_ids(adapter, ids))
        adapter = engines.adapter(stream.dtype)
        for layer in range(adapter.n_layers):
            X, own = stream.X, engines.block(layer, stream.dtype)  # (B, N, d)
            if own is None:
                parts = sublayers(adapter, layer, X, lam)
            else:
                O = own(X, lam=0.0, gating=gating, layernorm=True, skip_site="residual", norm_site="both")
                parts = [(X, O)]
            yield Step(X, parts, stream.carried.exponent.numpy(force=True).astype(int))
            stream.step(adapter, layer, own)
        yield Step(stream.X, [], stream.carried.exponent.numpy(force=True).astype(int))


def head_rows(task: LoadedTask) -> Iterator[dict[str, Any]]:
    """One row a layer and head: C_M = max over the excerpts of ||M||_F at lambda = 1; for attention S and c too."""
    gating = task.variants[0].gating
    ids = task.ids[: task.plan.excerpts]
    for layer, step in enumerate(trace(task.adapter, ids, 1.0, gating, task.compute_dtype)):
        if not step.parts:
            return
        Ms, S = mixing_matrices(task.adapter, layer, step.X.double())
        sizes = np.linalg.norm(Ms, axis=(2, 3))  # (B, h)
        for head, C_M in enumerate(sizes.max(0)):
            row = {"layer": layer + 1, "head": head, "C_M": float(C_M)}
            yield row if S is None else row | {"S": float(S[head]), "c": 0.0}


def mixing_matrices(adapter: Adapter, layer: int, X: Tensor) -> tuple[Array, Array | None]:
    """Ms (B, h, N, N) of block `layer` for its input X (B, N, d), in float64, and S (h,) of each head's C_V, or None."""
    with torch.no_grad():
        if isinstance(adapter, Mamba2Adapter):
            return _mamba2_mixing(adapter, layer, X.double())
        return _attention_mixing(adapter, layer, X)


def _mamba2_mixing(adapter: Mamba2Adapter, layer: int, X: Tensor) -> tuple[Array, Array | None]:
    """From the B, C and dt that in_proj, convolution and SiLU make of norm(X); D is in M."""
    t = {name: tensor.detach().double() for name, tensor in adapter.tensors(layer).items()}
    s = adapter.shape
    u = X * torch.rsqrt(X.square().mean(-1, keepdim=True) + s.eps) * t["norm.weight"]
    bias = t.get("mixer.in_proj.bias")
    projected = F.linear(u, t["mixer.in_proj.weight"][s.inner :], None if bias is None else bias[s.inner :])
    xBC, dt = torch.split(projected, [s.conv_dim, s.heads], dim=-1)  # (B, N, conv_dim), (B, N, h)
    taps, shift = t["mixer.conv1d.weight"].cpu(), t.get("mixer.conv1d.bias")
    xBC = ssd.conv(xBC.cpu(), taps, None if shift is None else shift.cpu())
    BC = (torch.unflatten(part, -1, (s.groups, s.state)) for part in xBC[..., s.inner :].chunk(2, dim=-1))
    B, C = (part.repeat_interleave(s.heads // s.groups, 2).transpose(1, 2).numpy() for part in BC)  # (B, h, N, n)
    steps = F.softplus(dt + t["mixer.dt_bias"], threshold=40.0).clamp(*s.dt_limit).numpy(force=True)  # (B, N, h)
    A, D = (-t["mixer.A_log"].exp()).numpy(force=True), t["mixer.D"].numpy(force=True)
    return np.array([constants.mamba2_heads(*one, A, D) for one in zip(C, B, steps, strict=True)]), None


def _attention_mixing(adapter: Adapter, layer: int, X: Tensor) -> tuple[Array, Array | None]:
    """softmax(Q K^T / sqrt(d_h)) of every head, of a decoder over earlier tokens alone, and ||W_V^h W_O^h||_2."""
    block, heads = adapter.block(layer).attention, adapter.config.num_attention_heads
    own = getattr(block, "self", block)
    out = block.output.dense if own is not block else block.dense
    X = X.to(own.query.weight.dtype)
    q, k = (part(X).unflatten(-1, (heads, -1)).transpose(1, 2).double() for part in (own.query, own.key))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, h, N, e) -> (B, h, N, N)
    if isinstance(adapter, BertAdapter) and adapter.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    Ms = torch.softmax(scores, dim=-1)
    W_V = own.value.weight.double().unflatten(0, (heads, -1))  # (h, e, d)
    W_O = out.weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # (h, d, e)
    S = torch.linalg.matrix_norm(W_O @ W_V, 2)
    return Ms.numpy(force=True), S.numpy(force=True)
