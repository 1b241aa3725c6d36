"""What ALBERT and BERT share: post-norm blocks, LayerNorm(X + O), for attention and for the feed-forward part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lscollapse.models.adapters.adapter import Edit, HookSet
from lscollapse.models.numerics.carried import Carried


class PostNormAdd:
    """One LayerNorm(X + O) inside a block: edits it to LayerNorm(lam*X + O), or without the norm."""

    def __init__(self, name: str, edit: Edit, hooks: HookSet, scales_skip: bool, norm: Any) -> None:
        self._seen: dict[str, Tensor] = {}
        self._name, self._edit, self._hooks = name, edit, hooks
        self._scales_skip = scales_skip
        if scales_skip:
            hooks.before(norm, f"{name} skip", self._replace_sum)
        if edit.removes_norm("block"):
            hooks.after(norm, f"{name} norm (removed)", lambda args, kwargs, output: args[0])

    def skip_is_argument(self, module: Any, position: int) -> None:
        """X is the `position`-th positional argument of `module`."""
        if self._scales_skip:
            self._hooks.before(module, f"{self._name} input", lambda args, kwargs: self._keep("X", args[position]))

    def skip_is_output(self, module: Any) -> None:
        """X is the output (or the first of the outputs) of `module`."""
        if self._scales_skip:
            self._hooks.after(module, f"{self._name} input", lambda args, kwargs, out: self._keep("X", out))

    def mechanism_is_output(self, module: Any) -> None:
        """O is the output of `module`."""
        if self._scales_skip:
            self._hooks.after(module, f"{self._name} mechanism", lambda args, kwargs, out: self._keep("O", out))

    def _keep(self, key: str, value: Tensor | tuple) -> None:
        self._seen[key] = value[0] if isinstance(value, tuple) else value

    def _replace_sum(self, args: tuple, kwargs: dict) -> tuple:
        X, O = self._seen.pop("X"), self._seen.pop("O")
        if not self._edit.removes_norm("block"):
            self._edit.carried = Carried(len(X))  # of this sum alone: the norm that follows does not see its scale
        return (self._edit.add(X, O),)
