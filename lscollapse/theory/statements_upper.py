"""The statements that push mu down through LayerNorm: Theorems 4.2 and 4.3, and Lemmas A.4 and A.5."""

from __future__ import annotations

import numpy as np

from lscollapse.theory import bounds
from lscollapse.theory.arrays import Array, min_cosine, mu, unit_rows
from lscollapse.theory.checking import Statement, fails_unless, lower, upper
from lscollapse.theory.instances import Instance, Rng, cone, draw_decay, shape
from lscollapse.theory.layers import layer, selective_matrix, softmax


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
    a_priori = bounds.selective_overlap(W_BC, min_cosine(Y), alpha, len(Y))
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
    return fails_unless(values[0] <= printed, text + ", ".join(f"{value:.6f}" for value in values))


def _lemma_a4() -> tuple[str, str]:
    Y = unit_rows([[1.0, 0.5], [1.0, -0.05]])
    entry = float(selective_matrix(Y, np.diag([1.0, 10.0]), 1.0)[1, 0])
    printed = min_cosine(Y)
    return fails_unless(entry >= printed, f"W_BC = diag(1, 10): M_21 = {entry:.6f}, bound {printed:.6f}")


def _lemma_a4_margin(Y: Array, W_BC: Array) -> float | None:
    """M_ij / alpha^(i-j) - entry_factor, in units of ||W_BC||_2."""
    Y = unit_rows(Y)
    phi = min_cosine(Y)
    if phi < 0.0:
        return None
    slack = Y @ W_BC @ Y.T - bounds.entry_factor(W_BC, phi)
    return float(slack.min()) / float(np.linalg.norm(W_BC, 2))


def _lemma_a5() -> tuple[str, str]:
    W, Y = np.array([[1.0, -10.0], [10.0, 1.0]]), np.array([[1.0, 0.0], [0.6, 0.8]])
    divisor = 1.0 / float(np.linalg.norm((selective_matrix(Y, W, 1.0) @ Y)[1]))
    printed = 2.0**-1.5
    return fails_unless(divisor >= printed, f"W_BC = [[1,-10],[10,1]]: D_22 = {divisor:.6f}, bound {printed:.6f}")


def _draw_lemma(rng: Rng) -> Instance:
    N, d = shape(rng)
    W = rng.standard_normal((d, d))
    return {"Y": cone(rng, N, d), "W_BC": W @ W.T if rng.integers(2) else W}


def _lemma_a5_margin(Y: Array, W_BC: Array, alpha: float) -> float | None:
    Y = unit_rows(Y)
    rows = np.linalg.norm(selective_matrix(Y, W_BC, float(np.clip(alpha, -1, 1))) @ Y, axis=1)
    return upper(float(rows.max()), 1.0 / bounds.layernorm_factor(W_BC, len(Y)))


STATEMENTS = (
    Statement(
        "Theorem 4.2 / A.2, attention with LayerNorm", lambda: ("existence only", "its constants are not given"),
        "mu <= sqrt(N prod(1 - p)(1 - phi0))", _draw_stochastic, _theorem42_margin,
    ),
    Statement("Lemma A.4, entries of M", _lemma_a4, "with both extreme eigenvalues", _draw_lemma, _lemma_a4_margin),
    Statement("Lemma A.5, LayerNorm divisors", _lemma_a5, "with norm_2(W_BC)", draw_decay, _lemma_a5_margin),
    Statement(
        "Theorem 4.3, selective SSM with LayerNorm", _theorem43, "with overlaps p, exponent K/2, M >= 0",
        _draw_selective, _theorem43_margin,
    ),
    Statement(
        "Theorem 4.3 with a skip, lam >= 0", lambda: ("new", "a positive lam only slows the collapse"),
        "overlaps of diag(1/(r + lam))(M + lam I)", _draw_skip, _skip_margin,
    ),
)  # fmt: skip
