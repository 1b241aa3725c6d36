"""The statements that keep mu up: the definitions, Theorem 4.1, and the certificates that replace it."""

from __future__ import annotations

from functools import partial

import numpy as np

from lscollapse.theory import certificates, theorem41
from lscollapse.theory.arrays import (
    Array,
    angle,
    max_row_sum,
    mu,
    rank1_residual,
    relative_mu,
    singular_range,
    spectral_norm,
    unit_rows,
)
from lscollapse.theory.checking import Printed, Statement, equal, fails_unless, lower, new, smallest, upper
from lscollapse.theory.instances import Instance, Rng, layers_of, mixing, shape, tokens
from lscollapse.theory.layers import layer, softmax

X3 = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
M3 = softmax(X3 @ X3.T / np.sqrt(2.0))


# --- definitions ---


def _definition() -> tuple[str, str]:
    Y = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    columns = float(np.linalg.norm(Y - Y.mean(1, keepdims=True)))
    return "definition", f"mean row (formula): mu = {mu(Y):.6f}; mean of columns (text): {columns:.6f}"


def _definition_margin(Y: Array) -> float:
    Y = unit_rows(Y)
    N, m = len(Y), relative_mu(Y)
    pairs = np.sqrt(((Y[:, None] - Y[None]) ** 2).sum() / (2 * N))  # mu by the distances of all pairs of rows
    means = 1 - N * (Y.mean(0) ** 2).sum() / (Y**2).sum()
    return min(equal(mu(Y), float(pairs)), equal(m**2, float(means)), m - rank1_residual(Y))


def _eq6() -> tuple[str, str]:
    W = np.diag([0.5, 0.1])
    three, six = mu(layer(X3, M3, 1.0, W)), mu(layer(X3, M3, 1.0, W, form="eq6"))
    text = f"attention, W_V = diag(.5, .1): mu {three:.6f} against {six:.6f}"
    return fails_unless(bool(np.isclose(three, six)), text)


def _draw_layer(rng: Rng) -> Instance:
    N, d = shape(rng)
    return {"Y": tokens(rng, N, d), "M": mixing(rng, N), "C_V": rng.standard_normal((d, d)), "lam": _signed(rng, 5.0)}


def _signed(rng: Rng, size: float) -> float:
    return float(rng.choice([-1.0, 1.0]) * size * np.exp(rng.standard_normal()))


def _eq6_margin(Y: Array, M: Array, C_V: Array, lam: float) -> float:
    plain = layer(Y, M, lam), layer(Y, M, lam, np.eye(Y.shape[1]), form="eq6")
    value_only = layer(Y, M, 0.0, C_V), layer(Y, M, 0.0, C_V, form="eq6")
    return -float(max(np.abs(three - six).max() for three, six in (plain, value_only)))


# --- Theorem 4.1 ---


def _step_a() -> tuple[str, str]:
    Z = np.array([[1.0, 0.0], [2.0, 0.0]])
    left, right = mu(unit_rows(Z)) ** 2, mu(Z) ** 2 / 4
    return fails_unless(left >= right, f"Z = [[1,0],[2,0]]: mu^2 {left:.3f}, bound {right:.3f}")


def _step_b() -> tuple[str, str]:
    M = np.zeros((4, 4))
    M[0] = 1.0
    row = float(np.linalg.norm((M + np.eye(4))[0] @ np.ones((4, 1))) ** 2)
    printed = (np.linalg.norm(M) + 1.0) ** 2
    text = f"N = 4, M = e_1 1^T, equal tokens, lam = 1: {row:.0f}, bound {printed:.0f}"
    return fails_unless(bool(row <= printed), text)


def _one_step_margin(Y: Array, M: Array, C_V: Array, lam: float) -> float | None:
    Y, C = unit_rows(Y), spectral_norm(M)
    S, c = singular_range(C_V)
    bound = theorem41.one_step(mu(Y) ** 2, lam, len(Y), C, c, S)
    return lower(mu(layer(Y, M, lam, C_V, form="eq6")) ** 2, bound)


def _row_norm_margin(Y: Array, M: Array, C_V: Array, lam: float) -> float | None:
    Y, N = unit_rows(Y), len(Y)
    largest = float(np.linalg.norm((lam * Y + M @ Y) @ C_V, axis=1).max())
    return upper(largest, singular_range(C_V)[0] * (np.sqrt(N) * float(np.linalg.norm(M)) + abs(lam)))


def _draw_one_step(rng: Rng) -> Instance:
    instance = _draw_layer(rng)
    d = instance["Y"].shape[1]
    instance["C_V"] = np.eye(d) + rng.choice([0.0, 0.3]) * instance["C_V"]
    instance["lam"] *= 4 * spectral_norm(instance["M"])
    return instance


def _draw_deep(rng: Rng) -> Instance:
    N, d = shape(rng)
    K = int(rng.integers(1, 6))
    C_V = np.eye(d) + rng.choice([0.0, 0.05]) * rng.standard_normal((d, d))
    rate, slack = float(rng.uniform(0.05, 0.99)), float(rng.choice([1e-9, 0.1, 1.0]))
    return {"Y": tokens(rng, N, d), "Ms": layers_of(rng, K, N), "C_V": C_V, "rate": rate, "slack": slack}


def _deep(
    sign: int, variant: theorem41.Version, Y: Array, Ms: Array, C_V: Array, rate: float, slack: float
) -> float | None:
    """Margin of Theorem 4.1 at the smallest |lam| that meets its hypotheses, times 1 + slack."""
    Y0 = Y = unit_rows(Y)
    S, c = singular_range(C_V)
    if not 0.0 < rate < 1.0 or c < 1e-3 * S or relative_mu(Y) < 1e-4:
        return None
    a = rate * (c / S) ** 2
    C = max(spectral_norm(M) if variant == "repaired" else float(np.linalg.norm(M)) for M in Ms)
    lam = sign * theorem41.lambda_required(a, len(Ms), C, min(1.0, relative_mu(Y) ** 2), c, S, variant) * (1 + slack)
    for M in Ms:
        Y = layer(Y, M, lam, C_V, form="eq6")
    return lower(mu(Y) ** 2, a ** len(Ms) * mu(Y0) ** 2)


def _negative() -> tuple[str, str]:
    Y = np.array([[np.cos(0.1), np.sin(0.1)], [np.cos(0.1), -np.sin(0.1)]])
    M, lam, a, C_M = np.array([[0.0, -1.0], [-1.0, 0.0]]), -100.0, 0.97, np.sqrt(2.0)
    b, after = theorem41.b(lam, a, 1, 2, C_M, variant="paper"), mu(layer(Y, M, lam)) ** 2
    fails = theorem41.condition7(lam, a, C_M) > 0 and mu(Y) ** 2 >= b and after < a * mu(Y) ** 2
    text = f"lam = {lam:.0f}, a = {a}: b = {b:.4f} <= mu0^2, yet mu1^2/mu0^2 = {after / mu(Y) ** 2:.6f}"
    return fails_unless(not fails, text)


def _not_unit() -> tuple[str, str]:
    Y, M, lam, a = 10 * np.eye(2), 0.1 * np.eye(2), 1000.0, 0.9
    b, before = theorem41.b(lam, a, 1, 2, float(np.linalg.norm(M))), mu(Y) ** 2
    after = mu(layer(Y, M, lam)) ** 2
    fails = before >= b and after < a * before
    text = f"Y0 = 10 I: b = {b:.4f} <= mu0^2 = {before:.0f}, yet mu1^2 = {after:.0f} < {a * before:.0f}"
    return fails_unless(not fails, text)


def _threshold() -> tuple[str, str]:
    P = np.eye(2) - 0.5
    M = (0.5 * np.ones((2, 2)) - P) / np.sqrt(2.0)  # ||M||_F = 1: pulls to the mean and away from the differences
    a, Y = 0.9, np.array([[np.cos(0.1), np.sin(0.1)], [np.cos(0.1), -np.sin(0.1)]])
    lam = 1.01 * theorem41.lambda_star(a, 1.0)
    ratio = mu(layer(Y, M, lam)) ** 2 / mu(Y) ** 2
    C_M = theorem41.implied_C_M(937.924, 0.9)
    need = theorem41.lambda_required(0.9, 64, C_M, 1.0)
    text = (
        f"lam = 1.01 lambda*: mu1^2/mu0^2 = {ratio:.4f} < a = {a}; 937.924 at a = .9 implies C_M = {C_M:.4f},"
        f" for which K = 64 needs |lam| = {need:.4g}"
    )
    return fails_unless(ratio >= a, text)


def _ideal() -> tuple[str, str]:
    need = theorem41.lambda_required(0.9999, 64, 1.0, 0.95)
    text = f"(7) forces a < c^2/S^2 <= 1; a = .9999: a^64 = {0.9999**64:.10f}, C_M = 1 needs |lam| = {need:.0f}"
    return "void", text


def _ideal_margin(rate: float, C_M: float, c: float, lam: float) -> float:
    """No lam satisfies (7) at a >= c^2/S^2 (S = 1)."""
    a = min(c**2 + rate, 1 - 1e-12)
    return -theorem41.condition7(lam, a, C_M, c) / lam**2


def _draw_ideal(rng: Rng) -> Instance:
    values = {"rate": 10.0 ** rng.uniform(-9, 0), "C_M": 10.0 ** rng.uniform(-3, 3), "c": rng.uniform(0.01, 0.99)}
    return {name: float(value) for name, value in values.items()} | {"lam": _signed(rng, 1e3)}


# --- angles ---


def _draw_net(rng: Rng) -> Instance:
    N, d = shape(rng)
    K = int(rng.integers(1, 7))
    return {
        "Y": tokens(rng, N, d),
        "Os": rng.standard_normal((K, N, d)),
        "pull": float(rng.choice([0.0, 1.0, 100.0])),
        "G": float(10 ** rng.uniform(-1, 1)),
        "room": float(rng.uniform(0.7, 8.0)),
        "sign": int(rng.choice([-1, 1])),
    }


def _pulled(fixed: Array, Y: Array, pull: float) -> Array:
    """A direction (N, d) for an adversarial mixer output: `fixed`, plus `pull` times the way to the mean row."""
    direction: Array = fixed + pull * (Y.mean(0) - Y)
    return direction


def _rows_margin(Y: Array, Os: Array, pull: float, G: float, room: float, sign: int) -> float | None:
    """Both Theorem 4.1* and its a-posteriori form, on mixer outputs chosen to pull towards consensus."""
    Y = unit_rows(Y)
    m0, lam, Ys = relative_mu(Y), sign * room * G * len(Os), [Y]
    for fixed in Os:
        out = G * unit_rows(_pulled(fixed, sign * Ys[-1], pull))
        Ys.append(unit_rows(lam * Ys[-1] + out))
    actual = relative_mu(Ys[-1])
    a_priori = lower(actual, float(certificates.certificate(m0, np.full(len(Os), G), lam)[-1]))
    measured = lower(actual, float(certificates.measured(np.array(Ys), lam)[-1]))
    return smallest([a_priori, measured])


def _angle_eq6_margin(Y: Array, M: Array, C_V: Array, lam: float) -> float | None:
    Y = unit_rows(Y)
    S, c = singular_range(C_V)
    bound = certificates.one_step_eq6(relative_mu(Y), lam, max_row_sum(M), c, S)
    return lower(relative_mu(layer(Y, M, lam, C_V, form="eq6")), bound)


def _frobenius_evidence() -> tuple[str, str]:
    Y = np.zeros((100, 2))
    Y[:, 0], Y[-1, 0] = 1.0, -1.0
    out = np.zeros((100, 2))
    out[-1, 0] = 10.01
    left = angle(Y) - np.arcsin(np.linalg.norm(out) / (10 * np.linalg.norm(Y)))
    after = angle(unit_rows(10 * Y + out))
    return "new", f"only without a row LayerNorm: with one, an outlier row gives psi = {after:.4f} < {left:.4f}"


def _prenorm_margin(Y: Array, Os: Array, pull: float, G: float, room: float, sign: int) -> float | None:
    """Pre-norm net with ||O||_F = G: the a-priori certificate at depth K and at infinite depth, and measured ratios."""
    r0, m0, X = float(np.linalg.norm(Y)), relative_mu(Y), Y
    lam, ratios = sign * (1 + room), []
    for fixed in Os:
        out = _pulled(fixed, sign * X, pull)
        out = out * (G * r0 / np.linalg.norm(out))
        ratios.append(float(np.linalg.norm(out) / (abs(lam) * np.linalg.norm(X))))
        X = lam * X + out
    bounds = (
        float(certificates.prenorm_certificate(m0, lam, np.full(len(Os), G * r0), r0)[-1]),
        certificates.prenorm_certificate_infinite(m0, lam, G * r0, r0),
        float(certificates.from_ratios(m0, ratios)[-1]),
    )
    return smallest([lower(relative_mu(X), bound) for bound in bounds])


def _deep_statement(name: str, printed: Printed, correction: str, sign: int, variant: theorem41.Version) -> Statement:
    return Statement(name, printed, correction, _draw_deep, partial(_deep, sign, variant))


STATEMENTS = (
    Statement(
        "Eq. 5, definition of mu", _definition, "identities of mu, r1 <= m",
        lambda rng: {"Y": tokens(rng, *shape(rng))}, _definition_margin,
    ),
    Statement("Eq. 6 equals eq. 3", _eq6, "equal for C_V = I, and for lam = 0", _draw_layer, _eq6_margin),
    Statement(
        "Theorem 4.1, proof, LayerNorm step", _step_a, "repaired one-step inequality", _draw_one_step, _one_step_margin
    ),
    Statement("Theorem 4.1, proof, row-norm step", _step_b, "with sqrt(N) ||M||_F", _draw_layer, _row_norm_margin),
    _deep_statement(
        "Theorem 4.1, lam > 0, unit-row input",
        lambda: ("holds", "for the one K that b is computed for; two steps of the printed proof are false"),
        "", 1, "abs",
    ),
    _deep_statement("Theorem 4.1, lam < 0", _negative, "with |lam| in b", -1, "abs"),
    _deep_statement("Theorem 4.1, input not normalised", _not_unit, "rows of Y0 normalised first", -1, "repaired"),
    _deep_statement(
        "Threshold after Theorem 4.1 suffices", _threshold, "|lam| from (7) and the sharper b together", 1, "repaired"
    ),
    Statement("Ideal a = 1; Remark 4.1", _ideal, "(7) fails at every a >= c^2/S^2", _draw_ideal, _ideal_margin),
    Statement(
        "Theorem 4.1* (angles), eq. 3", new, "psi_K >= psi_0 - sum of turns, bounded or measured",
        _draw_net, _rows_margin,
    ),
    Statement(
        "Theorem 4.1* (angles), eq. 6", new, "m' >= (c/S) sin(psi - arcsin(norm_inf(M)/|lam|))",
        _draw_one_step, _angle_eq6_margin,
    ),
    Statement(
        "Pre-norm certificate, every depth", _frobenius_evidence, "m_K >= sin(psi_0 - S_K), S_K <= S_inf",
        _draw_net, _prenorm_margin,
    ),
)  # fmt: skip
