"""Compiles the kernels of the measures, as `Fused` launches them; launches none.

    TRITON_CACHE_DIR=... python -m tests.kernels.compile_measures 90 128 2560

prints one JSON object a kernel, of compute capability, rows and columns.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def main(capability: int, n: int, d: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from lscollapse.models.kernels.fused_measures import Fused

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
        )
    )
    launch, tool = JITFunction.run, Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def compile_and_report(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **(kwargs | {"warmup": True}))
        ptx = kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            )
        facts = {
            "name": self.__name__,
            "target": next(line for line in ptx.splitlines() if line.startswith(".target")),
            "shared": kernel.metadata.shared,
            "stack": int(re.search(r"STACK:(\d+)", usage.stdout)[1]),  # type: ignore[index]
            "products": sorted(set(re.findall(r"mma\.sync\S*", ptx))),
            "conversions": sorted(set(re.findall(r"cvt\S*f64\.f32\S*", ptx))),
        }
        print(json.dumps(facts))
        return kernel

    JITFunction.run = compile_and_report
    Fused(torch.zeros(2, n, d)).size  # noqa: B018


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
