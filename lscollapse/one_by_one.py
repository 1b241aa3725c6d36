"""What the measures share of a batch on a CPU: one excerpt after the other goes through all of it, in as many threads as torch has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lscollapse.eigenvector import one_thread
from lscollapse.excerpt import Excerpt
from lscollapse.passes import Shared
from lscollapse.workers import Workspace, workers_here

# Sums of an excerpt, in the order in which they are made: the last two overwrite what the others read.
SUMS = (
    "size", "shortest", "row_norm_ratio", "longest_row", "centred", "aligned", "angular_mu", "rank1_residual",
    "angular_rank1_residual", "effective_rank", "size_1_inf", "centred_1_inf",
)  # fmt: skip
SHARED_OUT = 2**17  # numbers of an excerpt: of smaller ones threads are no faster, since they wait for the interpreter


def shared_of(Y: Tensor) -> Shared:
    """What the measures share of Y (B, N, d). A GPU makes each pass over all excerpts, and so does what autograd follows."""
    return OneByOne(Y) if Y.is_cpu and not (Y.requires_grad and torch.is_grad_enabled()) else Shared(Y)


class OneByOne(Shared):
    """Sums that are made together, excerpt by excerpt. They depend neither on what else is in the batch nor on the threads."""

    def make(self, parts: Iterable[str]) -> None:
        missing = {"shortest", *parts} - vars(self).keys()  # that one is nearly free
        wanted = [name for name in SUMS if name in missing]
        sums = np.empty((len(self.Y), 1 + len(wanted)))

        def measure(workspace: Workspace, Y: Tensor, out: np.ndarray) -> None:
            ends = Y.aminmax()  # NaN where there is one
            out[:] = math.nan
            out[0] = peak = max(abs(ends.min.item()), abs(ends.max.item()))
            if math.isfinite(peak):
                excerpt = Excerpt(Y, peak, workspace)
                with np.errstate(all="ignore"):  # what is made of rows of zeros is NaN or infinite
                    out[1:] = [getattr(excerpt, name) for name in wanted]

        workers, shared_out = workers_here(), len(self.Y) > 1 and self.Y[0].numel() >= SHARED_OUT
        with one_thread():
            (workers.each if shared_out else workers.here)(measure, self.Y.detach(), sums)
        vars(self).update(zip(["peak", *wanted], torch.from_numpy(sums).unbind(1), strict=True))

    @cached_property
    def scale(self) -> Tensor:  # (B,), as `Excerpt` has it
        if self.Y.dtype == torch.float64:
            return super().scale
        return torch.ones_like(self.peak).where(self.peak < math.inf, math.nan)
