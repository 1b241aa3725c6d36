"""What memory there is, how torch's allocator keeps it, and which errors say that there was none left.

glibc returns every large freed block to the system, and fresh pages are dear: a CPU forward pass runs 2x to 40x slower.

`keep_freed_memory` makes the allocator keep what it has. It does nothing on other C libraries.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGE = 2**31 - 1  # mallopt takes a C int
# What RuntimeErrors say where memory is short: the CUDA driver and runtime (and so torch and Triton), cuBLAS, cuDNN and
# their like, cuDNN from version 9 on, torch on a CPU.
_OUT_OF_MEMORY = ("out of memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED", "DefaultCPUAllocator")


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed blocks instead of unmapping them; True where the settings took effect."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, LARGE), (M_TOP_PAD, 64 * 2**20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def available_memory() -> int:
    """Bytes that processes can still take: what Linux calls available, at most what the container is allowed."""
    listed = Path("/proc/meminfo")
    if not listed.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in listed.read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    allowed, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if allowed.is_file() and allowed.read_text().strip().isdigit():
        free = min(free, int(allowed.read_text()) - int(used.read_text()))
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or not, so that half of the work may do.

    A Triton kernel that needs more registers or shared memory than a GPU has (OutOfResources) says nothing of the kind.
    """
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
