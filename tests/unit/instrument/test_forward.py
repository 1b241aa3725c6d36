"""`lscollapse.measure` against transformers' own hidden states and against the plain models of tests/equivalence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lscollapse
from lscollapse import Variant
from lscollapse.core import assets, registry
from lscollapse.core.table import DEFAULT_MEASURES
from lscollapse.models.checkpoints import checkpoint
from tests.equivalence import plain_decoders, plain_models, tiny
from tests.equivalence.compare import assert_rows_match, by_layer

LAMS = (-2.0, 0.0, 3.0)


def arms_of(rows: pd.DataFrame, n_arms: int) -> list[pd.DataFrame]:
    """The rows of each variant, in the order in which the variants were given."""
    assert sorted(rows["variant"].unique()) == list(range(n_arms))
    return [rows[rows["variant"] == arm].drop(columns="variant") for arm in range(n_arms)]


def hidden_states(model: Any, ids: np.ndarray) -> list[np.ndarray]:
    """[X_0, ..., X_K] as transformers gives them."""
    with torch.no_grad():
        states = model(input_ids=torch.as_tensor(ids), output_hidden_states=True).hidden_states
        if model.config.model_type == "mamba2":  # the outputs of the blocks, then that of the final norm
            states = [model.embeddings(torch.as_tensor(ids)), *states[:-1]]
    return [state.double().numpy() for state in states]


# --- lam = 1, nothing removed: transformers itself ------------------------------------------------


@pytest.mark.parametrize(
    ("make", "n_tokens"),
    [
        (lambda: tiny.mamba2(1), 13),
        (lambda: tiny.mamba2(2), 19),
        (lambda: tiny.mamba2(2), 8),
        (lambda: tiny.mamba2(2), 2),
        (lambda: tiny.mamba2(2, 2, chunk_size=64), 131),
        (lambda: tiny.mamba2(2, hidden_act="swish"), 19),
        (lambda: tiny.mamba2(4, use_bias=False, time_step_limit=(0.3, 0.9)), 5),
        (tiny.bert, 7),
        (tiny.albert, 9),
        (lambda: tiny.albert(5, 2, 1), 9),
        (lambda: tiny.albert(3, 1, 1), 2),
    ],
    ids=[
        "mamba2",
        "over two chunks",
        "one chunk",
        "under the kernel",
        "long",
        "by hooks",
        "no biases",
        "bert",
        "albert 4x2",
        "albert 5/2",
        "albert",
    ],
)
def test_untouched_is_transformers(make: Any, n_tokens: int) -> None:
    model, ids = make(), tiny.ids(3, n_tokens)
    assert_rows_match(lscollapse.measure(model, ids), hidden_states(model, ids))


def _embedded_or_skip(name: str) -> Any:
    try:
        registry.embedded_files(registry.resolve(name))
    except assets.AssetError as error:
        pytest.skip(str(error))
    return checkpoint.load(name).model


# The S4D is the package's own net: tests/integration/experiments/test_retrain.py.
OF_TRANSFORMERS = ("mamba2", "albert", "bert")


@pytest.mark.parametrize(
    "name", [name for name, e in registry.ENTRIES.items() if e.embedded and e.architecture in OF_TRANSFORMERS]
)
def test_embedded_model_is_transformers(name: str) -> None:
    model = _embedded_or_skip(name)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
    assert_rows_match(lscollapse.measure(model, ids), hidden_states(model, ids))


@pytest.mark.parametrize("kind", ["mamba2", "bert", "albert"])
def test_a_head_on_top_changes_nothing(kind: str) -> None:
    from transformers import AlbertForMaskedLM, BertForMaskedLM, Mamba2ForCausalLM

    base = getattr(tiny, kind)()
    heads = {"mamba2": Mamba2ForCausalLM, "bert": BertForMaskedLM, "albert": AlbertForMaskedLM}
    whole = heads[kind](base.config).eval()
    whole.base_model.load_state_dict(base.state_dict())
    ids = tiny.ids(2, 9)
    variants = [Variant(), Variant(lam=-2.0, layernorm=False)]
    pd.testing.assert_frame_equal(lscollapse.measure(whole, ids, variants), lscollapse.measure(base, ids, variants))


# --- everything else: the plain models ------------------------------------------------------------


@pytest.mark.parametrize(("n_groups", "n_tokens", "act"), [(1, 13, "silu"), (2, 19, "silu"), (2, 11, "swish")])
def test_every_variant_of_mamba2(n_groups: int, n_tokens: int, act: str) -> None:
    """By the package's own blocks, and (swish is another name of silu) by hooks on transformers' modules."""
    model, ids = tiny.mamba2(n_groups, 2, hidden_act=act), tiny.ids(2, n_tokens)
    weights = plain_models.weights_of(model)
    norms = [(True, "both"), (False, "both"), (False, "mixer"), (False, "block")]
    variants = [
        Variant(lam=lam, gating=gating, layernorm=layernorm, norm_site=norm_site, skip_site=skip_site)
        for lam, gating, (layernorm, norm_site), skip_site in itertools.product(
            (*LAMS, (1.5, -0.5)), (True, False), norms, ("residual", "mixer")
        )
    ]
    rows = lscollapse.measure(model, ids, variants)
    for variant, part in zip(variants, arms_of(rows, len(variants)), strict=True):
        v = variant
        outputs = plain_models.mamba2(
            weights, model.config, ids, v.lam, v.gating, v.layernorm, v.skip_site, v.norm_site
        )
        assert_rows_match(part, outputs, what=str(variant))


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_every_variant_of_post_norm(kind: str) -> None:
    model = tiny.bert(3) if kind == "bert" else tiny.albert(4, 2, 2)
    per_layer = (1.5, 0.0, -0.5) if kind == "bert" else (1.0, -2.0, 0.0, 0.5, 1.0, 1.0, 3.0, -1.0)
    lams = (*LAMS, per_layer)
    ids, weights = tiny.ids(2, 9), plain_models.weights_of(model)
    plain = getattr(plain_models, kind)
    variants = [
        Variant(lam=lam, layernorm=layernorm, skip_site=site)
        for lam, layernorm, site in itertools.product(lams, (True, False), ("residual", "ffn", "both"))
    ]
    rows = lscollapse.measure(model, ids, variants)
    for variant, part in zip(variants, arms_of(rows, len(variants)), strict=True):
        outputs = plain(weights, model.config, ids, variant.lam, variant.layernorm, variant.skip_site)
        assert_rows_match(part, outputs, what=str(variant))


@pytest.mark.parametrize("faster", [2.0, 6.0])
def test_a_state_that_forgets_at_once(faster: float) -> None:
    """Decays far below the smallest float32 within a chunk: quotients of them must not appear."""
    model, ids = tiny.mamba2(2), tiny.ids(1, 70)
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.A_log += faster
            layer.mixer.dt_bias += faster
    outputs = plain_models.mamba2(plain_models.weights_of(model), model.config, ids, -2.0)
    assert_rows_match(lscollapse.measure(model, ids, [Variant(-2.0)]), outputs)


# --- large lambda ---------------------------------------------------------------------------------


def assert_follows(rows: pd.DataFrame, outputs: list[np.ndarray], rel: float = 1e-4) -> None:
    """relative mu and the true log10 of mu at every layer."""
    table = by_layer(rows)
    for layer, Y in enumerate(outputs):
        for excerpt, matrix in enumerate(Y):
            expected = plain_models.plain_measures(matrix)
            relative, mu = table[layer, excerpt, "relative_mu"], table[layer, excerpt, "mu"]
            where = f"layer {layer}, excerpt {excerpt}: {relative}, {mu} against {expected}"
            assert relative[2] == mu[2] == "ok", where
            assert relative[0] == pytest.approx(expected["relative_mu"], rel=rel), where
            assert mu[0] == pytest.approx(expected["mu"], rel=rel), where
            assert mu[1] == pytest.approx(math.log10(expected["mu"]), abs=rel), where


@pytest.fixture(scope="module", params=["silu", "swish"], ids=["own blocks", "hooks"])
def deep(request: pytest.FixtureRequest) -> Any:
    return tiny.mamba2(n_layers=64, seed=1, hidden_act=request.param)


@pytest.mark.parametrize("lam", [64.0, -64.0, -7.3])
def test_64_layers_of_large_lambda(deep: Any, lam: float) -> None:
    """64^64 is 1e115: far outside float32, inside the float64 of the plain model."""
    ids = tiny.ids(1, 5)
    outputs = plain_models.mamba2(plain_models.weights_of(deep), deep.config, ids, lam, gating=False)
    rows = lscollapse.measure(deep, ids, [Variant(lam=lam, gating=False)])
    if abs(lam) == 64.0:
        assert 110 < rows[rows["layer"] == 64].query("measure == 'mu'")["log10"].min() < 120
    assert_follows(rows, outputs)


def test_excerpts_of_different_size() -> None:
    """One excerpt is 2^45 times the other at the embedding: each carries an exponent of its own."""
    model = tiny.mamba2(n_layers=20, seed=2)
    with torch.no_grad():
        model.embeddings.weight[:30] *= 2.0**45
    ids = np.stack([tiny.ids(1, 7)[0] % 30, 30 + tiny.ids(1, 7)[0] % 30])
    outputs = plain_models.mamba2(plain_models.weights_of(model), model.config, ids, 8.0)
    assert_follows(lscollapse.measure(model, ids, [Variant(lam=8.0)]), outputs)


PER_LAYER = {
    "a zero after growth": (64.0,) * 40 + (0.0,) + (1.0,) * 23,
    "small after growth": (64.0,) * 20 + (0.01,) * 44,
    "growth after a zero": (0.0,) * 5 + (64.0,) * 59,
    "alternating": (1e6, 1e-6) * 32,
}


@pytest.mark.parametrize("name", PER_LAYER)
def test_per_layer_lambdas_may_grow_and_shrink(deep: Any, name: str) -> None:
    ids = tiny.ids(1, 5)
    lam = PER_LAYER[name]
    outputs = plain_models.mamba2(plain_models.weights_of(deep), deep.config, ids, lam)
    assert_follows(lscollapse.measure(deep, ids, [Variant(lam=lam)]), outputs)


# --- any finite lambda ------------------------------------------------------------------------------

EXTREMES: list[float | tuple[float, ...]] = [
    1e39, -1e38, 1e300, 5e-324, 1e-40, 1e-46, -0.0,
    (1e35, 1.0) * 3, (1e30, 1e-46) * 3, (1e300, -1e-300) * 3, (1e39, 1e39, 1e-39, 1e-39, 1e-39, 1e39),
    (1e14, 0.0, 1e14, 0.5, -0.0, 1.0), (1e25, 5e-324, 1.0, 1e9, -1e-9, 2.0),
]  # fmt: skip


def wide_range(weights: plain_models.Weights) -> plain_models.Weights:
    """Weights as numpy's long double, with which the plain models hold 1e4932."""
    return {name: value.astype(np.longdouble) for name, value in weights.items()}


def assert_follows_far(rows: pd.DataFrame, outputs: list[np.ndarray], rel: float, what: str) -> None:
    """As assert_follows, for outputs in long double that float64 does not hold."""
    table = by_layer(rows)
    for layer, Y in enumerate(outputs):
        for excerpt, matrix in enumerate(Y):
            size = np.abs(matrix).max()
            expected = plain_models.plain_measures((matrix / size).astype(np.float64))
            for name in DEFAULT_MEASURES:
                value, log10, status = table[layer, excerpt, name]
                where = f"{what}, layer {layer}, excerpt {excerpt}, {name}: {value}, {log10}, {status}"
                assert status == "ok", where
                if name == "mu":
                    slack = rel * (1 + 0.01 / expected["relative_mu"])  # rounding shows where rows are nearly equal
                    assert log10 == pytest.approx(float(np.log10(expected["mu"]) + np.log10(size)), abs=slack), where
                elif name != "longest_row":  # two rows may be within rounding of a thousandth
                    assert value == pytest.approx(expected[name], rel=rel, abs=rel), where


@pytest.mark.parametrize("act", ["silu", "swish"])
@pytest.mark.parametrize("lam", EXTREMES, ids=str)
def test_any_finite_lambda_on_the_residual_of_mamba2(lam: float | tuple[float, ...], act: str) -> None:
    """By the package's own blocks and by hooks (of which transformers computes parts in float32 whatever the dtype); not
    even float64 holds 1e300^6."""
    model, ids = tiny.mamba2(n_layers=6, seed=2, hidden_act=act), tiny.ids(2, 6)
    outputs = plain_models.mamba2(wide_range(plain_models.weights_of(model)), model.config, ids, lam)
    for dtype, rel in ((torch.float32, 1e-4), (torch.float64, 1e-11 if act == "silu" else 1e-4)):
        assert_follows_far(lscollapse.measure(model, ids, [Variant(lam)], dtype), outputs, rel, f"{lam}, {dtype}")


@pytest.mark.parametrize("site", ["residual", "ffn", "both"])
@pytest.mark.parametrize("lam", [1e39, -1e300, 1e-46, (1e39, 0.0, 1e35), (1e20, 1e-20, 1e300)], ids=str)
def test_any_finite_lambda_on_either_skip_of_gpt2(lam: float | tuple[float, ...], site: str) -> None:
    model, ids = plain_decoders.tiny("gpt2"), tiny.ids(2, 6)
    weights = wide_range(plain_models.weights_of(model))
    outputs = plain_decoders.gpt2(weights, model.config, ids, lam, True, site)
    assert_follows_far(lscollapse.measure(model, ids, [Variant(lam, skip_site=site)]), outputs, 1e-4, site)


@pytest.mark.parametrize("site", ["residual", "ffn", "both"])
@pytest.mark.parametrize("lam", [1e25, -1e39, (1e-46, 1e39, 1e300), (1e25, 0.5, 1e39)], ids=str)
def test_any_finite_lambda_before_a_layer_norm(lam: float | tuple[float, ...], site: str) -> None:
    """The squares of lam*X leave float32 in the LayerNorm from 1e19 on; what it makes of them does not."""
    model, ids = tiny.bert(), tiny.ids(2, 6)
    outputs = plain_models.bert(wide_range(plain_models.weights_of(model)), model.config, ids, lam, True, site)
    assert_follows_far(lscollapse.measure(model, ids, [Variant(lam, skip_site=site)]), outputs, 1e-4, site)


@pytest.mark.parametrize("lam", [(64.0,) * 6 + (1 / 64,) * 6, (1e6,) * 6 + (1e-6,) * 6, (1e30, 1e-30) * 6], ids=str)
def test_rows_of_all_norms_that_grow_and_shrink(lam: tuple[float, ...]) -> None:
    """The norm's eps is nothing beside the smallest row in its true size, and must not be where X is carried scaled."""
    model, ids = tiny.mamba2(n_layers=12), tiny.ids(2, 8)
    with torch.no_grad():
        order = torch.randperm(tiny.VOCABULARY, generator=torch.Generator().manual_seed(1))
        model.embeddings.weight *= torch.logspace(-4, 6, tiny.VOCABULARY)[order][:, None]
    outputs = plain_models.mamba2(wide_range(plain_models.weights_of(model)), model.config, ids, lam)
    assert_follows_far(lscollapse.measure(model, ids, [Variant(lam)]), outputs, 2e-6, str(lam))


def test_lambda_inside_the_mixer_leaves_the_scale_of_the_residual_alone() -> None:
    """X' = X + O there: with the gate lambda is absent, without it the residual keeps what it has, whatever lambda is."""
    model, ids = tiny.mamba2(n_layers=6, seed=2), tiny.ids(2, 6)
    with torch.no_grad():
        for layer, factor in zip(model.layers, (3e12, 3e12, 3e12, 0.3, 0.3, 3e12), strict=True):
            layer.mixer.out_proj.weight *= factor  # X passes 2^40 at once
    weights = wide_range(plain_models.weights_of(model))
    arms = [
        Variant(0.0, skip_site="mixer"),
        Variant(1.0),
        Variant((1e14, 0.0, 3.0, -0.5, 0.0, 1.0), gating=False, layernorm=False, skip_site="mixer", norm_site="mixer"),
    ]
    found = arms_of(lscollapse.measure(model, ids, arms), 3)
    for variant, rows in zip(arms, found, strict=True):
        v = variant
        outputs = plain_models.mamba2(
            weights, model.config, ids, v.lam, v.gating, v.layernorm, v.skip_site, v.norm_site
        )
        assert_follows_far(rows, outputs, 1e-4, str(variant))


@pytest.mark.parametrize("act", ["silu", "swish"])
def test_a_lambda_inside_the_mixer_whose_squares_leave_float32(act: str) -> None:
    """The norm before out_proj takes its size out again; a lambda that float32 does not hold is an overflow."""
    model, ids = tiny.mamba2(hidden_act=act), tiny.ids(2, 6)
    weights = wide_range(plain_models.weights_of(model))
    for lam in (1e25, -1e37):
        outputs = plain_models.mamba2(weights, model.config, ids, lam, False, True, "mixer")
        rows = lscollapse.measure(model, ids, [Variant(lam, gating=False, skip_site="mixer")])
        assert_follows_far(rows, outputs, 1e-4, str(lam))
    rows = lscollapse.measure(model, ids, [Variant(1e39, gating=False, skip_site="mixer")])
    assert set(rows.loc[rows["layer"] > 0, "status"]) == {"overflow"}


def test_a_stream_whose_squares_leave_the_range_is_lost_where_it_is_not_carried() -> None:
    """Gemma-2's RMSNorm, the next one being within the same block, makes zeros of 1e25 in float32: nothing from there is the model's."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = Gemma2Model(Gemma2Config(vocab_size=61, num_key_value_heads=2, head_dim=4, **sizes)).eval()
    table = by_layer(lscollapse.measure(model, tiny.ids(1, 6), [Variant((1e25, 1e-25, 1.0))]))
    assert [table[layer, 0, "relative_mu"][2] for layer in range(4)] == ["ok", "overflow", "overflow", "overflow"]


# --- statuses -------------------------------------------------------------------------------------


def test_the_arm_that_overflows_leaves_the_others_alone() -> None:
    model, ids = tiny.mamba2(n_layers=12), tiny.ids(2, 7)
    quiet = [Variant(lam=0.5), Variant(lam=-2.0, gating=False)]
    loud = Variant(lam=1e6, layernorm=False)
    alone = lscollapse.measure(model, ids, quiet)
    first, bad, second = arms_of(lscollapse.measure(model, ids, [quiet[0], loud, quiet[1]]), 3)
    for found, expected in zip((first, second), arms_of(alone, 2), strict=True):
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True))
    assert len(bad) == 13 * 2 * len(DEFAULT_MEASURES)  # a bad value is a row with a status, never a dropped row
    layers = bad.groupby("layer")["status"].agg(set)
    assert layers[0] == {"ok"}
    assert layers[12] == {"overflow"}
    overflowed = (layers == {"overflow"}).to_numpy()
    assert (np.diff(overflowed.astype(int)) >= 0).all(), "once out of range, always out of range"
    assert bad[bad["status"] == "overflow"]["value"].isna().all()


def test_one_excerpt_overflows_the_other_does_not() -> None:
    model = tiny.mamba2(n_layers=3)
    with torch.no_grad():
        model.embeddings.weight[5] = 1e30
    ids = np.array([[1, 5, 2, 3], [1, 6, 2, 3]])
    variant = Variant(layernorm=False)
    table = by_layer(lscollapse.measure(model, ids, [variant]))
    alone = by_layer(lscollapse.measure(model, ids[1:], [variant]))
    assert table[0, 0, "relative_mu"][2] == "ok"
    assert {table[3, 0, name][2] for name in DEFAULT_MEASURES} == {"overflow"}
    for name in DEFAULT_MEASURES:
        assert table[3, 1, name][2] == "ok"
        assert table[3, 1, name][0] == pytest.approx(alone[3, 0, name][0], rel=1e-5)


def test_nan_in_the_weights_is_nan_not_overflow() -> None:
    model = tiny.mamba2(n_layers=2)
    with torch.no_grad():
        model.embeddings.weight[5] = math.nan
    table = by_layer(lscollapse.measure(model, np.array([[1, 5, 2], [1, 6, 2]])))
    for layer in range(3):
        assert {table[layer, 0, name][2] for name in DEFAULT_MEASURES} == {"nan"}
        assert {table[layer, 1, name][2] for name in DEFAULT_MEASURES} == {"ok"}


def test_collapsed_rows_are_below_the_floor() -> None:
    """No positions and one token repeated: all rows agree, at every layer of BERT."""
    model = tiny.bert()
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
    rows = lscollapse.measure(model, np.full((1, 6), 7))
    assert (rows["floor"] == 2.0**-21).all()
    for name, status in rows.groupby("measure")["status"].agg(set).items():
        assert status == (
            {"ok"} if name in ("stable_rank", "mean_cosine", "row_norm_ratio", "longest_row") else {"below_floor"}
        ), name


def test_antipodal_rows_are_not_below_the_floor_of_mu() -> None:
    """Rows +u and -u: relative mu is near 1 and only the rank-1 residual is below the floor."""
    model = tiny.mamba2(n_layers=1)
    with torch.no_grad():
        model.embeddings.weight[1] = -model.embeddings.weight[2]
    table = by_layer(lscollapse.measure(model, [[1, 2, 1, 2]]))
    assert table[0, 0, "relative_mu"] == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-7), "ok")
    assert table[0, 0, "rank1_residual"][2] == "below_floor"


# --- excerpts, columns, arguments -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba2", "bert", "albert"])
def test_excerpts_are_independent_of_each_other(kind: str) -> None:
    model, ids = getattr(tiny, kind)(), tiny.ids(3, 9)
    together = by_layer(lscollapse.measure(model, ids, [Variant(lam=-0.5)]))
    for excerpt in range(3):
        alone = by_layer(lscollapse.measure(model, ids[excerpt : excerpt + 1], [Variant(lam=-0.5)]))
        for (layer, _, name), (value, _, _) in alone.items():
            assert together[layer, excerpt, name][0] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_columns() -> None:
    model, ids = tiny.mamba2(), tiny.ids(2, 5)
    rows = lscollapse.measure(model, ids, [Variant(lam=-2.0, gating=False), Variant(lam=(1.0, 2.0, 3.0))])
    assert len(rows) == 2 * 2 * 4 * len(DEFAULT_MEASURES)
    assert sorted(rows["layer"].unique()) == [0, 1, 2, 3]
    assert set(rows["measure"]) == set(DEFAULT_MEASURES)
    assert set(rows["n_tokens"]) == {5}
    assert set(rows["dtype"]) == {"float32"}
    first, second = arms_of(rows, 2)
    assert set(first["lam"]) == {-2.0} and not first["gating"].any()
    assert second["lam"].isna().all() and second["gating"].all()
    bert = lscollapse.measure(tiny.bert(), ids)
    assert bert["gating"].isna().all()  # no gate to have or not


def test_progress_counts_block_passes() -> None:
    seen: list[int] = []
    lscollapse.measure(tiny.mamba2(), tiny.ids(2, 5), [Variant(), Variant(lam=0.0)], progress=seen.append)
    assert seen == [4] * 6  # each excerpt with its twin


@pytest.mark.parametrize("make", [tiny.mamba2, tiny.bert, tiny.albert])
def test_bfloat16_is_recorded_as_such(make: Any) -> None:
    """The floor is that of the arithmetic that was used, also where the residual stream is kept in float32."""
    rows = lscollapse.measure(make().to(torch.bfloat16), tiny.ids(1, 5), [Variant(lam=0.5)])
    assert set(rows["dtype"]) == {"bfloat16"}
    assert set(rows["floor"]) == {2.0**-7}


@pytest.mark.parametrize("kind", ["mamba2", "bert", "albert"])
def test_float64_is_double_precision_throughout(kind: str) -> None:
    model, ids = getattr(tiny, kind)(), tiny.ids(2, 9)
    outputs = getattr(plain_models, kind)(plain_models.weights_of(model), model.config, ids, -2.0)
    rows = lscollapse.measure(model.double(), ids, [Variant(lam=-2.0)])
    assert set(rows["dtype"]) == {"float64"}
    assert_rows_match(rows, outputs, rel=1e-11, noise=1e-12)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3], "shape"),
        (np.zeros((0, 4), dtype=int), "shape"),
        ([[1, 2], [3, tiny.VOCABULARY]], f"token id {tiny.VOCABULARY}"),
        ([[1, 2], [3, -4]], "token id -4"),
        (np.ones((1, 33), dtype=int), "33 tokens"),
    ],
)
def test_bad_ids(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lscollapse.measure(tiny.bert(), ids)
