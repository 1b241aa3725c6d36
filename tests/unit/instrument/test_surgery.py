"""Surgery on transformers' own modules: what they compute, that nothing stays behind, that nothing goes unnoticed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lscollapse
from lscollapse import Variant
from lscollapse.instrument.surgery import SurgeryError
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import UnsupportedModel
from tests.equivalence import plain_models, tiny

MAKE: dict[str, Callable[[], Any]] = {"mamba2": lambda: tiny.mamba2(2), "bert": tiny.bert, "albert": tiny.albert}
ALL_NORMS = [(True, "both"), (False, "both"), (False, "mixer"), (False, "block")]


def forward(model: Any, ids: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)).last_hidden_state


@contextmanager
def captured(modules: list[nn.Module], what: str) -> Iterator[list[Tensor]]:
    """The first input or the (first) output of each call of `modules`, in the order of the calls."""
    seen: list[Tensor] = []

    def keep_input(_module: nn.Module, args: tuple) -> None:
        seen.append(args[0].clone())

    def keep_output(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [
        m.register_forward_pre_hook(keep_input) if what == "input" else m.register_forward_hook(keep_output)
        for m in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: Any) -> list[nn.Module]:
    """Straight from transformers' attributes; a shared block once."""
    kind = model.config.model_type
    if kind == "mamba2":
        return list(model.layers)
    if kind == "bert":
        return list(model.encoder.layer)
    return [layer for group in model.encoder.albert_layer_groups for layer in group.albert_layers]


def edited_outputs(model: Any, ids: np.ndarray, variant: Variant) -> list[np.ndarray]:
    """The outputs of every block of a whole forward of the model under surgery."""
    with lscollapse.surgery(model, variant), captured(blocks_of(model), "output") as seen:
        forward(model, ids)
    return [Y.double().numpy() for Y in seen]


def assert_close(found: list[np.ndarray], plain: list[np.ndarray], what: str) -> None:
    """Activations of every layer, to 1e-5 of the largest one."""
    assert len(found) == len(plain) - 1
    for layer, (ours, theirs) in enumerate(zip(found, plain[1:], strict=True), 1):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < 1e-5, f"{what}, layer {layer}: {error}"


# --- what an edited model computes ----------------------------------------------------------------


@pytest.mark.parametrize(("n_groups", "n_tokens"), [(1, 13), (2, 19)])
def test_every_edit_of_mamba2(n_groups: int, n_tokens: int) -> None:
    """Whole forwards of transformers' model; 19 tokens are over two chunks of 8, 13 are an odd length."""
    model, ids = tiny.mamba2(n_groups), tiny.ids(2, n_tokens)
    weights = plain_models.weights_of(model)
    for lam, gating, (layernorm, norm_site), skip_site in itertools.product(
        (-2.0, 0.0, 1.0, 3.0, (1.5, 0.0, -0.5)), (True, False), ALL_NORMS, ("residual", "mixer")
    ):
        variant = Variant(lam, gating, layernorm, skip_site, norm_site)
        plain = plain_models.mamba2(weights, model.config, ids, lam, gating, layernorm, skip_site, norm_site)
        assert_close(edited_outputs(model, ids, variant), plain, str(variant))


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_every_edit_of_post_norm(kind: str) -> None:
    model, ids = MAKE[kind](), tiny.ids(2, 9)
    weights, plain_model = plain_models.weights_of(model), getattr(plain_models, kind)
    per_layer = (1.5, 0.0, -0.5) if kind == "bert" else (1.0, -2.0, 0.0, 0.5, 1.0, 1.0, 3.0, -1.0)
    for lam, layernorm, site in itertools.product(
        (-2.0, 0.0, 1.0, 3.0, per_layer), (True, False), ("residual", "ffn", "both")
    ):
        variant = Variant(lam, layernorm=layernorm, skip_site=site)
        plain = plain_model(weights, model.config, ids, lam, layernorm, site)
        assert_close(edited_outputs(model, ids, variant), plain, str(variant))


def test_lambdas_of_a_shared_layer_go_by_its_calls() -> None:
    """One module computes all layers of this ALBERT, forward after forward."""
    model, ids = tiny.albert(4, 1, 1), tiny.ids(2, 6)
    lam = (0.0, 1.0, -2.0, 0.5)
    plain = plain_models.albert(plain_models.weights_of(model), model.config, ids, lam)
    with lscollapse.surgery(model, Variant(lam)), captured(blocks_of(model), "output") as seen:
        forward(model, ids)
        forward(model, ids)
    outputs = [Y.double().numpy() for Y in seen]
    assert_close(outputs[:4], plain, "first forward")
    assert_close(outputs[4:], plain, "second forward")


def test_surgery_of_a_model_with_a_head() -> None:
    from transformers import Mamba2ForCausalLM

    whole = Mamba2ForCausalLM(tiny.mamba2().config).eval()
    ids = tiny.ids(2, 9)
    with lscollapse.surgery(whole, Variant(lam=-2.0, gating=False)), torch.no_grad():
        logits = whole(input_ids=torch.as_tensor(ids)).logits
    w = plain_models.weights_of(whole.backbone)
    X = plain_models.mamba2(w, whole.config, ids, -2.0, gating=False)[-1]
    final = X / np.sqrt((X**2).mean(-1, keepdims=True) + whole.config.layer_norm_epsilon) * w["norm_f.weight"]
    expected = final @ whole.lm_head.weight.detach().double().numpy().T
    np.testing.assert_allclose(logits.double().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- lam = 0 is exactly O -------------------------------------------------------------------------


@pytest.mark.parametrize("gating", [True, False])
@pytest.mark.parametrize("layernorm", [True, False])
def test_lambda_0_of_mamba2_is_the_mixer_bit_for_bit(gating: bool, layernorm: bool) -> None:
    model, ids = tiny.mamba2(2), tiny.ids(2, 9)
    with torch.no_grad():
        model.embeddings.weight *= 1e6 if layernorm else 30.0  # (X + O) - X would lose O
    with (
        captured([layer.mixer for layer in model.layers], "output") as mixers,
        lscollapse.surgery(model, Variant(0.0, gating, layernorm)),
        captured(list(model.layers), "output") as blocks,
    ):
        forward(model, ids)
    assert len(mixers) == len(blocks) == 3
    for O, Y in zip(mixers, blocks, strict=True):
        assert torch.equal(O, Y)


@pytest.mark.parametrize("kind", ["bert", "albert"])
@pytest.mark.parametrize("site", ["residual", "ffn", "both"])
def test_lambda_0_of_post_norm_is_the_mechanism_bit_for_bit(kind: str, site: str) -> None:
    """What goes into the LayerNorm is the output of the linear map before it."""
    model, ids = MAKE[kind](), tiny.ids(2, 9)
    if kind == "bert":
        first = [(b.attention.output.dense, b.attention.output.LayerNorm) for b in blocks_of(model)]
        second = [(b.output.dense, b.output.LayerNorm) for b in blocks_of(model)]
    else:
        first = [(b.attention.dense, b.attention.LayerNorm) for b in blocks_of(model)]
        second = [(b.ffn_output, b.full_layer_layer_norm) for b in blocks_of(model)]
    for pairs, edited in ((first, site in ("residual", "both")), (second, site in ("ffn", "both"))):
        dense, norms = map(list, zip(*pairs, strict=True))
        with (
            captured(dense, "output") as mechanism,
            lscollapse.surgery(model, Variant(0.0, skip_site=site)),
            captured(norms, "input") as summed,
        ):
            forward(model, ids)
        assert len(mechanism) == len(summed) > 0
        assert all(torch.equal(O, Y) == edited for O, Y in zip(mechanism, summed, strict=True))


def test_the_measured_pass_gives_o_alone_at_lambda_0() -> None:
    """Also in the package's own blocks. Past the eps of the norm the mixer does not see how large X is, so O is
    the same for embeddings of 2^40 and 2^50; a skip that was added and taken away would leave 2^-24 of them."""
    ids, tables = tiny.ids(2, 9), []
    for scale in (2.0**40, 2.0**50):
        model = tiny.mamba2(2)
        with torch.no_grad():
            model.embeddings.weight *= scale
        tables.append(lscollapse.measure(model, ids, [Variant(0.0)]).query("layer == 1")["value"])
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-5)


# --- nothing stays behind -------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The bits and the addresses of every weight, and how many hooks hang where."""
    return {
        "weights": {n: t.detach().clone().view(torch.uint8) for n, t in model.state_dict().items()},
        "addresses": {n: t.data_ptr() for n, t in model.state_dict().items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "forwards": {n: m.forward for n, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["weights"].keys() == after["weights"].keys()
    for name, bits in before["weights"].items():
        assert torch.equal(bits, after["weights"][name]), name
    for part in ("addresses", "hooks", "attributes", "forwards"):
        assert before[part] == after[part], part


VARIANTS = {
    "mamba2": [
        Variant(-2.0, False, False),
        Variant(0.5, False, skip_site="mixer"),
        Variant((1.0, 2.0, 3.0), True, False, norm_site="mixer"),
    ],
    "bert": [Variant(-2.0, layernorm=False), Variant(0.0, skip_site="both")],
    "albert": [Variant(-2.0, layernorm=False), Variant(0.0, skip_site="both")],
}
CASES = [(kind, variant) for kind, variants in VARIANTS.items() for variant in variants]


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=str)
def test_the_model_is_as_it_was(kind: str, variant: Variant) -> None:
    model, ids = MAKE[kind](), tiny.ids(2, 9)
    before, output = snapshot(model), forward(model, ids)
    with lscollapse.surgery(model, variant):
        changed = forward(model, ids)
    assert not torch.equal(changed, output)
    assert_same(before, snapshot(model))
    assert torch.equal(forward(model, ids), output)
    lscollapse.measure(model, ids, [variant])
    assert_same(before, snapshot(model))
    assert torch.equal(forward(model, ids), output)


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=str)
def test_the_model_is_as_it_was_after_an_exception(kind: str, variant: Variant) -> None:
    """Once between two forwards, once in the middle of a block."""
    model, ids = MAKE[kind](), tiny.ids(2, 9)
    before, output = snapshot(model), forward(model, ids)
    with pytest.raises(KeyError, match="between"), lscollapse.surgery(model, variant):
        forward(model, ids)
        raise KeyError("between")
    assert_same(before, snapshot(model))

    last = blocks_of(model)[-1]
    inner = {"mamba2": "mixer.out_proj", "bert": "output.dense", "albert": "ffn_output"}[kind]

    def fail(*_: Any) -> None:
        raise KeyError("inside")

    handle = last.get_submodule(inner).register_forward_hook(fail)
    try:
        with pytest.raises(KeyError, match="inside"), lscollapse.surgery(model, variant):
            forward(model, ids)
    finally:
        handle.remove()
    assert_same(before, snapshot(model))
    assert torch.equal(forward(model, ids), output)


# --- nothing goes unnoticed -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
def test_a_model_that_was_never_called(kind: str) -> None:
    model = MAKE[kind]()
    with pytest.raises(SurgeryError, match="did not fire"), lscollapse.surgery(model, Variant(-2.0)):
        pass


@pytest.mark.parametrize("kind", MAKE)
def test_training_mode(kind: str) -> None:
    model = MAKE[kind]().train()
    before = snapshot(model)
    with pytest.raises(SurgeryError, match="training mode"), lscollapse.surgery(model, Variant(-2.0)):
        pytest.fail("the context was entered")
    assert_same(before, snapshot(model))


def test_a_path_around_the_gated_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fused kernel does: the mixer computes its norm without calling the module that the hook is on."""
    model = tiny.mamba2()
    mixer = model.layers[1].mixer
    monkeypatch.setattr(mixer, "forward", lambda u, **_: mixer.out_proj(mixer.in_proj(u)[..., :32]))
    with pytest.raises(SurgeryError, match=r"mixer\.norm"), lscollapse.surgery(model, Variant(gating=False)):
        forward(model, tiny.ids(1, 5))


def test_a_block_that_is_left_out() -> None:
    """Early exits and layer dropping are seen."""
    model = tiny.mamba2()
    with pytest.raises(SurgeryError, match="did not fire"), lscollapse.surgery(model, Variant(-2.0)), torch.no_grad():
        X = model.embeddings(torch.as_tensor(tiny.ids(1, 5)))
        model.layers[1](model.layers[0](X))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mamba2", {"skip_site": "ffn"}, "'ffn' does not exist in mamba2: use one of residual, mixer"),
        ("bert", {"skip_site": "mixer"}, "'mixer' does not exist in bert: use one of residual, ffn, both"),
        ("albert", {"skip_site": "nowhere"}, "'nowhere' does not exist in albert"),
        ("bert", {"norm_site": "mixer"}, "'mixer' does not exist in bert"),
        ("mamba2", {"norm_site": "nowhere"}, "'nowhere' does not exist in mamba2: use one of both, mixer, block"),
        ("mamba2", {"lam": (1.0, 2.0)}, "2 lambdas for 3 layers"),
        ("albert", {"lam": (1.0,) * 4}, "4 lambdas for 8 layers"),
    ],
)
def test_variants_that_a_model_does_not_have(kind: str, changes: dict[str, Any], message: str) -> None:
    model, variant = MAKE[kind](), Variant(**changes)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=message), lscollapse.surgery(model, variant):
        pytest.fail("the context was entered")
    with pytest.raises(SurgeryError, match=message):
        lscollapse.measure(model, tiny.ids(1, 5), [variant])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), "2", (1.0, float("-inf")), None, 10**400])
def test_lambda_must_be_a_finite_number(lam: Any) -> None:
    with pytest.raises(SurgeryError, match="finite"):
        Variant(lam)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "bert"])
def test_unsupported_models(model: Any) -> None:
    with pytest.raises(UnsupportedModel, match="supported are mamba2, albert, bert"):
        lscollapse.measure(model, [[1, 2]])


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_chunked_feed_forward_is_refused(kind: str) -> None:
    """It calls the feed-forward part on pieces of the sequence: the edited sum would be of pieces."""
    model = getattr(tiny, kind)(chunk_size_feed_forward=3)
    with pytest.raises(UnsupportedModel, match="chunk_size_feed_forward"), lscollapse.surgery(model, Variant(0.0)):
        pytest.fail("the context was entered")


def test_names_of_arms() -> None:
    assert Variant().arm() == "gate, LN"
    assert Variant(gating=False, layernorm=False).arm() == "no gate, no LN"
    assert Variant(layernorm=False, norm_site="mixer").arm() == "gate, no mixer LN"
    assert Variant(gating=False, skip_site="mixer").arm() == "no gate, LN, mixer skip"
    assert Variant(skip_site="both").arm(has_gate=False) == "LN, both skips"


def test_adapters_know_shared_layers() -> None:
    adapter = adapt(tiny.albert(4, 2, 2))
    assert adapter.n_layers == 8
    groups = adapter.model.encoder.albert_layer_groups
    assert [adapter.block(k) for k in range(4)] == [groups[0].albert_layers[k % 2] for k in range(4)]
    assert adapter.layers_of(groups[1].albert_layers[1]) == [5, 7]
