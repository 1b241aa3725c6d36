"""Attention whose scores leave float32: NaN, where torch's fused kernel would say zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lscollapse.models.numerics.scores import scores_in_range


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e18, 1e20])
def test_excerpts_with_infinite_scores_are_nan_and_others_as_in_float64(size: float, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, value = torch.rand(2, 3, 5, 8, generator=generator), torch.randn(2, 3, 5, 8, generator=generator)
    key = -torch.rand(2, 3, 5, 8, generator=generator)  # at 1e20 every score is minus infinity, as if it were masked
    query[1], key[1] = query[1] * size, key[1] * size
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=causal)
    with scores_in_range():
        found = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        named = F.scaled_dot_product_attention(query=query, key=key, value=value, is_causal=causal)
    torch.testing.assert_close(found, named, equal_nan=True)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    assert found[1].isnan().all() if size == 1e20 else torch.allclose(found[1].double(), exact[1], rtol=1e-3, atol=1e-5)
