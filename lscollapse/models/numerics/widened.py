"""float64 that stays float64.

transformers' modules ask for float32 inside, whatever the dtype of the model: norms, rotary angles, softmax, Mamba's
scan. In a bfloat16 model that is a gain; in a float64 one it is float32 under another name. While
`computing_in(torch.float64)` is open, every such request is answered with float64, whichever module makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip
GROUPED = tuple(m.__dict__[name] for m, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if name in m.__dict__)
NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)


class _Widened(TorchFunctionMode):
    """Whoever asks torch for a narrower float gets float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in NARROWING:
            return args[0].to(torch.float64)
        if func in GROUPED and args[0].dtype == torch.float64:
            return _grouped_product(*args, **(kwargs or {}))
        wide = (WIDE[a] if isinstance(a, torch.dtype) and a in WIDE else a for a in args)
        named = {k: WIDE[a] if isinstance(a, torch.dtype) and a in WIDE else a for k, a in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def computing_in(dtype: torch.dtype | None) -> Iterator[None]:
    """While open, modules given float64 compute in float64 throughout; for any other dtype nothing changes."""
    if dtype != torch.float64:
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of tensors made from numbers
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(default)


def _grouped_product(X: Tensor, W: Tensor, *, offs: Tensor, bias: None = None, out_dtype: Any = None) -> Tensor:
    """torch's grouped_mm, which has no float64: rows offs[g-1]..offs[g] of X (M, n) times W[g] (n, k)."""
    ends = offs.tolist()
    parts = [X[start:end] @ w for start, end, w in zip([0, *ends[:-1]], ends, W, strict=True)]
    return torch.cat([*parts, X.new_zeros(len(X) - ends[-1], W.shape[-1])])
