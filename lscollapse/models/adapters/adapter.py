"""What the rest of the package knows of a model: an embedding, a stack of blocks, and where a block adds its skip.

An adapter wraps a loaded transformers model and owns nothing of its own: `block(k)` are the model's modules, so that
hooks on them act on any forward of the model. One file per architecture subclasses `Adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lscollapse.models.adapters.edit import Edit, HookSet
from lscollapse.models.checkpoints.refusals import token_embedding
from lscollapse.models.kernels.mamba2_block import Mamba2Block


class UnsupportedModel(ValueError):
    """No adapter knows this architecture, or the model does not look as its architecture should."""


@dataclass(frozen=True)
class Head:
    """What makes scores of the vocabulary out of the last block's output X: transform(X) @ weight.T + bias.

    Attributes:
        transform: the final norm and what else stands before the output matrix, (..., d) -> (..., e).
        weight: (V, e), on any device and in any dtype.
        bias: (V,), or None.
        mapped: weight lies in a mapped file; what was used of it is to be forgotten (tensors.forget).
    """

    transform: nn.Module
    weight: Tensor
    bias: Tensor | None
    mapped: bool = False


class Scores(Protocol):
    """A head whose parts are not known (own_head.py)."""

    def scores(self, X: Tensor, ids: Tensor) -> Tensor:
        """(B, N, d) and the ids (B, N) that were embedded -> (B, N, V), in the dtype of X; differentiable in X."""


class Adapter(ABC):
    """A transformers model as embed -> blocks 0..K-1 (-> head, which only lm_loss.py and gradients.py use).

    Class attributes:
        stack: name within the base model of the list of its blocks, where there is one.
        final_norm: name of the norm between the last block and the output matrix, where nothing else stands there.
        has_gate: whether the mixer has a multiplicative gate that `gating=False` can remove; None where not known.
        skip_sites: where lambda can act, the default first.
        norm_sites: which norms `layernorm=False` can remove, the default first.
        knows_sites: False where only the first skip is known: no edit reaches other skips and norms that there may be.
        bounded_mixer: the weights alone bound the mixer's output (see early_exit.py).
        engine: what computes the blocks.
        any_batch: the blocks take any number of excerpts, not only as many as were embedded last.
        pre_norm: the block adds O = mixer(norm(X)) to X and no norm follows, so O does not depend on the scale of X.

    Attributes:
        model: the base model.
        whole: the model as it came, with its head if it has one.
    """

    stack: ClassVar[str] = "layers"
    final_norm: ClassVar[str] = ""
    has_gate: ClassVar[bool | None] = False
    skip_sites: ClassVar[tuple[str, ...]] = ("residual",)
    norm_sites: ClassVar[tuple[str, ...]] = ("both",)
    knows_sites: ClassVar[bool] = True
    bounded_mixer: ClassVar[bool] = False
    engine: ClassVar[str] = "transformers"
    any_batch: ClassVar[bool] = True
    pre_norm: ClassVar[bool] = False
    whole: Any = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config

    @property
    def blocks(self) -> list[Any]:
        """The module of every layer; the same module several times where weights are shared."""
        return list(self.model.get_submodule(self.stack))

    @property
    def distinct_blocks(self) -> list[Any]:
        """Every module of `blocks` once, in the order of the first layer that it computes."""
        return list({id(block): block for block in self.blocks}.values())

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def block(self, layer: int) -> Any:
        """The module that computes layer `layer` (0-based)."""
        return self.blocks[layer]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, N) -> the input of the first block (B, N, d)."""
        X: Tensor = self.model.embeddings(ids)  # (B, N, d)
        return X

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        """Output of block `layer` for its input X, (B, N, d) -> (B, N, d), as the untouched forward calls it.

        Args:
            handed: one dict for each arm, empty before layer 0: what its blocks hand to later ones beside X. Needed
                where several arms are run by turns; without it all calls since the last `embed` are one arm's.
        """
        Y: Tensor = self.block(layer)(X)  # (B, N, d)
        return Y

    @property
    def hands_on(self) -> bool:
        """Whether blocks hand numbers to later ones beside X, so that X^(k) alone does not decide what follows."""
        return False

    def forward(self, ids: Tensor) -> Any:
        """The model's own forward on the ids that `embed` takes."""
        return self.model(ids)

    @property
    def vocabulary(self) -> int:
        """How many ids there are, from 0 on."""
        return int(self.config.vocab_size)

    @property
    def embedding(self) -> tuple[str, Tensor] | None:
        """Name and matrix (V, e) of which a token id takes a row, where there is one."""
        return token_embedding(self.model)

    @property
    def longest(self) -> int | None:
        """The most tokens of an excerpt; None where the model sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @abstractmethod
    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        """Register on `hooks` everything that turns `block` into the edited block."""

    @property
    def masked(self) -> bool:
        """Whether the model fills in masked tokens instead of predicting the next one.

        By the class of the model as it came, else by the class its checkpoint was saved as, else by what transformers
        has for the architecture: of those that have both, such as BERT, a decoder predicts.
        """
        names = [kind.__name__ for kind in type(self.whole).__mro__]
        for name in names + list(getattr(self.config, "architectures", None) or []):
            if "MaskedLM" in name:
                return True
            if "CausalLM" in name or "LMHead" in name:
                return False
        predicts, fills = self._classes_with_head
        return fills is not None and (predicts is None or not getattr(self.config, "is_decoder", False))

    @property
    def head_class(self) -> str | None:
        """Name of transformers' class of this architecture with the head for its objective, None where there is none.

        None too where one class serves both objectives: which of them a checkpoint was trained for is then not known.
        """
        predicts, fills = self._classes_with_head
        if predicts == fills:
            return None
        return fills if self.masked else predicts

    @property
    def _classes_with_head(self) -> tuple[str | None, str | None]:
        """The classes of this architecture that predict the next token, and that fill in hidden ones."""
        from transformers.models.auto.modeling_auto import (  # not above, as in models/adapt.py
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )

        model_type = getattr(self.config, "model_type", "")
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type), MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)

    @property
    def head(self) -> Head | Scores | None:
        """The language-model head, None where the model came without one."""
        output: Any = getattr(self.whole, "get_output_embeddings", lambda: None)()
        transform = None if output is None else self.before_output()
        return None if transform is None else Head(transform, output.weight, output.bias)

    def before_output(self) -> nn.Module | None:
        """`Head.transform`, from the modules of `model` and of a `whole` with a head."""
        norm: nn.Module | None = self.model.get_submodule(self.final_norm) if self.final_norm else None
        return norm

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; where they differ the narrowest, since what they compute is no better than that."""
        return narrowest(self.model)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def backend(self, dtype: torch.dtype) -> str:
        """What computes the blocks of an arm in `dtype`, as the table records it; on a GPU with what float32 is there."""
        return self.engine if self.device.type == "cpu" else f"{self.engine}, ieee fp32"

    @property
    def has_own_blocks(self) -> bool:
        """Whether the package computes the blocks itself (`own_block`), in any dtype, not the model's modules."""
        return False

    def own_block(self, layer: int, dtype: torch.dtype) -> Mamba2Block:
        """The package's own computation of block `layer` in `dtype`; only where `has_own_blocks`."""
        raise UnsupportedModel(f"{self.config.model_type} has no blocks of the package's own")

    def mixer_bound(self, layer: int, spectral_bound: Callable[[Tensor], float]) -> float:
        """An upper bound of the norm of every row of O of block `layer`; only where `bounded_mixer`."""
        raise UnsupportedModel(f"the weights of {self.config.model_type} do not bound its mixer")

    def layers_of(self, block: Any) -> list[int]:
        """The layers that `block` computes, in the order of its calls within one forward."""
        return [layer for layer, module in enumerate(self.blocks) if module is block]


def narrowest(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights, of several the one with the fewest digits."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
