"""The malloc setting, seen from the page faults of a process that frees and takes large blocks."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
