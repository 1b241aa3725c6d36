"""Any other architecture of transformers: the repeated block and its residual sum are found, and the finding is tested.

The blocks are the longest list of modules that lies in no other list. A residual sum is the one addition in its forward
that has the block's own input X as an operand; the other operand is O (in a block with two skips that is the mixer's:
lambda acts there, as at skip_site `residual` elsewhere). Lambda replaces this sum by lam*X + O. Gate, norms and other
skips are not known, so they are not switched. The scores of the vocabulary are those of the model's own forward
(own_head.py).

What is tested, on a few made-up tokens when the adapter is made and on the first ids that it embeds:
    the blocks follow one another, each taking what the one before gave, (excerpts, tokens, width);
    in every block there is exactly one such sum;
    with lambda = 1 formed anew, the block's output is what it was, to rounding;
    with lambda = 0 the sum is O bit for bit, and the block's output is another.
And on the first of those ids alone, for three lambdas layer by layer: that replayed blocks give what they give in a
whole forward (replayed.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lscollapse.models.adapters.adapter import UnsupportedModel
from lscollapse.models.adapters.edit import Args, Edit, HookSet, Kwargs
from lscollapse.models.adapters.own_head import OwnHead
from lscollapse.models.adapters.replayed import Recording, ReplayedAdapter, first_argument, forward_of, record
from lscollapse.models.adapters.trial import failures_as, relative_difference, rounding

ADDITIONS = (Tensor.add, Tensor.add_, torch.add)
CASTS = (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half)
# What torch's complaints of dtypes say.
ABOUT_DTYPES = re.compile(r"dtype|scalar type|converted to type |\b(Float|Float32|Float16|BFloat16|Double|Half)\b")
PROBE = (2, 6)  # excerpts, tokens
BACKEND = "transformers, generic adapter"
Add = Callable[[Tensor, Tensor], Tensor]


class GenericAdapter(ReplayedAdapter):
    """Raises UnsupportedModel with the reason where a test fails. Of an encoder-decoder model it is the encoder."""

    has_gate = None
    knows_sites = False
    engine = BACKEND
    tried = None

    def __init__(self, model: Any) -> None:
        self._is_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
        if self._is_encoder:
            model = model.get_encoder()
        if model.training:
            raise UnsupportedModel(
                "the model is in training mode, where its forward is random: call model.eval() first"
            )
        super().__init__(model)
        self._list = _stack(model)
        self._sums_tested = False
        self._own_head: OwnHead | None = None
        self._blocks = [call.block for call in self._tested_calls(self._probe).calls]

    @property
    def blocks(self) -> list[Any]:
        return self._blocks

    @property
    def vocabulary(self) -> int:
        size = getattr(self.config, "vocab_size", None)
        if size is None:
            raise self._unsupported("it reads no tokens: its config has no vocab_size")
        return int(size)

    @property
    def head(self) -> OwnHead | None:
        """The model's own way to its scores, None where it came without a head for its objective.

        Raises:
            UnsupportedModel: more than the last block's output decides the scores.
        """
        whole = self.whole
        output = getattr(whole, "get_output_embeddings", lambda: None)()
        if output is None or self.head_class is None:
            return None
        if self._own_head is None or self._own_head.whole is not whole:
            self._own_head = OwnHead(whole, self.blocks, self._probe)
        return self._own_head

    @property
    def head_class(self) -> str | None:
        return None if self._is_encoder else super().head_class

    @property
    def _probe(self) -> Tensor:
        batch, tokens = PROBE
        return torch.arange(batch * tokens, device=self.device).view(batch, tokens) % self.vocabulary

    def embed(self, ids: Tensor) -> Tensor:
        if not self._sums_tested:
            self._tested_calls(ids)
            self._sums_tested = True
        return super().embed(ids)

    def recorded(self, ids: Tensor) -> Recording:
        return record(self._list, lambda: self.forward(ids), compute=True)

    def install(self, block: Any, edit: Edit, hooks: HookSet) -> None:
        if not edit.changes_sum:
            return
        name = "residual sum"
        hooks.counts[name] = 0

        def add(X: Tensor, O: Tensor) -> Tensor:
            hooks.counts[name] += 1
            return edit.add(X, O)

        stack = ExitStack()
        hooks.on_exit(stack.close)
        stack.enter_context(_replaced_sum(block, add))

    def _tested_calls(self, ids: Tensor) -> Recording:
        """The calls of the blocks in a forward on ids, every one of them tested."""
        with torch.no_grad(), failures_as(self._fails):
            recording = self.recorded(ids)
            self._take(recording)
            self._test_chain(ids)
            handed: dict[int, Any] = {}
            for layer in range(len(self.calls)):
                self._test_sum(layer, handed)
        return recording

    def _test_chain(self, ids: Tensor) -> None:
        if len(self.calls) < 2:
            raise self._unsupported("it has no list of modules that its forward calls one after the other")
        Y = None
        for number, call in enumerate(self.calls, 1):
            X, what = call.X, type(call.block).__name__
            if not isinstance(X, Tensor) or X.ndim != 3 or X.shape[:2] != ids.shape:
                came = tuple(X.shape) if isinstance(X, Tensor) else type(X).__name__
                raise self._unsupported(f"{what} {number} takes {came}, not (excerpts, tokens, width)")
            if Y is not None and not (isinstance(Y, Tensor) and X.shape == Y.shape and bool((X == Y).all())):
                raise self._unsupported(f"something happens to X between {what} {number - 1} and {number}")
            if Y is not None and X.dtype != Y.dtype:
                raise self._wrong_dtype(f"{what} {number - 1} gives {_name(Y.dtype)}")
            Y = call.Y

    def _test_sum(self, layer: int, handed: dict[int, Any]) -> None:
        call = self.calls[layer]
        what = f"{type(call.block).__name__} {layer + 1}"
        seen: list[Tensor] = []
        casts: list[torch.dtype] = []

        def output(add: Add, handed: dict[int, Any]) -> Tensor:
            with _replaced_sum(call.block, add, casts):
                return self.run(layer, call.X, handed)

        def form_anew(X: Tensor, O: Tensor) -> Tensor:
            seen.append(O.clone())
            return 1.0 * X + O

        def drop_X(X: Tensor, O: Tensor) -> Tensor:
            seen.append(O.clone())
            return O

        before = {key: value if isinstance(value, Tensor) else copy.copy(value) for key, value in handed.items()}
        same = output(form_anew, handed)
        if not seen and casts:
            raise self._wrong_dtype(f"{what} adds its own input in {_name(casts[0])}")
        if len(seen) != 1:
            raise self._unsupported(f"{what} adds its own input to something {len(seen)} times, expected once")
        difference = relative_difference(same, call.Y)
        if not difference <= rounding(call.Y.dtype):
            raise self._unsupported(f"{what} formed anew with lambda = 1 is off by {difference:.1e}")
        dropped = output(drop_X, before)
        if not torch.equal(*seen) or torch.equal(dropped, call.Y):
            raise self._unsupported(f"lambda = 0 does not leave O in {what}: the sum found is not its residual")

    def _fails(self, why: str) -> UnsupportedModel:
        """What to say of an error in the model's forward on token ids."""
        if self.dtype != torch.float32 and ABOUT_DTYPES.search(why):
            return self._wrong_dtype(f"its forward fails: {why}")
        return self._unsupported(f"its forward on token ids fails: {why}")

    def _unsupported(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"no adapter for architecture {self.config.model_type!r}, and none is found: {why}")

    def _wrong_dtype(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.config.model_type} does not compute in {_name(self.dtype)} throughout: {why}; measure it in float32"
            " (--dtype float32, in Python model.float())"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stack(model: Any) -> list[Any]:
    """The longest of the lists of modules that lie in no other list."""
    lists: list[list[nn.Module]] = [[]]

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                lists.append(list(child))
            else:
                search(child)

    search(model)
    return max(lists, key=len)


@contextmanager
def _replaced_sum(block: Any, add: Add, casts: list[torch.dtype] | None = None) -> Iterator[None]:
    """While open, `block` computes add(X, O) where its forward adds its input X and something else of the same shape.

    Args:
        casts: gets the dtype of every sum with X converted to another dtype, which is left as it is.
    """
    untouched = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Sums(first_argument(args, kwargs), add, [] if casts is None else casts):
            return untouched(*args, **kwargs)

    with forward_of(block, forward):
        yield


class _Sums(TorchFunctionMode):
    """Sees every addition of torch tensors, and hands those of X to `add`."""

    def __init__(self, X: Tensor, add: Add, casts: list[torch.dtype]) -> None:
        super().__init__()
        self._X, self._add, self._casts = X, add, casts
        self._converted: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        if func in ADDITIONS and not kwargs and len(args) == 2:
            a, b = args
            self._casts += [X.dtype for X in self._converted if X is a or X is b]
            for X, O in ((a, b), (b, a)):
                if self._is_input(X) and isinstance(O, Tensor) and O.shape == X.shape and not self._is_input(O):
                    return self._add(X, O).contiguous()  # as X + O is; O alone may lie otherwise
        output = func(*args, **(kwargs or {}))
        if func in CASTS and self._is_input(args[0]) and output.dtype != self._X.dtype:
            self._converted.append(output)
        return output

    def _is_input(self, value: Any) -> bool:
        """X itself or another view of all of it, as (tokens, width) for example."""
        X = self._X
        if value is X:
            return True
        alike = isinstance(value, Tensor) and value.dtype == X.dtype and value.numel() == X.numel()
        return alike and value.data_ptr() == X.data_ptr()
