"""Which code computes the blocks of Mamba-2; the one importer of kernels.

    kernels = resolve_kernels("auto", "cuda")
    kernels.backend      # "lscollapse triton 3.6.0: scan tf32x3 (torch over 128 tokens), fp32 products of float16 halves"

On CPU it is the package's own C++, which a C++ compiler is enough for, or torch operations (`ssd.py`); on a GPU the
package's own Triton kernels, which a CUDA build of torch is enough for, torch operations, or mamba-ssm's Triton kernels
and causal-conv1d's CUDA kernel. Own kernels are compared with float64 before their first use.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from lscollapse.models.kernels import guard, mamba_ssm, native, native_build, ssd
from lscollapse.models.kernels.chunked import causal_conv, chunked_scan, gated_norm

CHOICES = ("auto", "native", "torch", "triton", "mamba-ssm")
PRODUCTS = ("split", "ieee")
INSTALL = "install a CUDA build of torch, which brings triton"
INSTALL_MAMBA_SSM = (
    "install a CUDA build of torch, then `pip install setuptools wheel packaging ninja`, "
    'then `pip install --no-build-isolation "lscollapse[gpu]"`'
)


class KernelError(ValueError):
    """The kernels asked for do not exist, are not installed, or cannot run on this device."""


@dataclass(frozen=True)
class Kernels:
    """The operations of a Mamba-2 block, bound for one kind of device.

    Attributes:
        scan: (x, dt, A, B, C, D, dt_bias, *, dt_limit, chunk) -> y; shapes as in `ssd.scan`, D also (batch, heads).
        conv: (x, weight, bias) -> y, silu of the causal depthwise convolution; shapes as in `ssd.conv`.
        gated_norm: (y, gate or None, weight, eps, groups) -> (..., width); see `chunked.gated_norm`.
        backend: what these are, with versions and the precision of float32, as the table records it.
        device: `cpu` or `cuda`.
        triton: whether there are Triton kernels among them, which compute in float32 whatever they are given.
        differentiable: whether the scan has a backward pass.
        note: one line for the user, where something preferred could not be had; else empty.
        own: the package's Triton kernels (fused.py), which go before the three operations where they take the shape.
        split: whether products of float32 are those of `own`.
        native: the package's C++ functions, which on a CPU take the place of the three operations in a whole block.
        widens: whether products of bfloat16 beside `native` are made in float32, which here is far faster.
    """

    scan: Callable[..., Tensor]
    conv: Callable[..., Tensor]
    gated_norm: Callable[..., Tensor]
    backend: str
    device: str
    triton: bool = False
    differentiable: bool = True
    note: str = ""
    own: ModuleType | None = None
    split: bool = False
    native: native.Native | None = None
    widens: bool = False

    def for_dtype(self, dtype: torch.dtype) -> Kernels:
        """These kernels as a block of that dtype uses them; torch's for float64, which own ones would round to float32."""
        if dtype == torch.float64 and (self.triton or self.native):
            return _torch_kernels(self.device)
        if dtype == torch.bfloat16 and self.widens:
            return replace(self, backend=f"{self.backend}, bf16 products in fp32")
        return self


def ieee() -> None:
    """Products and convolutions of float32 by torch are IEEE float32 on a GPU: TF32 rounds their factors to 11 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def resolve_kernels(kernels: str = "auto", device: str | torch.device = "cpu", *, products: str = "split") -> Kernels:
    """The operations for `device`; sets torch to IEEE float32.

    Args:
        kernels: `torch`; `native`, the package's own for a CPU, and torch's where they cannot be had; `triton`, its own
            for a GPU; `mamba-ssm`, with causal-conv1d, and torch's operations for what is not installed of the two;
            `auto`: native on a CPU, on a GPU triton if it is installed.
        device: `cpu` or `cuda`, with or without an index. With TRITON_INTERPRET=1 in the environment before Triton is
            imported, Triton kernels run on a CPU, slowly, for checks.
        products: of float32 by own kernels: `split`, on tensor cores (products.py), or `ieee`, torch's.

    Raises:
        KernelError: an unknown name or device, no GPU, or kernels asked for that are not installed or cannot run.
    """
    kind = torch.device(device).type
    for what, name, known in (("kernels", kernels, CHOICES), ("products", products, PRODUCTS)):
        if name not in known:
            raise KernelError(f"{what} {name!r} do not exist: choose one of {', '.join(known)}")
    if kind not in ("cpu", "cuda"):
        raise KernelError(f"there are no kernels for device {kind!r}: use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise KernelError("torch sees no GPU: install a CUDA build of torch, or use --device cpu")
    if kind == "cpu" and kernels in ("triton", "mamba-ssm") and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(f"the {kernels} kernels need a GPU: use --device cuda, or --kernels torch on a CPU")
    if kind == "cuda" and kernels == "native":
        raise KernelError("the native kernels are for a CPU: use --device cpu, or --kernels triton or torch on a GPU")
    ieee()
    if kernels == "torch":
        return _torch_kernels(kind)
    if kernels == "native" or (kernels == "auto" and kind == "cpu"):
        return _native_kernels()
    if kernels == "mamba-ssm":
        return _mamba_ssm_kernels(kind)
    try:
        return _guarded(str(device), products == "split")
    except KernelError as error:
        if kernels == "triton":
            raise
        return _torch_kernels(kind, f"torch operations run: {error}")


@functools.cache
def differentiable(kind: str) -> Kernels:
    """The operations with a backward pass, for training on `cpu` or `cuda`: mamba-ssm's on a GPU where there, else torch's."""
    if kind == "cuda":
        try:
            return resolve_kernels("mamba-ssm", kind)
        except KernelError:
            return resolve_kernels("torch", kind)
    return Kernels(chunked_scan, causal_conv, gated_norm, "torch chunked", kind)


def _torch_kernels(kind: str, note: str = "") -> Kernels:
    if kind == "cpu":
        return Kernels(ssd.scan, ssd.conv, gated_norm, "torch operations", kind, differentiable=False, note=note)
    return Kernels(
        chunked_scan, causal_conv, gated_norm, f"torch {torch.__version__} chunked, ieee fp32", kind, note=note
    )


def _native_kernels() -> Kernels:
    """Own C++ where it can be had and is right on this CPU, else torch operations and a note."""
    found, note = native.load()
    kernels = _torch_kernels("cpu", note)
    if found is None:
        return kernels
    return replace(kernels, backend=f"native c++ ({found.name})", native=found, widens=_widens())


def _widens() -> bool:
    """Whether products of bfloat16 are faster on this CPU when they are made in float32."""
    one_dnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # of torch
    if not (one_dnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True  # CPUs without AVX-512 or what Arm has for it: torch's products of bfloat16 are plain loops
    flags = native_build.cpu_flags().split()
    # Intel's AVX-512 makes half as many products of bfloat16 a second as of float32, its AMX many times more
    return "GenuineIntel" in flags and "amx_bf16" not in flags


def own_kernels(device: str, split: bool = True) -> Kernels:
    """The package's own kernels, whether or not they are right on this device. Raises KernelError where Triton is missing."""
    try:
        own = importlib.import_module("lscollapse.models.kernels.fused")
    except ImportError as error:
        raise KernelError(
            f"the triton kernels cannot be imported ({error}): {INSTALL}; or use --kernels torch"
        ) from error
    kind = torch.device(device).type
    backend = (
        f"lscollapse triton {own.VERSION}{'' if kind == 'cuda' else ' interpreted'}: scan tf32x3 (torch over "
        f"{own.LENGTH} tokens), fp32 products {'of float16 halves' if split else 'ieee'}"
    )
    return Kernels(
        chunked_scan, causal_conv, gated_norm, backend, kind, triton=True, own=own, split=split
    )  # fmt: skip


@functools.cache
def _guarded(device: str, split: bool) -> Kernels:
    """Own kernels as far as they are right on this device; the note says where they are not."""
    kernels = own_kernels(device, split)
    assert kernels.own is not None
    faults = guard.faults(kernels.own, torch.device(device), split)
    note = "; ".join(faults.values())
    if "mixer" in faults:
        return _torch_kernels(kernels.device, note)
    return replace(own_kernels(device, split and not faults), note=note)


def _mamba_ssm_kernels(kind: str) -> Kernels:
    """Each of the two packages alone; an error only where neither is there."""
    scan, norm, conv = chunked_scan, gated_norm, causal_conv
    scan_backend, conv_backend = f"torch {torch.__version__} chunked", "torch conv"
    missing = []
    try:
        scan, norm, scan_backend = mamba_ssm.scan_and_norm(kind)
    except ImportError as error:
        missing.append(f"mamba-ssm cannot be imported ({error})")
    if kind == "cuda":
        try:
            conv, conv_backend = mamba_ssm.conv()
        except ImportError as error:
            missing.append(f"causal-conv1d cannot be imported ({error})")
    if len(missing) == (2 if kind == "cuda" else 1):
        raise KernelError(f"{' and '.join(missing)}: {INSTALL_MAMBA_SSM}; or use --kernels triton or torch")
    backend = f"{scan_backend} + {conv_backend}" + (", ieee fp32" if kind == "cuda" else "")
    note = "".join(f"{what}, torch operations run in its place" for what in missing)
    return Kernels(scan, conv, norm, backend, kind, triton=scan is not chunked_scan, note=note)
