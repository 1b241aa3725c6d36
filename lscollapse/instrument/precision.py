"""A model in another dtype, and the dtype that its operations then really compute in.

The float64 copy of a model computes in float64 whatever its modules ask for (models/numerics/widened.py), with constants
made anew in float64. Whether all of it does is found out by a probe, which watches what each operation takes and gives.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lscollapse.core import allocation
from lscollapse.models.adapt import adapt
from lscollapse.models.adapters.adapter import Adapter
from lscollapse.models.numerics.widened import computing_in

SHARE = 0.8  # of free memory that a copy of the model may take
SAME = 1e-5  # how far a constant computed in float64 may be from the one computed in float32, relative


def converted(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter of a copy of the model in `dtype`, the same at every call while the weights are the same.

    What has that dtype already is shared with the model, not copied.
    """
    weights = [(id(tensor), tensor._version) for tensor in (*adapter.model.parameters(), *adapter.model.buffers())]
    made_of, copied = _copies.get(adapter, {}).get(dtype, (None, None))
    if copied is None or made_of != weights:
        copied = _copy(adapter, dtype)
        _copies.setdefault(adapter, {})[dtype] = weights, copied
    return copied


_copies: WeakKeyDictionary[Adapter, dict[torch.dtype, tuple[list[tuple[int, int]], Adapter]]] = WeakKeyDictionary()


def _copy(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    shared = {id(p): p for p in adapter.model.parameters() if p.dtype == dtype}
    model = copy.deepcopy(adapter.model, shared).to(dtype)
    if dtype == torch.float64:
        with torch.no_grad(), computing_in(dtype):
            _compute_constants(model)
    return adapt(model)


def fits(adapter: Adapter, dtype: torch.dtype, processes: int = 1) -> bool:
    """Whether there is memory for the model in `dtype`, beside itself, in each of so many processes."""
    if adapter.has_own_blocks or adapter.dtype == dtype:  # converted one layer at a time, or not at all
        return True
    on_gpu = adapter.device.type == "cuda"
    free: int = torch.cuda.mem_get_info(adapter.device)[0] if on_gpu else allocation.available_memory()
    needed: int = sum(p.numel() for p in adapter.model.parameters()) * dtype.itemsize
    return processes * needed < SHARE * free


def computed_in(adapter: Adapter, ids: Tensor) -> torch.dtype:
    """The narrowest dtype that any operation of a pass over `ids` takes or gives numbers in; which ids they are decides nothing."""
    seen = _seen.setdefault(adapter, {})
    if ids.shape not in seen:
        seen[ids.shape] = _narrowest(adapter, ids)
    return seen[ids.shape]


_seen: WeakKeyDictionary[Adapter, dict[torch.Size, torch.dtype]] = WeakKeyDictionary()


def _narrowest(adapter: Adapter, ids: Tensor) -> torch.dtype:
    watch = _Watch()
    with torch.no_grad(), watch:
        X = adapter.embed(ids)  # (B, N) -> (B, N, d)
        for layer in range(adapter.n_layers):
            X = adapter.run(layer, X)
    return watch.narrowest


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
    """Notes the dtype of what every operation takes and returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.narrowest: torch.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, output)):
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                part = value.dtype.to_real()
                if torch.finfo(part).eps > torch.finfo(self.narrowest).eps:
                    self.narrowest = part
        return output


def _compute_constants(model: Any) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, the scale of an embedding), anew as transformers makes them.

    One that comes out as another number than it was, rounding aside, was set by someone, and is kept.
    """

    from transformers import PreTrainedModel  # not above, as in models/adapt.py
    from transformers.initialization import guard_torch_init_functions

    def visit(owner: Any, module: nn.Module) -> None:
        constants = {name: b for name, b in module.named_buffers(recurse=False) if b.is_floating_point()}
        held = module.state_dict(keep_vars=True)
        constants = {name: b for name, b in constants.items() if name not in held}
        if owner is not None and constants:
            _initialise(owner, module, constants)
        for child in module.children():
            visit(child if isinstance(child, PreTrainedModel) else owner, child)

    with guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        visit(model if isinstance(model, PreTrainedModel) else None, model)


def _initialise(owner: Any, module: nn.Module, constants: dict[str, Tensor]) -> None:
    """Let `owner` initialise the constants of a module and nothing else; transformers leaves alone what bears its mark."""
    mark = "_is_hf_initialized"
    before = {name: constant.clone() for name, constant in constants.items()}
    for constant in constants.values():
        vars(constant).pop(mark, None)
    kept = [t for t in (*module.parameters(), *module.buffers()) if not any(t is c for c in constants.values())]
    marked = [t for t in kept if not getattr(t, mark, False)]
    for tensor in marked:
        setattr(tensor, mark, True)
    try:
        owner._init_weights(module)
    finally:
        for tensor in marked:
            delattr(tensor, mark)
    for name, old in before.items():
        new = getattr(module, name)
        if new.shape != old.shape or not torch.allclose(new, old, rtol=SAME, atol=0.0, equal_nan=True):
            setattr(module, name, old)
