"""Calls of modules that several arms make with the same tensors, made once: what comes before the first lambda acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lscollapse.models.adapters.replayed import forward_of, tensors_of

Versions = list[tuple[Tensor, int]]


class Once:
    """What modules gave for which tensors: the same objects, which nobody has written to since. The other arguments of a module
    have to be the same at every call."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[Versions, Any]] = {}

    @contextmanager
    def over(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """While open, these modules give what they gave before for the same tensors. Hooks on them fire at every call, hooks on what is
        inside of them only where it is computed."""
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(forward_of(module, self._once(module, module.forward)))
            yield

    def _once(self, module: nn.Module, untouched: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = list(tensors_of((*args, *kwargs.values())))
            asked = id(module), *map(id, given)
            seen, output = self._made.get(asked, ([], None))
            if not seen or any(tensor._version != version for tensor, version in seen):
                output = untouched(*args, **kwargs)
                # The tensors are kept, so that no other one gets their ids.
                self._made[asked] = [(tensor, tensor._version) for tensor in (*given, *tensors_of(output))], output
            return output

        return forward
