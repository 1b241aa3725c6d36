"""Gains against layers run as recurrences, the critical-lambda flow against closed forms, rates against long runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz
from scipy.special import softmax

from lscollapse.theory import bounds, certificates, constants, flow, onestep, spectral, theorem41
from lscollapse.theory.arrays import TheoryError, relative_mu, unit_rows
from lscollapse.theory.layers import attention_matrix, decay, layer

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None, derandomize=True)


@few
@given(seeds, st.integers(1, 8), st.integers(1, 3), st.booleans(), st.booleans())
def test_mamba2_heads_equal_the_recurrence(seed, N, h, per_head, skip):
    rng = np.random.default_rng(seed)
    C, B = rng.standard_normal((2, h, N, 4) if per_head else (2, N, 4))
    dt, A, D = rng.uniform(0, 2, (N, h)), -rng.uniform(0.1, 3, h), rng.standard_normal(h) if skip else None
    X = rng.standard_normal((N, h))  # one channel a head
    Ms = constants.mamba2_heads(C, B, dt, A, D)
    for head in range(h):
        c, b = (C[head], B[head]) if per_head else (C, B)
        state, out = np.zeros(4), np.zeros(N)
        for t in range(N):
            state = np.exp(dt[t, head] * A[head]) * state + dt[t, head] * X[t, head] * b[t]
            out[t] = c[t] @ state + (D[head] * X[t, head] if skip else 0.0)
        np.testing.assert_allclose(Ms[head] @ X[:, head], out, rtol=1e-10, atol=1e-12)


def test_mamba2_heads_with_strong_decay_do_not_overflow():
    Ms = constants.mamba2_heads(np.ones((64, 1)), np.ones((64, 1)), np.full((64, 1), 40.0), [-50.0])
    np.testing.assert_allclose(Ms[0], 40 * np.eye(64))


@few
@given(seeds, st.integers(1, 12), st.booleans())
def test_s4d_norms(seed, N, skip):
    rng = np.random.default_rng(seed)
    kernel, D = rng.standard_normal((3, N)), rng.standard_normal(3) if skip else None
    found = constants.s4d(kernel, D)
    for c in range(3):
        M = np.tril(toeplitz(kernel[c])) + (D[c] * np.eye(N) if skip else 0.0)
        assert found.frobenius[c] == pytest.approx(np.linalg.norm(M))
        assert np.linalg.norm(M, 2) <= found.spectral[c] * (1 + 1e-12)
    assert found.frobenius.max() == found.C_M


def test_measured_gain():
    found = constants.measured([[3.0, 4.0], [0.0, 1.0]], [[0.0, 5.0], [2.0, 0.0]])
    assert found == pytest.approx((2.0, np.sqrt(29 / 26)))


def test_lambda_required_is_the_edge_of_the_certificate():
    gains = np.array([0.5, 2.0, 1.0, 0.0])
    lam = certificates.lambda_required(0.9, 0.4, gains)
    assert certificates.certificate(0.9, gains, lam)[-1] == pytest.approx(0.4, rel=1e-9)
    K = 12
    expected = 1 / np.sin((np.arcsin(0.95) - np.arcsin(0.5)) / K)
    assert certificates.lambda_required(0.95, 0.5, np.ones(K)) == pytest.approx(expected, rel=1e-11)
    assert certificates.lambda_required(0.9, 0.9, gains) == np.inf
    assert certificates.lambda_required(0.9, 0.9, np.zeros(3)) == 0.0
    assert certificates.certificate(0.9, gains, 0.0)[1:].max() == 0.0


def test_prenorm_lambda_required():
    gains, r0 = np.full(24, 5.0), 18.0
    lam = certificates.prenorm_lambda_required(0.98, 0.6, gains, r0)
    assert certificates.prenorm_certificate(0.98, lam, gains, r0)[-1] == pytest.approx(0.6, rel=1e-9)
    ever = certificates.prenorm_lambda_required_infinite(0.98, 0.6, 5.0, r0)
    assert certificates.prenorm_certificate_infinite(0.98, ever, 5.0, r0) == pytest.approx(0.6, rel=1e-9)
    assert lam <= ever
    assert certificates.prenorm_certificate(0.98, ever, np.full(5000, 5.0), r0)[-1] == pytest.approx(0.6, rel=1e-8)
    assert certificates.prenorm_certificate(0.98, lam, 100 * gains, r0)[-1] == 0.0


def test_prenorm_turn_from_a_later_layer_and_without_mixer():
    gains = np.full(9, 1.0)
    whole = certificates.prenorm_turn(2.0, gains, 4.0)
    norm_at_3 = 4.0 * 8 - (4 + 2 + 1)  # the recurrence |lam| rho - G by hand
    rest = certificates.prenorm_turn(2.0, gains[3:], norm_at_3)
    assert whole[-1] - whole[3] == pytest.approx(rest[-1])
    assert certificates.prenorm_turn(0.5, np.zeros(3), 1.0) == pytest.approx(np.zeros(4))
    limit = -np.log(1 - 1e5 / 1e9)  # integral of G / rho_k over depth, for |lam| = 1 + 1e-5 and small ratios
    assert certificates.prenorm_turn_infinite(1 + 1e-5, 1.0, 1e9) == pytest.approx(limit, rel=1e-4)
    assert certificates.prenorm_turn_infinite(1.5, 1.0, 2.0) == np.inf  # r0 = G / (lam - 1) exactly


@few
@given(seeds, st.integers(2, 6), st.integers(1, 5), st.floats(-5, 5))
def test_response_scalars(seed, N, d, lam):
    X, out = np.random.default_rng(seed).standard_normal((2, N, d))
    six, Z = onestep.response(X, out), lam * X + out
    expected = ((Z - Z.mean(0)) ** 2).sum() / (Z**2).sum()
    assert float(six.relative_mu_squared(lam)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert relative_mu(six.crossing() * X + out) == pytest.approx(relative_mu(X), rel=1e-6)


def test_a_zero_row_after_the_skip_is_refused():
    X, out = np.eye(2), np.array([[-1.0, 0.0], [0.0, 2.0]])
    with pytest.raises(TheoryError, match="row 0 is zero"):
        unit_rows(1.0 * X + out)
    assert relative_mu(unit_rows(3.0 * X + out)) == pytest.approx(np.sqrt(0.5))


@few
@given(seeds, st.integers(2, 6), st.integers(2, 5))
def test_drive_is_the_first_order_change(seed, N, d):
    rng = np.random.default_rng(seed)
    X, out = unit_rows(rng.standard_normal((N, d))), rng.standard_normal((N, d))
    h, lams = onestep.drive(X, out), np.array([1e5, -1e5])
    change = np.array([relative_mu(unit_rows(lam * X + out)) for lam in lams]) ** 2 - relative_mu(X) ** 2
    np.testing.assert_allclose(change, -2 * h / lams, atol=1e-7 * (1 + np.linalg.norm(out) ** 2) / 100)


@pytest.mark.parametrize("target", [0.6, 0.1])
def test_flow_of_two_averaged_tokens(target):
    """O = mean row: the half angle t between two unit vectors follows tan t(tau) = tan t(0) exp(-tau), m = sin t."""
    t0 = 1.2
    Y0 = np.array([[np.cos(t0), np.sin(t0)], [np.cos(t0), -np.sin(t0)]])
    tau = np.log(np.tan(t0) / np.tan(np.arcsin(target)))
    K = 30
    found = flow.critical_lambda(lambda Y: np.tile(Y.mean(0), (2, 1)), Y0, K, target)
    assert found.tau == pytest.approx(tau, rel=1e-3)
    assert found.lam == pytest.approx(K / tau, rel=1e-3)
    assert flow.critical_lambda(lambda Y: -np.tile(Y.mean(0), (2, 1)), Y0, K, target, sign=-1).tau == found.tau
    exact = 1 / np.expm1(tau / K)  # a layer multiplies tan t by lam / (1 + lam)
    assert found.lam - 0.5 == pytest.approx(exact, rel=0.01)
    Y = Y0
    for _ in range(K):
        Y = layer(Y, np.full((2, 2), 0.5), exact)
    assert relative_mu(Y) == pytest.approx(target, rel=1e-9)


def test_flow_without_collapse():
    found = flow.critical_lambda(lambda Y: np.tile(Y.mean(0), (2, 1)), np.eye(2), 12, 0.5, sign=-1, tau_max=5.0)
    assert found == (0.0, np.inf)


@few
@given(seeds, st.integers(2, 6), st.floats(-0.4, 4.0))
def test_rho2_is_the_measured_rate(seed, N, lam):
    rng = np.random.default_rng(seed)
    M = softmax(rng.standard_normal((N, N)), axis=1)
    M = (M + M.T) / 2
    M += np.diag(1 - M.sum(1))  # symmetric: real spectrum, no transient
    Y, u = rng.standard_normal((N, 3)), np.array([0.0, 0.0, 1.0])
    Y = unit_rows(u + 1e-6 * Y)
    gaps = []
    for _ in range(60):
        Y = layer(unit_rows(u + 1e-6 * (Y - Y.mean(0)) / np.linalg.norm(Y - Y.mean(0))), M, lam)
        gaps.append(np.linalg.norm(Y - Y.mean(0)) / 1e-6)
    assert gaps[-1] <= spectral.rho2(M, lam) * 1.001
    nu = np.sort(np.abs((np.linalg.eigvalsh(M) + lam) / (1 + lam)))
    assert spectral.rho2(M, lam) == pytest.approx(nu[-2] if nu[-1] <= 1 + 1e-9 else nu[-1], rel=1e-6)


def test_lambda_c_of_the_two_systems_and_its_limits():
    assert spectral.lambda_c([[1.0, 0.0], [2.0, 1.0]]) == pytest.approx(-1.0)  # Sys-1
    assert spectral.lambda_c([[1.0, 0.0], [1.0, 1.0]]) == pytest.approx(-1.0)  # Sys-2 at consensus
    assert spectral.lambda_c([[3.0, 0.0], [2.0, 1.0]]) == pytest.approx(-2.0)
    assert spectral.lambda_c(np.eye(3)) == np.inf
    assert spectral.lambda_c(np.full((4, 4), 0.25)) == pytest.approx(-0.5)  # averaging: nu = 1, 0, 0, 0


@few
@given(seeds, st.integers(2, 5), st.booleans(), st.floats(0.01, 2.0))
def test_consensus_attracts_above_lambda_c_only(seed, N, causal, gap):
    rng = np.random.default_rng(seed)
    M = np.tril(rng.uniform(0.1, 1, (N, N))) if causal else softmax(rng.standard_normal((N, N)), axis=1)
    edge = spectral.lambda_c(M)
    assert spectral.attracting(M, edge + gap)
    assert not spectral.attracting(M, edge - gap - 1e-3 * np.pi)


def test_decay_rate_of_an_lti_system():
    M, lam = decay(4, 0.9), 1.0
    Y = unit_rows(np.random.default_rng(0).standard_normal((4, 3)))
    sizes = []
    for _ in range(80):
        Y = layer(Y, M, lam)
        sizes.append(relative_mu(Y))
    assert sizes[-1] / sizes[-2] == pytest.approx(spectral.rho2(M, lam), rel=1e-3)


def test_blocks_of_layers_are_multiplied_in_order():
    A, B = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.2, 0.8], [0.0, 1.0]])
    BA = B @ A  # A acts first
    p = (BA @ BA.T).min()
    assert p != pytest.approx((A @ B @ (A @ B).T).min())
    found = bounds.attention_layernorm([A, B], 0.25, r=2)
    np.testing.assert_allclose(found, np.sqrt(2 * 0.75 * np.array([1.0, 1.0 - p])))


@few
@given(seeds, st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))
def test_a_priori_form_of_theorem_a2_is_weaker_than_the_measured_one(seed, N, d, K):
    rng = np.random.default_rng(seed)
    Y, W_Q, W_K = unit_rows(np.abs(rng.standard_normal((N, d)))), *rng.standard_normal((2, d, d))
    C = max(np.linalg.norm(W_Q, 2), np.linalg.norm(W_K, 2))
    phi0, Ms = float((Y @ Y.T).min().clip(0, 1)), []
    for _ in range(K):
        Ms.append(softmax(Y @ W_Q @ W_K.T @ Y.T / np.sqrt(d), axis=1))
        Y = layer(Y, Ms[-1], 0.0)
    a_priori = bounds.attention_layernorm_a_priori(N, K, 1, C, d, phi0)
    assert bounds.attention_layernorm(Ms, phi0)[-1] <= a_priori * (1 + 1e-9)


def test_a_priori_form_of_theorem_a2_by_hand():
    eps = np.exp(-2 * 0.5**2 / 2) / 3
    expected = np.sqrt(3 * 0.9) * (1 - eps**4) ** (3 / 2)  # K = 7 layers are three blocks of r = 2
    assert bounds.attention_layernorm_a_priori(3, 7, 2, 0.5, 4, 0.1) == pytest.approx(expected)


def test_theorem_42_by_hand():
    found = bounds.attention_layernorm(np.full((7, 3, 3), 1 / 3), 0.1, r=2)  # 7 layers are three blocks of r = 2
    assert found == pytest.approx(np.sqrt(3 * 0.9) * (1 - 1 / 3) ** (np.arange(4) / 2))


@pytest.mark.parametrize(
    ("mixing", "G", "C_M", "expected"),
    [
        (lambda Y: attention_matrix(Y, np.eye(16), 16), 1.0, 4.0, (5.18, 5.65, 14.7, 373)),
        (lambda Y: attention_matrix(Y, np.eye(16), 16, causal=True), 1.0, 4.0, (4.51, 5.03, 14.7, 373)),
        (lambda Y: decay(16, 0.9), 8.147, 7.909, (20.2, 23.0, 120, 738)),
        (lambda Y: decay(16, 0.5), 2.0, 4.570, (0.67, 2.69, 29.5, 426)),
    ],
)
def test_comparison_table_of_the_docs(mixing, G, C_M, expected):
    """Critical lambda by bisection on the net, the flow's estimate, and both certificates: 12 layers, target 1/2."""
    K, target, low, high = 12, 0.5, 0.0, 200.0
    Y0 = unit_rows(np.random.default_rng(0).standard_normal((16, 16)))
    m0 = relative_mu(Y0)
    while high - low > 1e-3:
        lam, Y = (low + high) / 2, Y0
        for _ in range(K):
            Y = layer(Y, mixing(Y), lam)
        low, high = (low, lam) if relative_mu(Y) >= target else (lam, high)
    found = (
        high,
        flow.critical_lambda(lambda Y: mixing(Y) @ Y, Y0, K, target).lam,
        certificates.lambda_required(m0, target, np.full(K, G)),
        theorem41.lambda_required((target / m0) ** (2 / K), K, C_M, m0**2),
    )
    assert found == pytest.approx(expected, rel=0.005)
