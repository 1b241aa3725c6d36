"""Measures against closed forms, exact rational and 40-digit arithmetic, and numpy's/torch's singular values."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lscollapse import measures, perturbation
from lscollapse.core import table
from lscollapse.measures import (
    angular_mu,
    angular_rank1_residual,
    dong_residual,
    effective_rank,
    longest_row,
    mean_cosine,
    measure_all,
    mu,
    rank1_residual,
    relative_mu,
    row_norm_ratio,
    stable_rank,
)
from tests.equivalence.plain_models import plain_measures

TV1 = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], dtype=torch.float64)
FUNCTIONS = {
    "mu": mu, "relative_mu": relative_mu, "rank1_residual": rank1_residual, "stable_rank": stable_rank,
    "mean_cosine": mean_cosine, "dong_residual": dong_residual, "angular_mu": angular_mu,
    "angular_rank1_residual": angular_rank1_residual, "row_norm_ratio": row_norm_ratio, "longest_row": longest_row,
    "effective_rank": effective_rank,
}  # fmt: skip
SHAPES = st.tuples(st.integers(2, 7), st.integers(1, 7))
ENTRIES = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-100 else x)
MATRICES = hnp.arrays(np.float64, SHAPES, elements=ENTRIES).filter(lambda Y: np.abs(Y).max() > 0)


def random_matrix(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


def exact_mu(Y: np.ndarray) -> tuple[float, float]:
    """mu and relative mu of the float64 numbers as they are, in rational arithmetic up to the last square root."""
    rows = [[Fraction(float(y)) for y in row] for row in Y]
    n = len(rows)
    means = [sum(column) / n for column in zip(*rows, strict=True)]
    squares = sum((y - m) ** 2 for row in rows for y, m in zip(row, means, strict=True))
    total = sum(y**2 for row in rows for y in row)
    with mpmath.workdps(40):
        centred = mpmath.sqrt(mpmath.mpf(squares.numerator) / squares.denominator)
        whole = mpmath.sqrt(mpmath.mpf(total.numerator) / total.denominator)
        return float(centred), float(centred / whole)


def exact_dong(Y: np.ndarray) -> float:
    rows = [[Fraction(float(y)) for y in row] for row in Y]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    R = [[y - m for y, m in zip(row, means, strict=True)] for row in rows]

    def product(A: list[list[Fraction]]) -> Fraction:
        columns = max(sum(map(abs, column)) for column in zip(*A, strict=True))
        return columns * max(sum(map(abs, row)) for row in A)

    return math.sqrt(product(R) / product(rows))


def exact_mean_cosine(Y: np.ndarray) -> float:
    with mpmath.workdps(60):
        rows = [[mpmath.mpf(float(y)) for y in row] for row in Y]
        units = [[y / mpmath.norm(row) for y in row] for row in rows]
        total = sum(sum(column) ** 2 for column in zip(*units, strict=True))
        return float((total - len(rows)) / (len(rows) * (len(rows) - 1)))


def exact_rank1_residual(Y: np.ndarray) -> float:
    with mpmath.workdps(60):
        sigma = mpmath.svd_r(mpmath.matrix(Y.tolist()), compute_uv=False)
        squares = [s * s for s in sigma]
        return float(mpmath.sqrt((sum(squares) - max(squares)) / sum(squares)))


def test_vector_of_the_theory() -> None:
    found = {name: float(value) for name, value in measure_all(TV1).items()}
    assert found["mu"] == pytest.approx(5.830951895, rel=1e-9)
    assert found["mu"] == pytest.approx(math.sqrt(34), rel=1e-15)
    assert found["relative_mu"] == pytest.approx(0.5, rel=1e-15)
    assert found["rank1_residual"] == pytest.approx(0.05411214359, rel=1e-9)
    assert found["stable_rank"] == pytest.approx(1.002936723, rel=1e-9)
    assert found["dong_residual"] == pytest.approx(0.4780914437, rel=1e-9)


def test_vector_with_unit_rows() -> None:
    """m = 0.0765... and m^2 = 1 - (1/N^2) sum_ij cos_ij, which gives the mean over distinct pairs."""
    Y = TV1 / TV1.norm(dim=1, keepdim=True)
    m = 0.07653953509
    assert float(relative_mu(Y)) == pytest.approx(m, rel=1e-9)
    assert float(mean_cosine(Y)) == pytest.approx((9 * (1 - m**2) - 3) / 6, rel=1e-9)
    assert float(mean_cosine(TV1)) == pytest.approx((9 * (1 - m**2) - 3) / 6, rel=1e-9)


def test_every_function_agrees_with_measure_all() -> None:
    together = measure_all(TV1)
    assert tuple(together) == tuple(measures.MEASURES) == tuple(FUNCTIONS) == table.MEASURES
    for name, function in FUNCTIONS.items():
        assert torch.equal(function(TV1), together[name]), name


def test_closed_forms() -> None:
    eye = torch.eye(4, dtype=torch.float64)  # orthonormal rows: mu^2 = N - 1, sigma all 1
    found = {name: float(value) for name, value in measure_all(eye).items()}
    assert found == pytest.approx(
        {"mu": math.sqrt(3), "relative_mu": math.sqrt(3) / 2, "rank1_residual": math.sqrt(3) / 2, "stable_rank": 4.0,
         "mean_cosine": 0.0, "dong_residual": 1.5, "angular_mu": math.sqrt(3) / 2, "row_norm_ratio": 1.0, "longest_row": 0.0,
         "angular_rank1_residual": math.sqrt(3) / 2, "effective_rank": 4.0}, rel=1e-14, abs=1e-15,
    )  # fmt: skip
    single = torch.zeros(4, 3, dtype=torch.float64)
    single[0, 0] = 1.0
    assert float(dong_residual(single)) == pytest.approx(1.060660172, rel=1e-9)  # > 1: the mean is not the minimiser
    simplex = torch.eye(5, dtype=torch.float64) - 0.2  # mean row 0, all cosines -1/(N-1)
    assert float(relative_mu(simplex)) == pytest.approx(1.0, abs=1e-15)
    assert float(mean_cosine(simplex)) == pytest.approx(-0.25, rel=1e-12)


def test_antipodal_rows_are_seen_by_the_rank_only() -> None:
    u = random_matrix(1, 6)
    Y = torch.cat([u, -u, u, -u])
    assert float(relative_mu(Y)) == pytest.approx(1.0, abs=1e-15)
    assert float(rank1_residual(Y)) < 1e-15
    assert float(stable_rank(Y)) == pytest.approx(1.0, abs=1e-15)
    assert float(mean_cosine(Y)) == pytest.approx(-1 / 3, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(3, 3), (17, 5), (5, 17), (128, 64), (64, 128), (9, 1), (2, 40)])
def test_against_singular_values(n: int, d: int) -> None:
    Y = random_matrix(n, d, seed=n * d) + 0.7
    sigma = torch.linalg.svdvals(Y)
    residual = float(sigma[1:].norm() / sigma.norm())
    assert float(rank1_residual(Y)) == pytest.approx(residual, rel=1e-12, abs=1e-15)
    assert float(stable_rank(Y)) == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-12)
    centred = torch.linalg.svdvals(Y - Y.mean(0))  # the Frobenius norm is that of all singular values
    assert float(mu(Y)) == pytest.approx(float(centred.norm()), rel=1e-12)
    assert {name: float(value) for name, value in measure_all(Y).items()} == pytest.approx(
        plain_measures(Y.numpy()), rel=1e-11, abs=1e-14
    )


@pytest.mark.parametrize("collapse", [1e-2, 1e-6, 1e-10, 1e-12, 1e-14, 1e-15, 3e-16])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (3, 6), (16, 24)])
def test_collapsed_rows_keep_their_digits(collapse: float, n: int, d: int) -> None:
    Y = (random_matrix(1, d, seed=1) * 3.7 + collapse * random_matrix(n, d, seed=2)).numpy()
    expected_mu, expected_relative = exact_mu(Y)
    assert 0 < expected_relative < 2 * collapse
    assert float(mu(torch.from_numpy(Y))) == pytest.approx(expected_mu, rel=1e-13)
    assert float(relative_mu(torch.from_numpy(Y))) == pytest.approx(expected_relative, rel=1e-13)
    assert float(dong_residual(torch.from_numpy(Y))) == pytest.approx(exact_dong(Y), rel=1e-13)


@pytest.mark.parametrize("collapse", [1e-3, 1e-6, 1e-9, 1e-12, 1e-14, 1e-15])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (3, 6), (12, 20)])
def test_rank1_residual_of_nearly_rank_one(collapse: float, n: int, d: int) -> None:
    """Rows +-c_i u with a small rest."""
    Y = (random_matrix(n, 1, seed=3) @ random_matrix(1, d, seed=4) + collapse * random_matrix(n, d, seed=5)).numpy()
    expected = exact_rank1_residual(Y)
    assert collapse / 10 < expected < 10 * collapse
    assert float(rank1_residual(torch.from_numpy(Y))) == pytest.approx(expected, rel=1e-13, abs=1e-16)


@pytest.mark.parametrize(("n", "d"), [(127, 40), (40, 127), (128, 768), (512, 64), (300, 300), (3, 2)])
def test_rank_one_is_under_the_floor_of_float64(n: int, d: int) -> None:
    """Integers up to 50 times integers: every product is exact, so the rank is one to the last bit."""
    generator = np.random.default_rng(n)
    left = np.where(generator.random((n, 1)) < 0.5, -1.0, 1.0) * generator.integers(1, 50, (n, 1))
    Y = torch.from_numpy(left * generator.integers(-50, 50, (1, d)))
    assert float(rank1_residual(Y)) < 1e-16 < measures.floor(torch.float64)
    assert float(stable_rank(Y)) == 1.0


@pytest.mark.parametrize("decades", [20, 100, 155, 160, 162, 200, 290, 305, 320])
def test_rows_of_very_different_length_have_their_cosines(decades: int) -> None:
    """The squares of the short rows, and then the rows themselves beside the long ones, leave the range of float64."""
    Y = (random_matrix(9, 5, seed=9) + 0.3).numpy()
    Y[::2] *= 10.0 ** -min(decades, 290)
    Y[1] *= 10.0 ** max(0, decades - 290)
    assert float(mean_cosine(torch.from_numpy(Y))) == pytest.approx(exact_mean_cosine(Y), abs=1e-15)
    together = torch.from_numpy(np.stack([Y, np.ones_like(Y), np.full_like(Y, np.nan)]))
    found = mean_cosine(together).tolist()
    assert found[:2] == pytest.approx([exact_mean_cosine(Y), 1.0], abs=1e-15)
    assert math.isnan(found[2])


def test_identical_rows_are_zero() -> None:
    Y = random_matrix(1, 40, seed=6).expand(127, 40)  # 127 equal numbers need not have that number as their mean
    assert float(mu(Y)) == 0.0
    assert float(relative_mu(Y)) == 0.0
    assert float(dong_residual(Y)) == 0.0
    assert float(rank1_residual(Y)) < 1e-16
    assert float(mean_cosine(Y)) == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("exponent", [-1000, -600, 600, 1000])
def test_scale_leaves_everything_but_mu(exponent: int) -> None:
    """2^+-1000 is about 1e+-301; a power of two changes not one bit."""
    Y = random_matrix(6, 4, seed=7)
    base, scaled = measure_all(Y), measure_all(torch.ldexp(Y, torch.tensor(exponent)))
    for name in measures.MEASURES:
        expected = float(base[name]) * (2.0**exponent if name == "mu" else 1.0)
        assert float(scaled[name]) == expected, name


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_decimal_scale(scale: float) -> None:
    found = measure_all(TV1 * scale)
    assert float(found["mu"]) == pytest.approx(math.sqrt(34) * scale, rel=1e-12)
    assert float(found["relative_mu"]) == pytest.approx(0.5, rel=1e-12)
    assert float(found["rank1_residual"]) == pytest.approx(0.05411214359, rel=1e-9)


def test_low_precision_input_is_measured_in_float64() -> None:
    big = (TV1 * 2.0**120).float()  # squares overflow float32
    assert float(mu(big)) == pytest.approx(math.sqrt(34) * 2.0**120, rel=1e-14)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert relative_mu(TV1.to(dtype)).dtype == torch.float64
        assert float(relative_mu(TV1.to(dtype))) == pytest.approx(0.5, rel=1e-15)


def test_batch_is_a_loop() -> None:
    Y = random_matrix(2 * 3 * 5, 4, seed=8).reshape(2, 3, 5, 4)
    Y[0, 1] = float("nan")
    Y[1, 0] = 0.0
    Y[1, 2] *= 1e200
    together = measure_all(Y)
    for name, function in FUNCTIONS.items():
        assert together[name].shape == (2, 3)
        for i in range(2):
            for j in range(3):
                alone = float(function(Y[i, j]))
                assert float(together[name][i, j]) == pytest.approx(alone, rel=1e-14, nan_ok=True), (name, i, j)
                assert math.isnan(alone) == ((i, j) == (0, 1) or ((i, j) == (1, 0) and name != "mu")), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_give_nan_and_a_status(bad: float) -> None:
    Y = torch.stack([TV1, TV1, TV1])
    Y[1, 2, 0] = bad
    found = measure_all(Y)
    for name in measures.MEASURES:
        assert found[name].isnan().tolist() == [False, True, False], name
    assert measures.status(Y) == ["ok", "nan" if math.isnan(bad) else "overflow", "ok"]


def test_infinity_beside_nan_is_an_overflow() -> None:
    Y = TV1.clone()
    Y[0, 0], Y[1, 1] = math.nan, math.inf
    assert measures.status(Y[None]) == ["overflow"]


def test_zero_matrix() -> None:
    found = measure_all(torch.zeros(4, 3))
    assert float(found.pop("mu")) == 0.0
    assert all(value.isnan() for value in found.values())


def test_a_zero_row_has_no_cosine() -> None:
    Y = TV1.clone()
    Y[1] = 0.0
    for name, function in FUNCTIONS.items():
        of_directions = name in ("mean_cosine", "angular_mu", "angular_rank1_residual", "effective_rank")
        assert bool(function(Y).isnan()) == of_directions, name


def test_one_row() -> None:
    found = measure_all(TV1[:1])
    assert float(found["relative_mu"]) == 0.0
    assert float(found["stable_rank"]) == 1.0
    assert found["mean_cosine"].isnan()
    assert float(found["angular_mu"]) == 0.0
    assert float(found["angular_rank1_residual"]) < 1e-16
    assert [float(found[name]) for name in ("row_norm_ratio", "longest_row", "effective_rank")] == [1.0, 0.0, 1.0]


def two_directions(n: int, k: int, cosine: float, lengths: np.ndarray) -> Tensor:
    """k rows along (1, 0, 0), n - k along (c, sqrt(1 - c^2), 0), of these lengths."""
    rows = np.array([[1.0, 0.0, 0.0]] * k + [[cosine, math.sqrt(1 - cosine**2), 0.0]] * (n - k))
    return torch.from_numpy(rows * lengths[:, None])


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 0.8, 1.0])
@pytest.mark.parametrize(("n", "k"), [(7, 3), (128, 1), (128, 64), (2, 1)])
def test_two_directions_whatever_the_lengths(n: int, k: int, cosine: float) -> None:
    """The Gram matrix of the directions has the eigenvalues n / 2 +- sqrt(n^2 / 4 - k (n - k) (1 - c^2)), and no others."""
    lengths = 10.0 ** np.random.default_rng(n).uniform(-140, 140, n)
    Y = two_directions(n, k, cosine, lengths)
    half = math.sqrt(n**2 / 4 - k * (n - k) * (1 - cosine**2))
    # As a product over the other eigenvalue, so that no digits cancel.
    p = np.array([(n / 2 + half) / n, k * (n - k) * (1 - cosine**2) / (n / 2 + half) / n])
    square = 2 * k * (n - k) * (1 - cosine) / n**2
    assert float(angular_mu(Y)) == pytest.approx(math.sqrt(square), rel=1e-13, abs=1e-15)
    assert float(angular_rank1_residual(Y)) == pytest.approx(math.sqrt(p[1]), rel=1e-12, abs=1e-15)
    assert float(effective_rank(Y)) == pytest.approx(math.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-12)
    assert float(row_norm_ratio(Y)) == pytest.approx(lengths.max() / np.median(lengths), rel=1e-13)
    assert float(longest_row(Y)) == lengths.argmax()


@pytest.mark.parametrize("times", [1.0, 10.0, 100.0, 1000.0])
def test_one_long_row_decides_what_is_not_angular(times: float) -> None:
    """Gaussian rows, and one of them longer: an attention sink. In the limit relative mu is sqrt(1 - 1/N), whatever the others
    are, and the rank-1 residual 0."""
    Y = random_matrix(64, 96, seed=1) + 0.8
    before = {name: float(value) for name, value in measure_all(Y).items()}
    Y[5] *= times / float(row_norm_ratio(Y)) * (float(Y.norm(dim=1).max()) / float(Y[5].norm()))
    found = {name: float(value) for name, value in measure_all(Y).items()}
    for name in ("angular_mu", "angular_rank1_residual", "effective_rank", "mean_cosine"):
        assert found[name] == pytest.approx(before[name], rel=1e-12), name
    assert found["angular_mu"] == pytest.approx(0.77, abs=0.01)
    if times > 1:
        assert found["row_norm_ratio"] == pytest.approx(times, rel=1e-2)  # the median moves by half a row
        assert found["longest_row"] == 5
    if times >= 100:
        assert found["relative_mu"] == pytest.approx(math.sqrt(1 - 1 / 64), abs=2e-2)
        assert found["rank1_residual"] < 10 / times


def adversarial(random: np.random.Generator, trial: int) -> np.ndarray:
    """Matrices (N, d): plain, with rows of very different lengths, with one long row, of few directions, with a zero row, one row, d = 1."""
    n, d = int(random.integers(1, 12)), int(random.integers(1, 12))
    Y = random.standard_normal((n, d)) + random.choice([0.0, 0.5, 3.0])
    kind = trial % 8
    if kind == 1:
        Y *= 10.0 ** random.uniform(-150, 150, (n, 1))
    if kind == 2:
        Y[random.integers(n)] *= 10.0 ** random.uniform(1, 150)
    if kind == 3:
        Y = (
            Y[random.integers(0, min(n, 2), n)]
            * random.choice([-1.0, 1.0], (n, 1))
            * 10.0 ** random.uniform(0, 3, (n, 1))
        )
    if kind == 4:
        Y[random.integers(n)] = 0.0
    if kind == 5:
        Y = Y[:, :1]
    if kind == 6:
        Y = Y[:1] * 10.0 ** random.uniform(-140, 140)
    if kind == 7:
        Y = random.integers(-2, 3, (n, d)).astype(float)  # equal and zero rows, ties
    return Y


@pytest.mark.filterwarnings("ignore:invalid value")
def test_measures_of_directions_on_a_thousand_matrices() -> None:
    """Against numpy, from the definitions; what is NaN there is NaN here."""
    random = np.random.default_rng(0)
    for trial in range(1000):
        Y = adversarial(random, trial)
        found = measure_all(torch.from_numpy(Y), table.MEASURES[6:])
        expected = plain_measures(Y) if Y.any() else dict.fromkeys(found, math.nan)
        for name, value in found.items():
            # The least singular values of numpy are right to 1e-16 of the largest; the entropy has their p log p.
            tolerance = {"rel": 1e-12, "abs": 1e-13} if name == "effective_rank" else {"rel": 1e-13, "abs": 1e-14}
            assert float(value) == pytest.approx(expected[name], nan_ok=True, **tolerance), (name, trial)


@pytest.mark.parametrize("collapse", [1e-2, 1e-6, 1e-10, 1e-14])
@pytest.mark.parametrize(("n", "d"), [(5, 3), (3, 6), (12, 16)])
def test_collapsed_directions_keep_their_digits(collapse: float, n: int, d: int) -> None:
    """Against 60 digits; the lengths differ by 1 to 1e6."""
    lengths = 10.0 ** np.random.default_rng(3).uniform(0, 6, (n, 1))
    Y = ((random_matrix(1, d, seed=1) * 3.7 + collapse * random_matrix(n, d, seed=2)).numpy()) * lengths
    with mpmath.workdps(60):
        rows = [[mpmath.mpf(float(y)) for y in row] for row in Y]
        units = [[y / mpmath.norm(row) for y in row] for row in rows]
        means = [sum(column) / n for column in zip(*units, strict=True)]
        square = sum((u - m) ** 2 for row in units for u, m in zip(row, means, strict=True)) / n
        expected = float(mpmath.sqrt(square))
        sigma = mpmath.svd_r(mpmath.matrix(units), compute_uv=False)
        rank1 = float(mpmath.sqrt(sum(s * s for s in sigma) - max(sigma) ** 2) / mpmath.sqrt(n))
    # The rows scaled to length 1 are rounded to half a spacing each.
    assert float(angular_mu(torch.from_numpy(Y))) == pytest.approx(expected, rel=1e-13, abs=2e-16)
    assert float(angular_rank1_residual(torch.from_numpy(Y))) == pytest.approx(rank1, rel=1e-13, abs=2e-16)


def beside_one_direction(n: int, b: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
    """Rows e_0 + b_i e_i, and their measures: the Gram matrix is that of ones and a diagonal of b_i^2, whose largest eigenvalue
    solves sum 1 / (x - b_i^2) = 1."""
    Y = torch.zeros(n, n + 1, dtype=torch.float64)
    Y[:, 0] = 1.0
    Y[torch.arange(n), torch.arange(n) + 1] = torch.from_numpy(b)
    Y = Y.to(dtype)
    with mpmath.workdps(50):
        squares = [mpmath.mpf(float(y)) ** 2 for y in Y[torch.arange(n), torch.arange(n) + 1]]
        x = mpmath.findroot(lambda x: sum(1 / (x - s) for s in squares) - 1, n + max(squares))
        trace = n + sum(squares)
        centred = mpmath.sqrt(sum(squares) * (1 - mpmath.mpf(1) / n))
        lengths = [mpmath.sqrt(1 + s) for s in squares]
        along = sum(1 / length for length in lengths)  # of the sum of the directions
        aligned = along**2 + sum(s / length**2 for s, length in zip(squares, lengths, strict=True))
        expected = {
            "mu": centred, "relative_mu": centred / mpmath.sqrt(trace), "rank1_residual": mpmath.sqrt((trace - x) / trace),
            "angular_mu": mpmath.sqrt(1 - aligned / n**2), "mean_cosine": (aligned - n) / (n * (n - 1)),
        }  # fmt: skip
        return Y, {name: float(value) for name, value in expected.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e-3, 0.05, 0.1, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("n", [5, 60, 128])
def test_every_way_there_is_to_little_beside_one_direction(n: int, size: float, dtype: torch.dtype) -> None:
    """From collapsed, over the border of each short way, to spread out; b_i differ by up to a factor of ten."""
    b = size * np.random.default_rng(n).uniform(0.1, 1.0, n)
    Y, expected = beside_one_direction(n, b, dtype)
    found = measure_all(Y, list(expected))
    for name, value in expected.items():
        tolerance = {"abs": 1e-15} if name == "mean_cosine" else {"rel": 1e-13}
        assert float(found[name]) == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("kind", ["massive", "antipodal", "lengths", "few directions"])
@pytest.mark.parametrize(("n", "d"), [(96, 130), (130, 96)])
def test_large_excerpts_whose_gram_matrix_does_not_do(n: int, d: int, kind: str) -> None:
    """Against numpy's singular values, which are right to 1e-16 of the largest."""
    random = np.random.default_rng(n)
    Y = 1e-3 * random.standard_normal((n, d)) + random.standard_normal(d)
    if kind == "massive":
        Y = random.standard_normal((n, d))
        Y[3] *= 1e3
    if kind == "antipodal":
        Y *= random.choice([-1.0, 1.0], (n, 1))
    if kind == "lengths":
        Y *= random.uniform(0.2, 1.2, (n, 1))
    if kind == "few directions":
        Y = random.standard_normal((n, 3)) @ random.standard_normal((3, d))
    found = {name: float(value) for name, value in measure_all(torch.from_numpy(Y)).items()}
    assert found == pytest.approx(plain_measures(Y), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_measures_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    """Bits, of excerpts that are shared out among threads and of such that are not."""
    for shape in ((3, 64, 2048), (3, 20, 30)):
        Y = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
        Y[1] = Y[1, :1] + 1e-4 * Y[1]
        alone = [measure_all(excerpt) for excerpt in Y]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = measure_all(Y)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        for name, value in found.items():
            assert torch.equal(value, torch.stack([one[name] for one in alone])), (name, shape)


def test_a_gradient_goes_through_a_measure() -> None:
    Y = TV1.clone().requires_grad_()
    mu(Y).backward()
    assert Y.grad is not None
    torch.testing.assert_close(Y.grad, (TV1 - TV1.mean(0)) / (TV1 - TV1.mean(0)).norm(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("terms", [16, 64, 256, 1024, 3072])
def test_a_floor_is_about_the_rounding_of_two_products(terms: int) -> None:
    """Against float64: 0.21 eps sqrt(n / 2) as long as sums are added one by one, no more than that of 420 terms ever."""
    generator = torch.Generator().manual_seed(terms)
    X, W = (torch.randn(64, terms, generator=generator) for _ in range(2))
    exact = X.double() @ W.double().T
    error = float((X @ W.T - exact).norm() / exact.norm())
    assert error < 0.21 * 2.0**-23 * math.sqrt(420 / 2)
    assert math.sqrt(2) * error < 1.1 * measures.floor(torch.float32)
    if terms <= 64:
        assert error == pytest.approx(0.21 * 2.0**-23 * math.sqrt(terms / 2), rel=0.3)
    X, W = X.bfloat16(), W.bfloat16()
    exact = X.double() @ W.double().T
    rounded = float((X @ W.T - exact).norm() / exact.norm())
    assert rounded == pytest.approx(0.21 * 2.0**-7, rel=0.1)
    assert math.sqrt(12) * rounded < measures.floor(torch.bfloat16)


def test_floors() -> None:
    assert measures.floor(torch.float32) == 2.0**-21
    assert measures.floor(torch.bfloat16) == 2.0**-7
    assert measures.floor(torch.float64) == 2.0**-50


def moved_rows(Y: np.ndarray, b: float, random: np.random.Generator, kind: int) -> np.ndarray:
    """E with ||E_i|| = b ||Y_i||: at random, all rows one way, or towards and away from the leading singular vector."""
    E = random.standard_normal(Y.shape)
    if kind == 1:
        E[:] = E[0]
    if kind > 1:
        v = np.linalg.svd(Y)[2][0]
        E = (3 - 2 * (kind - 1)) * np.where(Y @ v < 0, -1.0, 1.0)[:, None] * v
    return E * b * np.linalg.norm(Y, axis=1, keepdims=True) / np.linalg.norm(E, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "d"), [(3, 4), (6, 3), (2, 2), (5, 5), (12, 7)])
def test_bounds_hold_for_rows_that_move(n: int, d: int) -> None:
    random = np.random.default_rng(n * d)
    square = np.linalg.qr(random.standard_normal((max(n, d),) * 2))[0][:n, :d]
    closest: dict[str, float] = dict.fromkeys(measures.MEASURES, 0.0)
    for trial in range(300):
        Y = [random.standard_normal((n, d)), 1.0 + 10.0 ** -(trial % 5) * random.standard_normal((n, d)), square][
            trial % 3
        ]
        b = 10.0 ** -(1 + trial % 7)
        before, after = plain_measures(Y), plain_measures(Y + moved_rows(Y, b, random, trial % 4))
        values = {name: np.array([value]) for name, value in before.items()}
        found = perturbation.bounds(values, np.array([b]), n, d)
        before["mu"], after["mu"] = math.log10(before["mu"]), math.log10(after["mu"])
        for name, bound in found.items():
            difference = abs(after[name] - before[name]) - 1e-13
            assert difference <= bound[0], (name, trial)
            closest[name] = max(closest[name], difference / bound[0])
    tight = ("mu", "relative_mu", "rank1_residual", "stable_rank", "angular_mu", "angular_rank1_residual")
    assert all(closest[name] > 0.5 for name in tight), closest


def test_bound_of_the_stable_rank_grows_with_its_square() -> None:
    """s = 1 / (1 - r^2) has the slope 2 r s^2: 1224.7 at s = 25, r^2 = 24/25."""
    r = math.sqrt(24 / 25)
    values = {name: np.array([r]) for name in measures.MEASURES} | {"stable_rank": np.array([25.0])}
    found = perturbation.bounds(values, np.array([1e-9]), 128, 64)
    assert float(found["stable_rank"][0]) == pytest.approx(2 * r * 625 * 1e-9, rel=1e-5)
    assert float(found["mean_cosine"][0]) == 2e-9
    tiny = perturbation.bounds(values, np.array([1e-20]), 128, 64)  # under the spacing of every value
    assert float(tiny["stable_rank"][0]) == pytest.approx(2 * r * 625 * 1e-20, rel=1e-12)
    assert float(tiny["mu"][0]) == pytest.approx(1e-20 / r / math.log(10), rel=1e-12)
    D2 = 4 * (64 + 8) * 1e-20 + r**2 * (64 + 8) * 1e-20  # the change of D^2 to first order
    assert float(tiny["dong_residual"][0]) == pytest.approx(D2 / (2 * r), rel=1e-12)
    none = perturbation.bounds(values | {"dong_residual": np.array([0.0])}, np.array([0.0]), 128, 64)
    assert {float(bound[0]) for bound in none.values()} == {0.0}
    assert all(np.isnan(bound[0]) for bound in perturbation.bounds(values, np.array([np.nan]), 128, 64).values())


@given(MATRICES)
def test_ranges(Y: np.ndarray) -> None:
    found = {name: float(value) for name, value in measure_all(torch.from_numpy(Y)).items()}
    n, d = Y.shape
    assert 0.0 <= found["relative_mu"] <= 1.0
    assert 0.0 <= found["rank1_residual"] <= found["relative_mu"] * (1 + 1e-12) + 1e-15
    assert 1.0 <= found["stable_rank"] <= min(n, d) * (1 + 1e-12)
    assert 0.0 <= found["dong_residual"] < 2.0
    assert math.isnan(found["mean_cosine"]) or -1 / (n - 1) - 1e-12 <= found["mean_cosine"] <= 1 + 1e-12


@given(MATRICES)
def test_mu_is_exact(Y: np.ndarray) -> None:
    expected_mu, expected_relative = exact_mu(Y)
    size = float(np.linalg.norm(Y))
    assert float(mu(torch.from_numpy(Y))) == pytest.approx(expected_mu, rel=1e-12, abs=1e-15 * size)
    assert float(relative_mu(torch.from_numpy(Y))) == pytest.approx(expected_relative, rel=1e-12, abs=1e-15)


@given(MATRICES, st.integers(-290, 290), st.randoms(use_true_random=False))
def test_invariance(Y: np.ndarray, decade: int, random: object) -> None:
    """Under a scale and a permutation of the rows."""
    order = list(range(len(Y)))
    random.shuffle(order)  # type: ignore[attr-defined]
    base = measure_all(torch.from_numpy(Y))
    moved = measure_all(torch.from_numpy(Y[order] * 10.0**decade))
    lost = np.abs(Y[Y != 0]).min() * 10.0**decade < 1e-300  # entries that became subnormal
    for name in set(measures.MEASURES) - {"mu", "longest_row"}:
        if not lost:
            assert float(moved[name]) == pytest.approx(float(base[name]), rel=1e-9, abs=1e-14, nan_ok=True), name


@given(MATRICES)
def test_rank1_residual_is_that_of_the_singular_values(Y: np.ndarray) -> None:
    sigma = np.linalg.svd(Y, compute_uv=False)
    expected = np.linalg.norm(sigma[1:] / sigma[0]) / np.linalg.norm(sigma / sigma[0])
    assert float(rank1_residual(torch.from_numpy(Y))) == pytest.approx(expected, rel=1e-9, abs=3e-15)


@pytest.mark.parametrize(("n", "d"), [(32, 256), (17, 24), (200, 64)])
def test_measures_do_not_depend_on_what_is_measured_beside(n: int, d: int) -> None:
    """Bits, of one matrix alone and of the same among others."""
    Y = torch.randn(5, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1.0
    together = measures.measure_all(Y)
    for size in (1, 2, 3):
        parts = [measures.measure_all(Y[i : i + size]) for i in range(0, 5, size)]
        for name, whole in together.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), whole), (size, name)


def test_a_small_change_of_mu_is_not_rounded_to_none() -> None:
    """-log10(1 - x) is x / ln 10 for an x that 1 - x does not show; infinite where all of relative mu may be gone."""
    found = perturbation.log10_mu_change(np.array([0.5, 0.5, 0.25, 0.5]), np.array([1e-20, 0.25, 0.25, np.nan]))
    np.testing.assert_allclose(found, [2e-20 / np.log(10), np.log10(2), np.inf, np.nan], rtol=1e-14)
