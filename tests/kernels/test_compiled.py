"""The Triton kernels compile for the GPUs people have, within their shared memory and, the package's own, their registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_only import SHARED

CAPABILITIES = (80, 90, 100)
FORWARD = {
    "_chunk_cumsum_fwd_kernel",
    "_chunk_state_fwd_kernel",
    "_state_passing_fwd_kernel",
    "_bmm_chunk_fwd_kernel",
    "_chunk_scan_fwd_kernel",
    "_layer_norm_fwd_1pass_kernel",
}


OWN = {"scores_kernel", "decays_kernel", "scan_kernel", "rows_kernel", "product_kernel", "combine_kernel"}
PRODUCTS = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma"}  # the instructions of each generation


def compiled(capability: int, what: str, cache: Path, *options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MAMBA_DETERMINISTIC")}
    command = [sys.executable, "-m", "tests.kernels.compile_only", str(capability), what, *options]
    done = subprocess.run(command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED)
def test_every_own_kernel_compiles(capability: int, tmp_path: Path) -> None:
    found = compiled(capability, "own", tmp_path)
    assert {kernel["name"] for kernel in found} == OWN
    for kernel in found:
        assert kernel["cubin"] == "7f454c46", kernel  # an ELF file
        assert f"sm_{capability}" in kernel["target"], kernel
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["spilled"] <= 128, kernel
        assert kernel["tf32"] == (kernel["name"] in ("scores_kernel", "scan_kernel")), kernel
    products = [kernel for kernel in found if kernel["name"] == "product_kernel"]
    assert len(products) == 2 and {kernel["products"] for kernel in products} == {PRODUCTS[capability]}
    # A tile of 128 x 128 numbers in 256 threads: tensor cores start from 0, and each sum of theirs is added in float32.
    assert min(kernel["additions"] for kernel in products) >= 64


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_mamba_ssm_compiles(capability: int, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("shape", [(128, 2560), (100, 2561), (1, 64), (9, 1)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_of_the_measures_compiles(capability: int, shape: tuple[int, int], tmp_path: Path) -> None:
    found = {kernel["name"]: kernel for kernel in compiled(capability, "measures", tmp_path, *map(str, shape))}
    assert len(found) == 4
    for name, kernel in found.items():
        assert f"sm_{capability}" in kernel["target"], kernel
        assert kernel["shared"] <= SHARED[capability] and kernel["spilled"] <= 128, kernel
        assert kernel["conversions"] in ([], ["cvt.f64.f32"]), kernel  # none that flushes small numbers
        tensor_cores = name in ("gram_kernel", "leading_kernel") and capability < 100
        assert bool(kernel["of float64"]) == tensor_cores, kernel
        assert all("f64.f64.f64.f64" in product for product in kernel["of float64"]), kernel
