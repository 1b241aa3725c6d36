"""Mapped tensors: what is forgotten of them leaves the memory, and is read again from the file."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lscollapse.models.checkpoints.tensors import forget, read_tensors


def resident(file: Path) -> int:
    """KiB of the mappings of a file that this process holds in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_forgotten_tensors_are_read_again(tmp_path: Path, name: str) -> None:
    """The same values from the file, of tensors that end within a page too; what was read of them leaves the memory."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{rows} {dtype}": torch.rand(rows, 1001, generator=generator).to(dtype)
        for rows in (1, 7, 300)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    file = tmp_path / name
    if file.suffix == ".bin":
        state["transposed"] = torch.rand(501, 1001, generator=generator).T
        state["tied"] = state["transposed"]
        state["expanded"] = torch.rand(1, 1001, generator=generator).expand(400, 1001)
        torch.save(state, file)
    else:
        save_file(state, file)
    size = file.stat().st_size // 1024
    mapped = read_tensors(file)
    for _ in range(2):
        assert all(torch.equal(mapped[key], tensor) for key, tensor in state.items())
        assert resident(file) > 0.9 * size
        forget(mapped)
        assert resident(file) < 0.1 * size


def test_only_what_is_of_a_tensor_is_forgotten() -> None:
    """Not what lies behind an expanded one, which has more elements than there is memory for them."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"\1" * len(memory))
    row = torch.frombuffer(memory, dtype=torch.uint8, count=page, offset=page)
    forget({"row": row.expand(3, page)})
    assert [memory[k * page : (k + 1) * page] == b"\1" * page for k in range(4)] == [True, False, True, True]
