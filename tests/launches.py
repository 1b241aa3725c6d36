"""What a GPU would start a kernel for, counted as torch dispatches it on tensors of any device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = {
    "view", "_unsafe_view", "t", "transpose", "select", "slice", "expand", "unsqueeze", "squeeze", "detach", "alias", "permute",
    "as_strided", "split_with_sizes", "split", "unbind", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
    "scalar_tensor",  # a number on the CPU
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Operations by name, but those that make a view or room; none while `paused`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += not (self.paused or name in NO_LAUNCH)
        return func(*args, **(kwargs or {}))
