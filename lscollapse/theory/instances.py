"""Random instances for the statements to be tried on: small, and often of the kinds that come near to a bound."""

from __future__ import annotations

from typing import Any

import numpy as np

from lscollapse.theory.arrays import Array
from lscollapse.theory.layers import softmax

Rng = np.random.Generator
Instance = dict[str, Any]


def shape(rng: Rng) -> tuple[int, int]:
    """A small N and d, as random instances have them."""
    return int(rng.integers(2, 8)), int(rng.integers(1, 6))


def tokens(rng: Rng, N: int, d: int) -> Array:
    """(N, d) not normalised: Gaussian, near consensus, one outlier, antipodal, or with positive entries."""
    noise = rng.standard_normal((N, d))
    common = np.ones((N, 1)) * rng.standard_normal(d)
    kind = rng.integers(5)
    if kind == 1:
        return common + float(10.0 ** rng.uniform(-3, 0)) * noise
    if kind == 2:
        common[0] = noise[0]
        return common
    if kind == 3:
        return rng.choice([-1.0, 1.0], (N, 1)) * common + 0.1 * noise
    return np.abs(noise) if kind == 4 else noise


def cone(rng: Rng, N: int, d: int) -> Array:
    """(N, d) tokens with non-negative entries, hence non-negative inner products; sometimes near consensus."""
    return np.abs(rng.standard_normal((N, d))) + float(rng.choice([0.0, 0.0, 1.0, 3.0]))


def mixing(rng: Rng, N: int) -> Array:
    """An (N, N) mixing matrix: Gaussian, attention-like, causal, rank one, one heavy row, orthogonal, or averaging."""
    noise = rng.standard_normal((N, N))
    kind = rng.integers(7)
    if kind == 1:
        return softmax(2 * noise)
    if kind == 2:
        return np.tril(noise)
    if kind == 3:
        return np.outer(noise[0], noise[1])
    if kind == 4:
        out = 0.01 * noise
        out[0] = 1.0
        return out
    if kind == 5:
        return np.linalg.qr(noise)[0]
    return np.ones((N, N)) / N - rng.uniform(0, 1) * np.eye(N) if kind == 6 else noise


def layers_of(rng: Rng, K: int, N: int) -> Array:
    """(K, N, N): one mixing matrix a layer, half of the time the same in all."""
    if rng.integers(2):
        return np.repeat(mixing(rng, N)[None], K, axis=0)
    return np.array([mixing(rng, N) for _ in range(K)])


def draw_decay(rng: Rng) -> Instance:
    """Tokens, W_BC and a decay in [-1, 1] of a selective SSM."""
    N, d = shape(rng)
    W = rng.standard_normal((d, d))
    alpha = float(rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 1.0))
    return {"Y": tokens(rng, N, d), "W_BC": W @ W.T if rng.integers(2) else W, "alpha": alpha}
