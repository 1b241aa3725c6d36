"""Where there is no GPU the measures are torch's; the kernels have tests of their own in tests/kernels/."""

from __future__ import annotations

import pytest
import torch

from lscollapse import measures
from lscollapse.models.kernels import fused_measures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cpu_is_left_to_torch(dtype: torch.dtype) -> None:
    Y = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, found = measures.measure_all(Y), measures.measure_all(fused_measures.shared_of(Y))
    assert list(found) == list(measures.MEASURES)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
