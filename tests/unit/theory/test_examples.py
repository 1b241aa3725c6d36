"""The two systems of section 4.2.2 against a 60-digit simulation of the layer map."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from lscollapse.reports.figures.theory import theory_examples_figure
from lscollapse.theory import examples
from lscollapse.theory.arrays import TheoryError, mu, rank1_residual

LAMBDAS = ["-4", "-2.5", "-2", "-1.75", "-1.5", "-1.25", "-1.01", "-0.99", "-0.5", "0", "1", "2"]


def simulate(lam, K, rows, entry):
    """mu at layers 0..K for two unit rows in 60 digits; entry(rows) is M_21, the diagonal of M is 1."""
    with localcontext() as context:
        context.prec = 60
        lam, (x, y), out = Decimal(lam), rows, []
        for _ in range(K + 1):
            out.append(float(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)).sqrt() / Decimal(2).sqrt()))
            e = entry(x, y)
            pair = [(1 + lam) * p for p in x], [(1 + lam) * q + e * p for p, q in zip(x, y, strict=True)]
            x, y = ([p / sum(q * q for q in z).sqrt() for p in z] for z in pair)
    return out


@pytest.mark.parametrize("lam", LAMBDAS)
def test_sys1_closed_form(lam):
    one, zero = Decimal(1), Decimal(0)
    expected = simulate(lam, 25, ((one, zero), (zero, one)), lambda x, y: Decimal(2))
    np.testing.assert_allclose(examples.sys1_exact(float(lam), 25).mu, expected, rtol=1e-11)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize(("a0", "b0"), [(3, 4), (-4, 3), (12, -5)])
def test_sys2_closed_form(lam, a0, b0):
    size = Decimal(round(np.hypot(a0, b0)))
    rows = ((Decimal(1), Decimal(0)), (Decimal(a0) / size, Decimal(b0) / size))
    expected = simulate(lam, 25, rows, lambda x, y: x[0] * y[0] + x[1] * y[1])
    np.testing.assert_allclose(examples.sys2_exact(float(lam), 25, a0, b0).mu, expected, rtol=1e-11)


@pytest.mark.parametrize("lam", [-3.0, -1.25, 0.5])
def test_float64_runs_and_rank1_residual(lam):
    for Ys, exact in (
        (examples.sys1(lam, 5), examples.sys1_exact(lam, 5)),
        (examples.sys2(lam, 5), examples.sys2_exact(lam, 5)),
    ):
        np.testing.assert_allclose([mu(Y) for Y in Ys], exact.mu, atol=1e-12)
        np.testing.assert_allclose([rank1_residual(Y) for Y in Ys], exact.rank1_residual, atol=1e-12)
        np.testing.assert_allclose(exact.relative_mu, exact.mu / np.sqrt(2))


def test_limits_on_either_side_of_the_thresholds():
    for lam in (-2.5, -2.0, -1.5, -1.1):
        assert examples.sys1_exact(lam, 400).mu[-1] == pytest.approx(np.sqrt(2))
        assert examples.sys1_exact(lam, 400).rank1_residual[-1] < 1e-6
    for lam in (-0.9, 0.0, 2.0):
        assert examples.sys1_exact(lam, 400).mu[-1] < 1e-6 and examples.sys2_exact(lam, 400).mu[-1] < 1e-6
    assert examples.sys2_exact(-1.6, 400).mu[-1] == pytest.approx(1.0)
    assert examples.sys2_exact(-2.0, 3).mu[1:] == pytest.approx([1.0, 1.0, 1.0])
    assert examples.sys2_exact(0.0, 400, a0=-1.0).mu[-1] == pytest.approx(np.sqrt(2))
    assert examples.sys2_exact(-0.5, 3, b0=0.0).mu == pytest.approx([0, 0, 0, 0])


def test_undefined_inputs():
    for call in (lambda: examples.sys1(-1.0, 2), lambda: examples.sys2_exact(-1.0, 2)):
        with pytest.raises(TheoryError, match="lam = -1"):
            call()
    for call in (
        lambda: examples.sys2_exact(0.0, 1, 0.0, 0.0),
        lambda: examples.sys1_exact(0.0, 1, alpha=-1.0),
        lambda: examples.table("sys3"),
    ):
        with pytest.raises(TheoryError):
            call()


def test_table_and_its_rows():
    data = examples.table("sys2", [-1.0, 0.0], K=3)
    assert np.isnan(data.mu[0]).all() and data.mu[1, 3] == pytest.approx(0.0878756126)
    assert (data.paper_threshold, data.true_threshold) == (-1.5, -1.0)
    rows = data.rows()
    assert len(rows) == 2 * 2 * 4
    assert rows[7] == {"system": "sys2", "lam": 0.0, "layer": 3, "measure": "mu", "value": pytest.approx(0.0878756126)}
    full = examples.table("sys1")
    assert (full.lambdas[0], full.lambdas[-1], full.mu.shape) == (-4.0, 2.0, (301, 41))


def test_figure_marks_both_thresholds(tmp_path):
    lambdas = np.linspace(-4, 2, 25)
    figure = theory_examples_figure(examples.table("sys1", lambdas, K=6), examples.table("sys2", lambdas, K=6))
    for column, paper in ((0, -2.0), (1, -1.5)):
        marked = {line.get_xdata()[0] for line in figure.axes[column].lines}
        assert marked == {paper, -1.0}
    figure.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size > 0
