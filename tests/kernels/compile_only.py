"""Compiles every Triton kernel that the scan and the gated norm launch at 2.7B sizes; launches none.

    TRITON_CACHE_DIR=... python -m tests.kernels.compile_only 90 ieee [backward]

prints one JSON object a kernel. Triton asks its active driver what to compile for; one that answers "compute capability
90" needs no GPU, and with warmup=True a kernel is compiled and not launched.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch


def main(capability: int, precision: str, backward: bool) -> None:
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
        facts = {
            "name": self.__name__,
            "shared": kernel.metadata.shared,
            "cubin": kernel.asm["cubin"][:4].hex(),
            "target": next(line for line in kernel.asm["ptx"].splitlines() if line.startswith(".target")),
            "tf32": "tf32" in kernel.asm["ptx"],
        }
        print(json.dumps(facts))
        return kernel

    JITFunction.run = compile_and_report

    from lscollapse.models.kernels.backends import _import_triton

    combined, layernorm = _import_triton("cpu", precision)
    batch, L, heads, head_dim, groups, state = 1, 300, 80, 64, 1, 128
    x, dt = torch.zeros(batch, L, heads, head_dim, requires_grad=True), torch.zeros(batch, L, heads)
    B, C = torch.zeros(2, batch, L, groups, state)
    A, D, dt_bias = torch.zeros(3, heads)
    y = combined.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True)
    if backward:
        y.backward(torch.zeros_like(y))
    rows = torch.zeros(L, heads * head_dim)
    layernorm.rmsnorm_fn(rows, torch.zeros(heads * head_dim), None, z=rows, norm_before_gate=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], backward="backward" in sys.argv)
