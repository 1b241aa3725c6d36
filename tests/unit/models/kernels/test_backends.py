"""Choosing kernels, and torch's operations for a GPU (run here on CPU) against plain float64 code; no Triton needed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lscollapse.models.kernels import backends, ssd
from lscollapse.models.kernels.backends import KernelError, Kernels, resolve_kernels
from lscollapse.models.kernels.chunked import causal_conv, chunked_scan, gated_norm
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import BlockError
from lscollapse.models.kernels.verify import TOY, KernelCheck, passed, verify
from tests.unit.models.kernels.test_cpu_block import SHAPES, plain_norm, plain_O, relative_error, stream, weights
from tests.unit.models.kernels.test_ssd import DECAYS, SIZES, inputs, recurrence

CHUNKED = Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "cpu")


def test_torch_on_a_cpu_is_by_excerpts() -> None:
    found = resolve_kernels("torch", "cpu")
    assert found.scan is ssd.scan and found.conv is ssd.conv and found.native is None
    assert (found.backend, found.device, found.triton, found.note) == ("torch operations", "cpu", False, "")
    assert found.for_dtype(torch.float64) is found


def test_what_torch_computes_is_ieee() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # cudnn's is so by default
    resolve_kernels("torch", "cpu")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("kernels", "device", "message"),
    [
        ("cuda", "cpu", "'cuda' do not exist: choose one of auto, native, torch, triton, mamba-ssm"),
        ("triton", "cpu", "need a GPU: use --device cuda, or --kernels torch"),
        ("mamba-ssm", "cpu", "need a GPU: use --device cuda, or --kernels torch"),
        ("auto", "meta", "no kernels for device 'meta': use cpu or cuda"),
    ],
)
def test_what_cannot_be_had_is_refused(kernels: str, device: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        resolve_kernels(kernels, device)
    with pytest.raises(KernelError, match="products 'tf32' do not exist: choose one of split, ieee"):
        resolve_kernels("auto", "cpu", products="tf32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    for kernels in ("auto", "torch", "triton", "mamba-ssm"):
        with pytest.raises(KernelError, match="torch sees no GPU"):
            resolve_kernels(kernels, "cuda:0")


def in_a_process(program: str, path: Path) -> str:
    """What `program` prints where modules of `path` come first and Triton, if there, would interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without(package: str, path: Path) -> None:
    (path / package).mkdir()
    (path / package / "__init__.py").write_text("raise ImportError('undefined symbol')")


def test_what_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    for package in ("triton", "mamba_ssm", "causal_conv1d"):
        without(package, tmp_path)
    program = """
        from lscollapse.models.kernels.backends import KernelError, resolve_kernels
        for kernels in ("triton", "mamba-ssm"):
            try:
                resolve_kernels(kernels, "cpu")
            except KernelError as error:
                print(error)
        print(resolve_kernels("auto", "cpu").triton)
    """
    triton, mamba_ssm, auto = in_a_process(program, tmp_path).splitlines()
    assert "cannot be imported (undefined symbol): install a CUDA build of torch, which brings triton" in triton
    for part in ("mamba-ssm cannot be imported (No module named 'mamba_ssm.ops')", "CUDA build of torch", "ninja",
                 'pip install --no-build-isolation "lscollapse[gpu]"', "--kernels triton or torch"):  # fmt: skip
        assert part in mamba_ssm
    assert auto == "False"


def test_on_a_gpu_each_package_is_resolved_alone(tmp_path: Path) -> None:
    """torch says that there is a GPU; nothing runs on it."""
    for package in ("triton", "mamba_ssm"):
        without(package, tmp_path)
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text("causal_conv1d_fn = print")
    (tmp_path / "causal_conv1d-1.6.1.dist-info").mkdir()
    (tmp_path / "causal_conv1d-1.6.1.dist-info" / "METADATA").write_text("Name: causal-conv1d\nVersion: 1.6.1\n")
    program = """
        import torch
        torch.cuda.is_available = lambda: True
        from lscollapse.models.kernels.backends import differentiable, resolve_kernels
        for found in (resolve_kernels("mamba-ssm", "cuda"), resolve_kernels("auto", "cuda:0"), differentiable("cuda")):
            print(found.backend.replace(torch.__version__, "VERSION"), found.note, found.triton, sep="; ")
    """
    mixed, auto, training = in_a_process(program, tmp_path).splitlines()
    missing = "mamba-ssm cannot be imported (No module named 'mamba_ssm.ops'), torch operations run in its place"
    assert mixed == f"torch VERSION chunked + causal-conv1d 1.6.1 cuda, ieee fp32; {missing}; False" == training
    backend, note, triton = auto.split("; ", 2)
    assert backend == "torch VERSION chunked, ieee fp32" and triton.endswith("False")
    assert note.startswith("torch operations run: the triton kernels cannot be imported (undefined symbol)")


def test_differentiable_on_a_cpu_is_torch() -> None:
    found = backends.differentiable("cpu")
    assert found.scan is chunked_scan and found.differentiable and found.own is None


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("size", SIZES)
def test_chunked_scan_is_the_recurrence(size: tuple[int, ...], decay: str) -> None:
    tensors = inputs(size, decay)
    expected = recurrence(**tensors, dt_limit=(0.001, 5.0))
    found = chunked_scan(**tensors, dt_limit=(0.001, 5.0), chunk=size[-1])
    assert found.dtype == torch.float64 and relative_error(found, expected) < 1e-12
    narrow = {name: t.float() for name, t in tensors.items()}
    found = chunked_scan(**narrow)
    assert found.dtype == torch.float32 and relative_error(found, recurrence(**narrow)) < 1e-5


def test_chunked_scan_takes_one_D_an_excerpt() -> None:
    tensors = inputs((2, 9, 4, 3, 2, 5, 32))
    D = torch.stack([tensors.pop("D"), torch.arange(4.0)]).double()
    found = chunked_scan(**tensors, D=D)
    for one, own in enumerate(D):
        expected = recurrence(**tensors, D=own)
        assert relative_error(found[one], expected[one]) < 1e-12


def test_chunked_scan_has_the_gradients_of_the_recurrence() -> None:
    tensors = {name: t.requires_grad_() for name, t in inputs((2, 70, 4, 3, 2, 5, 32), "strong").items()}
    leaves = list(tensors.values())
    ascent = torch.randn(2, 70, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(chunked_scan(**tensors, chunk=32), leaves, ascent)
    expected = torch.autograd.grad(recurrence(**tensors), leaves, ascent)
    for name, one, other in zip(tensors, found, expected, strict=True):
        assert relative_error(one, other) < 1e-10, name


@pytest.mark.parametrize(("L", "K"), [(1, 4), (3, 4), (40, 2), (9, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_causal_conv(L: int, K: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(L)
    x = torch.randn(2, L, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 1, K, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64) if with_bias else None
    expected = F.silu(F.conv1d(x.mT, weight, bias, padding=K - 1, groups=6)[..., :L].mT)
    assert relative_error(causal_conv(x, weight, bias), expected) < 1e-14
    assert torch.equal(causal_conv(x, weight[:, 0], bias), causal_conv(x, weight, bias))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15, 1e35])
def test_gated_norm_at_every_scale(groups: int, scale: float) -> None:
    """1e35 squared is no float32; next to 1e-24 eps is all there is."""
    y = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)) * scale
    gate, weight = torch.linspace(-3, 3, 12).expand(4, 12), torch.arange(1.0, 13.0)
    u = y.double() * gate.double() * torch.sigmoid(gate.double())
    assert (
        relative_error(gated_norm(y, gate, weight, 1e-5, groups), plain_norm(u, weight.double(), 1e-5, groups)) < 1e-6
    )
    assert (
        relative_error(gated_norm(y, None, weight, 1e-5, groups), plain_norm(y.double(), weight, 1e-5, groups)) < 1e-6
    )


def test_gated_norm_leaves_what_is_not_finite_visible() -> None:
    y = torch.ones(2, 4)
    y[1, 0] = torch.inf
    found = gated_norm(y, None, torch.ones(4), 0.0)
    assert torch.equal(found[0], torch.ones(4)) and not torch.isfinite(found[1]).all()


@pytest.mark.parametrize("kernels", [CHUNKED, resolve_kernels("torch", "cpu")], ids=lambda kernels: kernels.backend)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("skip_site", ["residual", "mixer"])
@pytest.mark.parametrize("norm_site", ["both", "mixer", "block", None])
@pytest.mark.parametrize("gating", [True, False])
def test_block_is_the_plain_block(
    kernels: Kernels, name: str, skip_site: str, norm_site: str | None, gating: bool
) -> None:
    s, lam, o_scale = SHAPES[name], -1.5, torch.tensor([0.25, 1.0, 2.0]).view(3, 1, 1)
    skip = torch.tensor([0.0, -0.5, 3.0]).view(3, 1, 1)
    w, X = weights(s, biases=name == "one group"), stream(s)
    arm = {"gating": gating, "layernorm": norm_site is None, "skip_site": skip_site, "norm_site": norm_site or "both"}
    shift = lam if skip_site == "mixer" else 0.0
    O = plain_O(w, s, X, gating, norm_site not in ("both", "block"), norm_site not in ("both", "mixer"), shift)
    expected = (1.0 if skip_site == "mixer" else lam) * X + o_scale * O
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        before = X.clone()
        scaled = GpuBlock(w, s, kernels, dtype)(X, lam=lam, skip=skip, o_scale=o_scale, **arm)
        assert relative_error(scaled, skip * X + o_scale * O) < tolerance
        found = GpuBlock(w, s, kernels, dtype)(X, lam=lam, o_scale=o_scale, **arm)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(found, expected) < tolerance
        assert torch.equal(X, before)


def test_lambda_zero_is_exactly_the_mixer_output() -> None:
    s = SHAPES["two groups"]
    block, X = GpuBlock(weights(s), s, CHUNKED, torch.float64), stream(s)
    assert relative_error(block(X, lam=0.0), plain_O(weights(s), s, X, True, True, True, 0.0)) < 1e-12
    assert torch.equal(block(1e30 * X, lam=0.0)[..., 0], block(2e30 * X, lam=0.0)[..., 0])
    X[1] = torch.nan
    assert torch.equal(block(X, lam=0.0)[::2], block(X, lam=0.0, skip=torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1))[::2])


def test_block_refuses_kernels_of_another_device() -> None:
    s = SHAPES["one group"]
    with pytest.raises(BlockError, match="on cpu, the kernels for cuda"):
        GpuBlock(weights(s), s, Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", "cuda"))
    with pytest.raises(BlockError, match="skip_site 'gate'"):
        GpuBlock(weights(s), s, CHUNKED)(stream(s), skip_site="gate")


def test_verify_on_a_cpu() -> None:
    rows = verify("cpu", "torch")
    assert passed(rows) and {row.backend for row in rows} == {"torch operations"}
    names = ("scan", "conv", "gated norm", "product", "block")  # torch's scan by excerpts has no backward pass
    assert [(row.case, row.name) for row in rows] == [(case.name, name) for case in TOY for name in names]
    assert all(0 < row.error < row.tolerance and row.torch_seconds is None for row in rows)


def test_verify_compares_the_native_code_where_it_is() -> None:
    notes: list[str] = []
    rows = verify("cpu", "native", note=notes.append)
    if resolve_kernels("native").native is None:
        assert rows == [] and len(notes) == 1
    else:
        assert passed(rows) and all(row.backend.startswith("native c++") for row in rows) and notes == []
        assert [(row.case, row.name) for row in rows] == [
            (case.name, name) for case in TOY for name in ("mixer", "block")
        ]


def test_verify_needs_every_error_within_its_tolerance() -> None:
    row = KernelCheck("scan", "one group", "torch operations", 1e-7, 5e-6, 0.1, None)
    assert passed([row]) and not passed([])
    for error in (6e-6, float("nan"), float("inf")):
        assert not passed([row, KernelCheck("conv", "one group", "torch operations", error, 5e-6, 0.1, None)])
