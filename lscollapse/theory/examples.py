"""The two 2x2 systems of section 4.2.2 (Propositions 4.3.1 and 4.3.2): simulated, and in exact closed form.

Sys-1 is an LTI SSM, M = [[1, 0], [alpha, 1]] with alpha = 2 and Y0 = I. Sys-2 is a selective SSM with W_B = W_C = I and
alpha = 1, M_21 = <y_2, y_1>, and Y0 with rows e1 and (a0, b0) normalised. Both have LayerNorm and a skip lam != -1.

Paper: collapse (mu -> 0) for lam > -2 and lam > -3/2. True (a0 > 0): mu -> 0 only for lam > -1. In Sys-1 below -1 and
in Sys-2 between -3/2 and -1 the rows become antipodal: mu -> sqrt 2 (Sys-1) or alternates between 0 and sqrt 2 (Sys-2),
and the matrix does become rank 1. In Sys-2 below -3/2 the rows become orthogonal, mu -> 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lscollapse.theory.arrays import Array, TheoryError
from lscollapse.theory.layers import layer, selective_matrix

PAPER_THRESHOLD = {"sys1": -2.0, "sys2": -1.5}
TRUE_THRESHOLD = -1.0


class Exact(NamedTuple):
    """mu, relative mu and rank-1 residual at layers 0..K, each (K+1,), without rounding near collapse."""

    mu: Array
    relative_mu: Array
    rank1_residual: Array


def _defined(lam: float) -> float:
    if lam == -1.0:
        raise TheoryError("lam = -1: the first row becomes zero and LayerNorm is undefined; take any other lambda")
    return 1.0 + lam


def sys1(lam: float, K: int, alpha: float = 2.0) -> Array:
    """Outputs of layers 0..K of Sys-1 in float64, (K+1, 2, 2)."""
    _defined(lam)
    M, Ys = np.array([[1.0, 0.0], [alpha, 1.0]]), [np.eye(2)]
    for _ in range(K):
        Ys.append(layer(Ys[-1], M, lam))  # Proposition 4.3.1
    return np.array(Ys)


def sys2(lam: float, K: int, a0: float = 1.0, b0: float = 1.0) -> Array:
    """Outputs of layers 0..K of Sys-2 in float64, (K+1, 2, 2).

    Rounding ends the run for -3/2 < lam < -1: after some 50 layers mu is exactly 0 or sqrt 2; `sys2_exact` is not.
    """
    _defined(lam)
    Ys = [np.array([[1.0, 0.0], np.array([a0, b0]) / np.hypot(a0, b0)])]
    for _ in range(K):
        Ys.append(layer(Ys[-1], selective_matrix(Ys[-1], np.eye(2), 1.0), lam))  # Proposition 4.3.2
    return np.array(Ys)


def _from_angle(log_sine: Array, same_side: Array) -> Exact:
    """Two unit rows at an angle given by log|sin| and whether their inner product is positive."""
    sine = np.exp(log_sine)
    cosine = np.sqrt(-np.expm1(2 * log_sine))
    mu = np.where(same_side, sine / np.sqrt(1.0 + cosine), np.sqrt(1.0 + cosine))  # sqrt 2 sin of half the angle
    return Exact(mu, mu / np.sqrt(2.0), sine / np.sqrt(2.0 * (1.0 + cosine)))


def sys1_exact(lam: float, K: int, alpha: float = 2.0) -> Exact:
    """Sys-1 (alpha > 0): a' = a (1 + q^2) + 2 q sqrt(a (a-1)), a_0 = 1, q = alpha/|1+lam|.

    1/a is the squared sine of the angle between the rows; it is carried as a logarithm. The rows' inner product has the
    sign of 1 + lam. Deviation: the paper writes 4/(1+lam) for the last factor and so loses the sign of the LayerNorm
    divisor.
    """
    if not alpha > 0.0:
        raise TheoryError(f"alpha = {alpha}: the closed form is for alpha > 0")
    s = _defined(lam)
    q = alpha / abs(s)
    log_a = [0.0]
    for _ in range(K):
        log_a.append(log_a[-1] + math.log1p(q**2 + 2 * q * math.sqrt(-math.expm1(-log_a[-1]))))
    return _from_angle(-np.array(log_a) / 2, np.full(K + 1, s > 0.0))


def sys2_exact(lam: float, K: int, a0: float = 1.0, b0: float = 1.0) -> Exact:
    """Sys-2: row 1 is sign(1+lam)^k e1, row 2 is proportional to ((2+lam)^k a0, (1+lam)^k b0)."""
    s = _defined(lam)
    if a0 == 0.0 and b0 == 0.0:
        raise TheoryError("a0 = b0 = 0: the second row of the input is zero")
    k = np.arange(K + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(np.abs(s)) - np.log(np.abs(1.0 + s))
        log_tangent = np.log(np.abs(b0)) - np.log(np.abs(a0)) + np.where(k > 0, k * ratio, 0.0)
    log_sine = -np.logaddexp(0.0, -2 * log_tangent) / 2
    flips = np.where(k % 2, np.sign(s) * np.sign(1.0 + s), 1.0)
    return _from_angle(log_sine, flips * np.sign(a0) > 0.0)


class ExamplesTable(NamedTuple):
    """What the figure of one system needs. mu and rank1_residual are (lambdas, K+1), NaN at lam = -1."""

    system: str
    lambdas: Array
    depths: NDArray[np.int64]
    mu: Array
    rank1_residual: Array
    paper_threshold: float
    true_threshold: float

    def rows(self) -> list[dict[str, float | int | str]]:
        """Long format, one dict a (lambda, depth, measure), for CSV or a data frame."""
        return [
            {"system": self.system, "lam": float(lam), "layer": int(k), "measure": name, "value": float(values[i, k])}
            for name, values in (("mu", self.mu), ("rank1_residual", self.rank1_residual))
            for i, lam in enumerate(self.lambdas)
            for k in self.depths
        ]


def table(system: Literal["sys1", "sys2"], lambdas: ArrayLike | None = None, K: int = 40) -> ExamplesTable:
    """mu and rank1_residual of one system over lambda (default -4 to 2 in steps of 0.02) and depth 0..K, exact."""
    if system not in PAPER_THRESHOLD:
        raise TheoryError(f"system = {system!r}: choose 'sys1' or 'sys2'")
    if lambdas is None:
        lambdas = np.arange(-200, 101) / 50.0
    lams = np.atleast_1d(np.asarray(lambdas, dtype=np.float64))
    exact = sys1_exact if system == "sys1" else sys2_exact
    mu, residual = np.full((2, len(lams), K + 1), np.nan)
    for i, lam in enumerate(lams):
        if lam != -1.0:
            values = exact(float(lam), K)
            mu[i], residual[i] = values.mu, values.rank1_residual
    depths = np.arange(K + 1, dtype=np.int64)
    return ExamplesTable(system, lams, depths, mu, residual, PAPER_THRESHOLD[system], TRUE_THRESHOLD)
