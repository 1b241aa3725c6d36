"""Attention scores that leave the range of their dtype.

torch's fused attention makes zeros of a row whose scores are infinite: without its norm a block then goes on with
numbers that look fine and are wrong. While `scores_in_range` is open, such an excerpt becomes NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lscollapse.measures import any_of


class scores_in_range(TorchFunctionMode):
    """NaN for every excerpt of F.scaled_dot_product_attention in which a score may exceed the dtype of the query."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return out
        query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        scale = kwargs.get("scale") or 1.0 / math.sqrt(query.shape[-1])
        largest = _longest(query) * _longest(key) * scale  # (B,); |q k| <= ||q|| ||k||
        lost = ~(largest <= torch.finfo(query.dtype).max)
        return out.masked_fill(lost.view(-1, *[1] * (out.ndim - 1)), math.nan) if any_of(lost) else out


def _longest(rows: Tensor) -> Tensor:
    """(B, heads, N, h) -> (B,): norm of the longest row, in float64."""
    norms: Tensor = torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=torch.float64)  # (B, heads, N)
    return norms.flatten(1).amax(1)
