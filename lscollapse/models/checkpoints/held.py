"""A Mamba-2 as what it is made of: the modules of transformers hold its tensors only once somebody asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lscollapse.models.checkpoints.architectures import on_meta


class HeldMamba2(nn.Module):
    """The parameters of transformers' Mamba2Model under their names, in modules that cannot compute.

    The package's own blocks need no more (models/kernels/), and transformers' modelling code takes longer to import than a
    small model to measure.

    Attributes:
        config: Mamba2Settings, or transformers' Mamba2Config.
        embeddings, layers, norm_f: as there.
    """

    def __init__(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.embeddings, self.norm_f, self.layers = _Part(), _Part(), nn.ModuleList()
        self.layers.extend(_Part() for _ in range(config.num_hidden_layers))
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, _Part())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(tensor))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def modules_of_transformers(self) -> Any:
        """The Mamba2Model of these parameters, which it shares."""
        model = on_meta(self.config)
        model.load_state_dict(self.state_dict(), assign=True)
        return model.train(self.training)


class _Part(nn.Module):
    """What holds parameters. Called with token ids, one of an embedding looks them up."""

    weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)  # (B, N) -> (B, N, d)


def with_modules(model: Any) -> Any:
    """The model as transformers has it, of which parameters may be held without their modules."""
    return model.modules_of_transformers() if isinstance(model, HeldMamba2) else model
