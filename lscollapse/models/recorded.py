"""Blocks called as the model's own forward calls them: masks, positions and rotary embeddings are recorded from it."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lscollapse.models.adapter import Adapter


@dataclass(frozen=True)
class Call:
    """One call of a block within a forward of the model; the first argument is the block's input X."""

    block: Any
    args: tuple
    kwargs: dict[str, Any]
    output: Any

    @property
    def X(self) -> Any:
        return first_argument(self.args, self.kwargs)

    @property
    def Y(self) -> Any:
        return first_of(self.output)

    def again(self, X: Tensor) -> Any:
        """The block's output for another input, with all other arguments as recorded."""
        if self.args:
            return first_of(self.block(X, *self.args[1:], **self.kwargs))
        return first_of(self.block(**{**self.kwargs, next(iter(self.kwargs)): X}))


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def first_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def forward_of(module: Any, forward: Callable) -> Iterator[None]:
    """Let `module` compute `forward` instead of its own, which is put back on exit."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def record(blocks: Iterable[Any], forward: Callable[[], Any], compute: bool) -> list[Call]:
    """The calls of `blocks` in one `forward` of their model, in order.

    Args:
        compute: False hands each block's input on as its output, so that only what lies around the blocks is computed.
    """
    calls: list[Call] = []

    def recording(block: Any, own: Callable) -> Callable:
        def called(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs) if compute else first_argument(args, kwargs)
            calls.append(Call(block, args, kwargs, output))
            return output

        return called

    with ExitStack() as stack:
        for block in {id(block): block for block in blocks}.values():
            stack.enter_context(forward_of(block, recording(block, block.forward)))
        forward()
    return calls


class RecordedAdapter(Adapter):
    """`run` gives block k the arguments that the model's own forward gave it for the ids of the last `embed`."""

    calls: list[Call]

    @property
    @abstractmethod
    def blocks(self) -> list[Any]:
        """The modules of the stack, in order; each returns Y, no tuple."""

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def block(self, layer: int) -> Any:
        return self.blocks[layer]

    def forward(self, ids: Tensor) -> Any:
        uncached = "use_cache" in inspect.signature(self.model.forward).parameters
        return self.model(ids, use_cache=False) if uncached else self.model(ids)

    def embed(self, ids: Tensor) -> Tensor:
        self.calls = record(self.blocks, lambda: self.forward(ids), compute=False)
        return self.calls[0].X

    def run(self, layer: int, X: Tensor) -> Tensor:
        return self.calls[layer].again(X)
