"""Propositions 4.3.1 and 4.3.2, and the statements about lambda that are new here: response, gains, spectral rates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import constants, examples, onestep, spectral
from .arrays import Array, TheoryError, mu, rank1_residual, relative_mu
from .checking import Instance, Rng, Statement, equal, mixing, shape, tokens, upper
from .layers import softmax


def _limit(system: str, lam: float, exact: examples.Exact) -> str:
    return f"{system} at lam = {lam}: mu_59 = {exact.mu[-2]:.4g}, mu_60 = {exact.mu[-1]:.4g}, r1 = {exact.rank1_residual[-1]:.1g}"


def _proposition1() -> tuple[str, str]:
    exact = examples.sys1_exact(-1.5, 60)
    return ("holds" if exact.mu[-1] < 1e-3 else "fails"), _limit("Sys-1", -1.5, exact)


def _proposition2() -> tuple[str, str]:
    exact = examples.sys2_exact(-1.25, 60)
    return ("holds" if exact.mu[-2:].max() < 1e-3 else "fails"), _limit("Sys-2", -1.25, exact)


def _draw_example(rng: Rng) -> Instance:
    return {"lam": float(rng.uniform(-4, 2)), "K": int(rng.integers(1, 13))}


def _draw_example2(rng: Rng) -> Instance:
    a0, b0 = rng.uniform(0.1, 3), rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 3)
    return _draw_example(rng) | {"a0": float(a0), "b0": float(b0)}


def _closed_form(Ys: Array, exact: examples.Exact) -> float:
    """Simulation against closed form: squares, since rounding moves mu^2 and r1^2 by a few eps."""
    last = Ys[-1], exact.mu[-1] ** 2, exact.rank1_residual[-1] ** 2
    return min(equal(mu(last[0]) ** 2, last[1]), equal(rank1_residual(last[0]) ** 2, last[2]))


def _limits(lam: float, predict: Callable[[], tuple[float, float, float]], exact: examples.Exact) -> float:
    """Margin 1 when mu at even and odd depth and r1 are within 1e-3 of their limits, else the miss."""
    even, odd, residual = predict()
    miss = max(abs(exact.mu[-1] - even), abs(exact.mu[-2] - odd), abs(exact.rank1_residual[-1] - residual))
    return 1.0 if miss < 1e-3 else -float(miss)


def _proposition1_margin(lam: float, K: int) -> float | None:
    if abs(lam + 1) < 1e-2 or abs(lam) > 10:
        return None
    limit = 0.0 if lam > -1.0 else np.sqrt(2.0)
    found = _limits(lam, lambda: (limit, limit, 0.0), examples.sys1_exact(lam, 400))
    return min(found, _closed_form(examples.sys1(lam, K), examples.sys1_exact(lam, K)))


def _proposition2_margin(lam: float, K: int, a0: float, b0: float) -> float | None:
    if abs(lam + 1) < 1e-2 or abs(lam + 1.5) < 1e-2 or abs(lam) > 10 or a0 <= 0.0:
        return None
    root = np.sqrt(2.0)
    limits = (0.0, 0.0, 0.0) if lam > -1.0 else (0.0, root, 0.0) if lam > -1.5 else (1.0, 1.0, np.sqrt(0.5))
    found = _limits(lam, lambda: limits, examples.sys2_exact(lam, 2000, a0, b0))
    return min(found, _closed_form(examples.sys2(lam, K, a0, b0), examples.sys2_exact(lam, K, a0, b0)))


# --- new ---


def _new() -> tuple[str, str]:
    return "new", "not in the paper"


def _draw_pair(rng: Rng) -> Instance:
    N, d = shape(rng)
    return {"X": tokens(rng, N, d), "out": tokens(rng, N, d), "lam": float(rng.choice([-1.0, 1.0]) * 10 ** rng.uniform(-1, 1))}


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
    return {"Y": tokens(rng, N, d), "logits": 2 * rng.standard_normal((h, N, N)), "W_V": rng.standard_normal((h, d, e)),
            "W_O": rng.standard_normal((h, e, d)), "kernel": rng.standard_normal((2, N))}  # fmt: skip


def _gains_margin(Y: Array, logits: Array, W_V: Array, W_O: Array, kernel: Array) -> float | None:
    """Multi-head attention and S4D gains against the materialised layer."""
    Ms = np.array([softmax(A) for A in logits])
    limit = constants.attention(Ms, W_V, W_O)
    found = constants.measured(Y, np.einsum("hij,jd,hde,hef->if", Ms, Y, W_V, W_O))
    unit = constants.measured(Y / np.linalg.norm(Y, axis=1, keepdims=True),
                              np.einsum("hij,jd,hde,hef->if", Ms, Y / np.linalg.norm(Y, axis=1, keepdims=True), W_V, W_O))  # fmt: skip
    toeplitz, N = constants.s4d(kernel), kernel.shape[1]
    lag = np.abs(np.subtract.outer(np.arange(N), np.arange(N)))
    channels = [upper(float(np.linalg.norm(np.tril(k[lag]), 2)), float(s), 0.0)
                for k, s in zip(kernel, toeplitz.spectral, strict=True)]  # fmt: skip
    margins = [upper(found.frobenius, limit.frobenius, 0.0), upper(unit.row, limit.row, 0.0), *channels]
    return min(margin for margin in margins if margin is not None)


def _draw_mixing(rng: Rng) -> Instance:
    N, _ = shape(rng)
    M = softmax(2 * rng.standard_normal((N, N))) if rng.integers(2) else np.tril(np.abs(mixing(rng, N))) + 0.1 * np.tri(N)
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
    Statement("Proposition 4.3.1 (Sys-1)", _proposition1, "mu -> 0 iff lam > -1; r1 -> 0 for all; closed form",
              _draw_example, _proposition1_margin),
    Statement("Proposition 4.3.2 (Sys-2)", _proposition2, "mu -> 0 iff lam > -1; r1 -> 0 iff lam > -3/2; closed form",
              _draw_example2, _proposition2_margin),
    Statement("One-step response to lambda", _new, "six scalars give relative mu for every lam", _draw_pair, _response_margin),
    Statement("Gains of attention and S4D", _new, "bounds hold for materialised layers", _draw_gains, _gains_margin),
    Statement("Spectral threshold lambda_c", _new, "consensus attracts iff lam > lambda_c", _draw_mixing, _spectral_margin),
)  # fmt: skip
