"""The kernels of the measures, interpreted on CPU, against extended precision and built-in singular values."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lscollapse import measures
from lscollapse.core import table
from lscollapse.models.kernels import fused_measures
from lscollapse.models.kernels.fused_measures import BySquaring, Fused
from tests.launches import Launches

OF_DIRECTIONS = ("mean_cosine", "effective_rank", *table.ANGULAR.values())
SHAPES = [(128, 96), (100, 33), (16, 64), (7, 20), (20, 7), (5, 1), (2, 40)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(Y: Tensor) -> dict[str, float]:
    """Of one matrix, in 64 bits of mantissa; the singular values in 40 digits, of the smaller Gram matrix."""
    A = Y.numpy(force=True).astype(np.longdouble)
    n = len(A)
    R = A - A.mean(0)
    units = A / np.sqrt((A**2).sum(1, keepdims=True))
    one_inf = [math.sqrt(np.abs(B).sum(0).max() * np.abs(B).sum(1).max()) for B in (R, A)]
    mu, size = np.sqrt((R**2).sum()), np.sqrt((A**2).sum())
    lengths = np.sqrt((A**2).sum(1))
    with mpmath.workdps(40):
        directions = [[mpmath.mpf(y) / mpmath.norm(row) for y in row] for row in Y.tolist()]
        U = mpmath.matrix(directions)
        turned = mpmath.eigsy(U * U.T if n <= A.shape[1] else U.T * U, eigvals_only=True)
        M = mpmath.matrix(Y.tolist() if n <= A.shape[1] else Y.T.tolist())
        sigma = mpmath.eigsy(M * M.T, eigvals_only=True)
        residual = float(mpmath.sqrt((mpmath.fsum(sigma) - max(sigma)) / mpmath.fsum(sigma)))
        rank = float(mpmath.fsum(sigma) / max(sigma))
        angular_rank1 = float(mpmath.sqrt((mpmath.fsum(turned) - max(turned)) / n))
        p = [q / n for q in turned if q > 1e-30]
        effective = float(mpmath.exp(-mpmath.fsum(q * mpmath.log(q) for q in p)))
    return {
        "mu": float(mu), "relative_mu": float(mu / size), "rank1_residual": residual, "stable_rank": rank,
        "mean_cosine": float(((units.sum(0) ** 2).sum() - n) / (n * (n - 1))), "dong_residual": one_inf[0] / one_inf[1],
        "angular_mu": float(np.sqrt(((units - units.mean(0)) ** 2).sum() / n)), "angular_rank1_residual": angular_rank1,
        "row_norm_ratio": float(lengths.max() / np.median(lengths)), "effective_rank": effective,
        "longest_row": float((lengths >= (1 - 2**-10) * lengths.max()).argmax()),
    }  # fmt: skip


def assert_measures(found: dict[str, Tensor], i: int, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        tolerance = {"rel": 1e-14, "abs": 0.0}
        tolerance["abs"] = {"rank1_residual": 1e-16, "mean_cosine": 1e-15}.get(name, 0.0)
        if name in table.ANGULAR.values():  # rows scaled to length 1 are rounded
            tolerance["abs"] = 2e-16
        if name == "effective_rank":
            tolerance["rel"] = 1e-13
        if name == "stable_rank":
            tolerance["rel"] = value * 1e-15
        assert found[name].dtype == torch.float64
        assert float(found[name][i]) == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 24), (7, 20), (20, 7), (5, 1), (2, 40)])
def test_against_extended_precision(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """At random, near one direction, and near rank one with rows of very different length."""
    n, d = shape
    rank1 = normal(n, 1) * 2.0 ** torch.arange(n)[:, None] % 9 @ normal(1, d, seed=2)
    Y = torch.stack([normal(n, d), normal(1, d, seed=1) + 1e-2 * normal(n, d), rank1 + 1e-3 * normal(n, d)]).to(dtype)
    found = measures.measure_all(Fused(Y))
    for i, matrix in enumerate(Y):
        assert_measures(found, i, exact(matrix.double()))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_agree_to_their_last_bits(shape: tuple[int, int]) -> None:
    """One spacing of float32 apart: mu is that of few small integers."""
    n, d = shape
    spacings = torch.randint(0, 2, (2, n, d), generator=torch.Generator().manual_seed(n)).double()
    Y = 1.5 + spacings * 2.0**-23
    found = measures.measure_all(Fused(Y.float()))
    expected = (spacings - spacings.mean(1, keepdim=True)).norm(dim=(1, 2)) * 2.0**-23
    torch.testing.assert_close(found["mu"], expected, rtol=1e-14, atol=0.0)
    same = measures.measure_all(Fused(Y[:, :1].float().expand(-1, n, -1)))
    assert same["mu"].tolist() == same["relative_mu"].tolist() == same["dong_residual"].tolist() == [0.0, 0.0]
    assert float(same["rank1_residual"].max()) < 1e-16
    torch.testing.assert_close(same["mean_cosine"], torch.ones(2, dtype=torch.float64), rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("n", [2, 16, 64, 128])
@pytest.mark.parametrize("spacings", [0, 1, 3, 1000, 2**20])
def test_orthogonal_rows(n: int, spacings: int) -> None:
    """s_i times the rows of a Hadamard matrix have the singular values s_i sqrt(n): the largest, and one below it."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    s = torch.full((n,), 0.25, dtype=torch.float64)
    s[0], s[1] = 1.0, 1.0 - spacings * 2.0**-24
    found = measures.measure_all(Fused((s[:, None] * H).float()[None]))
    energy = s.square().sum()
    assert float(found["stable_rank"]) == pytest.approx(float(energy), rel=float(energy) * 1e-15)
    assert float(found["rank1_residual"]) == pytest.approx(float((s[1:].square().sum() / energy).sqrt()), rel=1e-15)
    assert float(found["mean_cosine"]) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("gap", [0.0, 2.0**-53, 1e-15, 1e-14, 1e-13, 1e-12, 7e-12, 1e-10, 1e-7, 1e-3])
def test_near_singular_values(gap: float) -> None:
    """float64 numbers, of which torch makes the sums and the kernel the eigenvector."""
    sigma = torch.full((40,), 0.3, dtype=torch.float64)
    sigma[:3] = 1.0 - gap * torch.arange(3)
    Y = torch.linalg.qr(normal(2, 40, 40))[0] @ torch.diag(sigma) @ torch.linalg.qr(normal(2, 50, 40))[0].mT
    expected = float(sigma[1:].norm() / sigma.norm())
    for matrices in (Y, Y.mT * 1e250):
        assert BySquaring(matrices).rank1_residual.tolist() == pytest.approx([expected] * 2, rel=2e-15)


def test_a_large_excerpt() -> None:
    Y = (normal(1, 128, 640) + 0.5).float()
    found = measures.measure_all(Fused(Y))
    sigma = torch.linalg.svdvals(Y[0].double())
    assert float(found["stable_rank"]) == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-13)
    assert float(found["rank1_residual"]) == pytest.approx(float(sigma[1:].norm() / sigma.norm()), rel=1e-13)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 120])
def test_scale_leaves_everything_but_mu(exponent: int) -> None:
    """Not one bit; the squares of these would leave float32."""
    Y = (normal(2, 10, 37) * 16).round().float()
    base, scaled = measures.measure_all(Fused(Y)), measures.measure_all(Fused(torch.ldexp(Y, torch.tensor(exponent))))
    for name in measures.MEASURES:
        assert torch.equal(scaled[name], base[name] * (2.0**exponent if name == "mu" else 1.0)), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
def test_what_is_not_finite_is_nan_and_stays_apart() -> None:
    Y = normal(6, 9, 40).float()
    alone = measures.measure_all(Fused(Y[:1]))
    Y[1, 3, 4], Y[2, 0, 39], Y[3, 8, 0], Y[4], Y[5, 2] = math.nan, math.inf, -math.inf, 0.0, 0.0
    found = measures.measure_all(Fused(Y))
    for name in measures.MEASURES:
        nan = [False, True, True, True, name != "mu", name in OF_DIRECTIONS]
        assert found[name].isnan().tolist() == nan, name
        assert torch.equal(found[name][:1], alone[name]), name
    assert float(found["mu"][4]) == 0.0


def test_one_row() -> None:
    found = measures.measure_all(Fused(normal(2, 1, 50).float()))
    assert found["relative_mu"].tolist() == [0.0, 0.0] and found["stable_rank"].tolist() == [1.0, 1.0]
    assert found["mean_cosine"].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_measure_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of CONTRIBUTING.md, whose sum is made of Y in float64."""
    monkeypatch.setitem(
        measures.MEASURES,
        "longest_share",
        lambda unit, size: unit.square().sum(-1).amax(-1) / size.square(),
    )
    Y = normal(3, 4, 6).float()
    Y[0, 1:], Y[1, 0, 0] = 0.0, math.nan
    found = measures.measure_all(Fused(Y), ["longest_share"])["longest_share"]
    share = Y[2].double().square().sum(-1)
    assert found.tolist() == pytest.approx([1.0, math.nan, float(share.max() / share.sum())], rel=1e-14, nan_ok=True)


def test_kernels_that_are_right_are_used() -> None:
    fused_measures.fault.cache_clear()
    assert fused_measures.fault(torch.device("cpu")) == ""


@pytest.mark.parametrize("wrong", [10.0, math.nan, "does not launch"])
def test_kernels_that_are_wrong_are_not_used(wrong: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused_measures._leading

    def off(room: Tensor, n: int) -> Tensor:
        if isinstance(wrong, str):
            raise RuntimeError(f"the kernel\n{wrong}")
        return right(room, n) * torch.tensor([wrong] + [1.0] * (n - 1))  # a factor of all would be made good

    monkeypatch.setattr(fused_measures, "_leading", off)
    fused_measures.fault.cache_clear()
    said = fused_measures.fault(torch.device("cpu"))
    fused_measures.fault.cache_clear()
    assert ("do not run here" if isinstance(wrong, str) else "are off by") in said and "\n" not in said
    assert said.endswith("torch operations run instead")


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four kernels and a dozen operations on (B,) numbers; a meta tensor has nothing that could be read back."""
    kernels: list[str] = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: kernels.append(self.fn.__name__))
    with Launches() as launches:
        found = measures.measure_all(Fused(torch.empty(352, 128, 2560, device="meta")), table.DEFAULT_MEASURES)
    assert all(value.shape == (352,) for value in found.values())
    assert kernels == ["sums_kernel", "gram_kernel", "leading_kernel", "rest_kernel"]
    assert launches.counts.total() <= 14, launches.counts


def test_cost() -> None:
    """Of 2.7B's X: 4 float32 numbers read, half a Gram matrix and its diagonal, and 10 squarings of that."""
    reads, _, products, _ = fused_measures.cost(128, 2560, squarings=10)
    assert reads == 4 * 128 * 2560 * 4
    assert products == 0.75 * (2 * 128**2 * 2560 + 10 * 2 * 128**3)
