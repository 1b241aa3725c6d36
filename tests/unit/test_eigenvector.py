"""The energy that the two leading eigenvectors leave, against singular values that are built in; and what a GPU would do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lscollapse import eigenvector, measures
from lscollapse.core.table import DEFAULT_MEASURES
from lscollapse.one_by_one import OneByOne
from lscollapse.passes import Shared
from tests.launches import Launches
from tests.unit.test_measures import exact_mean_cosine, exact_rank1_residual

GAPS = [0.0, 2.0**-55, 2.0**-53, 1e-15, 1e-14, 1e-13, 1e-12, 7e-12, 1e-11, 1e-10, 1e-9, 1e-7, 1e-5, 1e-3]
HOW = {"one by one": OneByOne, "together": Shared}


def rank1_residual(Y: Tensor, how: str) -> Tensor:
    shared = HOW[how](Y.reshape(-1, *Y.shape[-2:]))
    return measures.measure_all(shared, ["rank1_residual"])["rank1_residual"]


def with_singular_values(sigma: Tensor, m: int, batch: int = 4) -> Tensor:
    """(batch, n, m) of random singular vectors."""
    generator = torch.Generator().manual_seed(len(sigma))
    n = len(sigma)
    left = torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(batch, m, n, generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(sigma) @ right.mT


@pytest.mark.parametrize("near", [2, 3, 16])
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("how", HOW)
def test_near_singular_values(how: str, gap: float, near: int) -> None:
    """Also at the worst gap for 36 squarings, 7e-12, where they would lose 1e-12; and where all agree, of which LAPACK may find
    none."""
    sigma = torch.full((16,), 0.3, dtype=torch.float64)
    sigma[:near] = 1.0 - gap * torch.arange(near)
    expected = float(sigma[1:].norm() / sigma.norm())
    found = rank1_residual(with_singular_values(sigma, 40), how)
    assert found.tolist() == pytest.approx([expected] * 4, rel=2e-15)


@pytest.mark.parametrize("small", [1e-2, 1e-8, 1e-12, 1e-14, 1e-16])
@pytest.mark.parametrize(("n", "m"), [(6, 9), (9, 6), (2, 2), (12, 1)])
def test_nearly_rank_one(small: float, n: int, m: int) -> None:
    generator = np.random.default_rng(n)
    Y = generator.standard_normal((n, 1)) @ generator.standard_normal((1, m)) + small * generator.standard_normal(
        (n, m)
    )
    expected = exact_rank1_residual(Y)
    for how in HOW:
        assert float(rank1_residual(torch.from_numpy(Y), how)) == pytest.approx(expected, rel=1e-14, abs=1e-16)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_of_any_size(scale: float) -> None:
    Y = with_singular_values(torch.tensor([1.0, 0.9, 0.1], dtype=torch.float64), 7)
    expected = math.sqrt(0.82 / 1.82)
    assert rank1_residual(Y * scale, "together").tolist() == pytest.approx([expected] * 4, rel=1e-14)


def test_no_energy_is_lost_by_many_equal_eigenvalues_or_one() -> None:
    gram = np.eye(300)
    for leading in (eigenvector.by_lapack, lambda G: eigenvector.by_squaring(torch.from_numpy(G)).numpy()):
        u = leading(gram)
        assert float(u @ gram @ u) == pytest.approx(1.0, rel=1e-15)
        assert np.abs(leading(gram[:1, :1])).tolist() == [1.0]


@pytest.mark.parametrize("second", [0.0, 1e-3, 0.3, 0.6, 0.8, 0.99, 1.0])
def test_powers_prove_what_they_find_or_find_nothing(second: float) -> None:
    """Eigenvalues 1, `second` and a hundred small ones, of trace 1; the diagonal ones are found at the first step."""
    values = np.concatenate([[1.0, second], np.full(98, 1e-3)]) / (1.098 + second)
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 100)))[0]
    for gram in (Q @ np.diag(values) @ Q.T, np.diag(values), np.diag(values[::-1])):
        assert eigenvector.by_powers(gram) is not None or second > 0.7
        vector, energy = eigenvector.leading(gram)
        assert energy == pytest.approx(values[0], rel=1e-14)
        if second < 1:
            assert np.linalg.norm(gram @ vector - values[0] * vector) < 1e-8


def test_powers_prove_nothing_from_a_start_without_the_leading_vector() -> None:
    """The longest row is alone in its direction; a longer singular vector is shared by others."""
    gram = np.zeros((64, 64))
    gram[0, 0], gram[1:, 1:] = 0.2, 0.8 / 63
    assert eigenvector.by_powers(gram) is None
    assert eigenvector.leading(gram)[1] == pytest.approx(0.8, rel=1e-14)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_no_vector_of_a_matrix_without_a_trace(bad: float) -> None:
    with np.errstate(invalid="ignore"):
        assert math.isnan(eigenvector.leading(np.full((64, 64), bad))[1])


def test_what_is_not_a_number_stays_apart() -> None:
    Y = with_singular_values(torch.tensor([1.0, 0.5], dtype=torch.float64), 5)
    Y[1], Y[2, 0, 0], Y[3, 1, 1] = 0.0, math.nan, math.inf
    found = rank1_residual(Y, "together").tolist()
    assert found[0] == pytest.approx(math.sqrt(0.2), rel=1e-14)
    assert all(math.isnan(value) for value in found[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 16, 8), (1, 4, 4), (5, 7)])
def test_nothing_is_read_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A meta tensor takes a GPU's branches and has nothing that could be read."""
    with Launches() as launches:
        found = measures.measure_all(torch.empty(shape, dtype=dtype, device="meta"), DEFAULT_MEASURES)
    assert all(value.shape == shape[:-2] and value.dtype == torch.float64 for value in found.values())
    assert launches.counts["bmm"] >= eigenvector.SQUARINGS
    with pytest.raises(RuntimeError):
        bool(found["mu"].sum() > 0)


def test_rows_of_any_length_have_their_cosines_where_a_gpu_would_be() -> None:
    generator = np.random.default_rng(0)
    Y = generator.standard_normal((9, 5)) * 10.0 ** generator.integers(-290, 290, (9, 1))
    found = measures.measure_all(Shared(torch.from_numpy(Y)[None]))["mean_cosine"]
    assert float(found) == pytest.approx(exact_mean_cosine(Y), abs=1e-15)
