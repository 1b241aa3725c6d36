"""The statements that push mu down: Theorems 4.2, 4.3, A.3, A.6 to A.10, their lemmas, and footnote 3."""

from __future__ import annotations

import numpy as np

from . import bounds, constants
from .arrays import Array, min_cosine, mu, norm_1_inf, unit_rows
from .checking import Instance, Printed, Rng, Statement, cone, layers_of, lower, shape, tokens, upper
from .layers import attention_matrix, decay, layer, selective_matrix, softmax


def _fails(holds: bool, text: str) -> tuple[str, str]:
    return ("holds" if holds else "fails"), text


# --- with LayerNorm ---


def _draw_stochastic(rng: Rng) -> Instance:
    N, d = shape(rng)
    causal = int(rng.integers(3)) if N > 2 else 0  # 0 full, 1 causal, 2 window of 1: reaches all in N - 1 steps
    K = int(rng.integers(1, 5)) * (N - 1 if causal == 2 else 1)
    logits = rng.uniform(0, 4) * rng.standard_normal((K, N, N))
    return {"Y": cone(rng, N, d), "logits": logits, "causal": causal, "W_V": rng.standard_normal((d, d))}


def _theorem42_margin(Y: Array, logits: Array, causal: int, W_V: Array) -> float | None:
    Y, N = unit_rows(Y), len(Y)
    phi0, orthogonal = min_cosine(Y), np.linalg.qr(W_V)[0]
    mask = (np.ones((N, N)), np.tri(N), np.tri(N) - np.tri(N, k=-2))[causal] > 0
    Ms = np.array([softmax(np.where(mask, A, -np.inf)) for A in logits])
    if phi0 < 0.0:
        return None
    bound = bounds.attention_layernorm(Ms, phi0, N - 1 if causal == 2 else 1)
    for M in Ms:
        Y = layer(Y, M, 0.0, orthogonal)
    return upper(mu(Y), float(bound[-1]))


def _draw_selective(rng: Rng) -> Instance:
    N, d = shape(rng)
    W = rng.standard_normal((d, d))
    W = W @ W.T if rng.integers(2) else np.eye(d) + 0.3 * W
    return {"Y": cone(rng, N, d), "W_BC": W, "alpha": float(rng.uniform(0.05, 1.0)), "K": int(rng.integers(1, 6))}


def _draw_skip(rng: Rng) -> Instance:
    return _draw_selective(rng) | {"lam": float(10.0 ** rng.uniform(-1, 1.5))}


def _skip_margin(Y: Array, W_BC: Array, alpha: float, K: int, lam: float) -> float | None:
    """Margin of the contraction bound for a selective SSM with LayerNorm and skip lam >= 0; needs M >= 0."""
    Y, Ms = unit_rows(Y), []
    phi0 = min_cosine(Y)
    if phi0 < 0.0 or not 0.0 <= alpha <= 1.0:
        return None
    for _ in range(K):
        Ms.append(selective_matrix(Y, W_BC, alpha))
        if (Ms[-1] < 0.0).any():
            return None
        Y = layer(Y, Ms[-1], lam)
    return upper(mu(Y), float(bounds.layernorm(Ms, phi0, lam)[-1]))


def _theorem43_margin(Y: Array, W_BC: Array, alpha: float, K: int) -> float | None:
    """Corrected bound from the measured overlaps; and the overlap itself against its a-priori form."""
    margin = _skip_margin(Y, W_BC, alpha, K, 0.0)
    if margin is None:
        return None
    Y = unit_rows(Y)
    M = selective_matrix(Y, W_BC, alpha)
    a_priori = bounds.selective_overlap(W_BC, min(1.0, min_cosine(Y)), alpha, len(Y))
    other = lower(bounds.overlap(bounds.row_stochastic(M)), a_priori)
    return margin if other is None else min(margin, other)


def _theorem43() -> tuple[str, str]:
    Y = np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    values = []
    for _ in range(3):
        Y = layer(Y, selective_matrix(Y, 2 * np.eye(2), 1.0), 0.0)
        values.append(mu(Y))
    printed = bounds.printed_theorem43(2, 0.5, 2.0, 1.0, 1)
    text = f"W_BC = 2 I, phi0 = c = .5: bound {printed:.0f} for every K >= 1; mu_1..3 = "
    return _fails(values[0] <= printed, text + ", ".join(f"{value:.6f}" for value in values))


def _lemma_a4() -> tuple[str, str]:
    Y = unit_rows([[1.0, 0.5], [1.0, -0.05]])
    entry = float(selective_matrix(Y, np.diag([1.0, 10.0]), 1.0)[1, 0])
    printed = min_cosine(Y)
    return _fails(entry >= printed, f"W_BC = diag(1, 10): M_21 = {entry:.6f}, bound {printed:.6f}")


def _lemma_a4_margin(Y: Array, W_BC: Array) -> float | None:
    """M_ij / alpha^(i-j) - entry_factor, in units of ||W_BC||_2."""
    Y = unit_rows(Y)
    phi = min(1.0, min_cosine(Y))
    slack = Y @ W_BC @ Y.T - bounds.entry_factor(W_BC, phi)
    return float(slack.min()) / float(np.linalg.norm(W_BC, 2)) if phi >= 0.0 else None


def _lemma_a5() -> tuple[str, str]:
    W, Y = np.array([[1.0, -10.0], [10.0, 1.0]]), np.array([[1.0, 0.0], [0.6, 0.8]])
    divisor = 1.0 / float(np.linalg.norm((selective_matrix(Y, W, 1.0) @ Y)[1]))
    printed = 2.0**-1.5
    return _fails(divisor >= printed, f"W_BC = [[1,-10],[10,1]]: D_22 = {divisor:.6f}, bound {printed:.6f}")


def _draw_lemma(rng: Rng) -> Instance:
    N, d = shape(rng)
    W = rng.standard_normal((d, d))
    return {"Y": cone(rng, N, d), "W_BC": W @ W.T if rng.integers(2) else W}


def _draw_decay(rng: Rng) -> Instance:
    N, d = shape(rng)
    W = rng.standard_normal((d, d))
    alpha = float(rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 1.0))
    return {"Y": tokens(rng, N, d), "W_BC": W @ W.T if rng.integers(2) else W, "alpha": alpha}


def _lemma_a5_margin(Y: Array, W_BC: Array, alpha: float) -> float | None:
    Y = unit_rows(Y)
    rows = np.linalg.norm(selective_matrix(Y, W_BC, float(np.clip(alpha, -1, 1))) @ Y, axis=1)
    return upper(float(rows.max()), 1.0 / bounds.layernorm_factor(W_BC, len(Y)))


# --- without LayerNorm ---


def _lemma_a1() -> tuple[str, str]:
    A, B = np.array([[0.0, 1.0]]), np.array([[1.0], [0.0]])
    left = float(np.linalg.norm(A @ B))
    right = float(np.linalg.svd(B, compute_uv=False)[-1] * np.linalg.norm(A))
    return _fails(left >= right, f"A = [0,1], B = [1;0]: {left:.0f}, bound {right:.0f}")


def _draw_product(rng: Rng) -> Instance:
    n, m = shape(rng)
    return {"A": rng.standard_normal((m, n)), "B": rng.standard_normal((n, n + int(rng.integers(3))))}


def _lemma_a1_margin(A: Array, B: Array) -> float | None:
    return lower(float(np.linalg.norm(A @ B)), bounds.product_lower_bound(A, B))


def _log_margin(actual: float, log_bound: float, floor: float = 0.0) -> float | None:
    """Margin of actual <= exp(log_bound); None when actual is at or under `floor`, where rounding decides."""
    return float(-np.expm1(np.log(actual) - log_bound)) if actual > floor else None


def _smallest(margins: list[float | None]) -> float | None:
    return min((margin for margin in margins if margin is not None), default=None)


def _theorem_a3() -> tuple[str, str]:
    return "void", "gamma is not defined in the paper: nothing to compute"


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
        floor = max(floor, 1e-6 * float(np.linalg.norm(Y)))
        margins.append(1 - mu(Y) / one_step if mu(Y) > floor else None)
        margins.append(_log_margin(mu(Y), bounds.attention_log_bound(B, mu0, k), floor))
    return _smallest(margins)


def _corollary_a31() -> tuple[str, str]:
    tall, wide = np.ones((9, 1)), np.ones((1, 9))
    one = float(np.abs(tall).sum(0).max())
    holds = np.linalg.norm(tall) >= one and np.linalg.norm(wide) <= 1.0
    return _fails(bool(holds), f"ones(9, 1): norm_F {np.linalg.norm(tall):.0f} >= norm_1 {one:.0f} is false; 3 must be 3^K")


def _draw_matrix(rng: Rng) -> Instance:
    A = rng.standard_normal(shape(rng))
    return {"A": A * (rng.random(A.shape) < 0.5) + 1e-3 * A if rng.integers(2) else A}


def _corollary_a31_margin(A: Array) -> float | None:
    size, mixed = float(np.linalg.norm(A)), norm_1_inf(A)
    return _smallest([upper(mixed, A.size**0.25 * size, 0.0), upper(size, np.sqrt(min(A.shape)) * mixed, 0.0)])


def _draw_lti(rng: Rng) -> Instance:
    N, d = shape(rng)
    return {"Y": tokens(rng, N, d), "Ws": np.exp(rng.standard_normal()) * layers_of(rng, int(rng.integers(1, 7)), N)}


def _lti_margin(Y: Array, Ws: Array) -> float | None:
    found = bounds.lti(Ws, float(np.linalg.norm(Y)))
    for W in Ws:
        Y = W @ Y
    floor = 1e-6 * float(np.exp(found.spectral))
    return _smallest([_log_margin(mu(Y), bound, floor) for bound in found])


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
    return _fails(after <= printed, text)


def _draw_free(rng: Rng) -> Instance:
    return _draw_decay(rng) | {"K": int(rng.integers(1, 6))}


def _selective_margin(Y: Array, W_BC: Array, alpha: float, K: int, sharp: bool) -> float | None:
    alpha, norm0, N, margins = float(np.clip(alpha, -1, 1)), float(np.linalg.norm(Y)), len(Y), []
    for k in range(1, K + 1):
        Y = selective_matrix(Y, W_BC, alpha) @ Y
        size = float(np.linalg.norm(Y))
        if not 1e-50 < size < 1e50:
            break
        margins.append(_log_margin(mu(Y) if sharp else size, bounds.selective_log_bound(W_BC, N, norm0, k, sharp)))
    return _smallest(margins)


# --- footnote 3 ---


def _footnote_lti() -> tuple[str, str]:
    size = float(np.linalg.norm(decay(4, 0.01)))
    text = f"attention sqrt(N) holds; LTI A = .01, B = C = 1, N = 4: norm_F(M) = {size:.6f}, bound .01"
    return _fails(size <= 0.01, text)


def _draw_footnote_lti(rng: Rng) -> Instance:
    H = int(rng.integers(1, 5))
    return {"A": rng.uniform(0.1, 1.2) * rng.standard_normal((H, H)) / np.sqrt(H), "B": rng.standard_normal((H, 1)),
            "C": rng.standard_normal((1, H)), "logits": rng.standard_normal((6, 6))}  # fmt: skip


def _footnote_lti_margin(A: Array, B: Array, C: Array, logits: Array) -> float | None:
    N = len(logits)
    kernel = np.array([(C @ np.linalg.matrix_power(A, s) @ B).item() for s in range(N)])
    M = np.tril(kernel[np.abs(np.subtract.outer(np.arange(N), np.arange(N)))])
    limit = constants.lti(*(float(np.linalg.norm(W, 2)) for W in (A, B, C)), N=N)
    attention = upper(float(np.linalg.norm(softmax(logits))), np.sqrt(N))
    return _smallest([*_norm_margins(M, limit), attention])


def _norm_margins(M: Array, limit: constants.DecayNorms) -> list[float | None]:
    sizes = float(np.linalg.norm(M)), float(np.abs(M).sum(1).max())
    return [upper(size, bound, 0.0) for size, bound in zip(sizes, limit, strict=True)]


def _footnote_selective() -> tuple[str, str]:
    size = float(np.linalg.norm(selective_matrix(np.ones((8, 1)), np.eye(1), 1.0)))
    return _fails(size <= 1.0, f"N = 8, d = 1, W_B = W_C = 1, alpha = 1: norm_F(M) = {size:.0f}, bound 1")


def _footnote_selective_margin(Y: Array, W_BC: Array, alpha: float) -> float | None:
    return _smallest(_norm_margins(selective_matrix(unit_rows(Y), W_BC, alpha), constants.selective(W_BC, alpha, len(Y))))


def _fixed(verdict: str, text: str) -> Printed:
    return lambda: (verdict, text)


STATEMENTS = (
    Statement(
        "Theorem 4.2 / A.2, attention with LayerNorm", _fixed("existence only", "its constants are not given"),
        "mu <= sqrt(N prod(1 - p)(1 - phi0))", _draw_stochastic, _theorem42_margin,
    ),
    Statement("Lemma A.4, entries of M", _lemma_a4, "with both extreme eigenvalues", _draw_lemma, _lemma_a4_margin),
    Statement("Lemma A.5, LayerNorm divisors", _lemma_a5, "with norm_2(W_BC)", _draw_decay, _lemma_a5_margin),
    Statement(
        "Theorem 4.3, selective SSM with LayerNorm", _theorem43, "with overlaps p, exponent K/2, M >= 0",
        _draw_selective, _theorem43_margin,
    ),
    Statement(
        "Theorem 4.3 with a skip, lam >= 0", _fixed("new", "not in the paper: a positive lam only slows the collapse"),
        "overlaps of diag(1/(r + lam))(M + lam I)", _draw_skip, _skip_margin,
    ),
    Statement("Lemma A.1", _lemma_a1, "for B with no more rows than columns", _draw_product, _lemma_a1_margin),
    Statement(
        "Theorem A.3, attention without LayerNorm", _theorem_a3, "B^((3^K-1)/2) mu0^(3^K), unmasked",
        _draw_attention, _theorem_a3_margin,
    ),
    Statement("Corollary A.3.1, norms", _corollary_a31, "norm_1,inf against norm_F", _draw_matrix, _corollary_a31_margin),
    Statement(
        "Lemma A.6, Theorems A.7, A.8, LTI", _fixed("holds", "they bound the norm of Y, not relative mu"), "",
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
        _draw_decay, _footnote_selective_margin,
    ),
)  # fmt: skip
