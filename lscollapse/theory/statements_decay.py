"""The statements on norms without LayerNorm: Lemma A.1, Theorems A.3 and A.6 to A.10, and footnote 3."""

from __future__ import annotations

import numpy as np

from lscollapse.theory import bounds, constants
from lscollapse.theory.arrays import Array, mu, norm_1_inf, unit_rows
from lscollapse.theory.checking import Statement, fails_unless, lower, smallest, upper
from lscollapse.theory.instances import Instance, Rng, draw_decay, layers_of, shape, tokens
from lscollapse.theory.layers import attention_matrix, decay, selective_matrix, softmax


def _lemma_a1() -> tuple[str, str]:
    A, B = np.array([[0.0, 1.0]]), np.array([[1.0], [0.0]])
    left = float(np.linalg.norm(A @ B))
    right = float(np.linalg.svd(B, compute_uv=False)[-1] * np.linalg.norm(A))
    return fails_unless(left >= right, f"A = [0,1], B = [1;0]: {left:.0f}, bound {right:.0f}")


def _draw_product(rng: Rng) -> Instance:
    n, m = shape(rng)
    return {"A": rng.standard_normal((m, n)), "B": rng.standard_normal((n, n + int(rng.integers(3))))}


def _lemma_a1_margin(A: Array, B: Array) -> float | None:
    return lower(float(np.linalg.norm(A @ B)), bounds.product_lower_bound(A, B))


def _log_margin(actual: float, log_bound: float, floor: float = 0.0) -> float | None:
    """Margin of actual <= exp(log_bound); None when actual is at or under `floor`, where rounding decides."""
    return float(-np.expm1(np.log(actual) - log_bound)) if actual > floor else None


def _draw_attention(rng: Rng) -> Instance:
    N, d = shape(rng)
    Y = rng.uniform(0.1, 1.0) * tokens(rng, N, d)
    weights = {name: rng.standard_normal((d, d)) for name in ("W_QK", "W_V")}
    return {"Y": Y, **weights, "K": int(rng.integers(1, 4))}


def _theorem_a3_margin(Y: Array, W_QK: Array, W_V: Array, K: int) -> float | None:
    B, mu0, margins = bounds.attention_factor(W_QK, W_V, 1), mu(Y), []
    floor = 0.0
    for k in range(1, K + 1):
        one_step = bounds.attention_one_step(Y, B)
        Y = attention_matrix(Y, W_QK, 1) @ Y @ W_V
        floor = max(floor, 1e-4 * float(np.linalg.norm(Y)))
        margins.append(1 - mu(Y) / one_step if mu(Y) > floor else None)
        margins.append(_log_margin(mu(Y), bounds.attention_log_bound(B, mu0, k), floor))
    return smallest(margins)


def _corollary_a31() -> tuple[str, str]:
    tall, wide = np.ones((9, 1)), np.ones((1, 9))
    one = float(np.abs(tall).sum(0).max())
    holds = np.linalg.norm(tall) >= one and np.linalg.norm(wide) <= 1.0
    text = f"ones(9, 1): norm_F {np.linalg.norm(tall):.0f} >= norm_1 {one:.0f} is false; the last 3 must be 3^K"
    return fails_unless(bool(holds), text)


def _draw_matrix(rng: Rng) -> Instance:
    A = rng.standard_normal(shape(rng))
    return {"A": A * (rng.random(A.shape) < 0.5) + 1e-3 * A if rng.integers(2) else A}


def _corollary_a31_margin(A: Array) -> float | None:
    size, mixed = float(np.linalg.norm(A)), norm_1_inf(A)
    return smallest([upper(mixed, A.size**0.25 * size, 0.0), upper(size, np.sqrt(min(A.shape)) * mixed, 0.0)])


def _draw_lti(rng: Rng) -> Instance:
    N, d = shape(rng)
    return {"Y": tokens(rng, N, d), "Ws": np.exp(rng.standard_normal()) * layers_of(rng, int(rng.integers(1, 7)), N)}


def _lti_margin(Y: Array, Ws: Array) -> float | None:
    limits = bounds.lti(Ws, float(np.linalg.norm(Y)))
    for W in Ws:
        Y = W @ Y
    floor = 1e-4 * float(np.exp(limits.spectral))
    return smallest([_log_margin(mu(Y), bound, floor) for bound in limits])


def _lemma_a9() -> tuple[str, str]:
    Y, W = np.full((2, 1), np.sqrt(0.5)), np.eye(1)
    after = float(np.linalg.norm(selective_matrix(Y, W, 3.0) @ Y))
    bound = float(np.exp(bounds.selective_log_bound(W, 2, 1.0, 1)))
    return "holds", f"for |alpha| <= 1 only: alpha = 3 gives {after:.5f} > {bound:.5f}"


def _theorem_a10() -> tuple[str, str]:
    Y, W = np.array([[1.0], [0.0]]), np.array([[0.01]])
    after = mu(selective_matrix(Y, W, 1.0) @ Y)
    printed = float(np.exp(bounds.printed_theorem_a10(W, 2, 1.0, 1)))
    corrected = float(np.exp(bounds.selective_log_bound(W, 2, 1.0, 1)))
    text = f"W_BC = .01, K = 1: mu {after:.9f}, bound {printed:.9f}; exponent (3^K - 1)/2: {corrected:.9f}"
    return fails_unless(after <= printed, text)


def _draw_free(rng: Rng) -> Instance:
    return draw_decay(rng) | {"K": int(rng.integers(1, 6))}


def _selective_margin(Y: Array, W_BC: Array, alpha: float, K: int, sharp: bool) -> float | None:
    alpha, norm0, N, margins = float(np.clip(alpha, -1, 1)), float(np.linalg.norm(Y)), len(Y), []
    for k in range(1, K + 1):
        Y = selective_matrix(Y, W_BC, alpha) @ Y
        size = float(np.linalg.norm(Y))
        if not 1e-50 < size < 1e50:
            break
        margins.append(_log_margin(mu(Y) if sharp else size, bounds.selective_log_bound(W_BC, N, norm0, k, sharp)))
    return smallest(margins)


# --- footnote 3 ---


def _footnote_lti() -> tuple[str, str]:
    size = float(np.linalg.norm(decay(4, 0.01)))
    text = f"attention sqrt(N) holds; LTI A = .01, B = C = 1, N = 4: norm_F(M) = {size:.6f}, bound .01"
    return fails_unless(size <= 0.01, text)


def _draw_footnote_lti(rng: Rng) -> Instance:
    H = int(rng.integers(1, 5))
    A = rng.uniform(0.1, 1.2) * rng.standard_normal((H, H)) / np.sqrt(H)
    B, C = rng.standard_normal((H, 1)), rng.standard_normal((1, H))
    return {"A": A, "B": B, "C": C, "logits": rng.standard_normal((6, 6))}


def _footnote_lti_margin(A: Array, B: Array, C: Array, logits: Array) -> float | None:
    N = len(logits)
    kernel = np.array([(C @ np.linalg.matrix_power(A, s) @ B).item() for s in range(N)])
    M = np.tril(kernel[np.abs(np.subtract.outer(np.arange(N), np.arange(N)))])
    size_A, size_B, size_C = (float(np.linalg.norm(W, 2)) for W in (A, B, C))
    limit = constants.lti(size_A, size_B, size_C, N)
    attention = upper(float(np.linalg.norm(softmax(logits))), np.sqrt(N))
    return smallest([*_norm_margins(M, limit), attention])


def _norm_margins(M: Array, limit: constants.DecayNorms) -> list[float | None]:
    sizes = float(np.linalg.norm(M)), float(np.abs(M).sum(1).max())
    return [upper(size, bound, 0.0) for size, bound in zip(sizes, limit, strict=True)]


def _footnote_selective() -> tuple[str, str]:
    size = float(np.linalg.norm(selective_matrix(np.ones((8, 1)), np.eye(1), 1.0)))
    return fails_unless(size <= 1.0, f"N = 8, d = 1, W_B = W_C = 1, alpha = 1: norm_F(M) = {size:.0f}, bound 1")


def _footnote_selective_margin(Y: Array, W_BC: Array, alpha: float) -> float | None:
    limit = constants.selective(W_BC, alpha, len(Y))
    return smallest(_norm_margins(selective_matrix(unit_rows(Y), W_BC, alpha), limit))


STATEMENTS = (
    Statement("Lemma A.1", _lemma_a1, "for B with no more rows than columns", _draw_product, _lemma_a1_margin),
    Statement(
        "Theorem A.3, attention without LayerNorm",
        lambda: ("void", "gamma is not defined in the paper: nothing to compute"),
        "B^((3^K-1)/2) mu0^(3^K), unmasked", _draw_attention, _theorem_a3_margin,
    ),
    Statement(
        "Corollary A.3.1, norms", _corollary_a31, "norm_1,inf against norm_F", _draw_matrix, _corollary_a31_margin
    ),
    Statement(
        "Lemma A.6, Theorems A.7, A.8, LTI", lambda: ("holds", "they bound the norm of Y, not relative mu"), "",
        _draw_lti, _lti_margin,
    ),
    Statement("Lemma A.9, selective", _lemma_a9, "", _draw_free, lambda **i: _selective_margin(**i, sharp=False)),
    Statement(
        "Theorem A.10, selective", _theorem_a10, "exponent (3^K - 1)/2; sharper with norm_2(W_BC)",
        _draw_free, lambda **i: _selective_margin(**i, sharp=True),
    ),
    Statement(
        "Footnote 3, attention and LTI", _footnote_lti, "sums of powers of norm_2(A)",
        _draw_footnote_lti, _footnote_lti_margin,
    ),
    Statement(
        "Footnote 3, selective", _footnote_selective, "sums of powers of alpha, norm_2(W_BC)",
        draw_decay, _footnote_selective_margin,
    ),
)  # fmt: skip
