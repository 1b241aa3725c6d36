"""What GPT-2, Llama and ViT share: pre-norm blocks, Z = X + attention(norm(X)), then Y = Z + mlp(norm(Z))."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lscollapse.models.adapters.edit import Args, Edit, HookSet, Kwargs
from lscollapse.models.adapters.replayed import ReplayedAdapter


class Parts(NamedTuple):
    """The modules of one block, by their names in it."""

    first_norm: str
    attention: str
    second_norm: str
    mlp: str


class PreNormAdapter(ReplayedAdapter):
    """skip_site `residual` is the attention's skip, `ffn` the MLP's; both norms are the block's."""

    skip_sites = ("residual", "ffn", "both")
    norm_sites = ("both", "block")
    pre_norm = True
    parts: ClassVar[Parts]

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        first_norm, attention, second_norm, mlp = (getattr(block, name) for name in self.parts)
        if edit.changes_sum:
            _sums(block, attention, second_norm, mlp, edit, hooks)
        if edit.removes_norm("block"):
            for name, norm in (("first norm", first_norm), ("second norm", second_norm)):
                hooks.after(norm, f"{name} (removed)", lambda args, kwargs, output: args[0])


def _sums(block: Any, attention: Any, second_norm: Any, mlp: Any, edit: Edit, hooks: HookSet) -> None:
    """Both sums formed anew: Z before the second norm, Y after the block."""
    seen: dict[str, Tensor] = {}

    def attention_skip(args: Args, kwargs: Kwargs) -> Args:
        seen["Z"] = _add(edit, seen.pop("X"), seen.pop("A"), "residual")
        return (seen["Z"],)

    def mlp_skip(args: Args, kwargs: Kwargs, output: Tensor) -> Tensor:
        return _add(edit, seen.pop("Z"), seen.pop("F"), "ffn")

    hooks.keep(block, 0, "block input", seen, "X")
    hooks.keep(attention, None, "attention output", seen, "A")
    hooks.before(second_norm, "attention skip", attention_skip)
    hooks.keep(mlp, None, "mlp output", seen, "F")
    hooks.after(block, "mlp skip", mlp_skip)


def _add(edit: Edit, X: Tensor, O: Tensor, site: str) -> Tensor:
    """The sum at one skip: lam*X + O where lambda acts at `site`, else X + O."""
    return edit.add(X, O) if edit.skip_site in (site, "both") else edit.sum(1.0, X, O)
