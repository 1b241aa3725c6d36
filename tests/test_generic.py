"""The generic adapter: what it finds in architectures it has never seen, that lambda does there what it should, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import lscollapse
from lscollapse import Variant
from lscollapse.models import UnsupportedModel, adapt
from lscollapse.models.generic import GenericAdapter
from lscollapse.variants import SurgeryError
from tests.equivalence import plain_decoders, plain_models, tiny
from tests.test_adapters import assert_close, ids_for, outputs, plain

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
        for name, value in expected.items():
            assert here[name] == pytest.approx(value, rel=1e-4), name
