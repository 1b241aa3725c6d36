"""The four mixers against plain float64 recurrences, dense closed forms (written here) and transformers' mixers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from lscollapse.models.nets import mamba
from lscollapse.models.nets.attention import Attention, linear_attention
from lscollapse.models.nets.mamba import Mamba, selective_scan
from lscollapse.models.nets.mamba2 import SSD, BareSSD, Mamba2
from tests.unit.models.kernels.test_ssd import recurrence as ssd_recurrence

SIZES = [
    (1, 1, 1, 1),
    (2, 1, 3, 4),
    (3, 7, 5, 2),
    (2, 9, 4, 3),
    (3, 33, 6, 5),
    (1, 130, 3, 4),
    (5, 64, 8, 16),
]  # b L d n
STEPS = {"weak": 0.01, "usual": 1.0, "strong": 400.0}  # times |A| up to 3: decays to exp(-1200)
TILES = {"one piece": 1, "rows": 8 * 20 * 3, "pieces": 8 * 128 * 64}  # numbers in a tile: how the work is cut
S6_NAMES = ("x", "dt", "A", "B", "C", "D")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def s6_inputs(size: tuple[int, ...], step: float = 1.0) -> list[Tensor]:
    b, L, d, n = size
    A = -3.0 * torch.rand(d, n, generator=torch.Generator().manual_seed(L), dtype=torch.float64)
    dt = step * F.softplus(normal(b, L, d, seed=1))
    return [normal(b, L, d), dt, A, normal(b, L, n, seed=2), normal(b, L, n, seed=3), normal(d)]


def s6_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The definition, token by token."""
    h = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(outputs, 1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


def gradients(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(y.dtype))


# --- the selective scan ---


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_s6_is_the_recurrence_and_so_are_its_gradients(
    size: tuple[int, ...], step: str, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mamba.TILE, "cpu", TILES[tile])
    inputs = s6_inputs(size, STEPS[step])
    leaves = [t.requires_grad_() for t in inputs]
    expected = s6_recurrence(*leaves)
    found = selective_scan(*leaves)
    assert found.dtype == torch.float64 and relative_error(found, expected) < 1e-12
    for name, one, other in zip(S6_NAMES, gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert torch.isfinite(one).all()
        assert float((one - other).abs().max()) <= 1e-11 * float(other.abs().max()), name
    narrow = [t.detach().float().requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    found, expected = selective_scan(*narrow), s6_recurrence(*wide)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5
    for name, one, other in zip(S6_NAMES, gradients(found, narrow), gradients(expected, wide), strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max()), name


def test_s6_keeps_few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd holds is the inputs and at most KEPT numbers of states, and the end; the result stays."""
    inputs = [t.requires_grad_() for t in s6_inputs((2, 160, 4, 3))]
    expected = gradients(s6_recurrence(*inputs), inputs)
    monkeypatch.setitem(mamba.TILE, "cpu", 1)
    for kept, states in ((1 << 20, 160 // 8), (2 * 160 * 12 // 32, 5), (1, 1)):
        monkeypatch.setattr(mamba, "KEPT", kept)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            y = selective_scan(*inputs)
        assert max(sizes) == max((states + 1) * 2 * 12, 2 * 160 * 4)
        for one, other in zip(gradients(y, inputs), expected, strict=True):
            assert relative_error(one, other) < 1e-11


def test_s6_gradients_by_finite_differences() -> None:
    leaves = [t.requires_grad_() for t in s6_inputs((2, 11, 2, 3))]
    assert torch.autograd.gradcheck(selective_scan, leaves)


def test_s6_of_a_constant_is_a_geometric_series() -> None:
    """One channel, one state, x = B = C = 1: y_t = dt (1 - a^t) / (1 - a) with a = exp(-dt), t = 1..L."""
    L, dt = 500, 0.01
    one = torch.ones(1, L, 1)
    y = selective_scan(one, dt * one, -torch.ones(1, 1), one, one, torch.zeros(1))
    t = torch.arange(1.0, L + 1, dtype=torch.float64)
    expected = dt * -torch.expm1(-dt * t) / -math.expm1(-dt)
    assert relative_error(y[0, :, 0], expected) < 1e-5


# --- transformers' mixers ---


def moved_off_the_start(module: nn.Module) -> None:
    """Random biases, D and norm weights, larger projections: an untrained mixer hides most of its terms."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter += 0.5 * normal(*parameter.shape, seed=len(name)).float()
            elif "proj" in name:
                parameter *= 2.0


@pytest.mark.parametrize("L", [1, 5, 41])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_mixer_is_that_of_transformers(kind: str, L: int) -> None:
    torch.manual_seed(0)
    d, n = 32, 6
    if kind == "mamba":
        ours: nn.Module = Mamba(d, n)
        theirs: nn.Module = MambaMixer(MambaConfig(hidden_size=d, state_size=n, num_hidden_layers=1), 0)
    else:
        ours = Mamba2(d, n, head_dim=16)
        shape = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16, "layer_norm_epsilon": 1e-5}
        theirs = Mamba2Mixer(Mamba2Config(hidden_size=d, state_size=n, num_hidden_layers=1, **shape), 0)
    moved_off_the_start(ours)
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    X = normal(3, L, d).float().requires_grad_()
    found, expected = ours(X), theirs(X)
    assert float(expected.detach().abs().max()) > 0.05
    assert relative_error(found, expected) < 2e-5
    names = [name for name, _ in ours.named_parameters()]
    ours_leaves, theirs_leaves = list(ours.parameters()), [theirs.get_parameter(name) for name in names]
    pairs = zip(gradients(found, [X, *ours_leaves]), gradients(expected, [X, *theirs_leaves]), strict=True)
    for name, (one, other) in zip(["X", *names], pairs, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * max(float(other.abs().max()), 1e-3), name


@pytest.mark.parametrize("L", [1, 63, 64, 131])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 6.0])
def test_ssd_module_is_the_recurrence(L: int, shift: float) -> None:
    torch.manual_seed(1)
    ssd = SSD(heads=2).double()
    with torch.no_grad():
        ssd.dt_bias += shift
    leaves = [normal(2, L, 6), normal(2, L, 4, seed=1), normal(2, L, 4, seed=2), normal(2, L, 2, seed=3)]
    leaves = [t.requires_grad_() for t in leaves]
    x, B, C, dt = leaves
    A = -ssd.A_log.exp()
    expected = ssd_recurrence(
        x.unflatten(-1, (2, 3)), dt, A, B[:, :, None], C[:, :, None], ssd.D, ssd.dt_bias
    ).flatten(2)  # fmt: skip
    found = ssd.scan(*leaves)
    assert relative_error(found, expected) < 1e-12
    everything = [*leaves, *ssd.parameters()]
    for one, other in zip(gradients(found, everything), gradients(expected, everything), strict=True):
        assert float((one - other).abs().max()) <= 1e-10 * float(other.abs().max()) + 1e-14


def test_bare_ssd_is_projection_scan_projection() -> None:
    torch.manual_seed(2)
    mixer, X = BareSSD(6, 4).double(), normal(2, 20, 6)
    x, B, C, dt = (X @ mixer.in_proj.weight.T).split((6, 4, 4, 1), -1)
    A = -mixer.A_log.exp()
    y = ssd_recurrence(x[:, :, None], dt, A, B[:, :, None], C[:, :, None], mixer.D, mixer.dt_bias)[:, :, 0]
    assert relative_error(mixer(X), y @ mixer.out_proj.weight.T) < 1e-12
    assert sum(p.numel() for p in mixer.parameters()) == 6 * (6 + 4 + 4 + 1) + 6 * 6 + 3


# --- attention ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(("N", "heads", "keys"), [(1, 1, 8), (7, 2, 8), (64, 4, 4), (65, 1, 12), (150, 2, 6)])
def test_attention_is_the_dense_formula(N: int, heads: int, keys: int, linear: bool, causal: bool) -> None:
    torch.manual_seed(N)
    d = 8
    mixer = Attention(d, heads, keys, linear=linear, causal=causal).double()
    X = normal(2, N, d).requires_grad_()
    q, k, v = ((X @ one.weight.T + one.bias).view(2, N, heads, -1) for one in (mixer.q, mixer.k, mixer.v))
    if linear:
        q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
        weights = torch.einsum("bihp,bjhp->bhij", q, k)
    else:
        weights = torch.exp(torch.einsum("bihp,bjhp->bhij", q, k) / math.sqrt(keys / heads))
    if causal:
        weights = weights * torch.ones(N, N, dtype=torch.float64).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhp->bihp", weights, v).reshape(2, N, d) @ mixer.out.weight.T + mixer.out.bias
    found = mixer(X)
    assert relative_error(found, expected) < 1e-12
    leaves = [X, *mixer.parameters()]
    for one, other in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert float((one - other).abs().max()) <= 1e-11 * max(float(other.abs().max()), 1.0)


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_linear_attention_does_not_depend_on_its_chunks(chunk: int) -> None:
    """With one key for all, the weights are equal: the output is the running mean of the values."""
    N = 37
    v = normal(2, 3, N, 4)
    ones = torch.ones(2, 3, N, 2, dtype=torch.float64)
    running = v.cumsum(2) / torch.arange(1, N + 1)[:, None]
    assert relative_error(linear_attention(ones, ones, v, causal=True, chunk=chunk), running) < 1e-13


# --- all of them ---

MIXERS = {
    "attention": lambda: Attention(32, 2, 32, linear=False, causal=True),
    "linear": lambda: Attention(32, 2, 32, linear=True, causal=True),
    "mamba": lambda: Mamba(32, 6),
    "mamba2": lambda: Mamba2(32, 6, head_dim=32),
    "bare SSD": lambda: BareSSD(32, 6),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_later_token_changes_nothing_before_it(name: str) -> None:
    torch.manual_seed(3)
    mixer, X = MIXERS[name]().double(), normal(2, 75, 32)
    for t in (1, 8, 64, 74):
        changed = X.clone()
        changed[:, t:] += 1.0
        before, after = mixer(X), mixer(changed)
        assert torch.allclose(before[:, :t], after[:, :t], rtol=0, atol=1e-13)
        assert (before[:, t] - after[:, t]).abs().max() > 1e-6
    X.requires_grad_()
    gradient = torch.autograd.grad(mixer(X)[:, 30].sum(), X)[0]
    assert gradient[:, :31].abs().amax((0, 2)).min() > 0 and not gradient[:, 31:].any()


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_to_bfloat16_keeps_the_scans_in_float32(name: str) -> None:
    torch.manual_seed(4)
    mixer, X = MIXERS[name](), normal(2, 100, 32).float().requires_grad_()
    expected = mixer(X)
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(X)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 0.03
    for one, other in zip(gradients(found, [X]), gradients(expected, [X]), strict=True):
        assert relative_error(one, other) < 0.05
