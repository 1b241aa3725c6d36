"""Own kernels on a card that nobody measured: compared with float64 before they are used, so that they are right or not used.

Two excerpts through what lies between the products of a block, and one product of 2,560 terms: a second, once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from lscollapse.core.allocation import is_out_of_memory
from lscollapse.models.kernels.mamba2_block import Mamba2Shape
from lscollapse.models.kernels.reference import TOLERANCE, block_weights, plain_mixer, relative_error

SHAPE = Mamba2Shape(256, heads=4, head_dim=64, state=128)
N_TOKENS = 128
PRODUCT = (256, 2560, 256)  # m, k, n


def launching_at(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current GPU, wherever its tensors are: while open that is the one of this tensor."""
    device: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]  # of torch
    return device


def faults(own: ModuleType, device: torch.device, split: bool) -> dict[str, str]:
    """What of `own`, a module as fused.py, is not right on this device: `mixer` or `product` -> why, for the user.

    Raises:
        Exception: the device has no room for the few MB that this takes (`is_out_of_memory`).
    """
    checks: dict[str, Callable[[], float]] = {"mixer": lambda: _mixer(own, device)}
    if split:
        checks["product"] = lambda: _product(own, device)
    with launching_at(torch.empty(0, device=device)):
        said = {name: fault(f"the package's {name} kernels", error, TOLERANCE[name]) for name, error in checks.items()}
    return {name: why for name, why in said.items() if why}


def fault(kernels: str, error: Callable[[], float], tolerance: float) -> str:
    """Why kernels of this name are not to be used, given how to find out by how much they are off; empty where they are right.

    Raises:
        Exception: as `faults`.
    """
    try:
        off = error()
    except Exception as failure:  # of a compiler, a driver or a launch: whatever it is, the kernels cannot be used
        if is_out_of_memory(failure):
            raise
        line = " ".join(str(failure).split())[:200]
        return f"{kernels} do not run here ({type(failure).__name__}: {line}): torch operations run instead"
    if off <= tolerance:  # nor a NaN
        return ""
    return f"{kernels} are off by {off:.0e} here, {tolerance:.0e} is allowed: torch operations run instead"


def _normal(device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


def mixed(own: ModuleType, weights: dict[str, Tensor], s: Mamba2Shape, projected: Tensor) -> Tensor:
    """Convolution, scan, gate and norm by own kernels: projected (B, N, inner + conv_dim + heads) -> (B, N, inner)."""
    taps = weights["mixer.conv1d.weight"].flatten(1).T.contiguous().T
    A, D, dt_bias = -weights["mixer.A_log"].exp(), weights["mixer.D"], weights["mixer.dt_bias"]
    y = own.scan(projected, s, A, D, dt_bias, taps, weights["mixer.conv1d.bias"])
    norm = weights["mixer.norm.weight"]
    return torch.as_tensor(own.rows(y, projected[..., : s.inner], norm, s.eps, s.groups, torch.float32))


def _mixer(own: ModuleType, device: torch.device) -> float:
    """Error of `mixed`, and of 3 X - 0.5 O with it for one excerpt and O for another."""
    s, w = SHAPE, block_weights(SHAPE, torch.Generator().manual_seed(0), device)
    projected, X = _normal(device, (2, N_TOKENS, s.inner + s.conv_dim + s.heads), (2, N_TOKENS, s.inner))
    exact, O = plain_mixer(w, s, projected), mixed(own, w, s, projected)
    skips, scales = torch.tensor([[3.0, 0.0], [-0.5, 1.0]], device=device)
    Y = own.combine(X, O, skips, scales)
    skips, scales = skips[:, None, None].double(), scales[:, None, None].double()
    return max(relative_error(O, exact), relative_error(Y, skips * X + scales * exact), key=order)


def _product(own: ModuleType, device: torch.device) -> float:
    """The largest error with weights of each dtype."""
    m, k, n = PRODUCT
    X, W = _normal(device, (m, k), (n, k))
    errors = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = W.to(dtype)
        exact = X.double() @ weight.double().T
        errors.append(relative_error(own.product(own.split(X), own.Weight.of(weight)), exact))
    return max(errors, key=order)


def order(error: float) -> float:
    """For `max`: a NaN is the largest."""
    return float("inf") if error != error else error
