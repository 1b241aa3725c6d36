"""Post-norm blocks, LayerNorm(X + O): one such sum in S4D, in ALBERT and BERT one for attention and one for the feed-forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lscollapse.models.adapters.adapter import Adapter, UnsupportedModel
from lscollapse.models.adapters.edit import Args, Edit, HookSet, Kwargs
from lscollapse.models.numerics.carried import Carried


def edit_sum(
    name: str, edit: Edit, hooks: HookSet, scaled: bool, norm: Any, skip: tuple[Any, int | None], mechanism: Any
) -> None:
    """Make of one LayerNorm(X + O) inside a block LayerNorm(lam*X + O), or the same without the norm.

    Args:
        scaled: whether lambda acts on this sum; else it is left as it is.
        norm: the module of the LayerNorm.
        skip: a module, and which of its positional arguments is X; None where X is (the first of) its output.
        mechanism: the module whose output is O.
    """
    seen: dict[str, Tensor] = {}

    def replace_sum(args: Args, kwargs: Kwargs) -> Args:
        X, O = seen.pop("X"), seen.pop("O")
        if not edit.removes_norm("block"):
            edit.carried = Carried(X)  # of this sum alone: the norm that follows does not see its scale
        return (edit.add(X, O),)

    if scaled:
        hooks.before(norm, f"{name} skip", replace_sum)
        hooks.keep(*skip, f"{name} input", seen, "X")
        hooks.keep(mechanism, None, f"{name} mechanism", seen, "O")
    if edit.removes_norm("block"):
        hooks.after(norm, f"{name} norm (removed)", lambda args, kwargs, output: args[0])


class PostNormAdapter(Adapter):
    """What ALBERT and BERT share: skip_site `residual` is the attention's skip, `ffn` the feed-forward part's."""

    skip_sites = ("residual", "ffn", "both")
    norm_sites = ("both", "block")

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        Y: Tensor = self.block(layer)(X, self.mask(X))  # (B, N, d)
        return Y

    def mask(self, X: Tensor) -> Any:
        """The attention mask, as the model makes it for excerpts without padding; None where it needs none."""
        return None

    @abstractmethod
    def sums(self, block: Any) -> Iterator[tuple[Any, tuple[Any, int | None], Any]]:
        """`norm`, `skip` and `mechanism` of `edit_sum`: of the attention, then of the feed-forward part."""

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if self.config.chunk_size_feed_forward:
            raise UnsupportedModel(
                "chunk_size_feed_forward is set: set it to 0, the edited sum needs the whole sequence"
            )
        named = (("attention", "residual"), ("ffn", "ffn"))
        for (name, site), parts in zip(named, self.sums(block), strict=True):
            edit_sum(name, edit, hooks, edit.changes_sum and edit.skip_site in (site, "both"), *parts)
