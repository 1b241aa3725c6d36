"""mamba-ssm's Triton kernels compile for the GPUs people have, within their shared memory, with IEEE products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory that a block may use, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FORWARD = {
    "_chunk_cumsum_fwd_kernel",
    "_chunk_state_fwd_kernel",
    "_state_passing_fwd_kernel",
    "_bmm_chunk_fwd_kernel",
    "_chunk_scan_fwd_kernel",
    "_layer_norm_fwd_1pass_kernel",
}


def compiled(capability: int, precision: str, cache: Path, *options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MAMBA_DETERMINISTIC")}
    command = [sys.executable, "-m", "tests.kernels.compile_only", str(capability), precision, *options]
    done = subprocess.run(command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    backward = capability == 90  # on one: its kernels take longest to compile
    found = compiled(capability, "ieee", tmp_path, *["backward"] * backward)
    names = {kernel["name"] for kernel in found}
    assert names >= FORWARD and any("bwd" in name for name in names) == backward
    for kernel in found:
        assert kernel["cubin"] == "7f454c46", kernel  # an ELF file
        assert f"sm_{capability}" in kernel["target"], kernel
        assert kernel["shared"] <= SHARED[capability], kernel
        assert not kernel["tf32"], kernel


def test_tf32_would_be_seen(tmp_path: Path) -> None:
    found = {kernel["name"]: kernel["tf32"] for kernel in compiled(90, "tf32", tmp_path)}
    assert found["_chunk_scan_fwd_kernel"] and found["_bmm_chunk_fwd_kernel"]
    assert not found["_chunk_cumsum_fwd_kernel"]
