"""Sums in the carried scale against exact fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from lscollapse.models.numerics.carried import HIGH, LOW, STEEPEST, Carried

LAMBDAS = (0.0, -0.0, 5e-324, -1e-320, 1e-46, 1e-40, 0.3, -1.0, 1.0, 64.0, -1e14, 1e35, 1e39, -1e300, 1.7e308)


def exact(X: torch.Tensor, exponent: torch.Tensor) -> list[list[Fraction]]:
    """The numbers that X, (B, N, d), stands for."""
    return [
        [Fraction(x) * Fraction(2) ** int(e) for x in part.flatten().tolist()]
        for part, e in zip(X.double(), exponent, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_chain_of_sums_is_that_of_exact_fractions(dtype: torch.dtype) -> None:
    """Every pair of lambdas in turn, on excerpts of very different size; lam*X + O to the rounding of the dtype."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    X = (X * torch.tensor([1.0, 2.0**30, 2.0**-20])[:, None, None]).to(dtype)
    eps = Fraction(torch.finfo(dtype).eps)
    for first, second in itertools.product(LAMBDAS, repeat=2):
        carried, Y = Carried(X), X
        for lam in (first, second, 0.5):
            O = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
            before, after = exact(Y, carried.exponent), exact(O, torch.zeros(3))
            Y = carried.add(lam, Y, O)
            assert Y.dtype == dtype and torch.isfinite(Y).all() and (carried.exponent >= 0).all()
            for found, xs, os in zip(exact(Y, carried.exponent), before, after, strict=True):
                largest = max(abs(Fraction(lam) * x) + abs(o) for x, o in zip(xs, os, strict=True))
                for y, x, o in zip(found, xs, os, strict=True):
                    assert abs(y - (Fraction(lam) * x + o)) <= 2 * eps * (abs(Fraction(lam) * x) + abs(o)) + (
                        largest * Fraction(2) ** -140  # what leaves the dtype beside the largest entry
                    ), (first, second, lam)


def test_what_is_carried_is_in_range_and_what_needs_no_carrying_is_left_alone() -> None:
    X, O = torch.full((1, 2, 3), 1.5), torch.ones(1, 2, 3)
    for lam in LAMBDAS:
        carried = Carried(X)
        Y = carried.add(lam, X, O)
        if carried.exponent[0]:
            assert 2.0 ** (LOW - 2) <= float(Y.abs().max()) <= 2.0**HIGH
        else:
            assert torch.equal(Y, torch.tensor(lam).to(X) * X + O) or abs(lam) < 1e-37
        assert bool(carried.exponent[0]) == (1.5 * abs(lam) >= 2.0**HIGH)


def test_a_tiny_stream_under_a_huge_lambda_is_raised_as_far_as_the_dtype_allows() -> None:
    X = torch.full((1, 1, 2), 1e-37)
    carried = Carried(X)
    Y = carried.add(1e39, X, torch.zeros_like(X))
    assert float(Y[0, 0, 0]) * 2.0 ** int(carried.exponent[0]) == pytest.approx(1e39 * float(X[0, 0, 0]), rel=1e-6)
    assert math.frexp(1e39)[1] > STEEPEST


def test_the_exponent_is_dropped_with_x_at_lambda_zero_and_comes_back_down_when_the_sum_cancels() -> None:
    carried = Carried(torch.ones(2, 1, 2))
    X = carried.add(1e30, torch.ones(2, 1, 2), torch.zeros(2, 1, 2))
    assert (carried.exponent > 0).all()
    kept, O = carried.down, torch.tensor([3.0, -7.0]).view(2, 1, 1).expand(2, 1, 2)
    assert torch.equal(carried.add(0.0, X, O), O) and not carried.exponent.any()
    carried.down = kept  # the tensor itself was not written to
    true = X * 2.0 ** -kept[:, None, None]
    Y = carried.add(1.0, X, 1.0 - true)
    assert not carried.exponent.any() and float(Y.abs().max()) <= 2e-7 * 1e30


def test_a_tensor_that_was_written_to_is_looked_at_again() -> None:
    X = torch.ones(1, 2, 3)
    carried = Carried(X)
    assert carried.fit(X) is X
    X.mul_(2.0**50)
    Y = carried.fit(X)
    assert float(Y.max()) <= 2.0**LOW and float(Y.max()) * 2.0 ** float(carried.exponent[0]) == 2.0**50


def test_a_tensor_without_a_version_is_carried_too() -> None:
    with torch.inference_mode():
        X = torch.full((1, 2, 3), 2.0**30)
        carried = Carried(X)
        Y = carried.add(2.0**20, X, torch.ones(1, 2, 3))
        assert float(Y.max()) * 2.0 ** float(carried.exponent[0]) == 2.0**50
