"""Are the kernels right on this machine? Each is held against its definition in float64: the recurrence, token by token.

    rows = verify("cuda")
    passed(rows)

On a CPU the Triton kernels run in Triton's interpreter, if mamba-ssm is installed: the same source, no GPU. On a GPU
the 2.7B shapes are checked too, and a second call of each operation is timed against torch's operations.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels.backends import CHOICES, KernelError, Kernels, resolve_kernels
from lscollapse.models.kernels.gpu_block import GpuBlock
from lscollapse.models.kernels.mamba2_block import Mamba2Shape

# Largest error relative to the largest value. float32 sums of a few hundred terms stay well below; TF32 is at 4e-4.
TOLERANCE = {"scan": 5e-6, "scan backward": 2e-5, "conv": 2e-6, "gated norm": 2e-6, "block": 2e-5}

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
PAPER = (Case("mamba2-2.7b", Mamba2Shape(2560, heads=80, head_dim=64, state=128), batch=1, n_tokens=300, chunk=256),)


@dataclass(frozen=True)
class KernelCheck:
    """One comparison.

    Attributes:
        name: the operation: `scan`, `scan backward`, `conv`, `gated norm` or `block`.
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


def verify(device: str = "cpu", kernels: str = "auto", cases: Sequence[Case] | None = None) -> list[KernelCheck]:
    """Compare scan (forward and backward), conv, gated norm and one whole block with the float64 recurrence.

    Args:
        device: `cpu` or `cuda`.
        kernels: `torch`, `triton`, or `auto`: both, or torch's alone where mamba-ssm is not installed.
        cases: sizes; default TOY, on a GPU also PAPER.

    On a CPU this sets TRITON_INTERPRET=1 for the process, so that nothing can run on its GPU with Triton afterwards.

    Raises:
        KernelError: the kernels or device asked for cannot be had; or on a CPU Triton was imported, not interpreted, before.
    """
    if kernels not in CHOICES or device.partition(":")[0] not in ("cpu", "cuda"):
        raise KernelError(f"no kernels {kernels} on {device}: choose {', '.join(CHOICES)}, on cpu or cuda")
    on_gpu = torch.device(device).type == "cuda"
    torch_kernels = resolve_kernels("torch", device)
    checked = [] if kernels == "triton" else [torch_kernels]
    if kernels != "torch":
        if not on_gpu and (kernels == "triton" or util.find_spec("mamba_ssm") is not None):
            _interpret()
            checked.append(resolve_kernels("triton", device))
        elif on_gpu:
            chosen = resolve_kernels(kernels, device)
            checked += [chosen] if chosen.triton else []
    if cases is None:
        cases = TOY + PAPER if on_gpu else TOY
    rows = []
    for case in cases:
        for name, run in _operations(case, torch.device(device)).items():
            expected = run(None)
            for candidate in checked:
                if candidate.differentiable or name != "scan backward":
                    rows.append(_check(name, run, case, candidate, torch_kernels, expected))
    return rows


def _interpret() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise KernelError("Triton is imported already: set TRITON_INTERPRET=1 to check it on a CPU")
        os.environ["TRITON_INTERPRET"] = "1"


def _check(
    name: str, run: Operation, case: Case, kernels: Kernels, torch_kernels: Kernels, expected: list[Tensor]
) -> KernelCheck:
    found, seconds = _timed(lambda: run(kernels))
    compared = kernels.triton and (torch_kernels.differentiable or name != "scan backward")
    torch_seconds = _timed(lambda: run(torch_kernels))[1] if compared else None
    errors = (
        (one.double() - exact).abs().max() / exact.abs().max() for one, exact in zip(found, expected, strict=True)
    )
    return KernelCheck(
        name, case.name, kernels.backend, max(map(float, errors)), TOLERANCE[name], seconds, torch_seconds
    )


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
    X = normal(*lead, s.hidden)

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

    def block(kernels: Kernels | None) -> list[Tensor]:
        return [plain_block(weights, s, X) if kernels is None else GpuBlock(weights, s, kernels)(X, lam=1.0)]

    return {"scan": scan, "scan backward": backward, "conv": conv, "gated norm": norm, "block": block}


def block_weights(shape: Mamba2Shape, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """Random weights of a block with the spread of decays and time steps that Mamba-2 is trained from."""

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    sizes = shape.tensors() | {"mixer.conv1d.bias": (shape.conv_dim,)}
    weights = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name in ("mixer.in_proj.weight", "mixer.out_proj.weight"):
        weights[name] /= weights[name].shape[1] ** 0.5
    weights["mixer.conv1d.weight"] /= shape.conv_kernel**0.5
    weights["mixer.A_log"] = uniform(1.0, 16.0, shape.heads).log()
    weights["mixer.dt_bias"] = uniform(-7.0, -2.0, shape.heads)  # softplus: 0.001 to 0.13
    return {name: tensor.to(device) for name, tensor in weights.items()}


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    *, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:  # fmt: skip
    """The definition at the head of ssd.py, token by token, in float64, with autograd; shapes as for `ssd.scan`."""
    x, dt, A, B, C, D, dt_bias = (t.double() for t in (x, dt, A, B, C, D, dt_bias))
    heads, groups = x.shape[2], B.shape[2]
    B, C = (t.repeat_interleave(heads // groups, 2) for t in (B, C))  # (batch, L, heads, state)
    step = torch.logaddexp(dt + dt_bias, dt.new_zeros(())).clamp(*dt_limit)
    state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        gained = torch.einsum("bhp,bhn->bhpn", step[:, t, :, None] * x[:, t], B[:, t])
        state = torch.exp(step[:, t] * A)[..., None, None] * state + gained
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of torch's own convolution in float64; x (B, L, channels), weight (channels, 1, K)."""
    K = weight.shape[-1]
    y = F.conv1d(x.double().transpose(1, 2), weight.double(), bias.double(), padding=K - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def plain_norm(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Gate first, then RMSNorm per group, in float64."""
    u = y.double() if gate is None else y.double() * F.silu(gate.double())
    parts = torch.unflatten(u, -1, (groups, -1))  # (..., groups, width / groups)
    return F.rms_norm(parts, [u.shape[-1] // groups], eps=eps).flatten(-2) * weight.double()


def plain_block(weights: dict[str, Tensor], s: Mamba2Shape, X: Tensor) -> Tensor:
    """X + mixer(norm(X)) in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    projected = plain_norm(X, None, w["norm.weight"], s.eps) @ w["mixer.in_proj.weight"].T
    gate, xBC, dt = torch.split(projected, [s.inner, s.conv_dim, s.heads], dim=-1)
    convolved = plain_conv(xBC, w["mixer.conv1d.weight"], w["mixer.conv1d.bias"])
    x, B, C = torch.split(convolved, [s.inner, s.groups * s.state, s.groups * s.state], dim=-1)
    x = torch.unflatten(x, -1, (s.heads, s.head_dim))  # (B, N, heads, head_dim)
    B, C = (torch.unflatten(t, -1, (s.groups, s.state)) for t in (B, C))  # (B, N, groups, state)
    y = recurrence(x, dt, -w["mixer.A_log"].exp(), B, C, w["mixer.D"], w["mixer.dt_bias"], dt_limit=s.dt_limit)
    return X + plain_norm(y.flatten(2), gate, w["mixer.norm.weight"], s.eps, s.groups) @ w["mixer.out_proj.weight"].T
