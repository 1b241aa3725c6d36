"""The layer maps of the paper on one excerpt: eq. (3) and eq. (6), and the mixing matrices M it considers.

Y is (N, d), M is (N, N), C_V is (d, d); all float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lscollapse.theory.arrays import Array, TheoryError, matrix, square, unit_rows

Form = Literal["eq3", "eq6"]


def layer(
    Y: ArrayLike, M: ArrayLike, lam: float, C_V: ArrayLike | None = None, form: Form = "eq3", layernorm: bool = True
) -> Array:
    """One layer, (N, d) -> (N, d). Eqs. (3), (4) and (6), arXiv:2410.10609v3.

    form="eq3": rows of lam Y + M Y C_V normalised; form="eq6": rows of (M + lam I) Y C_V normalised. The paper treats
    the two as one, but they agree only for C_V = I: eq. 6 multiplies the skip by C_V too.
    TheoryError on a wrong shape or, with LayerNorm, on a zero row (lam = -M_11 for a causal M).
    """
    Y = matrix(Y)
    M = square(M, "M", len(Y))
    C_V = np.eye(Y.shape[1]) if C_V is None else square(C_V, "C_V", Y.shape[1])
    if form == "eq3":
        Z = lam * Y + M @ Y @ C_V  # eq. (3)
    elif form == "eq6":
        Z = (lam * Y + M @ Y) @ C_V  # eq. (6)
    else:
        raise TheoryError(f"form = {form!r}: choose 'eq3' or 'eq6'")
    return unit_rows(Z) if layernorm else Z  # eq. (4)


def softmax(logits: Array) -> Array:
    """Row-wise softmax; -inf entries get weight zero."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    shares: Array = weights / weights.sum(1, keepdims=True)
    return shares


def attention_matrix(Y: ArrayLike, W_QK: ArrayLike, d_qk: int, causal: bool = False) -> Array:
    """M = softmax(Y W_QK Y^T / sqrt(d_qk)), (N, N), W_QK = W_Q W_K^T of shape (d, d). Eq. (8)."""
    Y = matrix(Y)
    logits = Y @ square(W_QK, "W_QK", Y.shape[1]) @ Y.T / np.sqrt(d_qk)
    if causal:
        logits = np.where(np.tri(len(Y), dtype=bool), logits, -np.inf)
    return softmax(logits)


def decay(N: int, alpha: float) -> Array:
    """The 1-semiseparable L_ij = alpha^(i-j) for i >= j, else 0, (N, N). The M of a scalar LTI SSM with B = C = 1."""
    lag = np.subtract.outer(np.arange(N), np.arange(N))
    return np.where(lag >= 0, np.power(float(alpha), np.maximum(lag, 0)), 0.0)


def selective_matrix(Y: ArrayLike, W_BC: ArrayLike, alpha: float) -> Array:
    """M = L(alpha) o (Y W_BC Y^T), (N, N), W_BC = W_C W_B^T of shape (d, d). Section 4.2.1, selective SSMs."""
    Y = matrix(Y)
    return decay(len(Y), alpha) * (Y @ square(W_BC, "W_BC", Y.shape[1]) @ Y.T)
