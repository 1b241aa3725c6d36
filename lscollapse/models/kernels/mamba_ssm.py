"""mamba-ssm's Triton scan and gated norm and causal-conv1d's CUDA convolution, as backends.py binds them.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the Triton kernels run on CPU, slowly, for checks.
Their products are IEEE float32.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable
from importlib import metadata, util
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from lscollapse.models.kernels.chunked import causal_conv

CHUNK = 256  # tokens between two hand-overs of the state: what the released models were trained with


def scan_and_norm(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], str]:
    """Scan, gated norm and what they are, for `cpu` (interpreted) or `cuda`. Raises ImportError."""
    combined, layernorm = import_triton(kind)
    scan: Callable[..., Tensor] = combined.mamba_chunk_scan_combined
    norm: Callable[..., Tensor] = layernorm.rmsnorm_fn

    def triton_scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None,
        *, dt_limit: tuple[float, float] = (0.0, math.inf), chunk: int = CHUNK,
    ) -> Tensor:  # fmt: skip
        chunk = min(chunk, max(16, 1 << (x.shape[1] - 1).bit_length()))  # no larger than the excerpt needs
        each = D is not None and D.ndim == 2  # one row an excerpt: the kernel takes one for all
        y = scan(x, dt, A, B, C, chunk, D=None if each else D, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit)
        return y + D[:, None, :, None] * x if D is not None and each else y

    def triton_norm(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
        return norm(y, weight, None, z=gate, eps=eps, group_size=y.shape[-1] // groups, norm_before_gate=False)

    how = "" if kind == "cuda" else " interpreted"
    return triton_scan, triton_norm, f"mamba-ssm {metadata.version('mamba-ssm')} triton{how}"


def conv() -> tuple[Callable[..., Tensor], str]:
    """causal-conv1d's convolution, which needs a GPU, and what it is. Raises ImportError."""
    fused_conv: Callable[..., Tensor] = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def cuda_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        taps = weight.flatten(1)
        if not 2 <= taps.shape[1] <= 4:  # it has no kernel for others
            return causal_conv(x, weight, bias)
        if any(n % 8 for n in (x.shape[-1], x.stride(0), x.stride(1), x.storage_offset())):
            x = x.transpose(1, 2).contiguous().transpose(1, 2)  # its (batch, channels, L) kernel takes any size
        return fused_conv(x.transpose(1, 2), taps.contiguous(), bias, activation="silu").transpose(1, 2)

    return cuda_conv, f"causal-conv1d {metadata.version('causal-conv1d')} cuda"


def selective_scan_kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's CUDA scan of Mamba-1, `selective_scan_fn`, or None where its compiled part is not installed."""
    if util.find_spec("selective_scan_cuda") is None:
        return None
    scan: Callable[..., Tensor] = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return scan


def import_triton(kind: str) -> tuple[ModuleType, ModuleType]:
    """mamba-ssm's modules of the scan and of the gated norm. Raises ImportError."""
    bound = sys.modules.get("mamba_ssm.ops.triton.ssd_combined") is not None
    if bound and os.environ.get("TRITON_F32_DEFAULT") != "ieee":
        raise ImportError("it was imported before with products in TF32, Triton's default: start a new process")
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
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
