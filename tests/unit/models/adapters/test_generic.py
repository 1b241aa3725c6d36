"""The generic adapter: what it finds in architectures it has never seen, that lambda does there what it should, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import lscollapse
from lscollapse import Variant
from lscollapse.instrument.forward import measure_pass
from lscollapse.instrument.gradients import check_chain
from lscollapse.instrument.identity import layer_outputs
from lscollapse.instrument.surgery import SurgeryError
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.generic import GenericAdapter
from tests.equivalence import plain_decoders, plain_models, tiny
from tests.unit.instrument.test_surgery import captured
from tests.unit.models.adapters.test_adapters import assert_close, ids_for, outputs, plain

_SETTINGS = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
FOUND: dict[str, dict[str, Any]] = {
    "GPTNeoX": {},
    "GPTJ": {"rotary_dim": 4},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "DistilBert": {"hidden_dim": 24},
    "Electra": {"embedding_size": 8},
    "Falcon": {},
    "Bloom": {},
    "Gemma": _GROUPED,
    "Gemma2": {**_GROUPED, "sliding_window": 4},
    "Phi": {},
    "Cohere": {},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 5},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_key_value_heads": 2},
    "T5": {"d_model": 16, "d_kv": 4, "d_ff": 24},
    "Bart": {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_layers": 2,
             "decoder_attention_heads": 4, "decoder_ffn_dim": 24},
}  # fmt: skip
PARALLEL = ("GPTNeoX", "GPTJ", "Falcon", "Phi", "Cohere")
ENCODERS = ("T5", "Bart")


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = _SETTINGS | FOUND.get(name, {}) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(**settings)
    return tiny._shaken(transformers.AutoModel.from_config(config), 0)


def ids(batch: int = 2, n_tokens: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 61, (batch, n_tokens))


@pytest.mark.parametrize("name", FOUND)
def test_lambda_one_is_the_model_itself(name: str) -> None:
    """Sums left alone, and formed anew, against transformers' hidden states (the last is after the final norm)."""
    model = build(name)
    adapter = adapt(model)
    assert isinstance(adapter, GenericAdapter)
    part = model.get_encoder() if name in ENCODERS else model
    with torch.no_grad():
        states = part(torch.as_tensor(ids()), output_hidden_states=True).hidden_states
    expected = [state.double().numpy() for state in states[: adapter.n_layers]]
    assert adapter.n_layers == 3
    for scale in (None, 1.0):
        assert_close(outputs(adapter, ids(), Variant(), scale)[:-1], expected, 1e-6, name)


@pytest.mark.parametrize("name", PARALLEL)
def test_lambda_in_a_block_with_one_sum(name: str) -> None:
    """Y = X + O there, so by the untouched block alone Y(lam) = lam*X + (Y - X)."""
    model = build(name).double()
    adapter = adapt(model)
    for lam in (-2.0, 0.0, 3.0):
        X = adapter.embed(torch.as_tensor(ids()))
        found = outputs(adapter, ids(), Variant(lam))
        for layer in range(adapter.n_layers):
            with torch.no_grad():
                Y = adapter.run(layer, X)
            X = lam * X + (Y - X)
            assert_close([found[layer + 1]], [X.detach().numpy()], 1e-10, f"lambda {lam}, layer {layer}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mamba", "roberta"])
def test_against_the_plain_implementations(name: str) -> None:
    """On architectures that have adapters of their own, whose first skip it must find."""
    model = plain_decoders.tiny(name)
    adapter, tokens = GenericAdapter(model), ids_for(name)
    for lam in (-2.0, 0.0, (1.5, 0.0, -0.5)):
        assert_close(outputs(adapter, tokens, Variant(lam)), plain(name, model, tokens, lam), 2e-5, str(lam))


def test_measured_as_by_the_adapter_of_its_own() -> None:
    model = plain_decoders.tiny("gpt2")
    variants = [Variant(lam) for lam in (-1.0, 0.0, 1.0, 2.0)]
    generic, own = (lscollapse.measure(m, ids(3), variants) for m in (GenericAdapter(model), model))
    np.testing.assert_allclose(generic["value"], own["value"], rtol=1e-4)


def test_surgery_on_a_whole_forward_leaves_no_trace() -> None:
    model = build("GPTNeoX")
    tokens = torch.as_tensor(ids())
    with torch.no_grad():
        before = model(tokens).last_hidden_state
        with lscollapse.surgery(model, Variant(-2.0)):
            edited = model(tokens).last_hidden_state
        after = model(tokens).last_hidden_state
        last = model.final_layer_norm(torch.as_tensor(outputs(model, ids(), Variant(-2.0))[-1]).float())
    assert torch.equal(before, after)
    torch.testing.assert_close(edited, last)
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_lambda_is_switched() -> None:
    model = build("GPTNeoX")
    for variant, reason in (
        (Variant(skip_site="ffn"), "skip_site 'ffn' is not known of gpt_neox"),
        (Variant(norm_site="block"), "norm_site 'block' is not known of gpt_neox"),
        (Variant(layernorm=False), "the norms of gpt_neox are not known"),
        (Variant(gating=False), "whether the mixers of gpt_neox have a gate, and where, is not known"),
    ):
        with pytest.raises(SurgeryError, match=reason):
            lscollapse.measure(model, ids(), [variant])
        with pytest.raises(SurgeryError, match=reason), lscollapse.surgery(model, variant):
            pytest.fail("the context was entered")


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "XLNet",
            {"max_position_embeddings": None, "d_head": 4},
            r"takes \(6, 2, 16\), not \(excerpts, tokens, width\)",
        ),
        ("Rwkv", {"attention_hidden_size": 16}, "adds its own input to something 0 times"),
        ("Bloom", {"apply_residual_connection_post_layernorm": True}, "adds its own input to something 0 times"),
    ],
)
def test_architectures_that_are_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    """XLNet has tokens first; RWKV's first block norms its input before it adds; Bloom can add the normed input."""
    with pytest.raises(UnsupportedModel, match=f"no adapter for architecture.*{reason}"):
        adapt(build(name, **changes))


def test_what_reads_no_tokens_is_refused() -> None:
    config = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    with pytest.raises(UnsupportedModel, match=r"'swin'.*it reads no tokens"):
        adapt(transformers.SwinModel(config).eval())


# --- made-up models that would be measured wrongly ------------------------------------------------


class MadeUpConfig(PretrainedConfig):
    model_type = "made-up"

    def __init__(self, block: str = "good", **settings: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.block = 61, 8, 3, block
        super().__init__(**settings)


class MadeUpBlock(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mixer, self.calls = kind, nn.Linear(8, 8), 0

    def forward(self, X: Tensor) -> Tensor:
        O = torch.tanh(self.mixer(X))
        self.calls += 1
        return {
            "good": lambda: X + O,
            "twice": lambda: (X + O) + torch.sin(X + 0.5 * O),
            "in place": lambda: X.add_(O),
            "unused": lambda: (X + O) * 0.0 + torch.cos(X),
            "random": lambda: X + O * (1.0 + 1e-3 * self.calls),
            "none": lambda: torch.tanh(O),
        }[self.kind]()


class MadeUpModel(PreTrainedModel):
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(61, 8)
        self.layers = nn.ModuleList(MadeUpBlock(config.block) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        X = self.words(input_ids)
        for layer in self.layers:
            X = layer(X)
        return X


def made_up(block: str) -> Any:
    return MadeUpModel(MadeUpConfig(block)).eval()


def test_a_made_up_model_is_found() -> None:
    model = made_up("good")
    X = model.words(torch.as_tensor(ids()))
    expected = [X]
    for layer in model.layers:
        expected.append(-2.0 * expected[-1] + torch.tanh(layer.mixer(expected[-1])))
    found = outputs(model, ids(), Variant(-2.0))
    assert_close(found, [Y.detach().double().numpy() for Y in expected], 1e-5, "made up")


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("twice", "adds its own input to something 2 times"),
        ("in place", "is off by"),
        ("unused", "lambda = 0 does not leave O"),
        ("random", "is off by"),
        ("none", "adds its own input to something 0 times"),
    ],
)
def test_made_up_models_are_refused(block: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"MadeUpBlock 1 .*{reason}|{reason} in MadeUpBlock 1"):
        adapt(made_up(block))


def test_something_between_the_blocks_is_refused() -> None:
    class Between(MadeUpModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            X = self.words(input_ids)
            for layer in self.layers:
                X = layer(X) * 2.0
            return X

    with pytest.raises(UnsupportedModel, match="something happens to X between MadeUpBlock 1 and 2"):
        adapt(Between(MadeUpConfig()).eval())


def test_the_users_own_input_is_tested_too() -> None:
    """A block that behaves on the adapter's own few tokens, and not on longer texts."""

    class Long(MadeUpBlock):
        def forward(self, X: Tensor) -> Tensor:
            return super().forward(X) if X.shape[1] < 9 else 2.0 * X + torch.tanh(self.mixer(X))

    model = made_up("good")
    model.layers = nn.ModuleList(Long("good") for _ in range(3))
    adapter = adapt(model)
    adapter.embed(torch.as_tensor(ids(2, 8)))
    with pytest.raises(UnsupportedModel, match="Long 1 adds its own input to something 0 times"):
        lscollapse.measure(adapt(model), ids(2, 9))


# --- what blocks hand to later blocks -------------------------------------------------------------

_SPARSE = {
    "num_key_value_heads": 4, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "indexer_types": ["full", "shared", "full", "shared"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_hidden_layers": 4,
}  # fmt: skip
_GEMMA4 = {
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "sliding_window": 6,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
HANDING_ON: dict[str, tuple[str, dict[str, Any], bool]] = {
    "2 layers take keys and values": ("Gemma4Text", _GEMMA4 | {"num_kv_shared_layers": 2}, True),
    "4 layers take keys and values": ("Gemma4Text", _GEMMA4 | {"num_kv_shared_layers": 4}, True),
    "the choice of tokens": ("GlmMoeDsa", _SPARSE, False),
    "the choice, keys and values": (
        "MistralLarge4Text",
        _SPARSE | {"head_dim": 8, "kv_source_layers": [0, 0, 2, 2], "no_rope_layers": [1] * 4},
        True,
    ),
}


def assert_measured_as_a_whole_forward(model: Any, tokens: np.ndarray) -> None:
    """All measures of arms that one pass runs by turns, against the definitions on whole forwards under surgery."""
    variants = [Variant(1.0), Variant(0.3), Variant(-2.0)]
    rows = measure_pass(adapt(model), tokens, variants, torch.float32)
    blocks = [call.block for call in adapt(model).calls]
    for number, variant in enumerate(variants):
        with lscollapse.surgery(model, variant), captured(blocks, "output") as outputs, torch.no_grad():
            model(torch.as_tensor(tokens), use_cache=False)
        for layer, Y in enumerate(outputs, 1):
            for excerpt, y in enumerate(Y):
                here = rows[(rows["variant"] == number) & (rows["layer"] == layer) & (rows["excerpt"] == excerpt)]
                expected = plain_models.plain_measures(y.numpy())
                for name, value in here.set_index("measure")["value"].items():
                    assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (variant, layer, name)


@pytest.mark.parametrize("what", HANDING_ON)
def test_what_blocks_hand_on_is_kept_for_each_arm(what: str) -> None:
    name, changes, numbers = HANDING_ON[what]
    model = build(name, **changes)
    assert_measured_as_a_whole_forward(model, ids())
    assert adapt(model).hands_on == numbers
    if numbers:
        with pytest.raises(UnsupportedModel, match="cannot be followed from block to block"):
            check_chain(adapt(model))


def test_no_cache_fills_up_where_a_wrapper_hides_the_argument() -> None:
    """BART's decoder on its own takes *args and **kwargs, and keeps keys and values unless it is told not to."""
    torch.manual_seed(0)
    config = transformers.BartConfig(**_SETTINGS | FOUND["Bart"])
    model = tiny._shaken(transformers.BartForCausalLM(config), 0)
    assert_measured_as_a_whole_forward(model, ids())
    assert model.config.use_cache and model.model.config.use_cache


class Handing(MadeUpBlock):
    """tanh(W X), and a share of what the block before made of its own input, which it gets in one of several ways."""

    def forward(self, X: Tensor, earlier: Any = None) -> Any:
        made = torch.tanh(self.mixer(X))
        if self.kind == "attribute":
            earlier, self.neighbour.kept = self.kept, made
            return X + made + (0.0 if earlier is None else 0.5 * earlier)
        if self.kind == "output":
            return X + made + (0.0 if earlier is None else 0.5 * earlier), made
        before = earlier[-1] if self.kind == "list" and earlier else earlier.get("made") if earlier else None
        earlier.append(made) if self.kind == "list" else earlier.update(made=made)
        return X + made + (0.0 if before is None else 0.5 * before)


class HandingModel(MadeUpModel):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Handing(config.block) for _ in range(3))
        for block, after in zip(self.layers, [*self.layers[1:], SimpleNamespace()], strict=True):
            object.__setattr__(block, "neighbour", after)

    def forward(self, input_ids: Tensor) -> Tensor:
        X, kind = self.words(input_ids), self.config.block
        for layer in self.layers:
            layer.kept = None
        earlier: Any = {"list": [], "dict": {}, "output": None}.get(kind)
        for layer in self.layers:
            if kind == "output":
                X, earlier = layer(X, earlier)
            else:
                X = layer(X, earlier) if kind in ("list", "dict") else layer(X)
        return X


def plain_handing(model: Any, tokens: np.ndarray, lam: float) -> list[np.ndarray]:
    X = model.words.weight.detach().double().numpy()[tokens]
    found, before = [X], np.zeros_like(X)
    for layer in model.layers:
        weight, bias = (p.detach().double().numpy() for p in (layer.mixer.weight, layer.mixer.bias))
        made = np.tanh(X @ weight.T + bias)
        X = lam * X + made + 0.5 * before
        found.append(X)
        before = made
    return found


@pytest.mark.parametrize("kind", ["output", "list", "dict"])
def test_three_ways_of_handing_on(kind: str) -> None:
    """The sum found is X + made, to which what came from before is added; so O is `made`, and lambda does not reach the rest."""
    model = HandingModel(MadeUpConfig(kind)).eval()
    lams = (0.5, -2.0, 0.0, 1.0)
    rows = lscollapse.measure(model, ids(), [Variant(lam) for lam in lams])
    for number, lam in enumerate(lams):
        for layer, X in enumerate(plain_handing(model, ids(), lam)):
            here = rows[(rows["variant"] == number) & (rows["layer"] == layer) & (rows["measure"] == "relative_mu")]
            expected = [plain_models.plain_measures(x)["relative_mu"] for x in X]
            np.testing.assert_allclose(here.sort_values("excerpt")["value"], expected, rtol=1e-5)


def test_one_arm_needs_no_memory_of_its_own() -> None:
    """Layer by layer without `handed`, as an arm that runs by itself; and again after another `embed`."""
    model = HandingModel(MadeUpConfig("list")).eval()
    for tokens in (ids(), ids(1, 5)):
        assert_close(outputs(adapt(model), tokens, Variant(-0.5)), plain_handing(model, tokens, -0.5), 1e-6, "alone")


def test_what_is_handed_on_by_another_way_is_refused() -> None:
    """Through attributes of the modules the arms would get each other's."""
    model = HandingModel(MadeUpConfig("attribute")).eval()
    reason = (
        r"made-up cannot be measured layer by layer: with lambda = -?\d.* it gets something else from earlier blocks"
    )
    with pytest.raises(UnsupportedModel, match=reason):
        lscollapse.measure(model, ids(), [Variant(0.5)])


# --- dtypes ---------------------------------------------------------------------------------------


class Fixed(MadeUpBlock):
    """Has float32 numbers that no conversion of the model reaches."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.numbers = torch.eye(8)

    def forward(self, X: Tensor) -> Tensor:
        return X + torch.tanh(X @ self.numbers)


def falcon_mamba() -> Any:
    """As published, its residual stream is float32 whatever the dtype of the weights."""
    changes = {"state_size": 4, "time_step_rank": 4, "num_attention_heads": None, "intermediate_size": 32}
    return build("FalconMamba", residual_in_fp32=True, **changes)


def with_fixed_numbers() -> Any:
    model = made_up("good")
    model.layers = nn.ModuleList(Fixed("good") for _ in range(3))
    return model


@pytest.mark.parametrize(
    ("make", "dtype", "reason"),
    [
        (falcon_mamba, torch.bfloat16, "FalconMambaBlock 1 adds its own input in float32"),
        (with_fixed_numbers, torch.bfloat16, "its forward fails: expected .* same dtype"),
        (with_fixed_numbers, torch.float64, "its forward fails: expected .* same dtype"),
    ],
)
def test_a_dtype_that_a_model_does_not_compute_in_is_called_that(
    make: Callable[[], Any], dtype: torch.dtype, reason: str
) -> None:
    """And it is measured in float32, so that the advice is right."""
    model = make()
    lscollapse.measure(model, ids())
    said = rf"does not compute in {str(dtype)[6:]} throughout: {reason}.*--dtype float32"
    with pytest.raises(UnsupportedModel, match=said):
        lscollapse.measure(model, ids(), dtype=dtype)
    with pytest.raises(UnsupportedModel, match=said):
        adapt(model.to(dtype))


def test_training_mode_and_no_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="training mode"):
        adapt(made_up("good").train())

    class Flat(MadeUpModel):
        def __init__(self, config: MadeUpConfig) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList()

    with pytest.raises(UnsupportedModel, match="no list of modules that its forward calls"):
        adapt(Flat(MadeUpConfig()).eval())


def test_plain_measures_of_a_generic_model() -> None:
    """Every row of a finished table, against the definitions on transformers' hidden states."""
    model = build("GPTNeoX")
    rows = lscollapse.measure(model, ids())
    with torch.no_grad():
        states = model(torch.as_tensor(ids()), output_hidden_states=True).hidden_states
    for layer, excerpt in ((0, 0), (1, 1), (2, 0)):
        expected = plain_models.plain_measures(states[layer][excerpt].numpy())
        here = rows[(rows["layer"] == layer) & (rows["excerpt"] == excerpt)].set_index("measure")["value"]
        for name, value in here.items():
            assert value == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("name", ["DistilBert", "Electra"])
def test_a_sum_that_no_norm_can_take_is_overflow(name: str) -> None:
    """Post-norm, so that for large lambda LayerNorm(lam*X + O) is LayerNorm(X): in float32 right, or overflow, never wrong."""
    model = build(name)
    for lam in (1e12, 1e18, 3e18, 5e18, 1e19, 3e19, 1e25):
        rows = lscollapse.measure(model, ids(), [Variant(lam)])
        rows = rows[rows["measure"] == "relative_mu"]
        with lscollapse.surgery(model.double(), Variant(1e12)), torch.no_grad():
            states = model(torch.as_tensor(ids()), output_hidden_states=True).hidden_states
        model.float()
        for row in rows.itertuples():
            expected = plain_models.plain_measures(states[row.layer][row.excerpt].numpy())["relative_mu"]
            assert row.status == "overflow" or row.value == pytest.approx(expected, rel=1e-4), (lam, row)
        assert (rows["status"] == "ok").all() == (lam <= 1e18)


@pytest.mark.parametrize("name", ["Jamba", "Mixtral"])
def test_models_of_float64_whose_modules_ask_for_float32(name: str) -> None:
    """Some operations have no float64: measured, scored and embedded they compute in it all the same."""
    settings = _SETTINGS | FOUND[name]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = tiny._shaken(kind(getattr(transformers, f"{name}Config")(**settings)), 0).eval()
    tokens = torch.as_tensor(ids())
    with torch.no_grad():
        X = adapt(model).embed(tokens)
        expected = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in tokens]
    model.double()
    with torch.no_grad():
        assert_close([adapt(model).embed(tokens).numpy()], [X.double().numpy()], 1e-6, name)
    rows = lscollapse.lm_loss(model, ids())
    assert set(rows["dtype"]) == {"float64"}
    np.testing.assert_allclose(rows["value"], expected, rtol=1e-5)


def test_blocks_that_are_called_by_keyword() -> None:
    class Named(MadeUpBlock):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + torch.tanh(self.mixer(hidden))

    class NamedModel(MadeUpModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            X = self.words(input_ids)
            for layer in self.layers:
                X = layer(hidden=X)
            return X

    model = NamedModel(MadeUpConfig()).eval()
    model.layers = nn.ModuleList(Named("good") for _ in range(3))
    X, expected = model.words(torch.as_tensor(ids())), []
    for layer in model.layers:
        expected.append(X)
        X = X + torch.tanh(layer.mixer(X))
    seen = layer_outputs(adapt(model), torch.as_tensor(ids()))
    assert_close(
        [Y.detach().numpy() for Y in seen], [Y.detach().double().numpy() for Y in (*expected, X)], 1e-6, "named"
    )
