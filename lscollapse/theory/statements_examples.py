"""Propositions 4.3.1 and 4.3.2, and the statements about lambda that are new here: response, gains, spectral rates."""

from __future__ import annotations

import numpy as np

from lscollapse.theory import constants, examples, onestep, spectral
from lscollapse.theory.arrays import Array, TheoryError, mu, rank1_residual, relative_mu, spectral_norm, unit_rows
from lscollapse.theory.checking import Statement, equal, fails_unless, new, smallest, upper
from lscollapse.theory.instances import Instance, Rng, mixing, shape, tokens
from lscollapse.theory.layers import softmax


def _limit(system: str, lam: float, exact: examples.Exact) -> str:
    residual = exact.rank1_residual[-1]
    return f"{system}, lam = {lam}: mu_59 = {exact.mu[-2]:.5g}, mu_60 = {exact.mu[-1]:.5g}, r1_60 = {residual:.1g}"


def _proposition1() -> tuple[str, str]:
    exact = examples.sys1_exact(-1.5, 60)
    return fails_unless(bool(exact.mu[-1] < 1e-3), _limit("Sys-1", -1.5, exact))


def _proposition2() -> tuple[str, str]:
    exact = examples.sys2_exact(-1.25, 60)
    return fails_unless(bool(exact.mu[-2:].max() < 1e-3), _limit("Sys-2", -1.25, exact))


def _draw_example(rng: Rng) -> Instance:
    return {"lam": float(rng.uniform(-4, 2)), "K": int(rng.integers(1, 13))}


def _draw_example2(rng: Rng) -> Instance:
    a0, b0 = rng.uniform(0.1, 3), rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 3)
    return _draw_example(rng) | {"a0": float(a0), "b0": float(b0)}


def _closed_form(Ys: Array, exact: examples.Exact) -> float:
    """Simulation against closed form: squares, since rounding moves mu^2 and r1^2 by a few eps."""
    last = Ys[-1], exact.mu[-1] ** 2, exact.rank1_residual[-1] ** 2
    return min(equal(mu(last[0]) ** 2, last[1]), equal(rank1_residual(last[0]) ** 2, last[2]))


def _limits(even: float, odd: float, residual: float, exact: examples.Exact) -> float:
    """Margin 1 when mu at even and odd depth and r1 are within 1e-3 of their limits, else the miss."""
    miss = max(abs(exact.mu[-1] - even), abs(exact.mu[-2] - odd), abs(exact.rank1_residual[-1] - residual))
    return 1.0 if miss < 1e-3 else -float(miss)


def _proposition1_margin(lam: float, K: int) -> float | None:
    if abs(lam + 1) < 1e-2 or abs(lam) > 10:
        return None
    limit = 0.0 if lam > -1.0 else np.sqrt(2.0)
    limits = _limits(limit, limit, 0.0, examples.sys1_exact(lam, 400))
    return min(limits, _closed_form(examples.sys1(lam, K), examples.sys1_exact(lam, K)))


def _proposition2_margin(lam: float, K: int, a0: float, b0: float) -> float | None:
    if abs(lam + 1) < 1e-2 or abs(lam + 1.5) < 1e-2 or abs(lam) > 10 or a0 <= 0.0:
        return None
    root = np.sqrt(2.0)
    even, odd, r1 = (0.0, 0.0, 0.0) if lam > -1.0 else (0.0, root, 0.0) if lam > -1.5 else (1.0, 1.0, np.sqrt(0.5))
    limits = _limits(even, odd, r1, examples.sys2_exact(lam, 2000, a0, b0))
    return min(limits, _closed_form(examples.sys2(lam, K, a0, b0), examples.sys2_exact(lam, K, a0, b0)))


# --- new ---


def _draw_pair(rng: Rng) -> Instance:
    N, d = shape(rng)
    lam = float(rng.choice([-1.0, 1.0]) * 10 ** rng.uniform(-1, 1))
    return {"X": tokens(rng, N, d), "out": tokens(rng, N, d), "lam": lam}


def _response_margin(X: Array, out: Array, lam: float) -> float | None:
    """The six scalars against the layer itself, and the side of the crossing that raises relative mu."""
    six, after = onestep.response(X, out), relative_mu(lam * X + out)
    if np.linalg.norm(lam * X + out) < 0.05 * (np.linalg.norm(lam * X) + np.linalg.norm(out)):
        return None
    gain = after**2 - relative_mu(X) ** 2
    agrees = abs(gain) < 1e-9 or six.raises(lam) == (gain > 0)
    return equal(float(six.relative_mu_squared(lam)), after**2) if agrees else -1.0


def _draw_gains(rng: Rng) -> Instance:
    N, d = shape(rng)
    h, e = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    weights = {"W_V": rng.standard_normal((h, d, e)), "W_O": rng.standard_normal((h, e, d))}
    return {"Y": tokens(rng, N, d), "logits": 2 * rng.standard_normal((h, N, N)), **weights}


def _gains_margin(Y: Array, logits: Array, W_V: Array, W_O: Array) -> float | None:
    """Multi-head attention on unit rows against its bounds, row by row and in Frobenius norm."""
    Y, Ms = unit_rows(Y), np.array([softmax(A) for A in logits])
    limit = constants.attention(Ms, W_V, W_O)
    gain = constants.measured(Y, np.einsum("hij,jd,hde,hef->if", Ms, Y, W_V, W_O))
    return smallest([upper(gain.frobenius, limit.frobenius, 1e-4), upper(gain.row, limit.row, 1e-4)])


def _draw_kernel(rng: Rng) -> Instance:
    return {"kernel": rng.standard_normal((1, int(rng.integers(2, 9)))), "D": rng.standard_normal(1)}


def _kernel_margin(kernel: Array, D: Array) -> float | None:
    """One S4D channel: the spectral norm of its Toeplitz matrix under the padded FFT, the Frobenius norm exact."""
    N = kernel.shape[1]
    M = np.tril(kernel[0][np.abs(np.subtract.outer(np.arange(N), np.arange(N)))]) + D * np.eye(N)
    norms = constants.s4d(kernel, D)
    return smallest([upper(spectral_norm(M), float(norms.spectral[0])), equal(float(np.linalg.norm(M)), norms.C_M)])


def _kernel() -> tuple[str, str]:
    kernel = np.array([[4.0, -6.0, -10.0]])
    size = spectral_norm(np.array([[4.0, 0.0, 0.0], [-6.0, 4.0, 0.0], [-10.0, -6.0, 4.0]]))
    short, padded = float(np.abs(np.fft.fft(kernel)).max()), float(constants.s4d(kernel).spectral[0])
    return "new", f"kernel (4, -6, -10): norm_2(M) = {size:.4f}; FFT on N points {short:.4f}, padded to 2N {padded:.4f}"


def _draw_mixing(rng: Rng) -> Instance:
    N, _ = shape(rng)
    causal = np.tril(np.abs(mixing(rng, N))) + 0.1 * np.tri(N)
    M = softmax(2 * rng.standard_normal((N, N))) if rng.integers(2) else causal
    return {"M": M, "offset": float(rng.choice([-1.0, 1.0]) * 10 ** rng.uniform(-2, 0.5))}


def _spectral_margin(M: Array, offset: float) -> float | None:
    """`attracting` flips at lambda_c: M row-stochastic or lower-triangular and positive."""
    M = np.abs(M)
    M = M if not np.triu(M, 1).any() else M / M.sum(1, keepdims=True)
    lam = spectral.lambda_c(M) + offset
    if not np.isfinite(lam) or abs(offset) < 1e-3:
        return None
    try:
        return 1.0 if spectral.attracting(M, lam) == (offset > 0) else -1.0
    except TheoryError:
        return None


STATEMENTS = (
    Statement(
        "Proposition 4.3.1 (Sys-1)", _proposition1, "mu -> 0 iff lam > -1; r1 -> 0 always; closed form",
        _draw_example, _proposition1_margin,
    ),
    Statement(
        "Proposition 4.3.2 (Sys-2)", _proposition2, "mu -> 0 iff lam > -1; r1 -> 0 iff lam > -3/2; closed form",
        _draw_example2, _proposition2_margin,
    ),
    Statement(
        "One-step response to lambda", new, "six scalars give relative mu at every lam", _draw_pair, _response_margin
    ),
    Statement("Gains of multi-head attention", new, "row and Frobenius bounds", _draw_gains, _gains_margin),
    Statement("Norms of an S4D channel", _kernel, "norm_2(M) <= max of the padded FFT", _draw_kernel, _kernel_margin),
    Statement(
        "Spectral threshold lambda_c", new, "consensus attracts iff lam > lambda_c", _draw_mixing, _spectral_margin
    ),
)  # fmt: skip
