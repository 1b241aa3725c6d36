"""Checked float64 arrays and the collapse measures of one (N, d) matrix: the numpy ground floor of the theory.

The measures are those of `lscollapse.measures` without torch, so that the theory imports in milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

UNIT_TOLERANCE = 1e-9


class TheoryError(ValueError):
    """An input that a statement is not about: a wrong shape, a zero row, a rate outside (0, 1)."""


def matrix(Y: ArrayLike, name: str = "Y") -> Array:
    """Y as a finite float64 matrix; TheoryError naming the argument otherwise."""
    out = np.asarray(Y, dtype=np.float64)
    if out.ndim != 2 or 0 in out.shape:
        raise TheoryError(f"{name} has shape {out.shape}: give a matrix (N, d) with at least one row and column")
    if not np.isfinite(out).all():
        raise TheoryError(f"{name} holds NaN or infinity: give finite entries")
    return out


def pair(X: ArrayLike, O: ArrayLike) -> tuple[Array, Array]:
    """Input and mixer output of one layer as matrices of one shape (N, d); TheoryError otherwise."""
    X, out = matrix(X, "X"), matrix(O, "O")
    if X.shape != out.shape:
        raise TheoryError(f"X has shape {X.shape}, O {out.shape}: give input and mixer output of one layer")
    return X, out


def square(M: ArrayLike, name: str = "M", N: int | None = None) -> Array:
    """M as a finite (N, N) matrix; TheoryError when it is not square or not of the size asked for."""
    out = matrix(M, name)
    size = out.shape[0] if N is None else N
    if out.shape != (size, size):
        raise TheoryError(f"{name} has shape {out.shape}: give a square matrix" + (f" ({N}, {N})" if N else ""))
    return out


def stack(Ms: ArrayLike, name: str = "Ms") -> Array:
    """K square matrices of one size as (K, N, N)."""
    out = np.asarray(Ms, dtype=np.float64)
    if out.ndim != 3 or out.shape[1] != out.shape[2] or 0 in out.shape:
        raise TheoryError(f"{name} has shape {out.shape}: give one square matrix a layer, (K, N, N)")
    if not np.isfinite(out).all():
        raise TheoryError(f"{name} holds NaN or infinity: give finite entries")
    return out


def unit_rows(Z: ArrayLike) -> Array:
    """Each row of Z divided by its l2 norm: the paper's LayerNorm. Eq. (4), arXiv:2410.10609v3.

    TheoryError on a zero row, where LayerNorm is undefined.
    """
    Z = matrix(Z, "Z")
    scale = np.abs(Z).max(1, keepdims=True)
    if not scale.all():
        row = int(np.argmin(scale))
        raise TheoryError(f"row {row} is zero: LayerNorm (eq. 4) is undefined there; choose another lambda or input")
    Z = Z / scale  # first, so that no square leaves the range
    unit: Array = Z / np.linalg.norm(Z, axis=1, keepdims=True)
    return unit


def require_unit_rows(Y: ArrayLike, name: str = "Y0") -> Array:
    """Y as a matrix whose rows have norm 1; TheoryError otherwise: most theorems silently assume it."""
    out = matrix(Y, name)
    worst = float(np.abs(np.linalg.norm(out, axis=1) - 1.0).max())
    if worst > UNIT_TOLERANCE:
        raise TheoryError(f"{name} has a row of norm off 1 by {worst:.3g}: normalise its rows first (unit_rows)")
    return out


def centred(Y: Array) -> Array:
    """Y minus its mean row, exact near collapse: the first row goes first, and the mean is taken twice."""
    R: Array = Y - Y[:1]
    for _ in range(2):
        R = R - R.mean(0)
    return R


def _scaled(Y: ArrayLike) -> tuple[Array, float]:
    Y = matrix(Y)
    scale = float(np.abs(Y).max())
    return (Y / scale if scale else Y), scale


def mu(Y: ArrayLike) -> float:
    """Frobenius norm of Y minus its mean row. Eq. (5), arXiv:2410.10609v3 (the formula; the text says columns)."""
    unit, scale = _scaled(Y)
    return float(np.linalg.norm(centred(unit))) * scale


def relative_mu(Y: ArrayLike) -> float:
    """mu(Y) / ||Y||_F, in [0, 1]; NaN for Y = 0."""
    unit, scale = _scaled(Y)
    return min(1.0, float(np.linalg.norm(centred(unit)) / np.linalg.norm(unit))) if scale else float("nan")


def angle(Y: ArrayLike) -> float:
    """psi(Y) = arcsin(relative mu), in [0, pi/2]: the angle from Y to the subspace of matrices with equal rows."""
    unit, _ = _scaled(Y)
    return float(np.arctan2(np.linalg.norm(centred(unit)), np.sqrt(len(unit)) * np.linalg.norm(unit.mean(0))))


def rank1_residual(Y: ArrayLike) -> float:
    """sqrt(1 - sigma_1^2 / sum sigma^2), in [0, 1]: relative distance to the nearest rank-1 matrix."""
    unit, scale = _scaled(Y)
    sigma = np.linalg.svd(unit, compute_uv=False)
    return float(np.linalg.norm(sigma[1:]) / np.linalg.norm(sigma)) if scale else float("nan")


def min_cosine(Y: ArrayLike) -> float:
    """phi(Y) = min over pairs of rows of their inner product, for Y with unit rows; 1 for a single row."""
    Y = require_unit_rows(Y, "Y")
    return min(1.0, float((Y @ Y.T).min()))


def spectral_norm(A: ArrayLike) -> float:
    """Largest singular value."""
    return float(np.linalg.norm(matrix(A, "A"), 2))


def max_row_sum(A: ArrayLike) -> float:
    """||A||_inf: the largest absolute row sum."""
    return float(np.abs(matrix(A, "A")).sum(1).max())


def norm_1_inf(A: ArrayLike) -> float:
    """sqrt(||A||_1 ||A||_inf), the norm of Dong et al. (2021)."""
    size = np.abs(matrix(A, "A"))
    return float(np.sqrt(size.sum(0).max() * size.sum(1).max()))


def singular_range(C_V: ArrayLike) -> tuple[float, float]:
    """(S, c): largest and smallest singular value of a square C_V, as Theorem 4.1 uses them."""
    sigma = np.linalg.svd(square(C_V, "C_V"), compute_uv=False)
    return float(sigma[0]), float(sigma[-1])
