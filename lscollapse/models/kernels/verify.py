"""Are the kernels right on this machine? Each is held against its definition in float64: the recurrence, token by token.

    rows = verify("cuda")
    passed(rows)

On a CPU that is the package's C++ and torch's operations; the Triton kernels run in Triton's interpreter, if Triton is
installed: the same source, no GPU. On a GPU the 2.7B shapes are checked too, and a second call of each operation is timed
against torch's operations.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.core.files import first_line
from lscollapse.models.kernels import fused_measures, guard, native
from lscollapse.models.kernels.backends import CHOICES, KernelError, Kernels, own_kernels, resolve_kernels
from lscollapse.models.kernels.cpu_block import CpuBlock
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Block, Mamba2Shape
from lscollapse.models.kernels.reference import (
    TOLERANCE,
    block_weights,
    plain_block,
    plain_conv,
    plain_mixer,
    plain_norm,
    recurrence,
    relative_error,
)

PACKAGES = {"triton": "triton", "mamba-ssm": "mamba_ssm"}  # kernels -> the package that they need beside Triton
TERMS = 2560  # of the product: as many as in_proj of the 2.7B model sums
# Computes with the kernels given, for None by the definition in float64; one tensor, or one a gradient.
Operation = Callable[[Kernels | None], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """Sizes to check at: a block, `batch` excerpts of `n_tokens` tokens, and a scan in chunks of `chunk` tokens."""

    name: str
    shape: Mamba2Shape
    batch: int
    n_tokens: int
    chunk: int


TOY = (
    Case("one group", Mamba2Shape(32, heads=4, head_dim=16, state=16), batch=2, n_tokens=50, chunk=64),
    Case("two groups", Mamba2Shape(32, heads=4, head_dim=16, state=32, groups=2), batch=1, n_tokens=75, chunk=32),
    Case("three tokens", Mamba2Shape(32, heads=2, head_dim=32, state=64), batch=1, n_tokens=3, chunk=16),
)
MAMBA2_27B = Mamba2Shape(2560, heads=80, head_dim=64, state=128)
PAPER = (
    Case("mamba2-2.7b", MAMBA2_27B, batch=2, n_tokens=128, chunk=128),
    Case("mamba2-2.7b, 300 tokens", MAMBA2_27B, batch=1, n_tokens=300, chunk=256),
)


@dataclass(frozen=True)
class KernelCheck:
    """One comparison.

    Attributes:
        name: the operation, one of TOLERANCE; `mixer` is conv, scan and gated norm by own kernels.
        case: name of the sizes.
        backend: what ran.
        error: largest |found - float64 recurrence| / largest |recurrence|; for a backward pass of the worst gradient.
        tolerance: what the error may be.
        seconds: time of one call, its compilation not counted.
        torch_seconds: the same by torch's operations on this device; None where those ran, or have no backward.
    """

    name: str
    case: str
    backend: str
    error: float
    tolerance: float
    seconds: float
    torch_seconds: float | None

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for a NaN


def passed(rows: Sequence[KernelCheck]) -> bool:
    """Whether something was checked and every error is within its tolerance."""
    return bool(rows) and all(row.ok for row in rows)


def verify(
    device: str = "cpu", kernels: str = "auto", cases: Sequence[Case] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[KernelCheck]:  # fmt: skip
    """Compare the parts of a block, a product and one whole block with float64, the scan with the recurrence.

    Args:
        device: `cpu` or `cuda`.
        kernels: `torch`, `native`, `triton`, `mamba-ssm`, or `auto`: all that are installed.
        cases: sizes; default TOY, on a GPU also PAPER.
        note: is told what of `auto` is installed and cannot be checked here.

    On a CPU this sets TRITON_INTERPRET=1 for the process, so that nothing can run on its GPU with Triton afterwards.

    Raises:
        KernelError: the kernels or device asked for cannot be had; or on a CPU Triton was imported, not interpreted, before.
    """
    if kernels not in CHOICES or device.partition(":")[0] not in ("cpu", "cuda"):
        raise KernelError(f"no kernels {kernels} on {device}: choose {', '.join(CHOICES)}, on cpu or cuda")
    on_gpu = torch.device(device).type == "cuda"
    torch_kernels = resolve_kernels("torch", device)
    if cases is None:
        cases = TOY + PAPER if on_gpu else TOY
    compare = partial(_rows, cases=cases, device=device, torch_kernels=torch_kernels)
    rows = compare(torch_kernels) if kernels in ("auto", "torch") else []
    if kernels == "native" or (kernels == "auto" and not on_gpu):
        compiled = resolve_kernels("native", device)
        rows += compare(compiled) if compiled.native is not None else []
        if compiled.note:
            note(compiled.note)
    installed = [name for name, package in PACKAGES.items() if util.find_spec("triton") and util.find_spec(package)]
    for name in installed if kernels == "auto" else {kernels} & set(PACKAGES):
        try:
            if not on_gpu and name in installed:
                _interpret()
            chosen = own_kernels(device) if name == "triton" else resolve_kernels(name, device)
            rows += compare(chosen)
            if chosen.own is not None:
                rows.append(_measures(chosen.backend, torch.device(device)))
        except KernelError as error:
            if kernels != "auto":
                raise
            note(f"the {name} kernels are not checked: {error}")
    return rows


def _rows(kernels: Kernels, cases: Sequence[Case], device: str, torch_kernels: Kernels) -> list[KernelCheck]:
    """The checks of one choice of kernels. Raises KernelError where Triton's interpreter breaks down."""
    rows = []
    for case in cases:
        for name, run in _operations(case, torch.device(device)).items():
            if not _has(kernels, name, case):
                continue
            try:
                rows.append(_check(name, run, case, kernels, torch_kernels, run(None)))
            except Exception as error:
                if type(error).__name__ != "InterpreterError":
                    raise
                numpy, triton = (metadata.version(package) for package in ("numpy", "triton"))
                raise KernelError(
                    f"the interpreter of Triton {triton} fails with numpy {numpy} ({first_line(error)}): install a newer triton or an"
                    " older numpy, or use --kernels torch"
                ) from error
    return rows


def _measures(backend: str, device: torch.device) -> KernelCheck:
    """The measures by kernels against LAPACK's."""
    error, tolerance = fused_measures.error(device), fused_measures.TOLERANCE
    start = time.perf_counter()
    fused_measures.error(device)
    return KernelCheck("measures", "128 x 96", backend, error, tolerance, time.perf_counter() - start, None)


def _has(kernels: Kernels, name: str, case: Case) -> bool:
    """Whether these kernels have an operation of their own of that name."""
    if kernels.native is not None:
        return name in ("mixer", "block")
    if name in ("product", "block"):
        return True
    if kernels.own is not None or name == "mixer":
        return name == "mixer" and kernels.own is not None and bool(kernels.own.takes_scan(case.shape, case.n_tokens))
    return kernels.differentiable or name != "scan backward"


def _interpret() -> None:
    """Raises KernelError where it cannot be switched on."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise KernelError("Triton is imported already: set TRITON_INTERPRET=1 to check it on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"


def _check(
    name: str, run: Operation, case: Case, kernels: Kernels, torch_kernels: Kernels, expected: list[Tensor]
) -> KernelCheck:
    found, seconds = _timed(lambda: run(kernels))
    compared = kernels.triton and (torch_kernels.differentiable or name != "scan backward") and name != "mixer"
    torch_seconds = _timed(lambda: run(torch_kernels))[1] if compared else None
    errors = [relative_error(one, exact) for one, exact in zip(found, expected, strict=True)]
    return KernelCheck(name, case.name, kernels.backend, max(errors), TOLERANCE[name], seconds, torch_seconds)


def _timed(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    """The result, and the seconds of a second call on a GPU; on a CPU, where nothing is compiled, of the only one."""
    start = time.perf_counter()
    result = run()
    if result[0].is_cuda:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _product(kernels: Kernels, X: Tensor, W: Tensor) -> Tensor:
    own = kernels.own if kernels.split else None
    return F.linear(X, W) if own is None else torch.as_tensor(own.product(own.split(X), own.Weight.of(W)))


def _mixed(kernels: Kernels, weights: dict[str, Tensor], case: Case, projected: Tensor) -> Tensor:
    """What lies between the products by kernels that compute all of it."""
    if kernels.native is not None:
        return native.mixed(kernels.native, weights, case.shape, projected, chunk=case.chunk)
    assert kernels.own is not None
    return guard.mixed(kernels.own, weights, case.shape, projected)


def _own_block(kernels: Kernels, weights: dict[str, Tensor], shape: Mamba2Shape) -> Mamba2Block:
    if kernels.native is not None:
        return CpuBlock(weights, shape, native=kernels.native)
    return GpuBlock(weights, shape, kernels)


def _operations(case: Case, device: torch.device) -> dict[str, Operation]:
    s, lead = case.shape, (case.batch, case.n_tokens)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    weights = block_weights(s, generator, device)
    A, D, dt_bias = -weights["mixer.A_log"].exp(), weights["mixer.D"], weights["mixer.dt_bias"]
    scan_inputs = [
        normal(*lead, s.heads, s.head_dim), normal(*lead, s.heads), A, normal(*lead, s.groups, s.state),
        normal(*lead, s.groups, s.state), D, dt_bias,
    ]  # fmt: skip
    ascent = normal(*lead, s.heads, s.head_dim)
    xBC, taps, conv_bias = normal(*lead, s.conv_dim), weights["mixer.conv1d.weight"], weights["mixer.conv1d.bias"]
    y, gate, norm_weight = normal(*lead, s.inner), normal(*lead, s.inner), weights["mixer.norm.weight"]
    X, wide, factor = normal(*lead, s.hidden), normal(*lead, TERMS), normal(s.hidden, TERMS)
    projected = normal(*lead, s.inner + s.conv_dim + s.heads)

    def scan(kernels: Kernels | None) -> list[Tensor]:
        return [recurrence(*scan_inputs) if kernels is None else kernels.scan(*scan_inputs, chunk=case.chunk)]

    def backward(kernels: Kernels | None) -> list[Tensor]:
        dtype = torch.float64 if kernels is None else torch.float32
        leaves = [t.detach().to(dtype).requires_grad_() for t in scan_inputs]
        result = recurrence(*leaves) if kernels is None else kernels.scan(*leaves, chunk=case.chunk)
        return list(torch.autograd.grad(result, leaves, ascent.to(dtype)))

    def conv(kernels: Kernels | None) -> list[Tensor]:
        return [plain_conv(xBC, taps, conv_bias) if kernels is None else kernels.conv(xBC, taps, conv_bias)]

    def norm(kernels: Kernels | None) -> list[Tensor]:
        arguments = (y, gate, norm_weight, s.eps, s.groups)
        return [plain_norm(*arguments) if kernels is None else kernels.gated_norm(*arguments)]

    def product(kernels: Kernels | None) -> list[Tensor]:
        return [wide.double() @ factor.double().T if kernels is None else _product(kernels, wide, factor)]

    def mixer(kernels: Kernels | None) -> list[Tensor]:
        return [plain_mixer(weights, s, projected) if kernels is None else _mixed(kernels, weights, case, projected)]

    def block(kernels: Kernels | None) -> list[Tensor]:
        return [plain_block(weights, s, X) if kernels is None else _own_block(kernels, weights, s)(X, lam=1.0)]

    return {
        "scan": scan, "scan backward": backward, "conv": conv, "gated norm": norm, "mixer": mixer, "product": product,
        "block": block,
    }  # fmt: skip
