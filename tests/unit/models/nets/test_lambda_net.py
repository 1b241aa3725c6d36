"""The nets of Table 1: what a block computes, where lambda acts and learns, what the config refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from lscollapse.models.nets.lambda_net import Block, Net, NetConfig, NetError

MIXERS = ("attention", "linear", "mamba", "mamba2")
SMALL = {"hidden_size": 16, "state_size": 4, "head_dim": 8, "vocab_size": 20, "n_labels": 5, "max_positions": 40}


def small(**changes: object) -> NetConfig:
    return NetConfig(**{**SMALL, **changes})


def net_of(config: NetConfig, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(config).double().eval()


def some_ids(batch: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(seed))


def stream(batch: int = 2, length: int = 9, d: int = 16) -> Tensor:
    return torch.randn(batch, length, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def normed(X: Tensor, norm: nn.Module) -> Tensor:
    centred = X - X.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# --- one block ---


@pytest.mark.parametrize("lam", [-1.0, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("mixer", MIXERS)
def test_block_is_lam_x_plus_o_then_the_mlp(mixer: str, lam: float) -> None:
    torch.manual_seed(1)
    X = stream()
    for norm in ("pre", "post"):
        block = Block(small(mixer=mixer, lam=lam, norm=norm)).double()
        with torch.no_grad():
            for parameter in (*block.norm.parameters(), *block.mlp_norm.parameters()):
                parameter.normal_()
        up, down = block.mlp[0], block.mlp[2]
        assert up.weight.shape == (64, 16)

        def mlp(X: Tensor, up: nn.Linear = up, down: nn.Linear = down) -> Tensor:
            return gelu(X @ up.weight.T + up.bias) @ down.weight.T + down.bias

        if norm == "pre":
            Y = lam * X + block.mixer(normed(X, block.norm))
            expected = Y + mlp(normed(Y, block.mlp_norm))
        else:
            Y = normed(lam * X + block.mixer(X), block.norm)
            expected = normed(Y + mlp(Y), block.mlp_norm)
        assert torch.allclose(block(X), expected, rtol=1e-12, atol=1e-12)
    bare = Block(small(mixer=mixer, lam=lam, mlp=False)).double()
    assert torch.allclose(bare(X), lam * X + bare.mixer(normed(X, bare.norm)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_author_code_puts_gelu_and_a_glu_behind_the_mixer(mixer: str) -> None:
    """norm(lam X + GLU(GELU(mixer(X)))), and "Mamba-2" is the bare SSD: 3 numbers beside its two projections."""
    torch.manual_seed(2)
    block, X = Block(small(mixer=mixer, shape="author_code", norm="post", mlp=False, lam=0.3)).double(), stream()
    inner, glu = block.mixer[0], block.mixer[3]
    value, gate = (gelu(inner(X)) @ glu.weight.T + glu.bias).split(16, -1)
    assert torch.allclose(block(X), normed(0.3 * X + value / (1 + torch.exp(-gate)), block.norm), rtol=1e-12)
    if mixer == "mamba2":
        assert sum(p.numel() for p in inner.parameters()) == 16 * (16 + 4 + 4 + 1) + 16 * 16 + 3


def test_author_code_attention_has_state_size_keys() -> None:
    assert net_of(small(shape="author_code")).layers[0].mixer.q.weight.shape == (4, 16)
    assert net_of(small()).layers[0].mixer.q.weight.shape == (16, 16)


# --- lambda ---


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_learnable_lambda_has_the_gradient_of_finite_differences(mixer: str) -> None:
    net, ids = net_of(small(mixer=mixer, lam="learnable", lam_init=0.7)), some_ids()
    labels = torch.randint(5, ids.shape, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        return F.cross_entropy(net(ids).flatten(0, 1), labels.flatten())

    loss().backward()
    for layer in net.layers:
        gradient, step = float(layer.lam.grad), 1e-5
        with torch.no_grad():
            layer.lam += step
            above = float(loss())
            layer.lam -= 2 * step
            below = float(loss())
            layer.lam += step
        assert abs(gradient) > 1e-6
        assert gradient == pytest.approx((above - below) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_moves_a_learnable_lambda_and_no_fixed_one(mixer: str) -> None:
    ids, labels = some_ids(), some_ids(seed=1) % 5
    for lam, start in (("learnable", -1.0), (1.0, 1.0)):
        net = net_of(small(mixer=mixer, lam=lam)).train()
        assert net.lams() == [start, start]
        names = [name for name, _ in net.named_parameters() if name.endswith("lam")]
        assert names == (["layers.0.lam", "layers.1.lam"] if lam == "learnable" else [])
        optimiser = torch.optim.AdamW(net.parameter_groups(0.1), lr=1e-2)
        before = F.cross_entropy(net(ids).flatten(0, 1), labels.flatten())
        before.backward()
        optimiser.step()
        assert F.cross_entropy(net(ids).flatten(0, 1), labels.flatten()) < before
        moved = [abs(one - start) for one in net.lams()]
        assert all(m > 1e-3 for m in moved) if lam == "learnable" else moved == [0.0, 0.0]


def test_lam_init_is_where_it_starts() -> None:
    assert Net(small(lam="learnable")).lams() == [-1.0, -1.0]
    assert Net(small(lam="learnable", lam_init=1)).lams() == [1.0, 1.0]
    assert Net(small(lam=0.25, lam_init=3.0)).lams() == [0.25, 0.25]


def test_a_learnable_lambda_computes_what_the_same_fixed_one_does() -> None:
    fixed, learnable = net_of(small(lam=-0.5)), net_of(small(lam="learnable", lam_init=-0.5))
    weights = {name: one for name, one in learnable.state_dict().items() if not name.endswith("lam")}
    fixed.load_state_dict(weights)
    assert torch.equal(fixed(some_ids()), learnable(some_ids()))


# --- the net ---


@pytest.mark.parametrize("mixer", MIXERS)
def test_net_is_embed_blocks_norm_head(mixer: str) -> None:
    ids = some_ids()
    net = net_of(small(mixer=mixer))
    X = net.encoder.weight[ids]
    if mixer in ("attention", "linear"):
        X = X + net.positions.weight[:12]
    else:
        assert net.positions is None
    assert torch.equal(net.embed(ids), X)
    for layer in net.layers:
        X = layer(X)
    expected = normed(X, net.norm) @ net.decoder.weight.T + net.decoder.bias
    assert torch.allclose(net(ids), expected, rtol=1e-12, atol=1e-12)
    at = torch.tensor([[1, 4], [0, 11], [7, 7]])
    found = net(ids, at)
    assert found.shape == (3, 2, 5)
    for row in range(3):
        for column in range(2):
            assert torch.allclose(found[row, column], expected[row, at[row, column]], rtol=1e-12, atol=1e-12)
    for parameter in net.parameters():
        assert parameter.requires_grad
    net(ids).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_pooled_pixels_of_a_post_norm_net() -> None:
    net = net_of(small(mixer="mamba", reads="pixels", output="pooled", norm="post", mlp=False, vocab_size=17))
    ids = torch.tensor([[0, 8, 16, 4], [16, 16, 0, 2]])
    scaled = torch.tensor([[-1.0, 0.0, 1.0, -0.5], [1.0, 1.0, -1.0, -0.75]], dtype=torch.float64)
    X = scaled[..., None] * net.encoder.weight[:, 0] + net.encoder.bias
    assert torch.allclose(net.embed(ids), X, rtol=1e-14)
    for layer in net.layers:
        X = layer(X)
    assert torch.allclose(net(ids), X.mean(1) @ net.decoder.weight.T + net.decoder.bias, rtol=1e-12)
    with pytest.raises(NetError, match="one output a sequence: give no positions"):
        net(ids, torch.zeros(2, 1, dtype=torch.int64))


def test_tied_classes_are_the_embedding() -> None:
    net = net_of(small(tied=True, n_labels=20, num_hidden_layers=1))
    assert net.decoder is None and not any("decoder" in name for name in net.state_dict())
    ids = some_ids()
    expected = normed(net.layers[0](net.embed(ids)), net.norm) @ net.encoder.weight.T
    assert torch.allclose(net(ids), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_attention_alone_can_look_ahead(mixer: str) -> None:
    ids = some_ids()
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 20
    for causal in (True, False):
        net = net_of(small(mixer=mixer, causal=causal))
        same = torch.allclose(net(ids)[:, :-1], net(other)[:, :-1], rtol=0, atol=1e-12)
        assert same is (causal or mixer in ("mamba", "mamba2"))


def test_positions_can_be_switched_and_end() -> None:
    assert Net(small(mixer="mamba", positions=True)).positions is not None
    assert Net(small(mixer="linear", positions=False)).positions is None
    with pytest.raises(NetError, match="41 positions, the net has embeddings for 40: set max_positions"):
        Net(small())(some_ids(length=41))


def test_dropout_acts_in_training_alone() -> None:
    net, ids = net_of(small(dropout=0.5)), some_ids()
    assert torch.equal(net(ids), net(ids))
    net.train()
    assert not torch.equal(net(ids), net(ids))


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_matrices_are_decayed(mixer: str) -> None:
    net = Net(small(mixer=mixer, lam="learnable"))
    decayed, free = net.parameter_groups(0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    assert sorted(names.values()) == sorted(names[id(p)] for p in (*decayed["params"], *free["params"]))
    not_decayed = {names[id(p)] for p in free["params"]}
    for name in names.values():
        kept = name.endswith(("lam", "bias", "A_log", ".D", "dt_bias")) or "norm" in name
        assert (name in not_decayed) is kept, name


# --- the config ---


def test_config_goes_through_json() -> None:
    config = small(mixer="mamba2", lam="learnable", lam_init=0.5, positions=True, shape="author_code")
    text = json.dumps(config.to_dict())
    assert json.loads(text)["model_type"] == "lambda_net"
    assert NetConfig.from_dict(json.loads(text)) == config
    assert NetConfig.from_dict({}) == NetConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.lam = 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "rwkv"}, "mixer: input should be 'attention', 'linear', 'mamba' or 'mamba2', got 'rwkv'"),
        ({"output": "last"}, "output: input should be 'each' or 'pooled', got 'last'"),
        ({"lam": "learned"}, "lam: input should be a valid number or 'learnable', got 'learned'"),
        ({"lam": math.nan}, "lam: input should be a finite number or 'learnable', got nan"),
        ({"lam_init": math.inf}, "lam_init: input should be a finite number, got inf"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: input should be greater than or equal to 1, got 0"),
        ({"vocab_size": 1}, "vocab_size: input should be greater than or equal to 2, got 1"),
        ({"heads": 3}, "16 channels .* do not divide into 3 heads"),
        ({"mixer": "mamba2", "head_dim": 24}, "32 inner channels cannot be cut into heads of 24: change head_dim"),
        ({"tied": True}, "tied needs tokens as input and as many classes as tokens"),
        ({"dropout": 1.0}, "dropout: input should be less than 1, got 1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: input should be greater than 0, got 0.0"),
        ({"colour": 1, "depth": 2}, "unknown setting 'colour': known are .*hidden_size"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(NetError, match=message):
        NetConfig.from_dict({**SMALL, **changes})
