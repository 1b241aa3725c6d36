"""Which code computes the scan, the causal convolution and the gated norm of Mamba-2; the one importer of kernels.

    kernels = resolve_kernels("auto", "cuda")
    kernels.backend      # "mamba-ssm 2.3.1 triton + causal-conv1d 1.6.1 cuda, ieee fp32"

On CPU it is `lscollapse.models.kernels.ssd`; on a GPU mamba-ssm's Triton kernels and causal-conv1d's CUDA kernel, or
torch operations. float32 means IEEE float32 on a GPU too: TF32, which rounds the factors of every product to 11 bits,
only if asked for.
With TRITON_INTERPRET=1 in the environment before Triton is imported, the Triton kernels run on CPU, slowly, for checks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from lscollapse.models.kernels import ssd

CHOICES = ("auto", "torch", "triton")
CHUNK = 64  # tokens between two hand-overs of the state in `chunked_scan`
TRITON_CHUNK = 256  # the same in the Triton scan: what the released models were trained with
INSTALL = (
    "install a CUDA build of torch, then `pip install setuptools wheel packaging ninja`, "
    'then `pip install --no-build-isolation "lscollapse[gpu]"`'
)


class KernelError(ValueError):
    """The kernels asked for do not exist, are not installed, or cannot run on this device."""


@dataclass(frozen=True)
class Kernels:
    """The three operations of a Mamba-2 block, bound for one kind of device.

    Attributes:
        scan: (x, dt, A, B, C, D, dt_bias, *, dt_limit, chunk) -> y; shapes as in `ssd.scan`.
        conv: (x, weight, bias) -> y, silu of the causal depthwise convolution; shapes as in `ssd.conv`.
        gated_norm: (y, gate or None, weight, eps, groups) -> (..., width); see `gated_norm` below.
        backend: what these are, with versions and the precision of float32, as the table records it.
        device: `cpu` or `cuda`.
        triton: whether scan and norm are Triton kernels, which compute in float32 whatever they are given.
        differentiable: whether the scan has a backward pass.
        note: one line for the user, where `auto` could not have what it prefers; else empty.
    """

    scan: Callable[..., Tensor]
    conv: Callable[..., Tensor]
    gated_norm: Callable[..., Tensor]
    backend: str
    device: str
    triton: bool = False
    differentiable: bool = True
    note: str = ""

    def for_dtype(self, dtype: torch.dtype) -> Kernels:
        """These kernels, or those of torch for float64, which Triton's would round to float32."""
        return _torch_kernels(self.device) if self.triton and dtype == torch.float64 else self


def resolve_kernels(kernels: str = "auto", device: str | torch.device = "cpu", *, allow_tf32: bool = False) -> Kernels:
    """The operations for `device`; sets torch and Triton to IEEE float32 products unless `allow_tf32`.

    Args:
        kernels: `torch`; `triton` (mamba-ssm and causal-conv1d); `auto`: torch on CPU, on a GPU triton if both import.
        device: `cpu` or `cuda`, with or without an index.
        allow_tf32: lets products of float32 run in TF32 on a GPU (relative error 4e-4).

    Raises:
        KernelError: an unknown name or device, no GPU, or `triton` where it is not installed or cannot run.
    """
    kind = torch.device(device).type
    if kernels not in CHOICES:
        raise KernelError(f"kernels {kernels!r} do not exist: choose one of {', '.join(CHOICES)}")
    if kind not in ("cpu", "cuda"):
        raise KernelError(f"there are no kernels for device {kind!r}: use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise KernelError("torch sees no GPU: install a CUDA build of torch, or use --device cpu")
    interpreted = kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if kernels == "triton" and kind == "cpu" and not interpreted:
        raise KernelError("the triton kernels need a GPU: use --device cuda, or --kernels torch on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    precision = "tf32" if allow_tf32 else "ieee"
    if kernels == "torch" or (kernels == "auto" and kind == "cpu"):
        return _torch_kernels(kind)
    try:
        return _triton_kernels(kind, precision)
    except ImportError as error:
        missing = f"the triton kernels cannot be imported ({error})"
        if kernels == "triton":
            raise KernelError(f"{missing}: {INSTALL}; or use --kernels torch") from error
        return _torch_kernels(kind, f"{missing}, torch operations run instead; for the kernels {INSTALL}")


@functools.cache
def differentiable(kind: str) -> Kernels:
    """The operations with a backward pass, for training on `cpu` or `cuda`: those of `auto`, and on a CPU torch's."""
    if kind == "cpu":
        return Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", kind)
    return resolve_kernels("auto", kind)


def selective_scan_kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's CUDA scan of Mamba-1, `selective_scan_fn`, or None where its compiled part is not installed."""
    if util.find_spec("selective_scan_cuda") is None:
        return None
    scan: Callable[..., Tensor] = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return scan


def _torch_kernels(kind: str, note: str = "") -> Kernels:
    if kind == "cpu":
        return Kernels(ssd.scan, ssd.conv, gated_norm, "torch native", kind, differentiable=False)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    backend = f"torch {torch.__version__} chunked, {precision} fp32"
    return Kernels(chunked_scan, causal_conv, gated_norm, backend, kind, note=note)


def _triton_kernels(kind: str, precision: str) -> Kernels:
    """Raises ImportError where something is missing."""
    combined, layernorm = _import_triton(kind, precision)
    scan: Callable[..., Tensor] = combined.mamba_chunk_scan_combined
    norm: Callable[..., Tensor] = layernorm.rmsnorm_fn
    backend = f"mamba-ssm {metadata.version('mamba-ssm')} triton"
    if kind == "cuda":
        fused_conv: Callable[..., Tensor] = importlib.import_module("causal_conv1d").causal_conv1d_fn
        backend += f" + causal-conv1d {metadata.version('causal-conv1d')} cuda, {precision} fp32"
    else:
        backend += " interpreted + torch conv"

    def triton_scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None,
        *, dt_limit: tuple[float, float] = (0.0, math.inf), chunk: int = TRITON_CHUNK,
    ) -> Tensor:  # fmt: skip
        chunk = min(chunk, max(16, 1 << (x.shape[1] - 1).bit_length()))  # no larger than the excerpt needs
        return scan(x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit)

    def triton_norm(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
        return norm(y, weight, None, z=gate, eps=eps, group_size=y.shape[-1] // groups, norm_before_gate=False)

    def cuda_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        taps = weight.flatten(1)
        if not 2 <= taps.shape[1] <= 4:
            raise KernelError(f"causal-conv1d has kernels of 2 to 4 taps, not {taps.shape[1]}: use --kernels torch")
        if any(n % 8 for n in (x.shape[-1], x.stride(0), x.stride(1), x.storage_offset())):
            x = x.transpose(1, 2).contiguous().transpose(1, 2)  # its (batch, channels, L) kernel takes any size
        return fused_conv(x.transpose(1, 2), taps.contiguous(), bias, activation="silu").transpose(1, 2)

    conv = cuda_conv if kind == "cuda" else causal_conv
    return Kernels(triton_scan, conv, triton_norm, backend, kind, triton=True)


def _import_triton(kind: str, precision: str) -> tuple[ModuleType, ModuleType]:
    """mamba-ssm's modules of the scan and of the gated norm, their products in `precision`."""
    bound = sys.modules.get("mamba_ssm.ops.triton.ssd_combined") is not None
    if bound and os.environ.get("TRITON_F32_DEFAULT") != precision:
        raise KernelError(
            f"the Triton kernels of this process are compiled with TRITON_F32_DEFAULT="
            f"{os.environ.get('TRITON_F32_DEFAULT')!r}, not {precision!r}: ask for it in a new process"
        )
    os.environ["TRITON_F32_DEFAULT"] = precision
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")  # fixed block sizes: no tuning runs, the same rounding every time
    _without_mamba_1()
    if kind == "cpu":  # the host code of the kernels enters the GPU of its tensors and asks for its size
        torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
        torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on every import: hints at the tuning cache, and deprecations within triton
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        return combined, importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")


def _without_mamba_1() -> None:
    """Let mamba_ssm's Triton files import where its compiled Mamba-1 scan, which its __init__ loads, was not built."""
    if "mamba_ssm" in sys.modules or util.find_spec("selective_scan_cuda") is not None:
        return
    spec = util.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("No module named 'mamba_ssm'")
    package = ModuleType("mamba_ssm")
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules["mamba_ssm"] = package


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None,
    *, dt_limit: tuple[float, float] = (0.0, math.inf), chunk: int = CHUNK,
) -> Tensor:  # fmt: skip
    """The scan of `ssd.scan` in torch operations on whole batches, for any device, with autograd.

    Takes memory for batch * heads * chunk^2 decays at a time. float32, or float64 for a float64 x; the logarithm of the
    decay is kept in float64. Axes: b excerpt, g group, h head of a group, L or Q tokens, n state, p channel of a head.
    """
    dtype, groups, L = ssd.compute_dtype(x.dtype), B.shape[2], x.shape[1]
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = F.softplus(raw, threshold=40.0).clamp(*dt_limit)
    log_decay = torch.unflatten((step.double() * A.double()).mT, 1, (groups, -1))  # (b, g, h, L)
    B, C = B.to(dtype).transpose(1, 2), C.to(dtype).transpose(1, 2)  # (b, g, L, n)
    scaled = torch.unflatten((x.to(dtype) * step[..., None]).transpose(1, 2), 1, (groups, -1))  # (b, g, h, L, p)
    state = None  # (b, g, h, n, p)
    parts = []
    for start in range(0, L, chunk):
        part = slice(start, start + chunk)
        cum, Bs, Cs, xs = log_decay[..., part].cumsum(-1), B[:, :, part], C[:, :, part], scaled[..., part, :]
        future = torch.ones(cum.shape[-1], cum.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        decay = (cum[..., None] - cum[..., None, :]).to(dtype).masked_fill(future, -math.inf).exp()  # (b, g, h, Q, Q)
        y = ((Cs @ Bs.mT)[:, :, None] * decay) @ xs  # (b, g, h, Q, p)
        if state is not None:
            y = y + (Cs[:, :, None] @ state) * cum.to(dtype).exp()[..., None]
        if part.stop < L:
            left = (cum[..., -1:] - cum).to(dtype).exp()  # (b, g, h, Q), the decay up to the end of the chunk
            gained = Bs.mT[:, :, None] @ (xs * left[..., None])
            state = gained if state is None else state * cum[..., -1:].to(dtype).exp()[..., None] + gained
        parts.append(y)
    y = torch.cat(parts, 3).flatten(1, 2).transpose(1, 2)  # (b, L, g * h, p)
    return y if D is None else y + D.to(dtype)[:, None] * x.to(dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of `ssd.conv` as K shifted products of whole batches, for any device, with autograd."""
    dtype, L = ssd.compute_dtype(x.dtype), x.shape[1]
    taps = weight.to(dtype).flatten(1).unbind(1)  # K of (channels,)
    padded = F.pad(x.to(dtype), (0, 0, len(taps) - 1, 0))  # (b, K - 1 + L, channels)
    y = torch.zeros_like(taps[0]) if bias is None else bias.to(dtype)
    for k, tap in enumerate(taps):
        y = torch.addcmul(y, padded[:, k : k + L], tap)
    return F.silu(y)


def gated_norm(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """weight * u / rms(u) with u = y * silu(gate), or u = y without a gate; y, gate (..., width), weight (width,).

    The rms is over each of `groups` equal parts of a row. A row above 2^30 is first scaled down by a power of two:
    exact, and the squares of a finite u never overflow.
    """
    u = torch.unflatten(y if gate is None else y * F.silu(gate), -1, (groups, -1))  # (..., groups, width / groups)
    excess = (torch.frexp(u.detach().abs().amax(-1, keepdim=True)).exponent - 30).clamp_min(0)
    scale = torch.ldexp(torch.ones_like(u[..., :1]), -excess)
    u = u * scale
    return (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps * scale * scale)).flatten(-2) * weight
