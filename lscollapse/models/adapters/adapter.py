"""What the rest of the package knows of a model: an embedding, a stack of blocks, and where a block adds its skip.

An adapter wraps a loaded transformers model and owns nothing of its own: `block(k)` are the model's modules, so that hooks
on them act on any forward of the model. One file per architecture subclasses `Adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lscollapse.models.adapters.objective import class_with_head, fills_masks
from lscollapse.models.checkpoints.refusals import token_embedding
from lscollapse.models.numerics.carried import Carried, lose_unsquarable


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
    """A transformers model as embed -> blocks 0..K-1 (-> head, which only quality.py and gradients.py use).

    Class attributes:
        has_gate: whether the mixer has a multiplicative gate that `gating=False` can remove; None where that is not known.
        skip_sites: where lambda can act, the default first.
        norm_sites: which norms `layernorm=False` can remove, the default first.
        knows_sites: False where only the first skip is known: the block may have other skips and norms, which no edit reaches.
        pre_norm: the block adds O = mixer(norm(X)) to X and no norm follows, so O does not depend on the scale of X.

    Attributes:
        model: the base model.
        whole: the model as it came, with its head if it has one.
    """

    has_gate: ClassVar[bool | None] = False
    skip_sites: ClassVar[tuple[str, ...]] = ("residual",)
    norm_sites: ClassVar[tuple[str, ...]] = ("both",)
    knows_sites: ClassVar[bool] = True
    pre_norm: ClassVar[bool] = False
    whole: Any = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config

    @property
    @abstractmethod
    def n_layers(self) -> int: ...

    @abstractmethod
    def block(self, layer: int) -> Any:
        """The module that computes layer `layer` (0-based); the same module for several layers where weights are shared."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, N) -> the input of the first block (B, N, d)."""

    @abstractmethod
    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        """Output of block `layer` for its input X, (B, N, d) -> (B, N, d), as the untouched forward calls it.

        Args:
            handed: one dict for each arm, empty before layer 0: what its blocks hand to later ones beside X. Needed where
                several arms are run by turns; without it all calls since the last `embed` are one arm's.
        """

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
        return self.config.vocab_size

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
        """Whether the model fills in masked tokens instead of predicting the next one."""
        return fills_masks(self.config, self.whole)

    @property
    def head_class(self) -> str | None:
        """transformers' class with the head that the model would be scored by, None where there is none."""
        return class_with_head(self.config, self.whole)

    @property
    def head(self) -> Head | Scores | None:
        """The language-model head, None where the model came without one."""
        output: Any = getattr(self.whole, "get_output_embeddings", lambda: None)()
        transform = None if output is None else self.before_output()
        return None if transform is None else Head(transform, output.weight, output.bias)

    def before_output(self) -> nn.Module | None:
        """`Head.transform`, from the modules of `model` and of a `whole` with a head."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; where they differ the narrowest, which is as good as what they compute."""
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def backend(self) -> str:
        """What computes the blocks, for the record."""
        return "transformers"

    @property
    def native(self) -> bool:
        """Whether the package computes the blocks itself (`native_block`), in any dtype, instead of the model's modules."""
        return False

    def native_block(self, layer: int, dtype: torch.dtype) -> NativeBlock:
        """The package's own computation of block `layer` in `dtype`; only where `native`."""
        raise UnsupportedModel(f"{self.config.model_type} has no blocks of the package's own")

    @property
    def bounded_mixer(self) -> bool:
        """Whether the weights alone bound the mixer's output (see certify.py)."""
        return False

    def mixer_bound(self, layer: int, spectral_bound: Callable[[Tensor], float]) -> float:
        """An upper bound of the norm of every row of O of block `layer`; only where `bounded_mixer`."""
        raise UnsupportedModel(f"the weights of {self.config.model_type} do not bound its mixer")

    def layers_of(self, block: Any) -> list[int]:
        """The layers that `block` computes, in the order of its calls within one forward."""
        return [layer for layer in range(self.n_layers) if self.block(layer) is block]


class NativeBlock(Protocol):
    """A block as a function that computes a variant directly, without hooks; arguments as in variants.Variant."""

    def __call__(
        self,
        X: Tensor,
        *,
        lam: float,
        gating: bool,
        layernorm: bool,
        skip_site: str,
        norm_site: str,
        skip: float | Tensor | None = None,
        o_scale: float | Tensor = 1.0,
    ) -> Tensor: ...


@dataclass
class Edit:
    """What a block should compute instead of what it is.

    Attributes:
        lam: the lambda of the layer that the current call of the block stands for.
        changes_sum: the block's own X + O must become lam*X + O, formed anew.
        changes_mixer: lam*V must be added to the scan output (skip_site `mixer`).
        carried: the scale that X is carried in (see carried.py); None where it is in its own.
    """

    lam: Callable[[], float]
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

    def sum(self, lam: float, X: Tensor, O: Tensor) -> Tensor:
        """lam*X + O, formed from X and O so that lam = 0 is exactly O; infinite where it is not carried and no norm can take it."""
        if self.carried is not None:
            return self.carried.add(lam, X, O)
        Y = O.to(torch.promote_types(X.dtype, O.dtype)) if lam == 0.0 else lam * X + O
        return lose_unsquarable(Y) if self.layernorm and Y.ndim == 3 else Y


class HookSet:
    """Registers hooks on modules, counts how often each fires, and removes every one."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._handles: list[Any] = []
        self._restores: list[Callable[[], None]] = []

    def before(self, module: Any, name: str, function: Callable[[tuple, dict], tuple | None]) -> None:
        """`function(args, kwargs)` runs before `module`; it may return new positional arguments."""
        self.counts[name] = 0

        def hook(_module: Any, args: tuple, kwargs: dict) -> tuple | None:
            self.counts[name] += 1
            replaced = function(args, kwargs)
            return None if replaced is None else (replaced, kwargs)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: Any, name: str, function: Callable[[tuple, dict, Any], Any]) -> None:
        """`function(args, kwargs, output)` runs after `module`; what it returns (unless None) replaces the output."""
        self.counts[name] = 0

        def hook(_module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            self.counts[name] += 1
            return function(args, kwargs, output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_exit(self, restore: Callable[[], None]) -> None:
        self._restores.append(restore)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for restore in self._restores:
            restore()
        self._handles.clear()
        self._restores.clear()
