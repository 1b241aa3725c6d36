"""Any other architecture of transformers: the repeated block and its residual sum are found, and the finding is tested.

The blocks are the longest list of modules that lies in no other list. A residual sum is the one addition in its forward
that has the block's own input X as an operand; the other operand is O (in a block with two skips that is the mixer's:
lambda acts there, as at skip_site `residual` elsewhere). Lambda replaces this sum by lam*X + O. Gate and norms are not
known, so they are not switched.

What is tested, on a few made-up tokens when the adapter is made and on the first ids that it embeds:
    the blocks follow one another, each taking what the one before gave, (excerpts, tokens, width);
    in every block there is exactly one such sum;
    with lambda = 1 formed anew, the block's output is what it was, to rounding;
    with lambda = 0 the sum is O bit for bit, and the block's output is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lscollapse.models.adapter import Edit, HookSet, UnsupportedModel
from lscollapse.models.recorded import Call, RecordedAdapter, first_argument, forward_of, record
from lscollapse.texts import first_line

ADDITIONS = (Tensor.add, Tensor.add_, torch.add)
PROBE = (2, 6)  # excerpts, tokens
ROUNDING = 64  # times the dtype's spacing: how far the output at lambda = 1 may be off, relative to its norm
BACKEND = "transformers, generic adapter"
Add = Callable[[Tensor, Tensor], Tensor]


class GenericAdapter(RecordedAdapter):
    """Raises UnsupportedModel with the reason where a test fails. Of an encoder-decoder model it is the encoder."""

    def __init__(self, model: Any) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        if model.training:
            raise UnsupportedModel(
                "the model is in training mode, where its forward is random: call model.eval() first"
            )
        super().__init__(model)
        self._list = _stack(model)
        self._proved = False
        batch, tokens = PROBE
        probe = torch.arange(batch * tokens, device=self.device).view(batch, tokens) % self.vocabulary
        self._blocks = [call.block for call in self._recorded(probe)]

    @property
    def blocks(self) -> list[Any]:
        return self._blocks

    @property
    def backend(self) -> str:
        return BACKEND

    @property
    def vocabulary(self) -> int:
        size = getattr(self.config, "vocab_size", None)
        if size is None:
            raise self._unsupported("it reads no tokens: its config has no vocab_size")
        return size

    def embed(self, ids: Tensor) -> Tensor:
        if self._proved:
            self.calls = record(self._list, lambda: self.forward(ids), compute=True)
        else:
            self.calls = self._recorded(ids)
            self._proved = True
        return self.calls[0].X

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if not edit.layernorm:
            raise UnsupportedModel(f"the norms of {self.config.model_type} are not known, so they cannot be removed")
        if not edit.changes_sum:
            return
        name = "residual sum"
        hooks.counts[name] = 0

        def add(X: Tensor, O: Tensor) -> Tensor:
            hooks.counts[name] += 1
            return edit.add(X, O)

        stack = ExitStack()
        hooks.on_exit(stack.close)
        stack.enter_context(_replaced_sum(block, add))

    def _recorded(self, ids: Tensor) -> list[Call]:
        """The calls of the blocks in a forward on ids, every one of them tested."""
        with torch.no_grad():
            try:
                calls = record(self._list, lambda: self.forward(ids), compute=True)
            except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
                raise self._unsupported(f"its forward on token ids fails: {first_line(error)}") from error
            self._test_chain(calls, ids)
            for number, call in enumerate(calls, 1):
                self._test_sum(call, number)
        return calls

    def _test_chain(self, calls: list[Call], ids: Tensor) -> None:
        if len(calls) < 2:
            raise self._unsupported("it has no list of modules that its forward calls one after the other")
        for number, call in enumerate(calls, 1):
            what = type(call.block).__name__
            if not isinstance(call.X, Tensor) or call.X.ndim != 3 or call.X.shape[:2] != ids.shape:
                came = tuple(call.X.shape) if isinstance(call.X, Tensor) else type(call.X).__name__
                raise self._unsupported(f"{what} {number} takes {came}, not (excerpts, tokens, width)")
            if number > 1 and not torch.equal(call.X, calls[number - 2].Y):
                raise self._unsupported(f"something happens to X between {what} {number - 1} and {number}")

    def _test_sum(self, call: Call, number: int) -> None:
        what = f"{type(call.block).__name__} {number}"
        seen: list[Tensor] = []

        def output(add: Add) -> Tensor:
            with _replaced_sum(call.block, add):
                return call.again(call.X)

        def form_anew(X: Tensor, O: Tensor) -> Tensor:
            seen.append(O.clone())
            return 1.0 * X + O

        def drop_X(X: Tensor, O: Tensor) -> Tensor:
            seen.append(O.clone())
            return O

        same = output(form_anew)
        if len(seen) != 1:
            raise self._unsupported(f"{what} adds its own input to something {len(seen)} times, expected once")
        difference = torch.linalg.vector_norm((same - call.Y).double()) / torch.linalg.vector_norm(call.Y.double())
        if not difference <= ROUNDING * torch.finfo(call.Y.dtype).eps:
            raise self._unsupported(f"{what} formed anew with lambda = 1 is off by {float(difference):.1e}")
        dropped = output(drop_X)
        if not torch.equal(*seen) or torch.equal(dropped, call.Y):
            raise self._unsupported(f"lambda = 0 does not leave O in {what}: the sum found is not its residual")

    def _unsupported(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"no adapter for architecture {self.config.model_type!r}, and none is found: {why}")


def _stack(model: Any) -> list[Any]:
    """The longest of the lists of modules that lie in no other list."""
    found: list[list[nn.Module]] = [[]]

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.append(list(child))
            else:
                search(child)

    search(model)
    return max(found, key=len)


@contextmanager
def _replaced_sum(block: Any, add: Add) -> Iterator[None]:
    """While open, `block` computes add(X, O) where its forward adds its input X and something else of the same shape."""
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Sums(first_argument(args, kwargs), add):
            return own(*args, **kwargs)

    with forward_of(block, forward):
        yield


class _Sums(TorchFunctionMode):
    """Sees every addition of torch tensors, and hands those of X to `add`."""

    def __init__(self, X: Tensor, add: Add) -> None:
        super().__init__()
        self._X, self._add = X, add

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in ADDITIONS and not kwargs and len(args) == 2:
            a, b = args
            for X, O in ((a, b), (b, a)):
                if self._is_input(X) and isinstance(O, Tensor) and O.shape == X.shape and not self._is_input(O):
                    return self._add(X, O)
        return func(*args, **(kwargs or {}))

    def _is_input(self, value: Any) -> bool:
        """X itself or another view of all of it, as (tokens, width) for example."""
        X = self._X
        if value is X:
            return True
        alike = isinstance(value, Tensor) and value.dtype == X.dtype and value.numel() == X.numel()
        return alike and value.data_ptr() == X.data_ptr()
