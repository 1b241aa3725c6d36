"""The malloc setting, seen from the page faults of a process that frees and takes large blocks."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from lscollapse.core.allocation import is_out_of_memory

SCRIPT = """
import resource, sys
from lscollapse.core import allocation
if sys.argv[1] == "keep":
    assert allocation.keep_freed_memory() is True
def once():
    block = bytearray(64 * 2**20)  # calloc: touched by zeroing or by the kernel
    block[::4096] = b"x" * len(block[::4096])
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_are_used_again() -> None:
    pages = 10 * 64 * 2**20 // 4096
    assert faults("keep") < pages / 100


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lscollapse.core import allocation

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocation.keep_freed_memory() is False


# As the libraries word them: c10/cuda/CUDAException.cpp, aten/src/ATen/cuda/Exceptions.h (cuBLAS, cuSOLVER, cuSPARSE),
# ATen/cudnn/Exceptions.h, and triton/backends/nvidia/driver.c before what cuGetErrorString says.
WORDS = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Triton Error [CUDA]: out of memory",
]


@pytest.mark.parametrize("words", WORDS)
def test_words_of_the_libraries_of_a_gpu(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))


def test_allocations_that_fail() -> None:
    for fails in (
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.empty(2**60, np.uint8),
        lambda: bytearray(2**62),
    ):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            fails()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError())


def test_other_errors_are_not_of_memory() -> None:
    """A device that was lost, a shape that does not fit, and what is no error of a library."""
    for words in ("CUDA error: an illegal memory access was encountered", "mat1 and mat2 shapes cannot be multiplied"):
        assert not is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(ValueError("out of memory"))
