"""The package's own Triton kernels, interpreted on CPU, against plain float64 code; what they write into holds NaN before."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lscollapse.models.kernels import backends, fused
from lscollapse.models.kernels.backends import Kernels, own_kernels, resolve_kernels
from lscollapse.models.kernels.chunked import causal_conv, chunked_scan, gated_norm
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from tests.unit.models.kernels.test_cpu_block import SHAPES, plain_norm, plain_O, relative_error, stream, weights
from tests.unit.models.kernels.test_ssd import recurrence

OP = 5e-6  # of the largest value: a model is blind to an error of 1e-3 in one product, this is not
KERNELS, IEEE = own_kernels("cpu"), own_kernels("cpu", split=False)
TINY = Mamba2Shape(hidden=32, heads=2, head_dim=16, state=16, groups=2)
FOUR_HEADS = Mamba2Shape(hidden=128, heads=4, head_dim=64, state=128)  # as those of the 2.7B model


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kwargs: make(*args, **kwargs).fill_(math.nan))


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def scanned(
    s: Mamba2Shape,
    L: int,
    batch: int = 1,
    gate: bool = False,
    bias: bool = True,
    shift: float = 0.0,
    each: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the kernels find, and the recurrence: projected, of which the gate is not read, after a float64 convolution."""
    w = {name: tensor.float() for name, tensor in weights(s).items()}
    projected = normal(batch, L, s.inner * gate + s.conv_dim + s.heads, seed=L)
    A, dt_bias = -w["mixer.A_log"].exp(), w["mixer.dt_bias"] + shift
    D = w["mixer.D"] + torch.arange(batch)[:, None] if each else w["mixer.D"]
    taps = w["mixer.conv1d.weight"].flatten(1).T.contiguous().T
    conv_bias = w["mixer.conv1d.bias"] if bias else None
    found = fused.scan(projected, s, A, D, dt_bias, taps, conv_bias)

    xBC, dt = projected[..., -s.conv_dim - s.heads : -s.heads].double(), projected[..., -s.heads :]
    wide, padding = taps[:, None].double(), s.conv_kernel - 1
    conv = F.conv1d(xBC.mT, wide, None if conv_bias is None else conv_bias.double(), padding=padding, groups=len(wide))
    x, B, C = F.silu(conv[..., :L].mT).split([s.inner, s.groups * s.state, s.groups * s.state], -1)
    x, B, C = x.unflatten(-1, (s.heads, -1)), B.unflatten(-1, (s.groups, -1)), C.unflatten(-1, (s.groups, -1))
    y = recurrence(x, dt, A, B, C, None, dt_bias, s.dt_limit) + D.double().view(-1, 1, s.heads, 1) * x
    return found, y.flatten(2)


def test_scan_at_every_length() -> None:
    for L in range(1, 129):
        found, expected = scanned(TINY, L)
        assert relative_error(found, expected) < OP, L


@pytest.mark.parametrize("shift", [-4.0, 0.0, 6.0])
@pytest.mark.parametrize("L", [33, 128])
def test_scan_at_the_heads_of_the_27b(L: int, shift: float) -> None:
    found, expected = scanned(FOUR_HEADS, L, batch=2, gate=True, shift=shift)
    assert found.dtype == torch.float32 and relative_error(found, expected) < OP


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_scan_variants(taps: int, bias: bool, each: bool) -> None:
    s = Mamba2Shape(hidden=32, heads=4, head_dim=32, state=64, groups=2, conv_kernel=taps, dt_limit=(0.01, 0.3))
    found, expected = scanned(s, L=40, batch=3, gate=True, bias=bias, each=each)
    assert relative_error(found, expected) < OP


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15, 1e38])
def test_rows_at_every_scale(groups: int, scale: float) -> None:
    """1e38 squared is no float32; next to 1e-24 eps is all there is. The halves keep 2^-22 of the largest of a row."""
    y, weight = normal(2, 2, 12).clamp(-3, 3) * scale, torch.arange(1.0, 13.0)
    gate = torch.linspace(-3, 1, 12).expand(2, 2, 12).contiguous()
    for gated, normed in itertools.product((True, False), repeat=2):
        u = y.double() * gate.double() * torch.sigmoid(gate.double()) if gated else y.double()
        expected = plain_norm(u, weight.double(), 1e-5, groups) if normed else u
        arguments = (y, gate if gated else None, weight if normed else None, 1e-5, groups)
        assert relative_error(fused.rows(*arguments, torch.float32), expected) < 1e-6
        high, low, factor = fused.rows(*arguments, None)
        off = (high.double() + low.double()) * factor[..., None].double() - expected
        assert (off.abs().amax(-1) / expected.abs().amax(-1)).max() < 1e-6
        assert torch.equal(factor.frexp().mantissa, torch.full_like(factor, 0.5))  # powers of two


@pytest.mark.parametrize(("small", "large"), [(1e-3, 1e37), (1e-30, 1e37), (1e37, 1e-37), (1e-20, 1e-20)])
def test_a_product_whose_factors_are_far_apart(small: float, large: float) -> None:
    """What is in the range of float32 at the end has not left it on the way."""
    X, W = normal(3, 96) * small, normal(16, 96, seed=1) * large
    found, expected = fused.product(fused.split(X), fused.Weight.of(W)), X.double() @ W.double().T
    assert relative_error(found, expected) < 1e-6


def test_halves_keep_22_bits() -> None:
    X = normal(5, 300) * torch.logspace(-42, 37, 5)[:, None]
    X[4, 7] = torch.finfo(torch.float32).max
    high, low, factor = fused.split(X)
    off = ((high.double() + low.double()) * factor[:, None].double() - X.double()).abs()
    assert (off <= X.double().abs() * 2.0**-22 + X.double().abs().amax(1, keepdim=True) * 2.0**-38).all()
    assert (fused.split(torch.zeros(1, 4)).high == 0).all()


def test_rows_leave_what_is_not_finite_visible() -> None:
    X = torch.ones(3, 4)
    X[1, 0], X[2, 1] = torch.inf, torch.nan
    found = fused.rows(X, None, torch.ones(4), 0.0, 1, torch.float32)
    assert torch.equal(found[0], torch.ones(4)) and not torch.isfinite(found[1]).all() and found[2].isnan().all()
    product = fused.product(fused.split(X), fused.Weight.of(torch.ones(2, 4)))
    assert torch.equal(product[0], torch.full((2,), 4.0)) and not torch.isfinite(product[1:]).any()


def test_combine_leaves_out_what_has_the_factor_0_whatever_it_holds() -> None:
    X, O = normal(4, 7, 900), normal(4, 7, 900, seed=1)
    X[1], O[3] = torch.nan, torch.inf
    skips, scales = torch.tensor([-1.5, 0.0, 2.0, 1.0]), torch.tensor([1.0, 0.3, 0.25, 0.0])
    found = fused.combine(X, O, skips, scales)
    assert torch.equal(found[1], 0.3 * O[1]) and torch.equal(found[3], X[3])
    expected = (skips.view(4, 1, 1) * X.double() + scales.view(4, 1, 1).double() * O.double())[:3:2]
    assert relative_error(found[:3:2], expected) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1, 1), (130, 72, 257), (3, 100, 129), (129, 2560, 20)])
def test_product(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = size
    sizes = torch.logspace(-30, 30, m)[:, None]  # of the rows
    X, weight, bias = normal(m, k) * sizes, (normal(n, k, seed=1) / 50).to(dtype), normal(n, seed=2)
    expected = X.double() @ weight.double().T
    found = fused.product(fused.split(X), fused.Weight.of(weight))
    scale = X.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)  # of a term, times sqrt(k)
    assert ((found - expected).abs() / scale).max() < 5e-7
    unit = X / sizes
    found = fused.product(fused.split(unit[None]), fused.Weight.of(weight)[n // 2 :], bias[n // 2 :])
    expected = (unit.double() @ weight.double().T + bias.double())[:, n // 2 :]
    assert found.shape == (1, m, n - n // 2) and relative_error(found[0], expected) < 1e-6


def test_what_is_exact_in_16_bits_needs_two_passes() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = fused.Weight.of((normal(20, 40) / 50).to(dtype))
        assert weight.low is None and weight.high.dtype == torch.float16
    stored = (normal(20, 40) / 50).half()
    assert fused.Weight.of(stored).high is stored
    w = {name: tensor.half() if "_proj" in name else tensor.float() for name, tensor in weights(TINY).items()}
    held = {tensor.data_ptr() for tensor in GpuBlock(w, TINY, KERNELS).parts()}
    assert {w[f"mixer.{name}_proj.weight"].data_ptr() for name in ("in", "out")} < held
    assert int(fused.Weight.of(stored.float()).has_low) == 0
    assert int(fused.Weight.of(normal(20, 40)).has_low) == 1


ARMS = [
    {"gating": gating, "layernorm": norm_site is None, "skip_site": skip_site, "norm_site": norm_site or "both"}
    for gating, skip_site, norm_site in itertools.product(
        [True, False], ["residual", "mixer"], [None, "both", "mixer", "block"]
    )
]
TORCH = Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "cpu")


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_every_arm_of_a_block(arm: dict) -> None:
    """Own kernels in both kinds of products, and torch's for a GPU, against the plain float64 block; lambda of both signs."""
    s, o_scale = Mamba2Shape(hidden=32, heads=4, head_dim=16, state=16, groups=2), 0.25
    w, X = weights(s, biases=True), stream(s, batch=2, N=21)
    blocks = [GpuBlock({key: t.float() for key, t in w.items()}, s, kernels) for kernels in (KERNELS, IEEE, TORCH)]
    for lam in (-1.5, 0.0):
        on_mixer = arm["skip_site"] == "mixer"
        keeps_block, keeps_mixer = (arm["layernorm"] or arm["norm_site"] == site for site in ("mixer", "block"))
        O = plain_O(w, s, X, arm["gating"], keeps_block, keeps_mixer, lam if on_mixer else 0.0)
        expected = (1.0 if on_mixer else lam) * X + o_scale * O
        for block in blocks:
            found: Tensor = block(X.float(), lam=lam, o_scale=o_scale, **arm)
            assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5, block.kernels.backend


@pytest.mark.parametrize(("name", "N"), [("one group", 21), ("two groups", 130), ("tiny", 130)])
def test_what_the_kernels_do_not_take_is_torch(name: str, N: int) -> None:
    """Heads that are no power of two from 16, and texts over 128 tokens; norms, products and sum are still own."""
    s = TINY if name == "tiny" else SHAPES[name]
    w, X = weights(s), stream(s, batch=1, N=N)
    assert not fused.takes_scan(s, N)
    found = GpuBlock({key: t.float() for key, t in w.items()}, s, KERNELS)(X.float(), lam=0.5)
    assert relative_error(found, 0.5 * X + plain_O(w, s, X, True, True, True, 0.0)) < 1e-5


def test_a_block_reads_nothing_from_its_device_and_is_eight_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launched, called, call = [], [], GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> object:
        launched.append(self.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():  # what the interpreter does is not the block's
            return call(self, *args, **kwargs)

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            called.append(str(function))
            return function(*args, **(kwargs or {}))  # type: ignore[operator]

    s, w = TINY, {key: t.float() for key, t in weights(TINY).items()}
    block, X, lams = GpuBlock(w, s, KERNELS), stream(s, batch=2, N=9).float(), torch.tensor([0.0, 2.0])
    monkeypatch.setattr(GridExecutor, "__call__", counted)
    with Recorded():
        block(X, lam=1.0, skip=lams, o_scale=lams)
    assert len(launched) == 8
    assert called and not [name for name in called if "local_scalar" in name or "nonzero" in name]


@pytest.fixture
def unguarded() -> Iterator[None]:
    backends._guarded.cache_clear()
    yield
    backends._guarded.cache_clear()


def test_kernels_that_are_right_are_used(unguarded: None) -> None:
    found = resolve_kernels("triton", "cpu")
    assert found.own is fused and found.split and found.note == "" and found.backend == KERNELS.backend
    assert found.backend.endswith("interpreted: scan tf32x3 (torch over 128 tokens), fp32 products of float16 halves")
    found = resolve_kernels("triton", "cpu", products="ieee")
    assert found.own is fused and not found.split and found.backend.endswith("fp32 products ieee")
    assert found.for_dtype(torch.float32) is found and found.for_dtype(torch.float64).backend == "torch operations"


@pytest.mark.parametrize("wrong", [1.0001, math.nan, "does not launch"])
@pytest.mark.parametrize("what", ["product", "scan"])
def test_kernels_that_are_wrong_are_not_used(
    what: str, wrong: float | str, unguarded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(fused, what)

    def off(*args: object) -> Tensor:
        if isinstance(wrong, str):
            raise RuntimeError(f"the kernel\n{wrong}")
        return right(*args) * torch.tensor([wrong] + [1.0] * (right(*args).shape[-1] - 1))

    monkeypatch.setattr(fused, what, off)
    found = resolve_kernels("triton", "cpu")
    name = {"product": "product", "scan": "mixer"}[what]
    said = f"the package's {name} kernels " + ("do not run" if isinstance(wrong, str) else "are off by")
    assert (
        found.note.startswith(said) and found.note.endswith("torch operations run instead") and "\n" not in found.note
    )
    if what == "product":
        assert found.own is fused and not found.split and "fp32 products ieee" in found.backend
    else:
        assert found.own is None and found.backend == "torch operations"


def test_an_interpreter_that_breaks_down_is_one_line() -> None:
    """That of Triton 3.6 makes numbers of arrays with one entry, which numpy has come to refuse; torch's are checked all the same."""
    program = (
        "import triton.runtime.interpreter as interpreter\n"
        "def broken(*args, **kwargs): raise interpreter.InterpreterError('only 0-dimensional arrays')\n"
        "interpreter.GridExecutor.__call__ = broken\n"
        "from lscollapse.cli.app import main; import sys; sys.argv[1:] = ['verify-kernels']; main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MAMBA_DETERMINISTIC"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "torch" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "kernels are not checked: the interpreter of Triton" in line]
    assert len(said) == 2 and all("or use --kernels torch" in line for line in said)
