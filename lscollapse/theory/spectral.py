"""Asymptotic rates near consensus: with LayerNorm, equal rows are a fixed direction and deviations evolve under T(lam).

T(lam) = diag(1 / (r_i + lam)) (M + lam I), r = row sums of M. Local statements (a linearisation); rates, not bounds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lscollapse.theory.arrays import Array, TheoryError, square


def T(M: ArrayLike, lam: float) -> Array:
    """The linearisation at consensus, (N, N); rows sum to 1. TheoryError where a row of M + lam I sums to zero."""
    M = square(M)
    sums: Array = M.sum(1) + lam
    if not sums.all():
        raise TheoryError(f"lam = {lam}: row {int(np.argmin(np.abs(sums)))} of M + lam I sums to zero")
    return (M + lam * np.eye(len(M))) / sums[:, None]


def rho2(M: ArrayLike, lam: float) -> float:
    """Modulus of the second eigenvalue of T(lam): the factor per layer by which deviations from consensus shrink."""
    nu = np.linalg.eigvals(T(M, lam))
    return float(np.abs(np.delete(nu, np.argmin(np.abs(nu - 1.0)))).max(initial=0.0))  # nu = 1 is the consensus itself


def attracting(M: ArrayLike, lam: float) -> bool:
    """True when equal rows attract nearby states: all r_i + lam of one sign, and rho2 < 1."""
    sums = square(M).sum(1) + lam
    return bool((sums > 0).all() or (sums < 0).all()) and rho2(M, lam) < 1.0


def lambda_c(M: ArrayLike) -> float:
    """The lambda above which consensus attracts. For lower-triangular M >= 0, or M with row sums 1.

    Row sums 1: max_{j>=2} -(1 - |nu_j|^2) / (2 (1 - Re nu_j)) over the eigenvalues but the first.
    Lower-triangular: max(-min r_i, -min_{i>=2} (M_ii + r_i) / 2). Infinity when consensus attracts for no lambda.
    """
    M = square(M)
    sums = M.sum(1)
    if (M >= 0.0).all() and not np.triu(M, 1).any():
        diagonal = np.diag(M)
        if (sums[1:] <= diagonal[1:]).any():
            return float("inf")
        return float(max(-sums.min(), (-(diagonal + sums) / 2)[1:].max(initial=-np.inf)))
    if np.abs(sums - 1.0).max() > 1e-9:
        raise TheoryError("M: lambda_c is known for lower-triangular M >= 0 and for M whose rows sum to 1 only")
    nu = np.linalg.eigvals(M)
    rest = np.delete(nu, np.argmin(np.abs(nu - 1.0)))
    if (rest.real > 1.0 + 1e-9).any():
        raise TheoryError("M has an eigenvalue of real part above 1: no lambda_c above which consensus attracts")
    if (rest.real > 1.0 - 1e-12).any():
        return float("inf")
    return float((-(1.0 - np.abs(rest) ** 2) / (2.0 * (1.0 - rest.real))).max(initial=-np.inf))
