"""The C++ between the products against float64 definitions: odd shapes, chunks, strong decay, what is huge or not finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels import backends, native
from lscollapse.models.kernels.backends import KernelError, resolve_kernels
from lscollapse.models.kernels.cpu_block import CpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.models.kernels.native import Mixer, Native
from lscollapse.workers import Workspace
from tests.unit.models.kernels.test_cpu_block import SHAPES, plain_norm, plain_O, relative_error, stream, weights

HEAD_DIMS, STATES, GROUPS, WIDTHS = (1, 3, 16, 48, 64, 80, 128), (1, 5, 16, 64, 128, 256), (1, 2, 4), (1, 2, 3, 4, 5)
LENGTHS = (1, 2, 77, 128, 129, 300)
# every head_dim, every state, every other size, each with several of the others
ODD = [
    (head_dim, STATES[k % 6], GROUPS[k % 3], WIDTHS[k % 5], LENGTHS[(k + k // 6) % 6])
    for k, head_dim in enumerate(HEAD_DIMS * 3)
]


@pytest.fixture(scope="module")
def functions() -> Native:
    found, why = native.load()
    if found is None:
        pytest.skip(why)
    return found


def conv_of(w: dict[str, Tensor], s: Mamba2Shape, xBC: Tensor) -> Tensor:
    """silu of torch's own causal convolution, (N, conv_dim) in float64."""
    K = s.conv_kernel
    bias = w.get("mixer.conv1d.bias")
    y = F.conv1d(xBC.T[None], w["mixer.conv1d.weight"], bias, padding=K - 1, groups=s.conv_dim)
    return F.silu(y[0, :, : len(xBC)].T)


def plain_mix(w: dict[str, Tensor], s: Mamba2Shape, projected: Tensor, gating: bool, norm: bool) -> Tensor:
    """(N, [inner +] conv_dim + heads) -> (N, inner) in float64: the whole matrix M of every head at once, no chunks."""
    z, rest = projected[:, : s.inner], projected[:, s.inner * gating :]
    convolved, raw = conv_of(w, s, rest[:, : s.conv_dim]), rest[:, s.conv_dim :] + w["mixer.dt_bias"]
    x, B, C = convolved.split([s.inner, s.groups * s.state, s.groups * s.state], 1)
    x = x.reshape(-1, s.heads, s.head_dim)
    B, C = (t.reshape(-1, s.groups, s.state).repeat_interleave(s.heads // s.groups, 1) for t in (B, C))
    step = torch.logaddexp(raw, torch.zeros_like(raw)).clamp(*s.dt_limit)  # (N, heads)
    cum = (step * -w["mixer.A_log"].exp()).cumsum(0)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)[:, :, None]
    decay = (cum[:, None] - cum[None]).masked_fill(future, -math.inf).exp()  # (i, j, heads)
    M = torch.einsum("ihn,jhn->ijh", C, B) * decay * step
    y = (torch.einsum("ijh,jhp->ihp", M, x) + w["mixer.D"][:, None] * x).flatten(1)
    if gating:
        y = y * F.silu(z)
    return plain_norm(y, w["mixer.norm.weight"], s.eps, s.groups) if norm else y


def mixed(
    functions: Native, w: dict[str, Tensor], s: Mamba2Shape, projected: Tensor, gating: bool = True, norm: bool = True
) -> Tensor:
    """The same by the C++, over the first columns of a copy of `projected`, as a block does it."""
    narrow = {name: t.float() for name, t in w.items()}
    conv = narrow["mixer.conv1d.weight"][:, 0].T.contiguous()
    A = -narrow["mixer.A_log"].exp()
    held = conv, narrow.get("mixer.conv1d.bias"), A, narrow["mixer.dt_bias"], narrow["mixer.norm.weight"]
    own = projected.clone()
    functions.mix(Mixer(s, gating, norm, *held), own, narrow["mixer.D"], own[:, : s.inner], Workspace())
    return own[:, : s.inner]


@pytest.mark.parametrize(("head_dim", "state", "groups", "K", "N"), ODD)
def test_odd_shapes(functions: Native, head_dim: int, state: int, groups: int, K: int, N: int) -> None:
    s = Mamba2Shape(8, heads=4, head_dim=head_dim, state=state, groups=groups, conv_kernel=K, dt_limit=(0.01, 2.0))
    w = {name: t.float().double() for name, t in weights(s).items()}
    if K == 3:
        del w["mixer.conv1d.bias"]
    generator = torch.Generator().manual_seed(N)
    for gating, norm in ((True, True), (False, False)):
        projected = torch.randn(N, s.inner * gating + s.conv_dim + s.heads, generator=generator)
        expected = plain_mix(w, s, projected.double(), gating, norm)
        # a norm over few entries magnifies the rounding of sums that cancel
        assert relative_error(mixed(functions, w, s, projected, gating, norm), expected) < (2e-5 if norm else 1e-6)
        coarse = projected.bfloat16()
        found = mixed(functions, w, s, coarse, gating, norm)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, plain_mix(w, s, coarse.double(), gating, norm)) < 2.0**-8


def test_a_convolution_wider_than_a_chunk(functions: Native) -> None:
    s = Mamba2Shape(8, heads=2, head_dim=4, state=3, conv_kernel=150)
    w, projected = weights(s), torch.randn(320, 8 + 14 + 2, generator=torch.Generator().manual_seed(0))
    assert relative_error(mixed(functions, w, s, projected), plain_mix(w, s, projected.double(), True, True)) < 5e-6


@pytest.mark.parametrize("A", [1e-4, 1.0, 50.0, 1e4])
def test_any_decay(functions: Native, A: float) -> None:
    """Time steps from 5e-5 to 10, no decay at all to all within a token, over three chunks."""
    s = Mamba2Shape(8, heads=8, head_dim=16, state=16)
    w = weights(s) | {
        "mixer.dt_bias": torch.linspace(-10, 10, 8).double(),
        "mixer.A_log": torch.full((8,), A).double().log(),
    }
    projected = torch.randn(300, 2 * 128 + 2 * 16 + 8, generator=torch.Generator().manual_seed(0))
    assert relative_error(mixed(functions, w, s, projected), plain_mix(w, s, projected.double(), True, True)) < 2e-6


def test_time_steps_and_gates_of_any_size(functions: Native) -> None:
    """softplus and silu from where they vanish to where they are the identity, each number to float32."""
    s = Mamba2Shape(1, heads=1, head_dim=1, state=1, conv_kernel=1)
    one = torch.ones(1, dtype=torch.float64)
    w = {"mixer.conv1d.weight": torch.ones(3, 1, 1).double(), "mixer.dt_bias": 0 * one, "mixer.A_log": 0 * one,
         "mixer.D": 0 * one, "mixer.norm.weight": one}  # fmt: skip
    for raw in torch.linspace(-60, 60, 240).tolist():
        projected = torch.tensor([[raw / 2, 2.0, 2.0, 2.0, raw]])  # z, x, B, C, dt: silu(z) C B dt x
        exact = plain_mix(w, s, projected.double(), True, False)
        assert relative_error(mixed(functions, w, s, projected, True, False), exact) < 1e-6, raw


def test_D_is_that_of_the_excerpt(functions: Native) -> None:
    """lambda on the mixer, one an excerpt."""
    s = SHAPES["two groups"]
    w, X, lam = weights(s), stream(s), torch.tensor([0.0, -2.0, 5.0]).view(3, 1, 1)
    found = CpuBlock(w, s, native=functions)(X, lam=lam.flatten(), skip_site="mixer")
    for one in range(3):
        expected = X[one] + plain_O(w, s, X[one : one + 1], True, True, True, float(lam[one]))[0]
        assert relative_error(found[one], expected) < 1e-5


def test_rows_from_the_first_that_is_not_finite_on_are_not(functions: Native) -> None:
    s = Mamba2Shape(8, heads=2, head_dim=4, state=3)
    w, clean = weights(s), torch.randn(300, 8 + 14 + 2, generator=torch.Generator().manual_seed(0))
    whole = mixed(functions, w, s, clean)
    for bad, column in itertools.product((math.nan, math.inf), (8, 8 + 8, 8 + 11, 8 + 14)):  # x, B, C, dt
        projected = clean.clone()
        projected[133, column] = bad
        found = mixed(functions, w, s, projected)
        assert torch.equal(found[:132], whole[:132])  # rows before it, but for those of its register tile
        assert not found[133].isfinite().any()
        if column != 8 + 11:  # C is forgotten after conv_kernel tokens
            assert found[133:].isnan().any(1).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e15, 1e35, 2e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_at_every_scale(functions: Native, scale: float, dtype: torch.dtype) -> None:
    """Squares from under float32's range to over it; next to 1e-24 eps is all there is."""
    X = (torch.rand(5, 77, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).float()
    weight, found = torch.arange(1.0, 78.0), torch.empty(5, 77, dtype=dtype)
    functions.enter(X, weight, 1e-5, found)
    expected = plain_norm(X.double(), weight.double(), 1e-5)
    assert relative_error(found, expected) < (5e-7 if dtype == torch.float32 else 2.0**-8)
    functions.enter(X, None, 1e-5, found)
    assert torch.equal(found, X.to(dtype))  # torch's rounding to bfloat16


def test_norm_of_a_row_that_is_not_finite_is_nan(functions: Native) -> None:
    X = torch.ones(3, 8)
    X[1, 0], X[2, 3] = math.inf, math.nan
    found = torch.empty(3, 8)
    functions.enter(X, torch.ones(8), 0.0, found)
    assert torch.equal(found[0], torch.ones(8)) and found[1:].isnan().all()


def test_a_number_that_is_no_bfloat16_stays_none(functions: Native) -> None:
    X = torch.tensor([[math.nan, math.inf, -math.inf, 3.4e38, -0.0, 1e-40]])
    found = torch.empty(1, 6, dtype=torch.bfloat16)
    functions.enter(X, None, 0.0, found)
    assert torch.equal(found.nan_to_num(7.0), X.bfloat16().nan_to_num(7.0)) and found[0, 0].isnan()


@pytest.mark.parametrize("gating", [True, False])
def test_bfloat16_products_in_float32_are_those_of_bfloat16(functions: Native, gating: bool) -> None:
    """More rows than are widened at a time, with biases; against the float64 block of the rounded weights."""
    s = Mamba2Shape(hidden=48, heads=20, head_dim=16, state=40, groups=2)
    w, X = weights(s, biases=True), stream(s)
    rounded = w | {name: t.bfloat16().double() for name, t in w.items() if "_proj" in name}
    expected = plain_O(rounded, s, X, gating, True, True, 0.0)
    errors = [
        relative_error(
            CpuBlock(w, s, torch.bfloat16, native=functions, widens=widens)(X, lam=0.0, gating=gating), expected
        )
        for widens in (True, False)
    ]
    assert errors[0] < 0.01 and errors[0] < 1.5 * errors[1]


def test_native_is_what_auto_means_on_a_cpu(functions: Native) -> None:
    for kernels in ("auto", "native"):
        found = resolve_kernels(kernels, "cpu")
        assert found.native is functions and found.backend.startswith("native c++ (") and not found.triton
        assert found.for_dtype(torch.float64).native is None
        assert found.for_dtype(torch.float64).backend == resolve_kernels("torch", "cpu").backend
        said = found.for_dtype(torch.bfloat16).backend
        assert said == found.backend + ", bf16 products in fp32" * found.widens
    assert resolve_kernels("torch", "cpu").native is None


@pytest.mark.parametrize(
    ("flags", "taken", "widens"),
    [
        ("GenuineIntel avx512_bf16 avx512f", True, True),  # VDPBF16PS: half as many products a second as VFMADD
        ("GenuineIntel amx_bf16 avx512_bf16 avx512f", True, False),
        ("AuthenticAMD avx512_bf16 avx512f", True, False),  # Zen 4: twice as many
        ("AuthenticAMD avx2", False, True),
        ("asimd bf16", True, False),
    ],
)
def test_bfloat16_goes_the_faster_way(
    functions: Native, monkeypatch: pytest.MonkeyPatch, flags: str, taken: bool, widens: bool
) -> None:
    monkeypatch.setattr(backends.native_build, "cpu_flags", lambda: flags)
    monkeypatch.setattr(backends.native, "load", lambda: (functions, ""))
    monkeypatch.setattr(backends.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: taken)
    assert resolve_kernels("native", "cpu").widens is widens


def test_native_is_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        KernelError, match="native kernels are for a CPU: use --device cpu, or --kernels triton or torch"
    ):
        resolve_kernels("native", "cuda")
