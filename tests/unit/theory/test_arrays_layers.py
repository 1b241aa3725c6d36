"""The numpy measures against the torch ones, and what bad input says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lscollapse import measures
from lscollapse.theory import (
    arrays,
    bounds,
    certificates,
    constants,
    flow,
    layers,
    onestep,
    spectral,
    theorem41,
)
from lscollapse.theory.arrays import TheoryError

Y2 = np.eye(2)


def ratio_1_inf(Y):
    return arrays.norm_1_inf(arrays.centred(Y)) / arrays.norm_1_inf(Y)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 6), st.sampled_from([1e-200, 1e-9, 1.0, 1e200]))
def test_measures_agree_with_the_torch_ones(seed, N, d, scale):
    rng = np.random.default_rng(seed)
    Y = scale * (rng.standard_normal(d) + 10.0 ** rng.uniform(-6, 1) * rng.standard_normal((N, d)))
    expected = measures.measure_all(torch.from_numpy(Y))
    for name, function in (
        ("mu", arrays.mu),
        ("relative_mu", arrays.relative_mu),
        ("rank1_residual", arrays.rank1_residual),
        ("dong_residual", lambda Y: ratio_1_inf(Y / np.abs(Y).max())),
    ):
        np.testing.assert_allclose(
            function(Y), float(expected[name]), rtol=1e-9, atol=1e-14 * (scale if name == "mu" else 1)
        )
    np.testing.assert_allclose(np.sin(arrays.angle(Y)), float(expected["relative_mu"]), rtol=1e-9, atol=1e-15)


def test_unit_rows_of_any_size():
    Z = np.array([[3e-200, 4e-200], [3e200, -4e200]])
    np.testing.assert_allclose(arrays.unit_rows(Z), [[0.6, 0.8], [0.6, -0.8]])


def test_layer_without_layernorm_and_selective_matrix():
    M = np.array([[1.0, 0.0], [2.0, 1.0]])
    np.testing.assert_allclose(layers.layer(Y2, M, 3.0, layernorm=False), [[4, 0], [2, 4]])
    Y, W = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 2.0], [0.0, 1.0]])
    expected = [[1 * 1 + 1 * 2 * 2 + 2 * 2, 0], [0.5 * (3 * 1 + 3 * 2 * 2 + 5 * 2), 9 + 3 * 2 * 5 + 25]]
    np.testing.assert_allclose(layers.selective_matrix(Y, W, 0.5), expected)


def test_causal_attention_matrix():
    M = layers.attention_matrix(Y2, Y2, 1, causal=True)
    np.testing.assert_allclose(M, [[1, 0], [1 / (1 + np.e), np.e / (1 + np.e)]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.layer(Y2, np.diag([1.0, 2.0]), -1.0), "row 0 is zero: LayerNorm"),
        (lambda: layers.layer(Y2, np.eye(3), 1.0), r"M has shape \(3, 3\)"),
        (lambda: layers.layer(Y2, Y2, 1.0, np.eye(3)), "C_V has shape"),
        (lambda: layers.layer(Y2, Y2, 1.0, form="eq7"), "choose 'eq3' or 'eq6'"),
        (lambda: arrays.mu([1.0, 2.0]), r"give a matrix \(N, d\)"),
        (lambda: arrays.mu([[np.nan]]), "NaN or infinity"),
        (lambda: arrays.min_cosine([[2.0, 0.0]]), "normalise its rows"),
        (lambda: theorem41.lambda_star(1.0, 1.0), "strictly between 0 and 1"),
        (lambda: theorem41.lambda_star(0.5, 0.0), "C_M = 0"),
        (lambda: theorem41.lambda_star(0.5, 1.0, c=2.0), "singular values"),
        (lambda: theorem41.k_max(1.0, 0.5, 1.0, 1.5), r"lies in \(0, 1\]"),
        (lambda: theorem41.b(1.0, 0.5, 1, 2, 1.0, variant="other"), "choose 'abs' or 'repaired'"),
        (lambda: theorem41.lambda_required(0.5, 3, 1.0, 1.0, c=-1.0), "0 <= c <= S"),
        (lambda: certificates.certificate(1.5, [1.0], 2.0), r"relative mu lies in \[0, 1\]"),
        (lambda: certificates.certificate(0.5, [1.0, 2.0], [1.0, 2.0, 3.0]), "3 lambdas for 2 layers"),
        (lambda: certificates.certificate(0.5, [-1.0], 2.0), "non-negative number a layer"),
        (lambda: certificates.prenorm_turn(2.0, [1.0], 0.0), "positive Frobenius norm"),
        (lambda: certificates.prenorm_turn_infinite(2.0, -1.0, 1.0), "give G >= 0"),
        (lambda: certificates.measured(Y2, 1.0), r"\(K\+1, N, d\)"),
        (lambda: bounds.layernorm([-Y2], 0.5), "need lam >= 0 and M >= 0"),
        (lambda: bounds.layernorm([np.zeros((2, 2))], 0.5), "sums to zero"),
        (lambda: bounds.layernorm([Y2], -0.5), r"inner product of tokens in \[0, 1\]"),
        (lambda: bounds.attention_layernorm([2 * Y2], 0.5), "row-stochastic"),
        (lambda: bounds.attention_layernorm([Y2], 0.5, r=0), "at least 1"),
        (lambda: bounds.selective_overlap(Y2, 0.5, 2.0, 3), r"in \[0, 1\]"),
        (lambda: bounds.entry_factor(Y2, -0.5), r"in \[0, 1\]"),
        (lambda: bounds.product_lower_bound(Y2, np.eye(3)), "undefined"),
        (lambda: constants.measured(Y2, np.eye(3)), "input and mixer output"),
        (lambda: constants.measured([[0.0, 0.0]], [[1.0, 1.0]]), "row 0 of X is zero"),
        (lambda: constants.attention([Y2], np.ones((2, 2, 1)), np.ones((2, 1, 2))), r"\(h, N, N\)"),
        (lambda: constants.mamba2_heads(Y2, Y2, np.ones((3, 1)), [-1.0]), r"\(N, n\)"),
        (lambda: bounds.layernorm(Y2, 0.5), "one square matrix a layer"),
        (lambda: onestep.response(Y2, np.eye(3)), "input and mixer output"),
        (lambda: flow.critical_lambda(lambda Y: Y, Y2, 4, 0.5, sign=0), "give 1 or -1"),
        (lambda: flow.critical_lambda(lambda Y: Y, Y2, 4, 0.9), "not above the target"),
        (lambda: spectral.T(-Y2, 1.0), "sums to zero"),
        (lambda: spectral.lambda_c(np.ones((2, 2))), "rows sum to 1 only"),
        (lambda: spectral.lambda_c([[2.0, -1.0], [-1.0, 2.0]]), "real part above 1"),
    ],
)
def test_bad_input_says_what_came_and_how_to_mend_it(call, message):
    with pytest.raises(TheoryError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
