"""Rounding: twins, what is made of how far they part, and against the true error, which float64 shows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lscollapse
from lscollapse import Variant
from lscollapse.core import allocation
from lscollapse.data import corpus
from lscollapse.instrument import rounding
from lscollapse.instrument.forward import measure_pass
from lscollapse.models.adapt import adapt
from lscollapse.models.checkpoints import checkpoint
from lscollapse.models.kernels.mamba2_block import Mamba2Block
from tests.equivalence import tiny

FRACTIONS = ("relative_mu", "rank1_residual", "mean_cosine", "dong_residual")
KEY = ["variant", "layer", "measure", "excerpt"]


# --- twins ----------------------------------------------------------------------------------------


def test_a_twin_is_off_by_one_unit_in_every_entry_and_an_original_by_nothing() -> None:
    X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = 2.0**-20
    shaken = rounding.Twins([7, 3]).shaken(X, 2, u)
    assert torch.equal(shaken[:2], X[:2])
    steps = shaken[2:] / X[2:] - 1.0
    torch.testing.assert_close(steps.abs(), torch.full_like(steps, u), rtol=1e-9, atol=0.0)
    share = (steps > 0).double().mean().item()
    assert 0.3 < share < 0.7  # 80 signs


def test_the_signs_are_of_the_excerpt_and_the_layer_whatever_is_beside_it() -> None:
    ones = torch.ones(4, 3, 6)
    together = rounding.Twins([0, 1]).shaken(ones, 5, 0.5)[2:]
    alone = [rounding.Twins([n]).shaken(ones[:2], 5, 0.5)[1] for n in (0, 1)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], rounding.Twins([0]).shaken(ones[:2], 6, 0.5)[1])


def test_the_unit_is_that_of_what_an_arm_computes_in() -> None:
    single, double, half = torch.zeros(1), torch.zeros(1).double(), torch.zeros(1).bfloat16()
    assert rounding.unit(single, torch.float32) == 2.0**-23
    assert rounding.unit(double, torch.float64) == 2.0**-52
    assert rounding.unit(double, torch.float32) == 2.0**-23  # float64 copies with float32 operations left in them
    assert rounding.unit(half, torch.bfloat16) == 2.0**-7
    assert rounding.unit(single, torch.bfloat16) < 2.0**-9  # X itself is float32 there


# --- from twins to an estimate: by hand -----------------------------------------------------------


def rows_of(values: dict[str, list[list[float]]], n: int = 1, floor: float = 1e-9, tokens: int = 100) -> pd.DataFrame:
    """Rows of one variant: for each measure, a list of layers, each with the values of n excerpts and their twins."""
    table = []
    for name, layers in values.items():
        for layer, excerpts in enumerate(layers):
            for excerpt, value in enumerate(excerpts):
                table.append(
                    {
                        "variant": 0, "layer": layer, "measure": name, "excerpt": excerpt, "value": value,
                        "log10": math.log10(value) if value > 0 else math.nan, "status": "ok" if value == value else "overflow",
                        "floor": floor, "n_tokens": tokens, "dtype": "float32",
                    }
                )  # fmt: skip
    return pd.DataFrame(table)


def pair(fraction: list[list[float]], **others: list[list[float]]) -> dict[str, list[list[float]]]:
    """All six measures, of matrices of norm 2, whose fractions are all `fraction`."""
    values = {name: fraction for name in FRACTIONS}
    values["mu"] = [[2.0 * v for v in row] for row in fraction]
    values["stable_rank"] = [[1.0 / (1.0 - v**2) for v in row] for row in fraction]
    return values | others


def estimate(values: dict[str, list[list[float]]], n: int = 1, resolve: float = 0.01, **more: Any) -> pd.DataFrame:
    return rounding.estimated(rounding.without_twins(rows_of(values, n, **more), n), resolve).set_index(
        ["measure", "layer"]
    )


def test_an_estimate_is_the_largest_parting_of_the_layers_around() -> None:
    parts = [0.0, 1e-6, 0.0, 0.0, 0.0, 3e-6, 0.0]
    table = estimate(pair([[0.5, 0.5 + part] for part in parts]))
    found = table.loc["relative_mu", "rounding"].to_numpy() / rounding.SAFETY
    np.testing.assert_allclose(found, [1e-6, 1e-6, 1e-6, 3e-6, 3e-6, 3e-6, 3e-6], rtol=1e-6)
    assert set(table["status"]) == {"ok"}


def test_it_is_the_largest_of_the_excerpts_on_all_of_them() -> None:
    table = estimate(pair([[0.5, 0.6, 0.5 + 1e-6, 0.6 - 4e-6]]), n=2)
    np.testing.assert_allclose(table.loc["relative_mu", "rounding"], rounding.SAFETY * 4e-6, rtol=1e-6)
    assert list(table.loc["relative_mu", "excerpt"]) == [0, 1]


def test_mu_follows_from_relative_mu_and_the_norm() -> None:
    """log10 mu is off by no more than log10(1 - error / relative mu) for its fraction, plus what the norm is off by."""
    own = {
        "mu": [[1.0, 1.0 * (1 + 1e-4) * (1 + 1e-5)]]
    }  # relative mu is off by a factor of 1 + 1e-4, the norm of 1 + 1e-5
    table = estimate(pair([[0.5, 0.5 * (1 + 1e-4)]], **own))
    error = rounding.SAFETY * 0.5e-4
    expected = -math.log10(1 - error / 0.5) + rounding.SAFETY * math.log10(1 + 1e-5)
    assert table.loc[("mu", 0), "rounding"] == pytest.approx(expected, rel=1e-3)


def test_the_stable_rank_follows_from_the_rank_1_residual() -> None:
    r = 0.9
    table = estimate(pair([[r, r + 1e-5]]))
    b = rounding.SAFETY * 1e-5
    assert table.loc[("stable_rank", 0), "rounding"] == pytest.approx(1 / (1 - (r + b) ** 2) - 1 / (1 - r**2), rel=1e-5)


def test_what_is_under_the_floor_is_known_to_the_floor_and_its_mu_not_at_all() -> None:
    rows = rows_of(pair([[1e-10, 1e-10]]), floor=1e-7)
    rows.loc[rows["measure"] != "mean_cosine", "status"] = "below_floor"
    table = rounding.estimated(rounding.without_twins(rows, 1), 0.01).set_index("measure")
    for name in ("relative_mu", "rank1_residual", "dong_residual"):
        assert table.loc[name, "rounding"] == pytest.approx(1e-7) and table.loc[name, "status"] == "below_floor"
    assert table.loc["mu", "rounding"] == math.inf and table.loc["mu", "status"] == "below_floor"


def test_tolerances_are_absolute_for_fractions_and_relative_for_the_others() -> None:
    fraction = [[0.5, 0.5 + 0.02 / rounding.SAFETY]]
    open_ = estimate(pair(fraction))
    assert (open_.loc[list(FRACTIONS), "status"] == "unresolved").all()
    wider = estimate(pair(fraction), resolve=0.03)
    assert (wider.loc[list(FRACTIONS), "status"] == "ok").all()
    assert wider.loc[("mu", 0), "status"] == "unresolved"  # 4 % of it
    # The stable rank, 1.33, is off by 2 r s^2 dr = 0.0356, which is 2.7 % of it.
    assert wider.loc[("stable_rank", 0), "status"] == "ok"
    assert estimate(pair(fraction), resolve=0.022).loc[("stable_rank", 0), "status"] == "unresolved"


def test_where_one_twin_leaves_the_range_and_the_other_does_not_nothing_is_known() -> None:
    nan = math.nan
    table = estimate(pair([[0.5, 0.6, 0.5, 0.6], [0.5, 0.6, nan, 0.6], [nan, 0.6, nan, 0.6]]), n=2)
    relative = table.loc["relative_mu"].reset_index()
    assert (relative["rounding"] == math.inf).all()  # every layer is near the second
    assert list(relative["status"]) == ["unresolved"] * 4 + ["overflow", "unresolved"]


def test_where_all_stands_still_the_estimate_does_too() -> None:
    rows = rows_of(pair([[0.5, 0.5 + part] for part in (3e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6)]))
    rows.loc[rows["layer"] >= 2, "status"] = "certified"
    table = rounding.estimated(rounding.without_twins(rows, 1), 0.01).set_index(["measure", "layer"])
    np.testing.assert_allclose(table.loc["relative_mu", "rounding"] / rounding.SAFETY, 3e-6, rtol=1e-6)


def test_a_certified_value_that_rounding_decided_before_is_not_known() -> None:
    rows = rows_of(pair([[0.5, 0.55]]))
    rows["status"] = "certified"
    assert (rounding.estimated(rounding.without_twins(rows, 1), 0.01)["status"] == "unresolved").all()


# --- against the true error -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def excerpts() -> np.ndarray:
    return np.array([excerpt.ids for excerpt in corpus.draw_excerpts("packaged", 4, 32).excerpts])


@pytest.fixture(scope="module")
def mamba2() -> Any:
    return adapt(checkpoint.load("mamba2-tiny").model)


ARMS = (Variant(0.0), Variant(1.0), Variant(0.0, gating=False))


@pytest.fixture(scope="module")
def truth(mamba2: Any, excerpts: np.ndarray) -> pd.DataFrame:
    return measure_pass(mamba2, excerpts, ARMS, torch.float64).set_index(KEY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_true_error_is_within_the_estimate(
    mamba2: Any, excerpts: np.ndarray, truth: pd.DataFrame, dtype: torch.dtype
) -> None:
    """48 layers, of which the full architecture at lambda = 0 is chaotic: from a 1e-7 on, errors grow to a tenth."""
    rows = lscollapse.measure(mamba2, excerpts, ARMS, dtype).set_index(KEY)
    assert set(rows["dtype"]) == {str(dtype).removeprefix("torch.")}
    fractions = rows[rows.index.get_level_values("measure").isin(FRACTIONS)]
    error = (fractions["value"] - truth["value"].reindex(fractions.index)).abs()
    within = (error <= fractions["rounding"]).groupby(["variant", "layer", "measure"]).all()
    assert within.mean() >= 0.95
    assert not ((error > 0.01) & (fractions["status"] != "unresolved")).any()
    deep = fractions.loc[0].loc[40:]
    assert (deep["status"] == "unresolved").all() and error.loc[0].loc[40:].max() > 0.01
    assert (fractions.loc[1]["status"] == "unresolved").mean() < 0.2


def test_an_arm_that_float32_does_not_resolve_runs_in_float64(
    mamba2: Any, excerpts: np.ndarray, truth: pd.DataFrame
) -> None:
    rows = lscollapse.measure(mamba2, excerpts, ARMS, batch=1).set_index(KEY)
    assert [set(rows.loc[number]["dtype"]) for number in range(3)] == [{"float64"}, {"float32"}, {"float32"}]
    assert not (rows["status"] == "unresolved").any()
    np.testing.assert_allclose(rows.loc[0]["value"], truth.loc[0]["value"].reindex(rows.loc[0].index), rtol=1e-5)


def test_it_stays_in_float32_where_there_is_no_memory_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda = 0 in a small BERT: its mu falls under what float32 knows of it."""
    model, ids = tiny.bert(6), tiny.ids(3, 12)
    wide = lscollapse.measure(model, ids, [Variant(0.0)])
    assert set(wide["dtype"]) == {"float64"}
    monkeypatch.setattr(allocation, "available_memory", lambda: 1000)
    narrow = lscollapse.measure(model, ids, [Variant(0.0)])
    assert set(narrow["dtype"]) == {"float32"} and (narrow["status"] == "unresolved").any()


def test_a_given_dtype_is_kept_and_flagged(mamba2: Any, excerpts: np.ndarray) -> None:
    rows = lscollapse.measure(mamba2, excerpts[:2], ARMS[:1], torch.float32)
    assert set(rows["dtype"]) == {"float32"}
    assert (rows[rows["layer"] == 48]["status"] == "unresolved").all()


def test_rows_do_not_depend_on_what_they_were_measured_with(mamba2: Any, excerpts: np.ndarray) -> None:
    """Bits: in one batch or one by one, beside other variants or alone."""
    whole = lscollapse.measure(mamba2, excerpts, ARMS[:2], torch.float32)
    single = lscollapse.measure(mamba2, excerpts, ARMS[:2], torch.float32, batch=1)
    pd.testing.assert_frame_equal(whole, single, check_exact=True)
    alone = lscollapse.measure(mamba2, excerpts, [ARMS[1]], torch.float32).drop(columns="variant")
    beside = whole[whole["variant"] == 1].drop(columns="variant").reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, beside, check_exact=True)


def test_the_originals_of_a_probe_are_the_excerpts_as_they_are(mamba2: Any, excerpts: np.ndarray) -> None:
    plain = measure_pass(mamba2, excerpts[:2], ARMS[1:2], torch.float32)
    probed = lscollapse.measure(mamba2, excerpts[:2], ARMS[1:2], torch.float32)
    columns = ["layer", "measure", "excerpt", "value", "log10"]
    pd.testing.assert_frame_equal(plain[columns], probed[columns], check_exact=True)


def test_the_own_block_is_what_is_probed() -> None:
    """So that the unit of bfloat16 with a float32 stream is that of the package's blocks, and of nothing else."""
    adapter = adapt(tiny.mamba2())
    assert isinstance(adapter.own_block(0, torch.bfloat16), Mamba2Block)
    assert adapter.own_block(0, torch.bfloat16).stream == torch.float32
