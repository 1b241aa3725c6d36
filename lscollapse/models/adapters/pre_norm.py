"""What GPT-2, Llama and ViT share: pre-norm blocks, Z = X + attention(norm(X)), then Y = Z + mlp(norm(Z))."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from lscollapse.models.adapters.adapter import Edit, HookSet
from lscollapse.models.adapters.replayed import RecordedAdapter, first_of


class Parts(NamedTuple):
    """The modules of one block."""

    first_norm: Any
    attention: Any
    second_norm: Any
    mlp: Any


class PreNormAdapter(RecordedAdapter):
    """skip_site `residual` is the attention's skip, `ffn` the MLP's; both norms are the block's."""

    skip_sites = ("residual", "ffn", "both")
    norm_sites = ("both", "block")
    pre_norm = True

    @abstractmethod
    def parts(self, block: Any) -> Parts: ...

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        parts = self.parts(block)
        if edit.changes_sum:
            _sums(block, parts, edit, hooks)
        if edit.removes_norm("block"):
            for name, norm in (("first norm", parts.first_norm), ("second norm", parts.second_norm)):
                hooks.after(norm, f"{name} (removed)", lambda args, kwargs, output: args[0])


def _sums(block: Any, parts: Parts, edit: Edit, hooks: HookSet) -> None:
    """Both sums formed anew: Z before the second norm, Y after the block."""
    seen: dict[str, Tensor] = {}

    def keep(key: str, value: Any) -> None:
        seen[key] = first_of(value)

    def attention_skip(args: tuple, kwargs: dict) -> tuple:
        seen["Z"] = _add(edit, seen.pop("X"), seen.pop("A"), "residual")
        return (seen["Z"],)

    def mlp_skip(args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        return _add(edit, seen.pop("Z"), seen.pop("F"), "ffn")

    hooks.before(block, "block input", lambda args, kwargs: keep("X", args[0]))
    hooks.after(parts.attention, "attention output", lambda args, kwargs, output: keep("A", output))
    hooks.before(parts.second_norm, "attention skip", attention_skip)
    hooks.after(parts.mlp, "mlp output", lambda args, kwargs, output: keep("F", output))
    hooks.after(block, "mlp skip", mlp_skip)


def _add(edit: Edit, X: Tensor, O: Tensor, site: str) -> Tensor:
    """lam*X + O where lambda acts at `site`, else X + O."""
    return edit.add(X, O) if edit.skip_site in (site, "both") else edit.sum(1.0, X, O)
