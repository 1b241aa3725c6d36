"""Mamba-2, BERT, ALBERT and S4D written out plainly in float64 numpy, straight from a dictionary of weights.

They are the oracle for the surgery: nothing of the package and no layer of torch is used, Mamba-2 runs token by token,
and lambda, the gate and the norms are plain `if`s where the equations have them. Names of weights are those of
transformers' base models. Every model returns [X_0, ..., X_K]: the embedding and the output of each block, (B, N, d).

Inside `shaken` every intermediate result is off by what rounding to a dtype could change in it: how far the outputs then
move says how far any program that computes in that dtype may be off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]
Lam = float | Sequence[float]

_erf = np.vectorize(math.erf, otypes=[float])


def weights_of(model: Any) -> Weights:
    """The weights of a torch model as float64 arrays."""
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}


_noise: list[Callable[[np.ndarray], np.ndarray]] = []  # of `shaken`, while it is open


@contextmanager
def shaken(spacing: float, rng: np.random.Generator) -> Iterator[None]:
    """While open, results x computed as sums of terms with |terms| summing to s become x + u s, u uniform in +-spacing."""
    _noise.append(lambda size: rng.uniform(-spacing, spacing, size.shape) * size)
    try:
        yield
    finally:
        _noise.pop()


def _rounded(x: np.ndarray, size: np.ndarray | None = None) -> np.ndarray:
    """x, or inside `shaken` x off by the spacing times `size`, |x| by default."""
    return x + _noise[-1](np.abs(x) if size is None else size) if _noise else x


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _rounded(a @ b, np.abs(a) @ np.abs(b)) if _noise else a @ b


def _lam(lam: Lam, layer: int) -> float:
    return float(lam) if isinstance(lam, int | float) else float(lam[layer])


def _linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return _product(x, w[f"{name}.weight"].T) + w.get(f"{name}.bias", 0.0)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def _activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "gelu":
        return x * 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
    if name == "gelu_new":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu":
        return np.maximum(x, 0.0)
    raise NotImplementedError(name)


def _layer_norm(w: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    centred = _rounded(x - x.mean(-1, keepdims=True), np.abs(x) + np.abs(x).mean(-1, keepdims=True))
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms_norm(weight: np.ndarray, x: np.ndarray, eps: float, groups: int = 1) -> np.ndarray:
    parts = _rounded(x.reshape(*x.shape[:-1], groups, -1))
    parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + eps)
    return parts.reshape(x.shape) * weight


# --- Mamba-2 --------------------------------------------------------------------------------------


def mamba2(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, gating: bool = True, layernorm: bool = True,
    skip_site: str = "residual", norm_site: str = "both",
) -> list[np.ndarray]:  # fmt: skip
    """X' = lam*X + O with O = mixer(norm(X)); at skip_site `mixer` X' = X + O, with lam*V inside the mixer in place of
    the gate, so nowhere while the gate is on."""
    block_norm = layernorm or norm_site == "mixer"
    mixer_norm = layernorm or norm_site == "block"
    X = w["embeddings.weight"][ids]
    outputs = [X]
    for k in range(config.num_hidden_layers):
        part = {n.removeprefix(f"layers.{k}."): a for n, a in w.items() if n.startswith(f"layers.{k}.")}
        u = _rms_norm(part["norm.weight"], X, config.layer_norm_epsilon) if block_norm else X
        strength = _lam(lam, k)
        inside = strength if skip_site == "mixer" and not gating else 0.0
        O = mamba2_mixer(part, config, u, gating, mixer_norm, inside)
        X = _sum(1.0 if skip_site == "mixer" else strength, X, O)
        outputs.append(X)
    return outputs


def _sum(lam: float, X: np.ndarray, O: np.ndarray) -> np.ndarray:
    """lam*X + O."""
    return _rounded(lam * X + O, np.abs(lam * X) + np.abs(O))


def mamba2_mixer(w: Weights, config: Any, u: np.ndarray, gating: bool, norm: bool, extra_skip: float) -> np.ndarray:
    """in_proj, causal depthwise convolution, the recurrence h' = exp(dt A) h + dt B x, y = C h + (D + extra_skip) x,
    gated RMSNorm per group, out_proj. u and the result are (B, N, d)."""
    n_heads, head_dim, n_groups, n_state = config.num_heads, config.head_dim, config.n_groups, config.state_size
    batch, n_tokens, _ = u.shape
    inner = n_heads * head_dim
    z, xBC, dt = np.split(_linear(w, "mixer.in_proj", u), [inner, 2 * inner + 2 * n_groups * n_state], -1)

    kernel = w["mixer.conv1d.weight"][:, 0, :]
    width = kernel.shape[1]
    convolved = np.zeros_like(xBC)
    for t in range(n_tokens):
        for back in range(min(width, t + 1)):
            convolved[:, t] += xBC[:, t - back] * kernel[:, width - 1 - back]
    xBC = _silu(convolved + w.get("mixer.conv1d.bias", 0.0))

    x, B, C = np.split(xBC, [inner, inner + n_groups * n_state], -1)
    x = x.reshape(batch, n_tokens, n_heads, head_dim)
    group = np.arange(n_heads) // (n_heads // n_groups)
    B = B.reshape(batch, n_tokens, n_groups, n_state)[:, :, group]
    C = C.reshape(batch, n_tokens, n_groups, n_state)[:, :, group]
    low, high = config.time_step_limit
    dt = np.clip(np.logaddexp(0.0, dt + w["mixer.dt_bias"]), low, high)
    A = -np.exp(w["mixer.A_log"])
    skip = w["mixer.D"] + extra_skip

    h = np.zeros((batch, n_heads, head_dim, n_state))
    y = np.empty_like(x)
    for t in range(n_tokens):
        step = dt[:, t]
        h = np.exp(step * A)[..., None, None] * h + np.einsum("bhp,bhn->bhpn", step[..., None] * x[:, t], B[:, t])
        terms = h * C[:, t, :, None, :]
        y[:, t] = _rounded(terms.sum(-1) + skip[:, None] * x[:, t], np.abs(terms).sum(-1))
    y = y.reshape(batch, n_tokens, inner)
    if gating:
        y = y * _silu(z)
    if norm:
        y = _rms_norm(w["mixer.norm.weight"], y, config.layer_norm_epsilon, n_groups)
    return _linear(w, "mixer.out_proj", y)


# --- BERT and ALBERT ------------------------------------------------------------------------------


def bert(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, layernorm: bool = True, skip_site: str = "residual"
) -> list[np.ndarray]:
    """X' = LN(lam*Z + ffn(Z)), Z = LN(lam*X + attention(X)), lam at the sites that `skip_site` names."""
    X = _embedding(w, config, ids)
    outputs = [X]
    names = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "dense": "attention.output.dense", "first norm": "attention.output.LayerNorm",
        "up": "intermediate.dense", "down": "output.dense", "second norm": "output.LayerNorm",
    }  # fmt: skip
    for k in range(config.num_hidden_layers):
        X = _post_norm_block(w, config, f"encoder.layer.{k}.", names, X, _lam(lam, k), layernorm, skip_site)
        outputs.append(X)
    return outputs


def albert(
    w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, layernorm: bool = True, skip_site: str = "residual"
) -> list[np.ndarray]:
    """The same block; the passes are divided over the groups, and each runs all inner layers of its group."""
    X = _linear(w, "encoder.embedding_hidden_mapping_in", _embedding(w, config, ids))
    outputs = [X]
    names = {
        "query": "attention.query", "key": "attention.key", "value": "attention.value", "dense": "attention.dense",
        "first norm": "attention.LayerNorm", "up": "ffn", "down": "ffn_output", "second norm": "full_layer_layer_norm",
    }  # fmt: skip
    for outer in range(config.num_hidden_layers):
        group = outer * config.num_hidden_groups // config.num_hidden_layers
        for inner in range(config.inner_group_num):
            where = f"encoder.albert_layer_groups.{group}.albert_layers.{inner}."
            strength = _lam(lam, len(outputs) - 1)
            X = _post_norm_block(w, config, where, names, X, strength, layernorm, skip_site)
            outputs.append(X)
    return outputs


def _embedding(w: Weights, config: Any, ids: np.ndarray) -> np.ndarray:
    words = w["embeddings.word_embeddings.weight"][ids]
    positions = w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    types = w["embeddings.token_type_embeddings.weight"][0]
    return _layer_norm(w, "embeddings.LayerNorm", words + positions + types, config.layer_norm_eps)


def _post_norm_block(
    w: Weights, config: Any, where: str, names: dict[str, str], X: np.ndarray, lam: float, layernorm: bool,
    skip_site: str,
) -> np.ndarray:  # fmt: skip
    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return _linear(w, where + names[name], x)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return _layer_norm(w, where + names[name], x, config.layer_norm_eps) if layernorm else x

    heads = config.num_attention_heads
    batch, n_tokens, d = X.shape

    def split(x: np.ndarray) -> np.ndarray:  # (B, N, d) -> (B, H, N, d/H)
        return x.reshape(batch, n_tokens, heads, d // heads).transpose(0, 2, 1, 3)

    q, k, v = split(linear("query", X)), split(linear("key", X)), split(linear("value", X))
    scores = _product(q, k.transpose(0, 1, 3, 2)) / math.sqrt(d // heads)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    M = scores / scores.sum(-1, keepdims=True)
    attended = linear("dense", _product(M, v).transpose(0, 2, 1, 3).reshape(batch, n_tokens, d))
    Z = norm("first norm", _sum(lam if skip_site in ("residual", "both") else 1.0, X, attended))
    fed = linear("down", _activation(config.hidden_act, linear("up", Z)))
    return norm("second norm", _sum(lam if skip_site in ("ffn", "both") else 1.0, Z, fed))


# --- S4D ------------------------------------------------------------------------------------------


def s4d(w: Weights, config: Any, ids: np.ndarray, lam: Lam = 1.0, layernorm: bool = True) -> list[np.ndarray]:
    """X' = LN(lam*X + O), O = GLU(W GELU(y)), y the output of h' = exp(dt A) h + (exp(dt A) - 1)/A x token by token."""
    digits = ids[..., None] // config.levels ** np.arange(config.channels - 1, -1, -1) % config.levels
    X = _linear(w, "encoder", digits * (2.0 / (config.levels - 1)) - 1.0)
    outputs = [X]
    for k in range(config.num_hidden_layers):
        part = {n.removeprefix(f"layers.{k}.mixer."): a for n, a in w.items() if n.startswith(f"layers.{k}.mixer.")}
        A = -np.exp(part["log_A_real"]) + 1j * part["A_imag"]  # (d, n), one of each conjugate pair
        C = part["C"][..., 0] + 1j * part["C"][..., 1]
        dtA = np.exp(part["log_dt"])[:, None] * A
        decay, gain = np.exp(dtA), np.expm1(dtA) / A
        h, y = np.zeros((len(X), *A.shape), dtype=complex), np.empty_like(X)
        for t in range(X.shape[1]):
            h = decay * h + gain * X[:, t, :, None]
            y[:, t] = 2.0 * (C * h).sum(-1).real + part["D"] * X[:, t]
        y = _rounded(
            y, np.broadcast_to(np.abs(y).max(1, keepdims=True), y.shape)
        )  # a convolution by FFT mixes all positions
        value, gate = np.split(_linear(part, "output", _activation("gelu", y)), 2, -1)
        X = _sum(_lam(lam, k), X, value / (1.0 + np.exp(-gate)))
        X = _layer_norm(w, f"layers.{k}.norm", X, 1e-5) if layernorm else X
        outputs.append(X)
    return outputs


# --- measures of one (N, d) matrix, by their definitions ------------------------------------------


def plain_measures(Y: np.ndarray) -> dict[str, float]:
    """Every measure of one finite matrix that is not collapsed, from its definition, with numpy's SVD; NaN where a row is zero."""
    Y = np.asarray(Y, dtype=np.float64)
    size = float(np.abs(Y).max())
    unit = Y / size  # so that squares stay in range
    R = unit - unit.mean(0)
    sigma = np.linalg.svd(unit, compute_uv=False)
    largest = np.abs(Y).max(1, keepdims=True)
    lengths = np.linalg.norm(Y / np.where(largest > 0, largest, 1.0), axis=1) * largest[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = Y / largest / np.linalg.norm(Y / largest, axis=1, keepdims=True)
        ratio = float(lengths.max() / np.median(lengths))
    cosines = rows @ rows.T
    n = len(Y)
    turned = np.linalg.svd(rows, compute_uv=False) if np.isfinite(rows).all() else np.full(1, np.nan)
    p = turned[turned > 0] ** 2 / n if np.isfinite(rows).all() else np.full(1, np.nan)

    def one_inf(A: np.ndarray) -> float:
        return math.sqrt(np.abs(A).sum(0).max() * np.abs(A).sum(1).max())

    return {
        "mu": float(np.linalg.norm(R)) * size,
        "relative_mu": float(np.linalg.norm(R) / np.linalg.norm(unit)),
        "rank1_residual": float(np.linalg.norm(sigma[1:]) / np.linalg.norm(sigma)),
        "stable_rank": float((sigma**2).sum() / sigma[0] ** 2),
        "mean_cosine": float((cosines.sum() - np.trace(cosines)) / (n * (n - 1))) if n > 1 else math.nan,
        "dong_residual": one_inf(R) / one_inf(unit),
        "angular_mu": float(np.linalg.norm(rows - rows.mean(0)) / math.sqrt(n)),
        "angular_rank1_residual": float(np.linalg.norm(turned[1:]) / math.sqrt(n)) if turned[0] > 0 else math.nan,
        "row_norm_ratio": ratio,
        "longest_row": float((lengths >= (1 - 2**-10) * lengths.max()).argmax()),
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
    }
