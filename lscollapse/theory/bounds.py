"""Upper bounds on mu without (or with a positive) skip: Theorems 4.2, 4.3, A.3, A.6 to A.10 and Lemmas A.1, A.4, A.5.

The corrected, computable form of each; what the paper prints is kept where it is needed to show the difference
(names starting with `printed_`). Bounds whose exponent grows as 3^K are returned as natural logarithms.
Source of the statements: arXiv:2410.10609v3; of the corrections and their proofs: docs/theory.md.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lscollapse.theory.arrays import Array, TheoryError, matrix, spectral_norm, square, stack

# --- with LayerNorm: exponential collapse ---


def overlap(T: ArrayLike) -> float:
    """p = min_ij (T T^T)_ij of a row-stochastic T, in [0, 1]: every layer shrinks 1 - phi by at least 1 - p."""
    T = matrix(T, "T")
    return float(np.clip((T @ T.T).min(), 0.0, 1.0))


def row_stochastic(M: ArrayLike, lam: float = 0.0) -> Array:
    """T = diag(1 / (row sum + lam)) (M + lam I) for M >= 0 entrywise and lam >= 0; TheoryError otherwise."""
    M = square(M)
    if lam < 0.0 or (M < 0.0).any():
        raise TheoryError(f"lam = {lam}, smallest entry of M {M.min():.3g}: these bounds need lam >= 0 and M >= 0")
    sums: Array = M.sum(1) + lam
    if not sums.all():
        raise TheoryError(f"row {int(np.argmin(sums))} of M + lam I sums to zero: the layer is undefined there")
    return (M + lam * np.eye(len(M))) / sums[:, None]


def _contraction(overlaps: ArrayLike, phi0: float, N: int) -> Array:
    if not 0.0 <= phi0 <= 1.0:
        raise TheoryError(f"phi0 = {phi0}: these bounds need a smallest inner product of tokens in [0, 1]")
    with np.errstate(divide="ignore"):
        logs = np.concatenate(([0.0], np.cumsum(np.log1p(-np.asarray(overlaps, dtype=np.float64)))))
    return np.sqrt(N * (1.0 - phi0) * np.exp(logs))  # mu^2 <= N (1 - phi), and 1 - phi falls by 1 - p a layer


def layernorm(Ms: ArrayLike, phi0: float, lam: float = 0.0) -> Array:
    """Upper bounds on mu at layers 0..K, (K+1,), of a net with LayerNorm and skip lam >= 0.

    sqrt(N (1 - phi0) prod_k (1 - p_k)), p_k = overlap of row_stochastic(M_k, lam). Ms (K, N, N) >= 0 with unit-row
    input, phi0 >= 0. lam = 0: Theorem 4.3 corrected (also with an orthogonal value matrix). lam > 0 (C_V = I): new;
    a positive skip only slows the collapse down.
    """
    Ms = stack(Ms)
    return _contraction([overlap(row_stochastic(M, lam)) for M in Ms], phi0, Ms.shape[1])


def attention_layernorm(Ms: ArrayLike, phi0: float, r: int = 1) -> Array:
    """Theorem 4.2 made explicit: bounds on mu at layers 0, r, 2r, ..., (K // r + 1,).

    Ms (K, N, N) row-stochastic, value matrices orthogonal, no skip. The overlap is that of the product of r consecutive
    M, so that a mask through which some token reaches all others in r steps still gives a bound below sqrt(N).
    """
    Ms = stack(Ms)
    if (Ms < 0.0).any() or np.abs(Ms.sum(2) - 1.0).max() > 1e-9:
        raise TheoryError("Ms must be row-stochastic (attention); for other non-negative M use `layernorm`")
    if r < 1:
        raise TheoryError(f"r = {r}: give the number of layers, at least 1, in which some token reaches all others")
    products = [np.linalg.multi_dot([np.eye(Ms.shape[1]), *Ms[k : k + r][::-1]]) for k in range(0, len(Ms) - r + 1, r)]
    return _contraction([overlap(B) for B in products], phi0, Ms.shape[1])


def attention_layernorm_a_priori(N: int, K: int, r: int, C: float, d_qk: int, phi0: float) -> float:
    """Theorem A.2's own form: sqrt(N (1 - phi0)) (1 - eps^(2r))^(floor(K/r)/2), eps = exp(-2 C^2 / sqrt(d_qk)) / N.

    C bounds the spectral norms of W_Q and W_K, so that eps is the least weight that attention can give a token.
    """
    eps = np.exp(-2 * C**2 / np.sqrt(d_qk)) / N
    return float(_contraction(np.full(K // r, eps ** (2 * r)), phi0, N)[-1])


def printed_theorem43(N: int, c: float, lam_min: float, alpha: float, K: int) -> float:
    """Theorem 4.3 as printed, sqrt(N) (1 - c^2 lam_min^2 alpha^(2N))^K: fails. For reproduction only."""
    return float(np.sqrt(N) * (1.0 - c**2 * lam_min**2 * alpha ** (2 * N)) ** K)


def entry_factor(W_BC: ArrayLike, phi: float) -> float:
    """Lemma A.4 corrected: M_ij >= alpha^(i-j) * this, for unit rows with inner products at least phi.

    ((l + L) phi - (L - l)) / 2 - ||A||_2 sqrt(1 - phi^2), with l, L the extreme eigenvalues of the symmetric part of
    W_BC and A its antisymmetric part; if l + L < 0 the first term is l. 0 <= phi <= 1. The printed lam_min * phi holds
    only on the diagonal or for W_BC = w I.
    """
    W = square(W_BC, "W_BC")
    if not 0.0 <= phi <= 1.0:
        raise TheoryError(f"phi = {phi}: give a smallest inner product of tokens in [0, 1]")
    low, high = np.linalg.eigvalsh((W + W.T) / 2)[[0, -1]]
    twist = spectral_norm((W - W.T) / 2) * np.sqrt(1.0 - phi**2)
    return float((min((low + high) * phi, low + high) - (high - low)) / 2 - twist)


def layernorm_factor(W_BC: ArrayLike, N: int) -> float:
    """Lemma A.5 corrected: D_ii >= 1 / (N ||W_BC||_2) in every layer, for |alpha| <= 1, unit rows."""
    return 1.0 / (N * spectral_norm(W_BC))


def selective_overlap(W_BC: ArrayLike, phi0: float, alpha: float, N: int) -> float:
    """A-priori p >= q^2 of a selective SSM from its weights: 0 when nothing is known (low <= 0).

    q = low alpha^(N-1) / (||W_BC||_2 sum_{s<N} alpha^s), low = entry_factor at phi0, 0 <= alpha <= 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise TheoryError(f"alpha = {alpha}: the decay of a selective SSM must lie in [0, 1] here")
    low = max(0.0, entry_factor(W_BC, phi0))
    return float((low * alpha ** (N - 1) / (spectral_norm(W_BC) * np.power(alpha, np.arange(N)).sum())) ** 2)


# --- without LayerNorm: decay of norms ---


def product_lower_bound(A: ArrayLike, B: ArrayLike) -> float:
    """Lemma A.1: ||AB||_F >= sigma_min(B) ||A||_F, B (n, p) with n <= p; TheoryError for a tall B: it fails."""
    A, B = matrix(A, "A"), matrix(B, "B")
    if A.shape[1] != B.shape[0]:
        raise TheoryError(f"A has shape {A.shape}, B {B.shape}: the product A B is undefined")
    if B.shape[0] > B.shape[1]:
        raise TheoryError(f"B has shape {B.shape}: Lemma A.1 fails for a B with more rows than columns")
    return float(np.linalg.svd(B, compute_uv=False)[-1] * np.linalg.norm(A))


def _tripled(log_factor: float, log_start: float, K: int) -> float:
    """log of factor^((3^K - 1)/2) * start^(3^K): the solution of x' = factor x^3."""
    if K == 0 or log_start == -np.inf or log_factor == -np.inf:
        return log_start if K == 0 else -np.inf
    exponent = log_factor / 2 + log_start  # of 3^K
    with np.errstate(over="ignore"):
        return float((np.exp(K * np.log(3.0)) * exponent if exponent else 0.0) - log_factor / 2)


def _log(x: float) -> float:
    return float(np.log(x)) if x > 0.0 else float("-inf")


def attention_factor(W_QK: ArrayLike, W_V: ArrayLike, d_qk: int) -> float:
    """B = ||W_QK||_2 ||W_V||_2 / sqrt(d_qk), the one constant of the attention bounds without LayerNorm."""
    return spectral_norm(W_QK) * spectral_norm(W_V) / float(np.sqrt(d_qk))


def attention_one_step(Y: ArrayLike, B: float) -> float:
    """Upper bound on mu after one unmasked softmax attention layer: B max_j ||R_j||^2 ||R||_F, R = Y - mean row."""
    R = matrix(Y)
    R = R - R.mean(0)
    return float(B * (R**2).sum(1).max() * np.linalg.norm(R))


def attention_log_bound(B: float, mu0: float, K: int) -> float:
    """Theorem A.3 made computable: log of B^((3^K - 1)/2) mu0^(3^K), a bound on mu after K attention layers.

    Unmasked softmax attention, no LayerNorm, no skip, any input; the largest B over layers. Below mu0 iff B mu0^2 < 1.
    """
    return _tripled(_log(B), _log(mu0), K)


class LtiBounds(NamedTuple):
    """Logarithms of three bounds on mu(Y^K): Lemma A.6 and Theorems A.7, A.8 with either norm, and the sharper one."""

    spectral: float
    frobenius: float
    sharp: float


def lti(Ws: ArrayLike, norm0: float) -> LtiBounds:
    """Bounds on mu of Y^K = W_K ... W_1 Y^0 from ||Y^0||_F = norm0, as logs. They bound the decay of the norm of Y."""
    Ws = stack(Ws, "Ws")
    product, log_scale = np.eye(Ws.shape[1]), 0.0
    for W in Ws:
        product = W @ product
        size = float(np.abs(product).max())
        if size == 0.0:
            break
        product, log_scale = product / size, log_scale + np.log(size)  # rescaled, so that no depth leaves float64
    sharp = _log(spectral_norm(product - product.mean(0))) + log_scale
    spectral = sum(_log(spectral_norm(W)) for W in Ws)
    frobenius = sum(_log(float(np.linalg.norm(W))) for W in Ws)
    return LtiBounds(*(float(bound + _log(norm0)) for bound in (spectral, frobenius, sharp)))


def selective_log_bound(W_BC: ArrayLike, N: int, norm0: float, K: int, sharp: bool = False) -> float:
    """Lemma A.9 and Theorem A.10 with its exponent corrected to (3^K - 1)/2: log bound on ||Y^K||_F, hence on mu.

    Factor sqrt(N) ||W_BC||_F as printed, or ||W_BC||_2 with sharp=True. For |alpha_t| <= 1, no LayerNorm, no skip.
    """
    W = square(W_BC, "W_BC")
    factor = spectral_norm(W) if sharp else float(np.sqrt(N) * np.linalg.norm(W))
    return _tripled(_log(factor), _log(norm0), K)


def printed_theorem_a10(W_BC: ArrayLike, N: int, norm0: float, K: int) -> float:
    """Theorem A.10 as printed, exponent 3^K / 2, as a log: fails. For reproduction only."""
    factor = np.sqrt(N) * np.linalg.norm(square(W_BC, "W_BC"))
    return float(3.0**K / 2 * np.log(factor) + 3.0**K * np.log(norm0))
