"""Statements of the paper that fail as printed, each with its counterexample."""

import numpy as np
import pytest

from lscollapse.theory import bounds, constants, examples, layers, theorem41
from lscollapse.theory.arrays import TheoryError, min_cosine, mu, unit_rows

CONE = np.array([[np.cos(0.1), np.sin(0.1)], [np.cos(0.1), -np.sin(0.1)]])


def test_lemma_a1_tall_matrix():
    A, B = np.array([[0.0, 1.0]]), np.array([[1.0], [0.0]])
    assert np.linalg.norm(A @ B) == 0 < np.linalg.svd(B, compute_uv=False)[-1] * np.linalg.norm(A)
    with pytest.raises(TheoryError, match="more rows than columns"):
        bounds.product_lower_bound(A, B)


def test_theorem41_proof_layernorm_step():
    Z = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert mu(unit_rows(Z)) == 0 and mu(Z) ** 2 / 2.0**2 == pytest.approx(0.125)


def test_theorem41_proof_row_norm_step():
    M = np.zeros((4, 4))
    M[0] = 1.0
    rows = (M + np.eye(4)) @ np.ones((4, 1))
    assert np.linalg.norm(rows, axis=1).max() ** 2 == 25 > (np.linalg.norm(M) + 1) ** 2


@pytest.mark.parametrize(("K", "ratio", "power"), [(1, 0.9611637934, 0.97), (20, 0.4518, 0.5438)])
def test_theorem41_negative_lambda_as_printed(K, ratio, power):
    M, lam, a, C_M = np.array([[0.0, -1.0], [-1.0, 0.0]]), -100.0, 0.97, np.sqrt(2)
    assert theorem41.condition7(lam, a, C_M) == pytest.approx(23.70256890, rel=1e-9)
    assert theorem41.b(lam, a, 1, 2, C_M, variant="paper") == pytest.approx(-1.0188, rel=1e-4)
    assert theorem41.b(lam, a, K, 2, C_M, variant="paper") < mu(CONE) ** 2  # the printed hypothesis holds
    Y = CONE
    for _ in range(K):
        Y = layers.layer(Y, M, lam)
    assert mu(Y) ** 2 / mu(CONE) ** 2 == pytest.approx(ratio, rel=1e-4)
    assert ratio < power == pytest.approx(a**K, rel=1e-4)
    assert theorem41.b(lam, a, 1, 2, C_M) == pytest.approx(24.604, rel=1e-4)  # corrected: above N, so it says nothing


def test_theorem41_input_that_is_not_normalised():
    Y, M = 10 * np.eye(2), 0.1 * np.eye(2)
    assert theorem41.b(1000.0, 0.9, 1, 2, 0.1 * np.sqrt(2)) == pytest.approx(0.0063, rel=0.01)
    after = mu(layers.layer(Y, M, 1000.0)) ** 2
    assert (after, mu(Y) ** 2) == (pytest.approx(1.0), pytest.approx(100.0)) and after < 0.9 * mu(Y) ** 2


def test_condition7_alone_does_not_suffice():
    P = np.eye(2) - 0.5
    M = (0.5 * np.ones((2, 2)) - P) / np.sqrt(2)
    lam = 1.01 * theorem41.lambda_star(0.9, float(np.linalg.norm(M)))
    assert theorem41.condition7(lam, 0.9, 1.0) > 0
    assert mu(layers.layer(CONE, M, lam)) ** 2 < 0.9 * mu(CONE) ** 2
    assert theorem41.b(theorem41.lambda_star(0.9, 1.0) * (1 - 1e-12), 0.9, 1, 2, 1.0) == np.inf


def test_eq6_is_not_eq3():
    Y, W = np.array([[1.0, 0.0], [0.6, 0.8]]), np.diag([0.5, 0.1])
    M = np.full((2, 2), 0.5)
    assert not np.allclose(layers.layer(Y, M, 1.0, W), layers.layer(Y, M, 1.0, W, form="eq6"))


def test_lemma_a4():
    Y, W = unit_rows([[1.0, 0.5], [1.0, -0.05]]), np.diag([1.0, 10.0])
    entry = layers.selective_matrix(Y, W, 1.0)[1, 0]
    assert entry == pytest.approx(0.6699834367, rel=1e-9) and entry < min_cosine(Y) == pytest.approx(0.8709784677)
    assert bounds.entry_factor(W, min_cosine(Y)) == pytest.approx(0.2903815726, rel=1e-9)


def test_lemma_a4_correction_needs_care_when_the_extreme_eigenvalues_sum_below_zero():
    W, Y = -np.diag([1.0, 0.1]), np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    phi = min_cosine(Y)
    assert (-1.1 * phi - 0.9) / 2 > (Y @ W @ Y.T).min()  # the formula without the min
    assert bounds.entry_factor(W, phi) <= (Y @ W @ Y.T).min()


def test_lemma_a5():
    W, Y = np.array([[1.0, -10.0], [10.0, 1.0]]), np.array([[1.0, 0.0], [0.6, 0.8]])
    divisor = 1 / np.linalg.norm((layers.selective_matrix(Y, W, 1.0) @ Y)[1])
    assert divisor == pytest.approx(0.1082870, rel=1e-6) and divisor < 2**-1.5
    assert bounds.layernorm_factor(W, 2) <= divisor


def _selective_mus(Y, W, K):
    out = []
    for _ in range(K):
        Y = layers.layer(Y, layers.selective_matrix(Y, W, 1.0), 0.0)
        out.append(mu(Y))
    return out


def test_theorem43_bound_of_zero():
    Y = np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    mus = _selective_mus(Y, 2 * np.eye(2), 3)
    assert [bounds.printed_theorem43(2, 0.5, 2.0, 1.0, K) for K in (1, 2, 3)] == [0, 0, 0]
    assert mus == pytest.approx([0.4940354785, 0.2869443579, 0.1504807135], rel=1e-9)


def test_theorem43_missing_square_root():
    Y = np.array([[1.0, 0.0], [0.8, 0.6]])
    mus = _selective_mus(Y, np.eye(2), 8)
    for K, actual, printed in ((4, 0.03311836, 0.02375336), (8, 0.00207160, 0.00039897)):
        assert mus[K - 1] == pytest.approx(actual, rel=1e-5)
        assert bounds.printed_theorem43(2, 0.8, 1.0, 1.0, K) == pytest.approx(printed, rel=2e-5) and printed < actual


def test_theorem43_scaling_the_weights_changes_nothing():
    Y = np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]])
    assert _selective_mus(Y, 2 * np.eye(2), 3) == pytest.approx(_selective_mus(Y, 0.01 * np.eye(2), 3))


def test_theorem_a10_exponent():
    Y, W = np.array([[1.0], [0.0]]), np.array([[0.01]])
    actual = mu(layers.selective_matrix(Y, W, 1.0) @ Y)
    assert actual == pytest.approx(0.0070710678) and np.exp(bounds.printed_theorem_a10(W, 2, 1.0, 1)) < actual
    assert np.exp(bounds.printed_theorem_a10(W, 2, 1.0, 1)) == pytest.approx(0.0016817928)
    assert np.exp(bounds.selective_log_bound(W, 2, 1.0, 1)) == pytest.approx(0.0141421356)


def test_theorem_a10_other_reading_of_the_exponent():
    Y, W = np.array([[1.0], [0.0]]), np.array([[10.0]])
    for _ in range(2):
        Y = layers.selective_matrix(Y, W, 1.0) @ Y
    assert mu(Y) == pytest.approx(7071, rel=1e-4)
    assert mu(Y) > (np.sqrt(2) * 10) ** ((3 ** (2 - 1) + 1) / 2) == pytest.approx(200)


def test_lemma_a9_needs_decay_at_most_one():
    Y = np.full((2, 1), np.sqrt(0.5))
    actual = np.linalg.norm(layers.selective_matrix(Y, np.eye(1), 3.0) @ Y)
    assert actual == pytest.approx(1.45774, rel=1e-5) and actual > np.exp(
        bounds.selective_log_bound(np.eye(1), 2, 1.0, 1)
    )
    assert np.linalg.norm(layers.decay(4, 1.0)) == pytest.approx(3.162, rel=1e-3)  # not <= sqrt(N) = 2


def test_corollary_a31_norm_relations():
    tall, wide = np.ones((9, 1)), np.ones((1, 9))
    assert np.linalg.norm(tall) == 3 < np.abs(tall).sum(0).max() == 9
    assert np.linalg.norm(wide) == 3 > min(wide.shape) * np.abs(wide).sum(0).max() == 1


def test_footnote3_lti():
    size = np.linalg.norm(layers.decay(4, 0.01))
    assert size == pytest.approx(2.000075, rel=1e-7) and size > 0.01
    assert constants.lti(0.01, 1.0, 1.0, 4).frobenius == pytest.approx(size)


def test_footnote3_selective():
    size = np.linalg.norm(layers.selective_matrix(np.ones((8, 1)), np.eye(1), 1.0))
    assert size == pytest.approx(6.0) and size > 1.0
    assert constants.selective(np.eye(1), 1.0, 8).frobenius == pytest.approx(6.0)


def test_proposition_431_between_minus_two_and_minus_one():
    exact = examples.sys1_exact(-1.5, 60)
    assert exact.mu[60] == pytest.approx(np.sqrt(2)) and exact.rank1_residual[60] < 1e-40


def test_proposition_431_induction_fails_at_the_first_step():
    lam = -3.0
    a1 = 1 / examples.sys1(lam, 1)[1][1, 1] ** 2
    assert a1 == pytest.approx(2.0) and a1 > 1 / (1 - 1 / (1 + lam) ** 2) == pytest.approx(4 / 3)


def test_proposition_432_between_minus_three_halves_and_minus_one():
    exact = examples.sys2_exact(-1.25, 60)
    assert exact.mu[59] == pytest.approx(np.sqrt(2)) and exact.mu[60] < 1e-28


def test_row_layernorm_defeats_the_frobenius_angle():
    Y, out = np.zeros((100, 2)), np.zeros((100, 2))
    Y[:, 0], Y[-1, 0], out[-1, 0] = 1.0, -1.0, 10.01
    ratio = np.linalg.norm(out) / (10 * np.linalg.norm(Y))
    assert ratio == pytest.approx(0.1001, rel=1e-4) and np.arcsin(mu(Y) / 10) - np.arcsin(ratio) > 0.1
    assert mu(unit_rows(10 * Y + out)) == 0


def test_s4d_spectral_bound_needs_padding():
    M = np.array([[4.0, 0.0, 0.0], [-6.0, 4.0, 0.0], [-10.0, -6.0, 4.0]])
    size = np.linalg.norm(M, 2)
    assert np.abs(np.fft.fft([4.0, -6.0, -10.0])).max() < size <= constants.s4d([[4.0, -6.0, -10.0]]).spectral[0]
