"""What each skip of a block adds up: X and O of the mixer, then of the feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.adapters.edit import Edit, edited


@dataclass
class _Recorder(Edit):
    """An edit that changes nothing but lambda at the first skip, and keeps what each skip of the block adds up."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, X: Tensor, O: Tensor) -> Tensor:
        self.seen.append((X, O))
        return (self.lam() if len(self.seen) == 1 else 1.0) * X + O


def sublayers(
    adapter: Adapter, layer: int, X: Tensor, lam: float = 1.0, handed: dict[int, Any] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(X, O) of every skip of block `layer` for the block's input X (B, N, d): the mixer's, then the feed-forward's.

    lam acts on the first skip only (skip_site `residual`); handed as for `Adapter.run`. The model is left as it was.
    """
    site = "both" if "both" in adapter.skip_sites else "residual"
    edit = _Recorder(
        lambda: lam,
        changes_sum=True,
        changes_mixer=False,
        gating=True,
        layernorm=True,
        skip_site=site,
        norm_site="both",
    )
    with edited(adapter.install, [adapter.block(layer)], lambda block, hooks: edit), torch.no_grad():
        adapter.run(layer, X, handed)
    return edit.seen
