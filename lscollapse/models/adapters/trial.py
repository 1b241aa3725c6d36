"""For adapters that try a model out: how far rounding may be off, and errors of the model's own code in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.core.files import first_line
from lscollapse.models.adapters.adapter import UnsupportedModel

ROUNDING = 64  # times the dtype's spacing: how far what is computed again may be off, relative to its norm
LARGEST_ROUNDING = 2.0**-5  # the most that is ever allowed, which matters in dtypes of few digits


@contextmanager
def failures_as(refusal: Callable[[str], UnsupportedModel]) -> Iterator[None]:
    """Errors of a model's own code become refusal(first line); those of memory stay what they are."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        if isinstance(error, UnsupportedModel) or is_out_of_memory(error):
            raise
        raise refusal(first_line(error)) from error


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in the Frobenius norm; 0 where both are 0."""
    difference = float(torch.linalg.vector_norm(found.double() - expected.double()))
    size = float(torch.linalg.vector_norm(expected.double()))
    return difference / size if size else float("inf") if difference else 0.0


def rounding(dtype: torch.dtype) -> float:
    """How far what is computed again in `dtype` may be off, relative to its norm."""
    return min(ROUNDING * torch.finfo(dtype).eps, LARGEST_ROUNDING)
