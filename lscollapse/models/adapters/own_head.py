"""A language-model head whose parts are not known: the scores are those of the model's own forward.

Its blocks are left out: each hands on what the last one gave. So all that stands behind them is computed as the model
computes it: final norm, projections, output matrix, scales and soft caps of the scores.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.replayed import forward_of, record, uncached
from lscollapse.models.adapters.trial import failures_as, relative_difference, rounding
from lscollapse.models.numerics.widened import computing_in


class OwnHead:
    """From the last block's output to the scores of the vocabulary, for a `whole` model with a head.

    Args:
        blocks: the modules of its stack.
        probe: token ids (B, N) on which the scores are compared with those of the untouched forward.

    Raises:
        UnsupportedModel: they differ, so that more than the last block's output decides them.
    """

    def __init__(self, whole: Any, blocks: list[Any], probe: Tensor) -> None:
        self.whole = whole
        ids = {id(block) for block in blocks}
        self._names = [name for name, module in whole.named_modules() if id(module) in ids]
        self._models = {next(whole.parameters()).dtype: whole}
        expected: list[Tensor] = []
        with torch.no_grad(), computing_in(next(iter(self._models))), failures_as(self._refusal):
            # What the blocks hand over beside X comes from other tokens than the comparison's: it must not matter.
            others = record(blocks, lambda: _logits(whole, probe.flip(1)), compute=True).calls
            self._others = [call.output[1:] if isinstance(call.output, tuple) else None for call in others]
            calls = record(blocks, lambda: expected.append(_logits(whole, probe)), compute=True).calls
            difference = relative_difference(self.scores(calls[-1].Y, probe), expected[0])
        if not difference <= rounding(expected[0].dtype):
            raise self._refusal(
                "its scores follow from more than the output of its last block (without the rest they are off by"
                f" {difference:.1e})"
            )

    def _refusal(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"the loss of {type(self.whole).__name__} cannot be measured: {why}")

    def scores(self, X: Tensor, ids: Tensor) -> Tensor:
        """(B, N, d) and the ids (B, N) that were embedded -> (B, N, V), in the dtype of X; differentiable in X."""
        whole = self._in(X.dtype)
        others = iter(self._others)

        def handing_on(*_args: Any, **_kwargs: Any) -> Any:
            more = next(others)
            return X if more is None else (X, *more)

        with ExitStack() as stack:
            for name in self._names:
                stack.enter_context(forward_of(whole.get_submodule(name), handing_on))
            return _logits(whole, ids)  # (B, N, V)

    def _in(self, dtype: torch.dtype) -> Any:
        """The model in another dtype: a copy in which the blocks have no weights."""
        if dtype not in self._models:
            blocks = [self.whole.get_submodule(name) for name in self._names]
            tensors = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
            nothing = {id(tensor): nn.Parameter(tensor.new_empty(0), requires_grad=False) for tensor in tensors}
            self._models[dtype] = copy.deepcopy(self.whole, nothing).to(dtype)
        return self._models[dtype]


def _logits(model: Any, ids: Tensor) -> Tensor:
    output = uncached(model, ids)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits
