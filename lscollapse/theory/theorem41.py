"""Theorem 4.1 (arXiv:2410.10609v3): condition (7), its threshold, b, and what they need to certify anything.

Symbols: lam the skip, a in (0, 1) the rate of mu^2 per layer, K layers, N tokens, C_M >= sup_k ||M^(k)||_F, S and c the
largest and smallest singular value of C_V. m0_squared = mu(Y0)^2 / N is the squared relative mu of an input with unit
rows, which the theorem silently assumes.

Deviation: |lam| stands wherever the paper prints a bare lambda; `b(variant="paper")` keeps the printed form.
`variant="repaired"` is the sharper corrected b: c^2 in place of S^2, and C_M may then be sup_k ||M^(k)||_2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lscollapse.theory.arrays import TheoryError

Version = Literal["abs", "repaired", "paper"]


def _check(a: float, C_M: float, c: float, S: float) -> None:
    if not 0.0 < a < 1.0:
        raise TheoryError(f"a = {a}: the collapse rate lies strictly between 0 and 1 (a = 1 would need C_M = 0)")
    if not C_M > 0.0:
        raise TheoryError(f"C_M = {C_M}: give a positive bound on the norm of M")
    if not 0.0 <= c <= S or S == 0.0:
        raise TheoryError(f"c = {c}, S = {S}: singular values must satisfy 0 <= c <= S and S > 0")


def _check_m0(m0_squared: float) -> None:
    if not 0.0 < m0_squared <= 1.0:
        raise TheoryError(f"m0_squared = {m0_squared}: the squared relative mu of the input lies in (0, 1]")


def _growth(a: float, K: int) -> float:
    """a^-K, infinity when it leaves float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(-K * np.log(a)))


def condition7(lam: float, a: float, C_M: float, c: float = 1.0, S: float = 1.0) -> float:
    """lam^2 c^2 - a S^2 (C_M + |lam|)^2; Theorem 4.1 asks for a positive value. Eq. (7)."""
    _check(a, C_M, c, S)
    return lam**2 * c**2 - a * S**2 * (C_M + abs(lam)) ** 2


def lambda_star(a: float, C_M: float, c: float = 1.0, S: float = 1.0) -> float:
    """The |lam| above which (7) holds, sqrt(a) S C_M / (c - sqrt(a) S); infinity when c <= sqrt(a) S.

    The same number as the fraction printed after Theorem 4.1. It does not suffice for the theorem: b is infinite there.
    """
    _check(a, C_M, c, S)
    room = c - np.sqrt(a) * S
    return float(np.sqrt(a) * S * C_M / room) if room > 0.0 else float("inf")


def implied_C_M(lam: float, a: float, c: float = 1.0, S: float = 1.0) -> float:
    """The C_M at which lambda_star equals |lam|: what a quoted threshold says about the network."""
    _check(a, 1.0, c, S)
    return max(0.0, float(abs(lam) * (c - np.sqrt(a) * S) / (np.sqrt(a) * S)))


def b(
    lam: float, a: float, K: int, N: int, C_M: float, c: float = 1.0, S: float = 1.0, variant: Version = "abs"
) -> float:
    """The b of Theorem 4.1: K layers are certified when mu(Y0)^2 >= b. Infinity where (7) fails.

    variant="abs" is the corrected statement, "repaired" the sharper one, "paper" the printed formula with its signed
    lambda (it may be negative, and is then wrong; NaN where its denominator is zero).
    """
    _check(a, C_M, c, S)
    if variant == "paper":
        denominator = lam**2 * c**2 - a * S**2 * (C_M + lam) ** 2
        return _growth(a, K) * 2 * lam * N * S**2 * C_M / denominator if denominator else float("nan")
    slack = condition7(lam, a, C_M, c, S)
    factor = _factor(variant, c, S)
    return _growth(a, K) * 2 * abs(lam) * N * factor * C_M / slack if slack > 0.0 else float("inf")


def _factor(variant: Version, c: float, S: float) -> float:
    if variant not in ("abs", "repaired"):
        raise TheoryError(f"variant = {variant!r}: choose 'abs' or 'repaired' (or 'paper', for b only)")
    return S**2 if variant == "abs" else c**2


def lambda_required(
    a: float, K: int, C_M: float, m0_squared: float, c: float = 1.0, S: float = 1.0, variant: Version = "abs"
) -> float:
    """Smallest |lam| that meets every hypothesis of Theorem 4.1 for K layers: (7) and mu(Y0)^2 >= b.

    Infinity when c <= sqrt(a) S, or when a^-K leaves float64.
    """
    _check(a, C_M, c, S)
    _check_m0(m0_squared)
    q = c**2 - a * S**2
    B = C_M * (a * S**2 + _factor(variant, c, S) * _growth(a, K) / m0_squared)
    if q <= 0.0 or not np.isfinite(B):
        return float("inf")
    return float((B + np.hypot(B, np.sqrt(q * a) * S * C_M)) / q)  # q lam^2 - 2 B lam - a S^2 C_M^2 = 0: mu(Y0)^2 = b


def k_max(
    lam: float, a: float, C_M: float, m0_squared: float, c: float = 1.0, S: float = 1.0, variant: Version = "abs"
) -> float:
    """Deepest K (a real number) that Theorem 4.1 certifies at this lam; negative when it certifies nothing."""
    _check(a, C_M, c, S)
    _check_m0(m0_squared)
    slack = condition7(lam, a, C_M, c, S)
    if slack <= 0.0:
        return float("-inf")
    return float(np.log(m0_squared * slack / (2 * abs(lam) * _factor(variant, c, S) * C_M)) / -np.log(a))


def one_step(mu_squared: float, lam: float, N: int, C: float, c: float = 1.0, S: float = 1.0) -> float:
    """The repaired key inequality: a lower bound on mu^2 after one layer of eq. (6) on unit rows, any sign of lam.

    (c^2/S^2) (lam^2 mu^2 - 2|lam| N C) / (|lam| + C)^2 with C >= ||M||_2; negative means it says nothing.
    """
    return float((c / S) ** 2 * (lam**2 * mu_squared - 2 * abs(lam) * N * C) / (abs(lam) + C) ** 2)
