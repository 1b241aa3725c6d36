"""What a block should compute instead of what it is, and the hooks that make it do so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lscollapse.models.numerics.carried import Carried, Lambda, lose_unsquarable, times

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
CALLS = "block"  # the name under which HookSet.counts has how often the edited block ran


def first_of(output: Any) -> Any:
    """What a module returns; of several things the first."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Edit:
    """What a block should compute instead of what it is.

    Attributes:
        lam: the lambda of the layer that the current call of the block stands for; one for all excerpts or one for each.
        changes_sum: the block's own X + O must become lam*X + O, formed anew.
        changes_mixer: lam*V must be added to the scan output (skip_site `mixer`).
        carried: the scale that X is carried in (numerics/carried.py); None where it is in its own.
    """

    lam: Callable[[], Lambda]
    changes_sum: bool
    changes_mixer: bool
    gating: bool
    layernorm: bool
    skip_site: str
    norm_site: str
    carried: Carried | None = None

    def removes_norm(self, site: str) -> bool:
        return not self.layernorm and self.norm_site in (site, "both")

    def add(self, X: Tensor, O: Tensor) -> Tensor:
        """lam*X + O, Eq. (3), arXiv:2410.10609v3, at a skip where lambda acts; at skip_site `mixer` that is none."""
        return self.sum(1.0 if self.skip_site == "mixer" else self.lam(), X, O)

    def sum(self, lam: Lambda, X: Tensor, O: Tensor) -> Tensor:
        """lam*X + O, exactly O for lam = 0; infinite where it is not carried and too large for a norm."""
        if self.carried is not None:
            return self.carried.add(lam, X, O)
        if not isinstance(lam, Tensor) and lam == 0.0:
            Y = O.to(torch.promote_types(X.dtype, O.dtype))
        else:
            Y = times(lam[:, None, None] if isinstance(lam, Tensor) else lam, X) + O
        return lose_unsquarable(Y) if self.layernorm and Y.ndim == 3 else Y


class HookSet:
    """Registers hooks on modules, counts how often each fires, and removes every one."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._restores: list[Callable[[], None]] = []

    def before(self, module: Any, name: str, function: Callable[[Args, Kwargs], Args | None]) -> None:
        """`function(args, kwargs)` runs before `module`; it may return new positional arguments."""
        self.counts[name] = 0

        def hook(_module: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
            self.counts[name] += 1
            replaced = function(args, kwargs)
            return None if replaced is None else (replaced, kwargs)

        self.on_exit(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: Any, name: str, function: Callable[[Args, Kwargs, Any], Any]) -> None:
        """`function(args, kwargs, output)` runs after `module`; what it returns (unless None) replaces the output."""
        self.counts[name] = 0

        def hook(_module: Any, args: Args, kwargs: Kwargs, output: Any) -> Any:
            self.counts[name] += 1
            return function(args, kwargs, output)

        self.on_exit(module.register_forward_hook(hook, with_kwargs=True).remove)

    def keep(self, module: Any, position: int | None, name: str, seen: dict[str, Tensor], key: str) -> None:
        """Put the `position`-th positional argument of `module`, or for None its (first) output, into seen[key]."""

        def note(value: Any) -> None:
            seen[key] = first_of(value)

        if position is None:
            self.after(module, name, lambda args, kwargs, output: note(output))
        else:
            self.before(module, name, lambda args, kwargs: note(args[position]))

    def on_exit(self, restore: Callable[[], None]) -> None:
        self._restores.append(restore)

    def remove(self) -> None:
        for restore in self._restores:
            restore()
        self._restores.clear()


@contextmanager
def edited(
    install: Callable[[Any, Edit, HookSet], None], blocks: Iterable[Any], edit_of: Callable[[Any, HookSet], Edit]
) -> Iterator[list[HookSet]]:
    """While open, every block computes its edit; on exit, also after an exception, they are as they were, bit for bit.

    Args:
        install: of the adapter.
        blocks: its modules, each once.
        edit_of: a block and its hooks, which count its calls from the first on, -> what it should compute.

    Yields:
        The hooks of each block.
    """
    installed: list[HookSet] = []
    try:
        for block in blocks:
            hooks = HookSet()
            installed.append(hooks)
            hooks.before(block, CALLS, lambda args, kwargs: None)  # the first hook: the others ask for its count
            install(block, edit_of(block, hooks), hooks)
        yield installed
    finally:
        for hooks in installed:
            hooks.remove()
