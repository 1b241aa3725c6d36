"""The certified early exit: e_k against the plain models, rows against the full computation, the norm's bound against LAPACK."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lscollapse.data import corpus
from lscollapse.instrument import early_exit
from lscollapse.instrument.forward import measure_pass
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapt import adapt
from lscollapse.models.checkpoints import checkpoint
from lscollapse.passes import Shared
from tests.equivalence import plain_models, tiny

LAYERS = 7


def scaled_out_proj(factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.layers:
            layer.mixer.out_proj.weight *= factor
            if layer.mixer.out_proj.bias is not None:
                layer.mixer.out_proj.bias *= factor

    return change


def uneven_rows(model: Any) -> None:
    """Embeddings whose norms go from 1e-3 to 1e5."""
    model.embeddings.weight *= torch.logspace(-3, 5, tiny.VOCABULARY)[:, None]


def nearly_zero_row(model: Any) -> None:
    model.embeddings.weight[7] *= 1e-20


def zero_row(model: Any) -> None:
    model.embeddings.weight[7] = 0.0


def aligned(model: Any) -> None:
    """out_proj and its norm of rank one, all of a sign: what the bound allows is nearly reached."""
    for layer in model.layers:
        layer.mixer.out_proj.weight.fill_(0.3)
        layer.mixer.norm.weight.abs_()


MODELS: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "as it is": ({}, lambda model: None),
    "two groups, no bias": ({"n_groups": 2, "use_bias": False}, lambda model: None),
    "huge out_proj": ({}, scaled_out_proj(1e3)),
    "small out_proj": ({}, scaled_out_proj(1e-6)),
    "no out_proj": ({"use_bias": False}, scaled_out_proj(0.0)),
    "rows of all norms": ({}, uneven_rows),
    "a row near zero": ({}, nearly_zero_row),
    "a zero row": ({}, zero_row),
    "aligned": ({"use_bias": False}, aligned),
}
VARIANTS = [
    *(Variant(lam, gating) for gating in (True, False) for lam in (-8.0, -1.01, 0.5, 1.0, 64.0)),
    Variant(tuple((-1.0) ** k * (0.5 + k) for k in range(LAYERS)), gating=False),
    Variant(tuple(float(3 ** (k % 4)) for k in range(LAYERS))),
    Variant(16.0, False, False, norm_site="block"),
    Variant(-16.0, True, False, norm_site="block"),
]


def made(name: str) -> Any:
    changes, change = MODELS[name]
    model = tiny.mamba2(n_layers=LAYERS, seed=3, **changes)
    with torch.no_grad():
        change(model)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def gains_of(model: Any) -> list[float]:
    gains = early_exit.gains(adapt(model), "")
    assert gains is not None
    return gains


def plain_gains(model: Any) -> list[float]:
    """sqrt(inner) ||W diag(w)||_2 + ||b|| by numpy's SVD."""
    found = []
    for layer in model.layers:
        W = layer.mixer.out_proj.weight.double().detach().numpy() * layer.mixer.norm.weight.double().detach().numpy()
        bias = layer.mixer.out_proj.bias
        offset = 0.0 if bias is None else float(np.linalg.norm(bias.double().detach().numpy()))
        found.append(math.sqrt(W.shape[1]) * float(np.linalg.norm(W, 2)) + offset)
    return found


def plain_outputs(model: Any, variant: Variant, ids: np.ndarray) -> list[np.ndarray]:
    arguments = variant.gating, variant.layernorm, variant.skip_site, variant.norm_site
    lam = list(variant.lam) if isinstance(variant.lam, tuple) else variant.lam
    return plain_models.mamba2(plain_models.weights_of(model), model.config, ids, lam, *arguments)


def test_every_row_of_the_rest_of_the_net_is_within_e(model: Any) -> None:
    """X_j / (lam_k ... lam_{j-1}) is within e_k of X_k, row by row, for all k < j: in float64, however large e_k is."""
    gains, ids = plain_gains(model), tiny.ids(2, 6, seed=1)
    for variant in VARIANTS:
        outputs = plain_outputs(model, variant, ids)
        left = early_exit.remaining(gains, variant, torch.float64)
        for k in range(LAYERS):
            factor = 1.0
            for j in range(k + 1, LAYERS + 1):
                factor *= variant.lam_at(j - 1)
                moved = np.linalg.norm(outputs[j] / factor - outputs[k], axis=-1)
                rounding = 1e-13 * np.linalg.norm(outputs[k], axis=-1)
                assert (moved <= left[k] + rounding).all(), (variant, k, j)


def test_e_is_the_sum_over_the_layers_that_remain(model: Any) -> None:
    """Unrolled: e_k = sum over j >= k of G_j / |lam_k ... lam_j|."""
    gains = plain_gains(model)
    for variant in VARIANTS:
        lams = np.abs([variant.lam_at(layer) for layer in range(LAYERS)])
        expected = [
            sum(gains[j] / np.prod(lams[k : j + 1]) for j in range(k, LAYERS)) for k in range(LAYERS + 1)
        ]  # fmt: skip
        for dtype, margin in early_exit.MARGIN.items():
            found = early_exit.remaining(gains, variant, dtype)
            np.testing.assert_allclose(found, np.array(expected) * margin, rtol=1e-12)


def test_gains_are_above_those_of_numpy(model: Any) -> None:
    for ours, exact in zip(gains_of(model), plain_gains(model), strict=True):
        assert exact <= ours <= exact * 64 ** (1 / 16) * 1.001


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per variant, excerpt and layer; value, log10, status and bound of each measure."""
    return rows.pivot(
        index=["variant", "excerpt", "layer"], columns="measure", values=["value", "log10", "status", "bound"]
    )


def assert_certified_rows_hold(certified: pd.DataFrame, computed: pd.DataFrame, rounding: float) -> int:
    """Every certified row within its bound and `rounding` of the computed one; the others are the same rows.

    The angle between an output and what it was when it was certified is at most asin(bound): relative mu and the rank-1
    residual are sines of angles to cones, 1 / stable_rank is the square of a cosine, the mean cosine is one of pairs.
    """
    exit, full = wide(certified), wide(computed)
    assert exit.index.equals(full.index)
    bound = exit["bound", "relative_mu"].astype(float)
    kept = bound.isna()
    pd.testing.assert_frame_equal(
        exit[kept].drop(columns="bound", level=0), full[kept].drop(columns="bound", level=0), check_exact=True
    )
    # In float32 a stream without its block's norm may overflow where the weights still prove what it would be.
    kept |= full["status", "mu"] == "overflow"
    exit, full, bound = exit[~kept], full[~kept], bound[~kept]
    ours, theirs = exit["value"].astype(float), full["value"].astype(float)
    slack = np.arcsin(bound) + rounding
    for name in ("relative_mu", "rank1_residual"):
        assert ((ours[name] - theirs[name]).abs() <= slack).all(), name
    assert ((ours["mean_cosine"] - theirs["mean_cosine"]).abs() <= 2 * slack).all()
    assert ((1 / ours["stable_rank"] - 1 / theirs["stable_rank"]).abs() <= 2 * slack).all()
    size = theirs["mu"] / theirs["relative_mu"]  # ||Y||
    in_range = np.isfinite(ours["mu"]) & np.isfinite(theirs["mu"]) & (theirs["mu"] > 0)
    assert ((ours["mu"] - theirs["mu"]).abs() <= slack * size * (1 + slack))[in_range].all()
    logs = (exit["log10", "mu"].astype(float) - full["log10", "mu"].astype(float)).abs()
    assert (logs <= np.log1p(slack / theirs["relative_mu"]) / np.log(10) + 1e-12)[
        theirs["relative_mu"] > 10 * slack
    ].all()
    statuses = exit["status"].stack(future_stack=True)
    expected = full["status"].stack(future_stack=True).replace("ok", "certified")
    near_floor = theirs["relative_mu"] < 1e-5
    assert (statuses == expected)[~near_floor.reindex(statuses.index.droplevel("measure")).to_numpy()].all()
    return len(bound)


@pytest.mark.parametrize("name", MODELS)
def test_certified_rows_of_adversarial_models(name: str) -> None:
    model = made(name)
    ids = tiny.ids(2, 5, seed=1)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype in dtypes if name in ("as it is", "aligned") else dtypes[:1]:
        check_certified_rows(model, ids, dtype)


def check_certified_rows(model: Any, ids: np.ndarray, dtype: torch.dtype) -> None:
    exit = measure_pass(adapt(model), ids, VARIANTS, dtype, gains=gains_of(model))
    full = measure_pass(adapt(model), ids, VARIANTS, dtype)
    # The stream is float32 where the products are in bfloat16; each layer rounds it once when lam X + O is formed.
    rounding = 4 * LAYERS * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    found = assert_certified_rows_hold(exit, full, rounding)
    if model.layers[0].mixer.out_proj.weight.abs().max() == 0:
        assert found  # where nothing is ever added, all is certain at once


def test_certified_rows_of_the_embedded_mamba2() -> None:
    model = checkpoint.load("mamba2-tiny").model
    excerpts = corpus.draw_excerpts("packaged", 2, 16).excerpts
    ids = np.array([excerpt.ids for excerpt in excerpts])
    lams = (-8.0, 0.0, 1.0, 4.0)
    variants = [Variant(lam, gating) for gating in (False, True) for lam in lams]
    gains = gains_of(model)
    for ours, exact in zip(gains, plain_gains(model), strict=True):
        assert exact <= ours <= exact * 2
    found = measure_pass(adapt(model), ids, variants, None, gains=gains)
    computed = measure_pass(adapt(model), ids, variants, None)
    rounding = 4 * model.config.num_hidden_layers * torch.finfo(torch.float32).eps
    assert assert_certified_rows_hold(found, computed, rounding) > 100


def test_an_excerpt_stands_still_from_its_certification_on() -> None:
    """Its measures to the bit, mu by the lambdas alone, while the other excerpt of its tile goes on being computed."""
    model = tiny.mamba2(n_layers=LAYERS, seed=3)
    with torch.no_grad():
        model.embeddings.weight[:30] *= 1e4
    ids = np.stack([tiny.ids(1, 6)[0] % 30, 30 + tiny.ids(1, 6)[0] % 30])
    lams = (-40.0, 30.0, -8.0, 0.5, -64.0, 9.0, 1e39)
    rows = measure_pass(adapt(model), ids, [Variant(lams)], None, gains=gains_of(model)).set_index("measure")
    late, early = (rows[rows["excerpt"] == n] for n in (1, 0))
    first = early[early["bound"].notna()]["layer"].min()
    assert 0 < first < LAYERS - 1 and not (late["bound"].notna() & (late["layer"] <= first + 1)).any()
    for name, kept in early[early["layer"] >= first - 1].groupby(level=0):
        if name == "mu":
            steps = np.diff(kept["log10"])
            np.testing.assert_allclose(steps, np.log10(np.abs(lams[first - 1 :])), rtol=1e-12)
        else:
            assert kept["value"].nunique() == 1, name


def test_the_bound_is_never_under_the_floor() -> None:
    """What is left to compute can be 1e-20; rounding is there all the same."""
    model = tiny.mamba2(n_layers=LAYERS)
    with torch.no_grad():
        scaled_out_proj(1e-20)(model)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = measure_pass(adapt(model), tiny.ids(2, 5), [Variant(8.0)], dtype, gains=gains_of(model))
        relative = rows[rows["measure"].isin(["relative_mu", "rank1_residual"])]["bound"].dropna()
        assert len(relative) and (relative >= torch.finfo(dtype).eps).all()


def test_the_relative_change_of_a_stream_carried_far_is_not_taken_for_zero() -> None:
    """e = 2^1000 against rows of 2^20 * 2^970 is a change of 2^10, though 2^-970 itself is nothing in float32."""
    X = torch.full((2, 3, 4), 2.0**19)
    down = torch.tensor([-970.0, -1060.0], dtype=torch.float64)
    found = early_exit.log2_change(torch.full_like(down, 1000.0), Shared(X).shortest, down)
    np.testing.assert_allclose(found, [10.0, -80.0], rtol=1e-14)


@pytest.mark.parametrize(
    "variant",
    [
        Variant(0.0), Variant((8.0,) * (LAYERS - 1) + (0.0,)), Variant(8.0, False, skip_site="mixer"),
        Variant(64.0, layernorm=False), Variant(64.0, layernorm=False, norm_site="mixer"),
    ],
    ids=["zero", "last zero", "mixer skip", "no norm", "no mixer norm"],
)  # fmt: skip
def test_nothing_is_certified_without_a_bound(variant: Variant) -> None:
    model = tiny.mamba2(n_layers=LAYERS)
    with torch.no_grad():
        scaled_out_proj(1e-12)(model)  # with the bound all of it would be
    rows = measure_pass(adapt(model), tiny.ids(2, 5), [variant, Variant(8.0)], torch.float32, gains=gains_of(model))
    assert rows[rows["variant"] == 0]["bound"].isna().all()
    assert not (rows[rows["variant"] == 0]["status"] == "certified").any()
    assert rows[rows["variant"] == 1]["bound"].notna().any()


def test_only_models_with_a_norm_before_out_proj_have_gains() -> None:
    assert early_exit.gains(adapt(tiny.bert()), "") is None
    assert early_exit.gains(adapt(tiny.albert()), "") is None


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    random = rng.standard_normal
    hadamard = np.array([[1.0]])
    for _ in range(6):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return {
        "random": random((40, 40)),
        "wide": random((5, 200)),
        "tall": random((200, 5)),
        "row": random((1, 30)),
        "rank one": np.outer(random(50), random(70)),
        "rank two": random((60, 2)) @ random((2, 40)),
        "orthogonal": np.linalg.qr(random((64, 64)))[0],
        "hadamard": hadamard,
        "graded": np.diag(10.0 ** -np.arange(20.0)),
        "tiny": 1e-200 * random((20, 30)),
        "large": 1e200 * random((20, 30)),
        "more than a million entries": random((1030, 1040)),
        "a million entries of rank one": np.outer(random(1030), random(1040)),
        "zero": np.zeros((3, 4)),
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_spectral_bound_is_above_the_norm(name: str, dtype: torch.dtype) -> None:
    W = torch.from_numpy(matrices()[name]).to(dtype)
    if not torch.isfinite(W).all():
        assert not early_exit.spectral_bound(W) <= 1e300  # nothing can be certified with it
        return
    exact = float(np.linalg.norm(W.double().numpy(), 2))
    found = early_exit.spectral_bound(W)
    assert exact <= found <= exact * min(W.shape) ** (1 / 16) * 1.001


@pytest.mark.parametrize("seed", range(5))
def test_no_row_of_a_mixer_is_longer_than_its_bound(seed: int) -> None:
    """A mixer ends in RMSNorm and a projection: whatever comes before."""
    model, rng = tiny.mamba2(seed=seed), np.random.default_rng(seed)
    w = {name: tensor.double().numpy() for name, tensor in model.layers[1].mixer.state_dict().items()}
    Z = 10.0 ** rng.uniform(-3, 3, (50, 32)) * rng.choice([-1.0, 1.0], (50, 32))
    out = (Z / np.sqrt((Z**2).mean(1, keepdims=True) + 1e-5) * w["norm.weight"]) @ w["out_proj.weight"].T
    longest = np.linalg.norm(out + w["out_proj.bias"], axis=1).max()
    assert longest <= adapt(model).mixer_bound(1, early_exit.spectral_bound)


def test_gains_are_cached_by_sha256(tmp_path: Path) -> None:
    model, digest = tiny.mamba2(n_layers=2), "ab" * 32
    gains = early_exit.gains(adapt(model), digest, tmp_path)
    (file,) = (tmp_path / "gains").iterdir()
    kept = {"gains": [1.0, 2.0], "sha256": hashlib.sha256(b"[1.0, 2.0]").hexdigest()}
    file.write_text(json.dumps(kept))
    assert early_exit.gains(adapt(model), digest, tmp_path) == [1.0, 2.0]
    altered = (kept | {"gains": [1.0, 2.5]}, kept | {"gains": [1.0]}, {"gains": [1.0, 2.0]}, {}, [1.0, 2.0])
    for damaged in (*map(json.dumps, altered), "[1.0, 2.", ""):
        file.write_text(damaged)
        assert early_exit.gains(adapt(model), digest, tmp_path) == gains


def test_random_weights_of_one_seed_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Their record is the seed, whatever the architecture."""
    small, large = tiny.mamba2(n_layers=2), tiny.mamba2(n_layers=2)
    with torch.no_grad():
        scaled_out_proj(1e3)(large)
    one = early_exit.gains(adapt(small), "random-init-0", tmp_path)
    other = early_exit.gains(adapt(large), "random-init-0", tmp_path)
    assert one is not None and other is not None and other[0] > 100 * one[0]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert early_exit.gains(adapt(tiny.mamba2(n_layers=2)), "cd" * 32, tmp_path / "file")
