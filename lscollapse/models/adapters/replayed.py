"""Blocks called as the model's own forward calls them: masks, positions and rotary embeddings are recorded from it.

What blocks hand to later ones beside X is kept for each arm (one variant of a model), because `measure` computes a
layer of every arm before it goes on to the next layer. A block can hand something on in two ways that are seen here: by
its further outputs, which the model gives to later blocks, and by a container (a dict or list) that it fills. Any other
way, such as an attribute of a module, is found by the test of `ReplayedAdapter.embed`, and the model is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lscollapse.models.adapters.adapter import Adapter, UnsupportedModel
from lscollapse.models.adapters.edit import Args, Edit, HookSet, Kwargs, edited, first_of
from lscollapse.models.adapters.trial import failures_as, relative_difference, rounding

REPLAYED = (1.0, 0.5, -0.5)  # lambdas of the arms that the test replays


@dataclass(frozen=True)
class Call:
    """One call of a block within a forward of the model; the first argument is the block's input X."""

    block: Any
    args: Args
    kwargs: Kwargs
    output: Any

    @property
    def X(self) -> Any:
        return first_argument(self.args, self.kwargs)

    @property
    def Y(self) -> Any:
        return first_of(self.output)

    @property
    def others(self) -> tuple[Args, Kwargs]:
        """The arguments but X."""
        return self.args[1:], self.kwargs if self.args else dict(list(self.kwargs.items())[1:])

    def again(self, X: Tensor, others: tuple[Args, Kwargs]) -> Any:
        """What the block returns for another input and other arguments."""
        args, kwargs = others
        return self.block(X, *args, **kwargs) if self.args else self.block(**{next(iter(self.kwargs)): X}, **kwargs)


@dataclass
class Recording:
    """The calls of the blocks in one forward, in order.

    Attributes:
        containers: every container among the arguments, by its id: as it was before the first block got it, and itself.
    """

    calls: list[Call] = field(default_factory=list)
    containers: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def note(self, value: Any) -> None:
        """Keep a copy of every container in `value`."""
        if _is_container(value) and id(value) not in self.containers:
            self.containers[id(value)] = copy.copy(value), value
        for part in _parts(value):
            self.note(part)

    def given(self) -> set[int]:
        """The ids of all tensors that blocks are given beside X."""
        return {id(tensor) for call in self.calls for tensor in _tensors(call.others)}


def first_argument(args: Args, kwargs: Kwargs) -> Any:
    """The first argument of a call, which of a block is its input X; None where there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def uncached(model: Any, ids: Tensor) -> Any:
    """The model's own forward without a cache: a block called again would go on where its first call left the cache."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        return model(ids, use_cache=False)
    setting = getattr(model.config, "use_cache", None)
    if setting is None:
        return model(ids)
    model.config.use_cache = False  # of wrappers that hand their arguments on
    try:
        return model(ids)
    finally:
        model.config.use_cache = setting


@contextmanager
def forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute `forward` instead of its own, which is put back on exit."""
    before = vars(module).get("forward")  # None where the class's method is what runs
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def record(blocks: Iterable[Any], forward: Callable[[], Any], compute: bool) -> Recording:
    """The calls of `blocks` in one `forward` of their model, in order.

    Args:
        compute: False hands each block's input on as its output, so that only what lies around the blocks is computed.
    """
    recording = Recording()

    def noted(block: Any, untouched: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            recording.note((*args, *kwargs.values()))
            output = untouched(*args, **kwargs) if compute else first_argument(args, kwargs)
            recording.calls.append(Call(block, args, kwargs, output))
            return output

        return called

    with ExitStack() as stack:
        for block in {id(block): block for block in blocks}.values():
            stack.enter_context(forward_of(block, noted(block, block.forward)))
        forward()
    return recording


class ReplayedAdapter(Adapter):
    """`run` gives block k the arguments that the model's own forward gave it for the ids of the last `embed`.

    The first `embed` tests this on the first tokens that it is given: the arms of REPLAYED, layer by layer as `measure`
    runs them, against whole forwards of the model with the same edits. Of an architecture that is known, by which way a
    block hands something on does not depend on how many tokens there are, and a whole excerpt costs as much as six
    forwards of it.

    Class attributes:
        tried: how many tokens of the first excerpt that is; None where it cannot be cut.
    """

    any_batch = False
    tried: ClassVar[int | None] = 16

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._tested = False
        self._take(Recording())

    def forward(self, ids: Tensor) -> Any:
        return uncached(self.model, ids)

    def recorded(self, ids: Tensor) -> Recording:
        """The calls of the blocks for these ids; here the blocks hand on nothing but X, so they are not computed."""
        return record(self.blocks, lambda: self.forward(ids), compute=False)

    def embed(self, ids: Tensor) -> Tensor:
        if not (self._tested or self.model.training):
            with torch.no_grad(), failures_as(self._not_by_layers):
                self._test_replay(ids[:1, : self.tried])
            self._tested = True
        self._take(self.recorded(ids))
        X: Tensor = self.calls[0].X  # (B, N, d)
        return X

    def run(self, layer: int, X: Tensor, handed: dict[int, Any] | None = None) -> Tensor:
        call, handed = self.calls[layer], self._alone if handed is None else handed
        args, kwargs = call.others
        args = tuple(self._of_arm(value, handed) for value in args)
        output = call.again(X, (args, {name: self._of_arm(value, handed) for name, value in kwargs.items()}))
        for recorded, computed in zip(_tensors(call.output), _tensors(output), strict=False):
            if id(recorded) in self._given:
                handed[id(recorded)] = computed
        Y: Tensor = first_of(output)  # (B, N, d)
        return Y

    @property
    def hands_on(self) -> bool:
        """Whether blocks hand on numbers, no mere choice of tokens, beside X for the ids of the last `embed`."""
        tensors = [part for call in self.calls for part in _tensors(call.output) if id(part) in self._given]
        for filled in self._filled():
            tensors += _tensors(filled)
        return any(tensor.is_floating_point() for tensor in tensors)

    def _take(self, recording: Recording) -> None:
        self._recording, self.calls, self._given = recording, recording.calls, recording.given()
        self._alone: dict[int, Any] = {}  # of an arm that runs by itself

    def _of_arm(self, value: Any, handed: dict[int, Any]) -> Any:
        """An argument of a block as one arm has it: the arm's outputs and containers in place of the recorded ones."""
        if isinstance(value, Tensor):
            return handed.get(id(value), value)
        if type(value) is tuple:
            return tuple(self._of_arm(part, handed) for part in value)
        if not _is_container(value):
            return value
        if id(value) not in handed:
            fresh = handed[id(value)] = copy.copy(self._recording.containers[id(value)][0])
            for key in list(fresh) if isinstance(fresh, MutableMapping) else range(len(fresh)):
                fresh[key] = self._of_arm(fresh[key], handed)
        return handed[id(value)]

    def _filled(self) -> Iterator[Any]:
        """The containers that the blocks have changed."""
        for before, container in self._recording.containers.values():
            if [*map(id, _parts(before))] != [*map(id, _parts(container))]:
                yield container

    def _test_replay(self, ids: Tensor) -> None:
        """Raise unless every block of every arm gives what it gives in a whole forward for the same input."""
        expected = [self._outputs(ids, lam) for lam in REPLAYED]
        self._take(self.recorded(ids))
        arms: list[dict[int, Any]] = [{} for _ in REPLAYED]
        inputs = [self.calls[0].X] * len(REPLAYED)
        for layer in range(self.n_layers):
            for arm, lam in enumerate(REPLAYED):
                with edited(self.install, [self.block(layer)], self._with(lam)):
                    output = self.run(layer, inputs[arm], arms[arm])
                inputs[arm] = expected[arm][layer]
                self._compare(output, inputs[arm], layer, lam)

    def _compare(self, output: Tensor, expected: Tensor, layer: int, lam: float) -> None:
        if not torch.isfinite(expected).all():
            return  # values that left the dtype get their status in the rows
        difference = relative_difference(output, expected)
        if not difference <= rounding(expected.dtype):
            what = f"{type(self.block(layer)).__name__} {layer + 1}"
            raise self._not_by_layers(
                f"with lambda = {lam:g} {what} is off by {difference:.1e} from a whole forward, so that it gets something"
                " else from earlier blocks than their outputs"
            )

    def _not_by_layers(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.config.model_type} cannot be measured layer by layer: {why}")

    def _outputs(self, ids: Tensor, lam: float) -> list[Tensor]:
        """The output of every block in a whole forward with lambda in all of them."""
        seen: list[Tensor] = []
        with edited(self.install, self.distinct_blocks, self._with(lam)) as installed:
            for block, hooks in zip(self.distinct_blocks, installed, strict=True):
                hooks.after(block, "output", lambda args, kwargs, output: seen.append(first_of(output)))
            self.forward(ids)
        return seen

    def _with(self, lam: float) -> Callable[[Any, HookSet], Edit]:
        """The edit of `surgery` for one lambda in all layers, at the adapter's first sites."""
        edit = Edit(lambda: lam, lam != 1.0, False, True, True, self.skip_sites[0], self.norm_sites[0])
        return lambda block, hooks: edit


def _is_container(value: Any) -> bool:
    return isinstance(value, MutableMapping | MutableSequence)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, MutableMapping):
        return list(value.values())
    return list(value) if isinstance(value, MutableSequence | tuple) else []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value):
        yield from _tensors(part)
