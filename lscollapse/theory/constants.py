"""The constants of the theorems for real layers: gains ||O|| / ||X||, and norms of materialised mixing matrices.

Arrays only; nothing here knows a model. A gain from weights is a bound; one measured on data is an estimate of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lscollapse.theory.arrays import Array, TheoryError, matrix, pair, spectral_norm, stack


class Gain(NamedTuple):
    """How large O is against X: per row (for LayerNorm after the skip) and in Frobenius norm (for pre-norm nets)."""

    row: float
    frobenius: float


def measured(X: ArrayLike, O: ArrayLike) -> Gain:
    """Gains of one layer on one excerpt, X and O (N, d): max_i ||O_i|| / ||X_i|| and ||O||_F / ||X||_F.

    Valid for heads, convolutions, gates and MLPs alike, but on this input only. TheoryError for a zero row of X.
    """
    X, out = pair(X, O)
    size = np.linalg.norm(X, axis=1)
    if not size.all():
        raise TheoryError(f"row {int(np.argmin(size))} of X is zero: the row gain is undefined")
    return Gain(float((np.linalg.norm(out, axis=1) / size).max()), float(np.linalg.norm(out) / np.linalg.norm(X)))


def attention(Ms: ArrayLike, W_V: ArrayLike, W_O: ArrayLike) -> Gain:
    """Bounds on the gains of O = concat_h(M_h X W_V^h) W_O for every X with unit rows (row) or any X (Frobenius).

    Ms (h, N, N) row-stochastic, W_V (h, d, e), W_O (h, e, d). Multi-head attention is not M X C_V for one C_V, so S and
    c of Theorem 4.1 have no meaning for it (per head c = 0).
    """
    Ms = stack(Ms)
    W_V, W_O = np.asarray(W_V, dtype=np.float64), np.asarray(W_O, dtype=np.float64)
    if W_V.ndim != 3 or W_O.shape != (W_V.shape[0], W_V.shape[2], W_V.shape[1]) or len(Ms) != len(W_V):
        raise TheoryError(f"Ms {Ms.shape}, W_V {W_V.shape}, W_O {W_O.shape}: give (h, N, N), (h, d, e) and (h, e, d)")
    joint = spectral_norm(np.concatenate(W_O))
    values = np.linalg.norm(W_V, 2, axis=(1, 2))
    heads = np.linalg.norm(W_V @ W_O, 2, axis=(1, 2))
    mixing = np.linalg.norm(Ms, 2, axis=(1, 2))
    row = min(joint * float(np.linalg.norm(values)), float(heads.sum()))
    whole = min(float(mixing.max()) * spectral_norm(np.concatenate(W_V, axis=1)) * joint, float(mixing @ heads))
    return Gain(row, whole)


def mamba2_heads(C: ArrayLike, B: ArrayLike, dt: ArrayLike, A: ArrayLike, D: ArrayLike | None = None) -> Array:
    """The materialised mixing matrices of one Mamba-2 scan, (h, N, N): (L_h o (C B^T)) diag(dt_h) + D_h I.

    C, B (N, n) shared by the heads or (h, N, n); dt (N, h) after softplus; A (h,) negative; D (h,) or None.
    L_ij = exp(A_h sum_{j < t <= i} dt_t). D acts as extra skip inside the mixer.
    """
    C, B = np.asarray(C, dtype=np.float64), np.asarray(B, dtype=np.float64)
    dt, A = np.asarray(dt, dtype=np.float64), np.asarray(A, dtype=np.float64)
    if dt.ndim != 2 or A.shape != (dt.shape[1],) or C.shape != B.shape or C.shape[-2] != len(dt):
        raise TheoryError(f"C {C.shape}, B {B.shape}, dt {dt.shape}, A {A.shape}: give (N, n), (N, n), (N, h), (h,)")
    N, h = dt.shape
    total = np.cumsum(dt.T * A[:, None], axis=1)  # (h, N)
    lag = np.where(np.tri(N, dtype=bool), total[:, :, None] - total[:, None, :], -np.inf)
    Ms: Array = np.exp(lag) * (C @ np.swapaxes(B, -1, -2)) * dt.T[:, None, :]
    skip = np.zeros(h) if D is None else np.asarray(D, dtype=np.float64)
    return Ms + skip[:, None, None] * np.eye(N)


class ToeplitzGain(NamedTuple):
    """Norms of the channels' lower-triangular Toeplitz matrices; C_M is the largest Frobenius norm."""

    frobenius: Array
    spectral: Array
    C_M: float


def s4d(kernel: ArrayLike, D: ArrayLike | None = None) -> ToeplitzGain:
    """Exact Frobenius norms and spectral upper bounds of M_c = Toeplitz(kernel_c) + D_c I, kernel (channels, N).

    ||M_c||_2 <= max |FFT of the kernel padded to 2N|: M_c is a corner of that circulant matrix.
    """
    K = matrix(kernel, "kernel").copy()
    if D is not None:
        K[:, 0] += np.asarray(D, dtype=np.float64)
    N = K.shape[1]
    frobenius = np.sqrt(K**2 @ np.arange(N, 0, -1))  # kernel_s fills a diagonal of N - s entries
    return ToeplitzGain(frobenius, np.abs(np.fft.rfft(K, 2 * N)).max(1), float(frobenius.max()))


class DecayNorms(NamedTuple):
    """Bounds on ||M||_F and ||M||_inf of a causal M whose entries decay with the lag."""

    frobenius: float
    max_row_sum: float


def lti(norm_A: float, norm_B: float, norm_C: float, N: int) -> DecayNorms:
    """Footnote 3 corrected for LTI SSMs, from spectral norms: ||C|| ||B|| sqrt(sum_s (N-s) ||A||^2s) and its row sum.

    The printed ||A|| ||B|| ||C||_F bounds neither: the diagonal C B carries no A, and there are N (N+1)/2 entries.
    """
    powers = np.power(float(norm_A), np.arange(N))
    size = norm_B * norm_C
    return DecayNorms(float(size * np.sqrt(powers**2 @ np.arange(N, 0, -1))), float(size * powers.sum()))


def selective(W_BC: ArrayLike, alpha: float, N: int) -> DecayNorms:
    """Footnote 3 corrected for selective SSMs, unit rows: `lti` with ||W_BC||_2 for ||B|| ||C||, |alpha| for ||A||."""
    return lti(abs(alpha), spectral_norm(W_BC), 1.0, N)
