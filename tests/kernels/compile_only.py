"""Compiles every Triton kernel that a block of the 2.7B model, or the measures, launch; launches none.

    TRITON_CACHE_DIR=... python -m tests.kernels.compile_only 90 own|ieee|tf32 [backward]
    TRITON_CACHE_DIR=... python -m tests.kernels.compile_only 90 measures 128 2560

`own`: the package's; `ieee`, `tf32`: mamba-ssm's with products in that precision; `measures`: as `Fused` launches them for an
excerpt of so many rows and columns. Prints one JSON object a kernel. Triton asks its active driver what to compile for; one that answers "compute capability 90" needs no GPU, and with warmup=True a
kernel is compiled and not launched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# Shared memory that a block may use, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INNER, CHANNELS, HEADS = 5120, 5376, 80


def main(capability: int, what: str, *options: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
        )
    )
    launch = JITFunction.run

    def compile_and_report(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **(kwargs | {"warmup": True}))
        ptx = kernel.asm["ptx"]
        facts = {
            "name": self.__name__,
            "shared": kernel.metadata.shared,
            "spilled": spilled(kernel.asm["cubin"]),
            "cubin": kernel.asm["cubin"][:4].hex(),
            "target": next(line for line in ptx.splitlines() if line.startswith(".target")),
            "tf32": "tf32" in ptx,
            "products": next((kind for kind in ("tcgen05.mma", "wgmma.mma", "mma.sync") if kind in ptx), ""),
            "additions": len(re.findall(r"\badd\.(?:rn\.)?f32", ptx)),
            "of float64": sorted(set(re.findall(r"mma\.sync\S*", ptx))),
            "conversions": sorted(set(re.findall(r"cvt\S*f64\.f32\S*", ptx))),
        }
        print(json.dumps(facts))
        return kernel

    JITFunction.run = compile_and_report
    if what == "own":
        own(SHARED[capability])
    elif what == "measures":
        measures(*map(int, options))
    else:
        mamba_ssm(what, backward="backward" in options)


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's registers that went to memory, as cuobjdump, which is part of Triton, reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout))


def own(shared: int) -> None:
    from lscollapse.models.kernels import fused, products
    from lscollapse.models.kernels.mamba2_block import Mamba2Shape

    s = Mamba2Shape(2560, heads=HEADS, head_dim=64, state=128)
    products._stages = lambda device: min(4, shared // products.STAGE)  # type: ignore[assignment]  # that of the target
    projected, X, taps = (
        torch.zeros(4, 128, INNER + CHANNELS + HEADS),
        torch.zeros(4, 128, 2560),
        torch.zeros(4, CHANNELS),
    )
    vector, few = torch.zeros(HEADS), torch.zeros(4)
    fused.scan(projected, s, vector, vector, vector, taps.T, torch.zeros(CHANNELS))
    fused.scan(projected.bfloat16(), s, vector, vector, vector, taps.T, None)
    y, gate, weight = torch.zeros(4, 128, INNER), projected[..., :INNER], torch.zeros(INNER)
    for dtype in (None, torch.float32, torch.bfloat16):
        fused.rows(y, gate, weight, 1e-5, 1, dtype)
        fused.rows(X, None, torch.zeros(2560), 1e-5, 1, dtype)
    fused.combine(X, X, few, few)
    high, W = X.half(), torch.zeros(2560, 2560)
    halves = fused.split(X)._replace(high=high, low=high)
    fused.product(halves, fused.Weight(W.half()))
    low = fused.Weight(W.half(), W.half(), W[0], torch.ones((), dtype=torch.int32))
    fused.product(halves, low, W[0])


def measures(n: int, d: int) -> None:
    from lscollapse.models.kernels.fused_measures import Fused

    Fused(torch.zeros(2, n, d))


def mamba_ssm(precision: str, backward: bool) -> None:
    from lscollapse.models.kernels.mamba_ssm import import_triton

    combined, layernorm = import_triton("cpu")
    os.environ["TRITON_F32_DEFAULT"] = precision  # read when a kernel is compiled
    batch, L, heads, head_dim, groups, state = 1, 300, HEADS, 64, 1, 128
    x, dt = torch.zeros(batch, L, heads, head_dim, requires_grad=True), torch.zeros(batch, L, heads)
    B, C = torch.zeros(2, batch, L, groups, state)
    A, D, dt_bias = torch.zeros(3, heads)
    y = combined.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True)
    if backward:
        y.backward(torch.zeros_like(y))
    rows = torch.zeros(L, heads * head_dim)
    layernorm.rmsnorm_fn(rows, torch.zeros(heads * head_dim), None, z=rows, norm_before_gate=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
