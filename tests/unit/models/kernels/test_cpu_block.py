"""The block on CPU, by torch operations and in C++, against transformers' Mamba2Block, and its variants against a plain
float64 block written here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lscollapse.models.kernels import native
from lscollapse.models.kernels.backends import Kernels
from lscollapse.models.kernels.chunked import causal_conv, chunked_scan, gated_norm
from lscollapse.models.kernels.cpu_block import CpuBlock
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import BlockError, Mamba2Shape

SHAPES = {
    "one group": Mamba2Shape(hidden=24, heads=6, head_dim=8, state=5, groups=1, eps=1e-5),
    "two groups": Mamba2Shape(hidden=16, heads=4, head_dim=8, state=3, groups=2, conv_kernel=3, dt_limit=(0.01, 0.3)),
    "four groups": Mamba2Shape(hidden=8, heads=8, head_dim=2, state=16, groups=4),
}


Make = Callable[..., CpuBlock]


@pytest.fixture(params=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Make:
    """CpuBlock on one of its two paths."""
    if request.param == "torch":
        return CpuBlock
    functions, why = native.load()
    if functions is None:
        pytest.skip(why)
    return partial(CpuBlock, native=functions)


def weights(shape: Mamba2Shape, biases: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    wanted = shape.tensors() | {
        name: size for name, size in shape.optional_tensors().items() if biases or name == "mixer.conv1d.bias"
    }
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in wanted.items()}
    for name in ("mixer.in_proj.weight", "mixer.out_proj.weight"):
        tensors[name] /= tensors[name].shape[1] ** 0.5
    return tensors | {"mixer.A_log": tensors["mixer.A_log"] + 1.0, "mixer.dt_bias": tensors["mixer.dt_bias"] - 2.0}


def stream(shape: Mamba2Shape, batch: int = 3, N: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(N)
    return 2.0 * torch.randn(batch, N, shape.hidden, generator=generator, dtype=torch.float64)


def plain_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return ((parts / (parts**2).mean(-1, keepdim=True).add(eps).sqrt()).reshape(x.shape)) * weight


def plain_O(
    w: dict[str, Tensor], s: Mamba2Shape, X: Tensor, gating: bool, block_norm: bool, mixer_norm: bool, D_shift: float
) -> Tensor:
    """O, token by token and with everything computed, in float64."""
    inner, wide = s.heads * s.head_dim, s.groups * s.state
    h = plain_norm(X, w["norm.weight"], s.eps) if block_norm else X
    h = h @ w["mixer.in_proj.weight"].T + w.get("mixer.in_proj.bias", 0.0)
    z, xBC, dt = h[..., :inner], h[..., inner : 2 * inner + 2 * wide], h[..., 2 * inner + 2 * wide :]
    taps, K = w["mixer.conv1d.weight"][:, 0], s.conv_kernel
    conv = torch.zeros_like(xBC) + w.get("mixer.conv1d.bias", 0.0)
    for t, shift in itertools.product(range(X.shape[1]), range(K)):
        if t >= shift:
            conv[:, t] += taps[:, K - 1 - shift] * xBC[:, t - shift]
    conv = conv * torch.sigmoid(conv)
    x = conv[..., :inner].reshape(*X.shape[:2], s.heads, s.head_dim)
    group = torch.arange(s.heads) // (s.heads // s.groups)
    B = conv[..., inner : inner + wide].reshape(*X.shape[:2], s.groups, s.state)[:, :, group]
    C = conv[..., inner + wide :].reshape(*X.shape[:2], s.groups, s.state)[:, :, group]
    step = torch.log1p(torch.exp(dt + w["mixer.dt_bias"])).clamp(*s.dt_limit)
    state = torch.zeros(X.shape[0], s.heads, s.head_dim, s.state, dtype=torch.float64)
    y = torch.zeros_like(x)
    for t in range(X.shape[1]):
        decay = torch.exp(-step[:, t] * torch.exp(w["mixer.A_log"]))
        state = decay[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", step[:, t], x[:, t], B[:, t])
        y[:, t] = torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + (w["mixer.D"] + D_shift)[:, None] * x[:, t]
    y = y.reshape(*X.shape[:2], inner)
    if gating:
        y = y * z * torch.sigmoid(z)
    if mixer_norm:
        y = plain_norm(y, w["mixer.norm.weight"], s.eps, s.groups)
    return y @ w["mixer.out_proj.weight"].T + w.get("mixer.out_proj.bias", 0.0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("N", [1, 5, 150])
def test_unedited_block_is_transformers_block(make: Make, name: str, N: int) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

    s = SHAPES[name]
    config = Mamba2Config(
        hidden_size=s.hidden,
        num_heads=s.heads,
        head_dim=s.head_dim,
        expand=s.inner // s.hidden,
        state_size=s.state,
        n_groups=s.groups,
        conv_kernel=s.conv_kernel,
        layer_norm_epsilon=s.eps,
        time_step_limit=s.dt_limit,
        use_bias=True,
        chunk_size=16,
        num_hidden_layers=1,
    )
    tensors = {name: t.float() for name, t in weights(s, biases=True).items()}
    reference = Mamba2Block(config, layer_idx=0).eval()
    reference.load_state_dict(tensors)
    X = stream(s, N=N).float()
    with torch.no_grad():
        expected = reference(X)
    found = make(tensors, s)(X)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("skip_site", ["residual", "mixer"])
@pytest.mark.parametrize("norm_site", ["both", "mixer", "block", None])
@pytest.mark.parametrize("gating", [True, False])
def test_variants_are_the_plain_block(
    make: Make, name: str, skip_site: str, norm_site: str | None, gating: bool
) -> None:
    s, lam, o_scale = SHAPES[name], -1.5, 0.25
    w, X = weights(s, biases=name == "one group"), stream(s)
    arm = {"gating": gating, "layernorm": norm_site is None, "skip_site": skip_site, "norm_site": norm_site or "both"}
    shift = lam if skip_site == "mixer" else 0.0
    O = plain_O(w, s, X, gating, norm_site not in ("both", "block"), norm_site not in ("both", "mixer"), shift)
    expected = (1.0 if skip_site == "mixer" else lam) * X + o_scale * O
    found = make(w, s, torch.float64)(X, lam=lam, o_scale=o_scale, **arm)
    assert found.dtype == torch.float64 and relative_error(found, expected) < 1e-12
    narrow = make(w, s, torch.float32)(X, lam=lam, o_scale=o_scale, **arm)
    assert narrow.dtype == torch.float32 and relative_error(narrow, expected) < 1e-5
    # bfloat16 has 8 bits: two products with rounded factors and results
    coarse = make(w, s, torch.bfloat16)(X, lam=lam, o_scale=o_scale, **arm)
    assert coarse.dtype == torch.float32 and relative_error(coarse, expected) < 0.05


def test_lambda_zero_is_exactly_the_scaled_mixer_output(make: Make) -> None:
    s = SHAPES["two groups"]
    block, X = make(weights(s), s, torch.float64), stream(s)
    O = block(X, lam=0.0)
    assert relative_error(O, plain_O(weights(s), s, X, True, True, True, 0.0)) < 1e-12
    assert torch.equal(block(X, lam=0.0, o_scale=0.5), 0.5 * O)
    assert torch.equal(block(1e30 * X, lam=0.0)[..., 0], block(2e30 * X, lam=0.0)[..., 0])
    scales = torch.tensor([1.0, 0.5, 2.0]).view(3, 1, 1)
    assert torch.equal(block(X, lam=0.0, o_scale=scales), scales.double() * O)


@pytest.mark.parametrize("skip_site", ["residual", "mixer"])
def test_skip_stands_in_the_place_of_lambda_on_the_residual_excerpt_by_excerpt(make: Make, skip_site: str) -> None:
    s = SHAPES["two groups"]
    w, X, lam = weights(s), stream(s), -1e39
    skip, scale = (torch.tensor(f, dtype=torch.float64).view(3, 1, 1) for f in ([0.0, -2.5, 2.0**-9], [1.0, 0.25, 0.5]))
    shift, gating = (1.5, False) if skip_site == "mixer" else (0.0, True)
    expected = skip * X + scale * plain_O(w, s, X, gating, True, True, shift)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        block = make(w, s, dtype)
        found = block(X, lam=shift or lam, gating=gating, skip_site=skip_site, skip=skip, o_scale=scale)
        assert relative_error(found, expected) < tolerance
    assert torch.isinf(make(w, s, torch.float32)(X, lam=lam)).all()  # not carried, it leaves float32


TORCH = Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "cpu")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_has_the_factor_0_is_left_out_whatever_it_holds(make: Make, on_gpu: bool) -> None:
    """A row that stands still, X + 0 O, and one that begins anew, 0 X + O."""
    kind: Any = (lambda w, s: GpuBlock(w, s, TORCH)) if on_gpu else make
    s = SHAPES["one group"]
    w, X = weights(s), stream(s).float()
    zero, one = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1), torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    whole = kind(w, s)(X, lam=0.0)
    broken = w | {"mixer.out_proj.weight": torch.full_like(w["mixer.out_proj.weight"], torch.nan)}
    still = kind(broken, s)(X, skip=zero, o_scale=one)
    assert torch.equal(still[1], X[1]) and still[0].isnan().all() and still[2].isnan().all()
    anew = kind(w, s)(X, skip=zero, o_scale=one)
    torch.testing.assert_close(anew[0], whole[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gating", [True, False])
def test_an_excerpt_gives_the_same_in_any_batch(make: Make, dtype: torch.dtype, gating: bool) -> None:
    """Bit-identical by construction but for the two matrix products, of which only the rounding may differ."""
    s = Mamba2Shape(hidden=96, heads=6, head_dim=32, state=16)
    block, X = make(weights(s), s, dtype), stream(s, batch=7, N=19)
    together = block(X, lam=0.5, gating=gating)
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    for part in (slice(0, 1), slice(3, 4), slice(2, 6), slice(6, 7)):
        assert relative_error(block(X[part], lam=0.5, gating=gating), together[part]) <= bound


def test_an_excerpt_that_overflows_leaves_the_others_alone(make: Make) -> None:
    s = SHAPES["one group"]
    block, X = make(weights(s), s), stream(s).float()
    clean = block(X, lam=1.0, layernorm=False)
    X[1] = torch.inf
    found = block(X, lam=1.0, layernorm=False)
    assert torch.equal(found[[0, 2]], clean[[0, 2]]) and not torch.isfinite(found[1]).any()


def test_norm_is_right_where_squares_overflow(make: Make) -> None:
    """norm(1e25 X) = norm(X) although 1e50 is no float32."""
    s = SHAPES["two groups"]
    block, X = make(weights(s), s), stream(s).float()
    assert relative_error(block(1e25 * X, lam=0.0), block(X, lam=0.0)) < 1e-4


def test_what_is_wrong_is_named() -> None:
    s = SHAPES["one group"]
    w, X = weights(s), stream(s)
    with pytest.raises(BlockError, match=r"no tensor 'mixer.D'"):
        CpuBlock({name: t for name, t in w.items() if name != "mixer.D"}, s)
    with pytest.raises(BlockError, match=r"unknown tensor 'mixer.E'"):
        CpuBlock(w | {"mixer.E": X}, s)
    with pytest.raises(BlockError, match=r"mixer.D has shape \(5,\), expected \(6,\)"):
        CpuBlock(w | {"mixer.D": torch.zeros(5)}, s)
    with pytest.raises(BlockError, match="float16"):
        CpuBlock(w, s, torch.float16)
    block = CpuBlock(w, s)
    with pytest.raises(BlockError, match="skip_site 'gate'"):
        block(X, skip_site="gate")
    with pytest.raises(BlockError, match="norm_site 'none'"):
        block(X, norm_site="none")
    with pytest.raises(BlockError, match="expected"):
        block(X[..., :3])


def test_workers_leave_the_thread_setting_of_others_alone(make: Make) -> None:
    s = SHAPES["one group"]
    before = torch.get_num_threads()
    make(weights(s), s)(stream(s))
    with ThreadPoolExecutor(1) as pool:
        assert (torch.get_num_threads(), pool.submit(torch.get_num_threads).result()) == (before, before)
