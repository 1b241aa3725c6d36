"""Numbers computed independently of this code (60-digit or separate float64 scripts), to 1e-6 relative or better."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from lscollapse import measures
from lscollapse.theory import arrays, bounds, certificates, constants, examples, layers, onestep, spectral, theorem41

X3 = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
W3 = np.diag([0.5, 0.1])
M3 = layers.attention_matrix(X3, np.eye(2), 2)


def close(actual, expected, rel=1e-8):
    assert actual == pytest.approx(expected, rel=rel)


def test_measures():
    Y = [[1, 2], [3, 4], [5, 9]]
    close(arrays.mu(Y), 5.830951895)
    close(arrays.relative_mu(Y), 0.5)
    close(arrays.angle(Y), np.pi / 6)
    close(arrays.rank1_residual(Y), 0.05411214359)
    close(1 / (1 - arrays.rank1_residual(Y) ** 2), 1.002936723)
    close(float(measures.dong_residual(torch.tensor(Y, dtype=torch.float64))), 0.4780914437)
    close(arrays.relative_mu(arrays.unit_rows(Y)), 0.07653953509)
    close(arrays.min_cosine(arrays.unit_rows(Y)), 0.9838699101)
    corner = torch.zeros(4, 1, dtype=torch.float64)
    corner[0] = 1.0
    close(float(measures.dong_residual(corner)), 1.0607, rel=1e-4)


def test_layer_maps():
    close(arrays.mu(X3), 1.032795559)
    three, six = layers.layer(X3, M3, 1.0, W3), layers.layer(X3, M3, 1.0, W3, form="eq6")
    close(arrays.mu(three), 0.8955750549)
    close(three[0, 0], 0.99932110695, rel=1e-10)
    close(arrays.mu(six), 0.4397937373)
    close(six[0, 0], 0.99824874296, rel=1e-10)
    close(arrays.mu(layers.layer(X3, M3, -2.0, W3)), 1.111279994)
    close(np.linalg.norm(M3), 1.026985133)
    close(arrays.spectral_norm(M3), 1.001887237)
    close(arrays.max_row_sum(M3), 1.0)


def test_theorem41():
    close(theorem41.lambda_star(0.9, 1.0), 18.48683298)
    close(theorem41.lambda_star(0.9999, 1.0), 19998.49999)
    close(theorem41.lambda_star(0.5, 2.0, 0.8, 1.1), 70.12879814)
    close(theorem41.condition7(100, 0.5, 2.0, 0.8, 1.1), 105.58)
    close(theorem41.b(100, 0.5, 2, 3, 2.0, 0.8, 1.1), 55.01041864)
    close(theorem41.b(100, 0.5, 2, 3, 2.0, 0.8, 1.1, "repaired"), 29.09641978)
    close(theorem41.lambda_required(0.9, 12, 1.0, 0.9), 96.77535802)
    close(theorem41.k_max(1000, 0.9, 1.0, 0.9), 35.95739192)


def best_rate(K, C_M):
    """(lam, a): the smallest `lambda_required` over the rates a for m0 = 1, and the a that attains it."""

    def cost(logit):
        return min(1e3, np.log(theorem41.lambda_required(1.0 / (1.0 + np.exp(-logit)), K, C_M, 1.0)))

    found = minimize_scalar(cost, bounds=(-10.0, np.log(100.0 * K)), method="bounded", options={"xatol": 1e-9})
    return np.exp(found.fun), 1.0 / (1.0 + np.exp(-found.x))


def test_theorem41_paper_remarks():
    C_M = theorem41.implied_C_M(937.924, 0.9)
    close(C_M, 50.73470405)
    assert theorem41.k_max(937.924, 0.9, C_M, 1.0) < 0  # nothing is certified at the quoted threshold
    close(theorem41.lambda_required(0.9, 1, C_M, 1.0), 2051.95, rel=1e-5)
    close(theorem41.lambda_required(0.9, 64, C_M, 1.0), 8.615e5, rel=1e-4)
    best, a = best_rate(64, C_M)
    close(best, 2.346e4, rel=1e-3)
    close(a, 0.980, rel=1e-3)
    close(theorem41.lambda_required(0.9999, 64, 1.0, 0.95), 41186, rel=1e-5)
    close(theorem41.lambda_star(0.9999, 1.0), 19998.5)
    lam, a = best_rate(4000, 1.0)
    close(lam / 4000, 7.2, rel=0.01)
    close(a**4000, 0.28, rel=0.01)


def test_angle_certificate():
    close(certificates.lambda_required(0.95, 0.5, np.ones(12)), 16.45666985)
    close(certificates.certificate(0.95, np.ones(12), 20.0)[-1], 0.6075605053)
    close(certificates.certificate(0.95, np.ones(12), -20.0)[-1], 0.6075605053)


@pytest.mark.parametrize(
    ("lam", "G", "r0", "K", "expected"),
    [
        (2, 1, 2.5, 10, 0.4765460568),
        (2, 1, 2.5, 1000, 0.4771968161),
        (1.5, 1, 5, 1000, 0.4900184552),
        (3, 1, 1, 1000, 0.6100456585),
        (-4, 2, 1.5, 64, 0.5132632274),
        (1, 1, 50, 12, 0.2713268687),
    ],
)
def test_prenorm_turn(lam, G, r0, K, expected):
    close(certificates.prenorm_turn(lam, np.full(K, G), r0)[-1], expected, rel=2e-10)
    if K >= 64:  # the limit is reached
        close(certificates.prenorm_turn_infinite(lam, G, r0), expected, rel=2e-10)


def test_theorem42():
    Y, Ms, mus = X3, [], []
    for _ in range(2):
        Ms.append(layers.attention_matrix(Y, np.eye(2), 2))
        Y = layers.layer(Y, Ms[-1], 0.0)
        mus.append(arrays.mu(Y))
    assert [bounds.overlap(M) for M in Ms] == pytest.approx([0.3092209721, 0.3331922418], rel=1e-8)
    assert mus == pytest.approx([0.2740300555, 0.004873447724], rel=1e-8)
    assert bounds.attention_layernorm(Ms, 0.0)[1:] == pytest.approx([1.439561421, 1.17552135], rel=1e-8)


def test_theorem43():
    Y, Ms, mus = np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]]), [], []
    for _ in range(3):
        Ms.append(layers.selective_matrix(Y, 2 * np.eye(2), 1.0))
        Y = layers.layer(Y, Ms[-1], 0.0)
        mus.append(arrays.mu(Y))
    p = [bounds.overlap(bounds.row_stochastic(M)) for M in Ms]
    assert mus == pytest.approx([0.4940354785, 0.2869443579, 0.1504807135], rel=1e-8)
    assert p == pytest.approx([1 / 3, 0.430500874, 0.4785319247], rel=1e-8)
    assert bounds.layernorm(Ms, 0.5)[1:] == pytest.approx([0.8164965809, 0.6161704991, 0.4449536403], rel=1e-8)


def test_theorem43_with_skip():
    M, Y, mus = layers.decay(3, 0.9), X3, []
    for _ in range(3):
        Y = layers.layer(Y, M, 1.0)
        mus.append(arrays.mu(Y))
    close(bounds.overlap(bounds.row_stochastic(M, 1.0)), 0.218328841)
    assert mus == pytest.approx([0.7587282824, 0.5364783189, 0.3725440721], rel=1e-8)
    assert bounds.layernorm([M] * 3, 0.0, 1.0)[1:] == pytest.approx([1.531343684, 1.353894162, 1.197007192], rel=1e-8)


def test_attention_without_layernorm():
    Y, B = X3 / 2, bounds.attention_factor(np.eye(2), np.eye(2), 2)
    mu0 = arrays.mu(Y)
    expected = ((0.02972264732, 0.05274365369, 0.09737289911), (6.18595132e-06, 1.052032293e-05, 6.528287978e-04))
    for k, (mu, one_step, deep) in enumerate(expected, start=1):
        close(bounds.attention_one_step(Y, B), one_step)
        Y = layers.attention_matrix(Y, np.eye(2), 2) @ Y
        close(arrays.mu(Y), mu)
        close(np.exp(bounds.attention_log_bound(B, mu0, k)), deep)


def test_lti():
    W, Y = 0.4 * layers.decay(3, 0.5), X3
    found = bounds.lti([W] * 3, float(np.linalg.norm(X3)))
    assert np.exp(found) == pytest.approx([0.3499687755, 0.7453717193, 0.1466424222], rel=1e-8)
    Y = W @ W @ W @ Y
    close(arrays.mu(Y), 0.120867972)
    close(arrays.relative_mu(Y), 0.4628328145)


def test_lti_bounds_the_norm_not_the_relative_mu():
    found = bounds.lti([0.5 * np.eye(3)] * 40, float(np.linalg.norm(X3)))
    Y = 0.5**40 * X3
    assert arrays.mu(Y) < 1.4e-12
    close(arrays.relative_mu(Y), arrays.relative_mu(X3))
    close(np.exp(found.sharp), arrays.spectral_norm(np.eye(3) - 1 / 3) * 0.5**40 * np.linalg.norm(X3))


def test_selective_without_layernorm():
    Y, W, norm0 = X3 / 2, 0.3 * np.eye(2), float(np.linalg.norm(X3 / 2))
    m0 = arrays.relative_mu(Y)
    Y = layers.selective_matrix(Y, W, 0.5) @ Y
    close(np.linalg.norm(Y), 0.07730823048)
    close(arrays.mu(Y), 0.04151054083)
    close(np.exp(bounds.selective_log_bound(W, 3, norm0, 1)), 0.4772970773)
    close(np.exp(bounds.selective_log_bound(W, 3, norm0, 1, sharp=True)), 0.1948557159)
    assert (round(arrays.relative_mu(Y), 4), m0 < arrays.relative_mu(Y)) == (0.5369, False)
    m1 = arrays.relative_mu(Y)
    Y = layers.selective_matrix(Y, W, 0.5) @ Y
    close(arrays.mu(Y), 3.379986323e-05)
    close(np.exp(bounds.selective_log_bound(W, 3, norm0, 2)), 0.07990302198)
    close(np.exp(bounds.selective_log_bound(W, 3, norm0, 2, sharp=True)), 0.002219528388)
    assert round(arrays.relative_mu(Y), 4) == 0.5538 > m1  # relative mu grows while the norm vanishes


def test_constants():
    found = constants.lti(0.5, 1.0, 1.0, 4)
    close(found.frobenius, 2.211475752)
    close(found.max_row_sum, 1.875)
    assert constants.selective(np.eye(2), 0.5, 4) == pytest.approx(found)


@pytest.mark.parametrize(
    ("lam", "mu"),
    [(1, 0.1386171692), (0, 0.0360968523), (-1.5, 1.4141967572), (-2.5, 1.4117786503), (-3, 1.4074037375)],
)
def test_sys1(lam, mu):
    close(examples.sys1_exact(lam, 3).mu[3], mu)
    close(arrays.mu(examples.sys1(lam, 3)[3]), mu)


@pytest.mark.parametrize(
    ("lam", "mu"),
    [(1, 0.2029824803), (0, 0.0878756126), (-1.25, 1.4139712988), (-1.5, 1.3065629649), (-3, 0.9359301605)],
)
def test_sys2(lam, mu):
    close(examples.sys2_exact(lam, 3).mu[3], mu, rel=1e-9)
    close(arrays.mu(examples.sys2(lam, 3)[3]), mu, rel=1e-9)


def test_sys2_two_cycle_and_deep_values():
    assert examples.sys2_exact(-1.5, 9).mu[-2:] == pytest.approx([0.5411961, 1.3065630], rel=1e-7)
    deep = examples.sys2_exact(-1.25, 60)
    assert deep.mu[-2:] == pytest.approx([1.4142136, 1.7e-29], rel=0.02)
    close(examples.sys1_exact(-1.5, 60).mu[-1], np.sqrt(2))


def test_one_step_response():
    six = onestep.response(X3, M3 @ X3)
    expected = (1.066666667, 0.228652377, 0.05100247869, 3, 2.182799677, 2.026564842)
    assert tuple(six) == pytest.approx(expected, rel=1e-9)
    close(six.crossing(), -0.6115159409)
    assert six.relative_mu_squared([1.0, -2.0]) == pytest.approx([0.1676902007, 0.6426486009], rel=1e-9)
    assert (six.raises(-0.7), six.raises(-0.5)) == (True, False)


def test_drive():
    close(onestep.drive(X3, M3 @ X3), 0.1745998279)
    change = arrays.relative_mu(arrays.unit_rows(100.0 * X3 + M3 @ X3)) ** 2 - arrays.relative_mu(X3) ** 2
    close(change, -0.003465253255)
    close(-2 * onestep.drive(X3, M3 @ X3) / 100, -0.003491996559)


def test_spectral():
    assert sorted(np.linalg.eigvals(M3).real) == pytest.approx([0.0257976712, 0.2242359822, 1], rel=1e-8)
    close(spectral.rho2(M3, 1.0), 0.6121179911)
    close(spectral.lambda_c(M3), -0.5128988356)
    close(spectral.rho2(layers.decay(4, 0.9), 1.0), 0.6896551724)
