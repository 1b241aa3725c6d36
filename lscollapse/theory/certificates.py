"""Lower bounds on relative mu from angles: Theorem 4.1*, its a-posteriori form, and the pre-norm certificate.

psi(Y) = arcsin(relative mu) is the angle from Y to the linear subspace of matrices with equal rows. A layer that turns
Y by at most theta lowers psi by at most theta; the sign of lambda does not matter. Every certificate here is a sum of
such turns. They replace Theorem 4.1: no condition on the input, no smallest singular value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from lscollapse.theory.arrays import Array, TheoryError, angle, require_unit_rows


def _check_m(m: float, name: str) -> None:
    if not 0.0 <= m <= 1.0:
        raise TheoryError(f"{name} = {m}: relative mu lies in [0, 1]")


def _vector(values: ArrayLike, name: str) -> Array:
    out = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if out.ndim != 1 or np.isnan(out).any() or (out < 0).any():
        raise TheoryError(f"{name}: give one non-negative number a layer, (K,)")
    return out


def _per_layer(gains: ArrayLike, lams: ArrayLike) -> tuple[Array, Array]:
    G, size = _vector(gains, "gains"), _vector(np.abs(lams), "lams")
    if len(size) not in (1, len(G)):
        raise TheoryError(f"{len(size)} lambdas for {len(G)} layers: give one, or one a layer")
    return G, np.broadcast_to(size, G.shape)


def _turns(ratios: Array) -> Array:
    """Cumulative turn after 0..K layers, (K+1,): sum of arcsin(ratio), infinite from the first ratio above 1."""
    steps = np.where(ratios <= 1.0, np.arcsin(np.minimum(ratios, 1.0)), np.inf)
    return np.concatenate(([0.0], np.cumsum(steps)))


def _lower(psi0: float, turns: Array) -> Array:
    return np.sin(np.maximum(0.0, psi0 - turns))


def from_ratios(m0: float, ratios: ArrayLike) -> Array:
    """Lower bounds on relative mu at layers 0..K, (K+1,), from the ratios ||O|| / (|lam| ||X||) of the K layers.

    Row norms (largest over rows) with LayerNorm after the skip; Frobenius norms when there is none (pre-norm).
    Frobenius ratios with a row LayerNorm are wrong: one row may turn by any angle. A ratio above 1 certifies nothing
    from there on.
    """
    _check_m(m0, "m0")
    return _lower(float(np.arcsin(m0)), _turns(_vector(ratios, "ratios")))


def certificate(m0: float, gains: ArrayLike, lams: ArrayLike) -> Array:
    """Theorem 4.1*: lower bounds on relative mu at layers 0..K, (K+1,).

    gains[k] >= max_i ||O_i||_2 of layer k (unit rows; divide by ||X_i||_2 otherwise); lams one lambda or one a layer.
    """
    G, size = _per_layer(gains, lams)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(G > 0.0, G / size, np.where(size > 0.0, 0.0, np.inf))
    return from_ratios(m0, ratios)


def one_step_eq6(m: float, lam: float, max_row_sum: float, c: float = 1.0, S: float = 1.0) -> float:
    """Lower bound on relative mu after one layer of eq. (6): (c/S) sin(psi - arcsin(||M||_inf / |lam|))."""
    return float(c / S * certificate(m, [max_row_sum], lam)[-1])


def measured(Ys: ArrayLike, lams: ArrayLike) -> Array:
    """A-posteriori bounds on relative mu at layers 0..K, (K+1,), from the measured turn of each layer.

    Ys (K+1, N, d): outputs with unit rows. The turn is arccos(mean_i sign(lam) <y_i', y_i>), computed from chords.
    """
    Ys = np.asarray(Ys, dtype=np.float64)
    if Ys.ndim != 3 or len(Ys) < 2:
        raise TheoryError(f"Ys has shape {Ys.shape}: give the outputs of layers 0..K, (K+1, N, d), K >= 1")
    for Y in Ys:
        require_unit_rows(Y, "Y")
    signs = np.broadcast_to(np.sign(np.asarray(lams, dtype=np.float64)), (len(Ys) - 1,))
    chords = np.linalg.norm(Ys[1:] - signs[:, None, None] * Ys[:-1], axis=(1, 2)) / np.sqrt(Ys.shape[1])
    steps = 2 * np.arcsin(np.minimum(chords / 2, 1.0))  # the angle under a chord of the unit sphere
    return _lower(angle(Ys[0]), np.concatenate(([0.0], np.cumsum(steps))))


def lambda_required(m0: float, m_target: float, gains: ArrayLike) -> float:
    """Smallest |lam| with which Theorem 4.1* keeps relative mu at or above m_target after len(gains) layers.

    For constant G: G / sin((arcsin m0 - arcsin m_target) / K). Infinity when m_target >= m0 and a gain is positive.
    """
    G = _vector(gains, "gains")
    return _smallest(lambda lam: float(_turns(G / lam)[-1]), m0, m_target, trivial=not G.any())


def prenorm_turn(lams: ArrayLike, gains: ArrayLike, r0: float) -> Array:
    """S_0..S_K, (K+1,): bounds on the turn of a pre-norm net X' = lam X + O, ||O||_F <= gains[k], ||X_0||_F = r0.

    S_K = sum arcsin(G_k / (|lam_k| rho_k)), rho_0 = r0, rho_{k+1} = |lam_k| rho_k - G_k. Infinite once a ratio passes
    1. Started from a measured ||X_k||_F it bounds how much the layers after k can still change relative mu's angle.
    """
    G, size = _per_layer(gains, lams)
    if not r0 > 0.0:
        raise TheoryError(f"r0 = {r0}: give the positive Frobenius norm of the first residual stream")
    log_rho, ratios = float(np.log(r0)), np.full(len(G), np.inf)  # in logs: |lam|^K leaves float64
    for k, (lam, g) in enumerate(zip(size, G, strict=True)):
        ratio = float(np.exp(np.log(g) - np.log(lam) - log_rho)) if g > 0.0 < lam else 0.0 if lam else np.inf
        ratios[k] = ratio
        if ratio >= 1.0:
            break
        log_rho += float(np.log(lam) + np.log1p(-ratio))  # rho_{k+1} = |lam| rho_k (1 - ratio)
    return _turns(ratios)


def prenorm_turn_infinite(lam: float, G: float, r0: float) -> float:
    """Upper bound on the turn of infinitely many pre-norm layers with one lambda and ||O||_F <= G each.

    Finite iff |lam| > 1 and r0 > G / (|lam| - 1). The first terms are summed, a geometric series bounds the tail.
    """
    lam = abs(lam)
    if not (G >= 0.0 and r0 > 0.0):
        raise TheoryError(f"G = {G}, r0 = {r0}: give G >= 0 and r0 > 0")
    if G == 0.0:
        return 0.0 if lam > 0.0 else float("inf")
    if lam <= 1.0 or r0 <= G / (lam - 1.0):
        return float("inf")
    fixed = G / (lam - 1.0)
    n = int(min(200_000, np.ceil(40.0 / np.log(lam))))
    shrink = np.exp(-np.arange(n + 1) * np.log(lam))  # |lam|^-k
    ratios = G / lam * shrink / (r0 - fixed + fixed * shrink)  # rho_k = |lam|^k (r0 - fixed) + fixed
    tail = min(1.0, G / lam * shrink[n] / (r0 - fixed))  # ratios fall by |lam| at least, and so do their arcsines
    return float(np.arcsin(ratios[:n]).sum() + np.arcsin(tail) * lam / (lam - 1.0))


def prenorm_certificate(m0: float, lams: ArrayLike, gains: ArrayLike, r0: float) -> Array:
    """Lower bounds on relative mu of the residual stream at layers 0..K of a pre-norm net, (K+1,)."""
    _check_m(m0, "m0")
    return _lower(float(np.arcsin(m0)), prenorm_turn(lams, gains, r0))


def prenorm_certificate_infinite(m0: float, lam: float, G: float, r0: float) -> float:
    """Lower bound on relative mu at every depth of a pre-norm net whose layers all have ||O||_F <= G; 0 if none."""
    _check_m(m0, "m0")
    return float(np.sin(max(0.0, np.arcsin(m0) - prenorm_turn_infinite(lam, G, r0))))


def prenorm_lambda_required(m0: float, m_target: float, gains: ArrayLike, r0: float) -> float:
    """Smallest |lam|, one for all layers, that certifies relative mu >= m_target after len(gains) pre-norm layers."""
    G = _vector(gains, "gains")
    return _smallest(lambda lam: float(prenorm_turn(lam, G, r0)[-1]), m0, m_target, trivial=not G.any())


def prenorm_lambda_required_infinite(m0: float, m_target: float, G: float, r0: float) -> float:
    """Smallest |lam| that certifies relative mu >= m_target at every depth, with ||O||_F <= G in every layer."""
    return _smallest(lambda lam: prenorm_turn_infinite(lam, G, r0), m0, m_target, trivial=G == 0.0)


def _smallest(turn: Callable[[float], float], m0: float, m_target: float, trivial: bool) -> float:
    """Smallest |lam| with turn(lam) <= arcsin m0 - arcsin m_target, turn decreasing; the end that satisfies it."""
    _check_m(m0, "m0")
    _check_m(m_target, "m_target")
    budget = float(np.arcsin(m0) - np.arcsin(m_target))
    if trivial:
        return 0.0 if budget >= 0.0 else float("inf")
    if budget <= 0.0:
        return float("inf")
    high = 1.0
    while turn(high) > budget:
        high *= 2.0
    low = high / 2.0
    while turn(low) <= budget:
        high, low = low, low / 2.0
    while high - low > 1e-13 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if turn(middle) <= budget else (middle, high)
    return high
