"""Certified early exit: where the weights prove that the remaining layers cannot change what is measured.

In a pre-norm net with a norm before out_proj, every row of O = mixer(norm(X)) is bounded by the weights alone,
||O_i|| <= G := sqrt(d_inner) * ||W_out diag(w_norm)||_2 (+ ||bias||), whatever the input, the scan and the gate do. With
X_{k+1} = lam_k X_k + O_k, the rest of the net maps X_k to (lam_k ... lam_{K-1}) (X_k + E), where every row of E has

    ||E_i|| <= e_k,    e_K = 0,    e_k = (G_k + e_{k+1}) / |lam_k|.

So once e_k < eps * min_i ||x_i||, every row of every later layer is, up to the common factor, within a relative eps of its
value now: relative mu and rank1_residual move by at most e_k / min_i ||x_i|| (both are 1-Lipschitz in the relative change of
X), and the remaining blocks need not be computed. It holds row by row, which a sum of angles (theory/certificates.py)
does not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lscollapse.core.files import OutputError, cache_folder, read_text, write_text
from lscollapse.instrument.surgery import Variant
from lscollapse.models.adapters.adapter import Adapter

SQUARINGS = 2  # of W W^T: the Schatten-16 norm, at most n^(1/16) above the spectral norm
MARGIN = {torch.float64: 1.0001, torch.float32: 1.001, torch.bfloat16: 1.05}  # for rounding in the products


class Stored(BaseModel):
    """Gains in the cache, and the sha256 of their numbers: one that was altered would leave the net where it should not."""

    model_config = ConfigDict(strict=True)

    gains: list[Annotated[float, Field(ge=0)]]
    sha256: str


def gains(adapter: Adapter, sha256: str, cache_dir: Path | None = None) -> list[float] | None:
    """G_k of every layer, or None where the architecture has no such bound. Cached by the sha256 of the weights file;
    random weights have none and are computed each time.

    Deviation: ||W||_2 is bounded from above by the Schatten-16 norm, which needs products only; it costs at most
    log(n^(1/16)) / log|lam| layers of computing.
    """
    if not adapter.bounded_mixer:
        return None
    file = cache_folder(cache_dir) / "gains" / f"{sha256}.json"
    cached = len(sha256) == 64
    stored = _stored(file) if cached else None
    if stored is not None and len(stored) == adapter.n_layers:
        return stored
    values = [adapter.mixer_bound(layer, spectral_bound) for layer in range(adapter.n_layers)]
    if not cached or not all(map(math.isfinite, values)):  # infinity is no JSON
        return values
    with suppress(OSError, OutputError):  # a cache that cannot be written costs time, not correctness
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, Stored(gains=values, sha256=_digest(values)).model_dump_json() + "\n")
    return values


def _stored(file: Path) -> list[float] | None:
    """What the cache holds, or None where there is nothing, or it is not what was written."""
    try:
        stored = Stored.model_validate_json(read_text(file, ValueError))
    except ValueError:
        return None
    return stored.gains if stored.sha256 == _digest(stored.gains) else None


def _digest(values: Sequence[float]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def spectral_bound(W: Tensor) -> float:
    """An upper bound of ||W||_2: (tr (W W^T)^(2p))^(1/(4p)) with p = 2^SQUARINGS. In float64 for small matrices."""
    W = W.double() if W.numel() <= 2**20 else W.float()
    largest = float(W.abs().max())
    if largest == 0.0:
        return 0.0
    W = W / largest  # first, so that no square leaves the range
    size = float(torch.linalg.matrix_norm(W))
    W, scale = W / size, largest * size
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W  # the smaller of the two, (n, n)
    for _ in range(SQUARINGS):
        gram = gram @ gram
    power = 2**SQUARINGS
    schatten: float = float(torch.linalg.matrix_norm(gram)) ** (1 / (2 * power))
    return scale * schatten * 1.0001  # for rounding in the products


def applies(variant: Variant) -> bool:
    """Whether the bound holds for a variant: its mixer keeps the norm, and lambda acts on the residual and is not zero."""
    lams = variant.lam if isinstance(variant.lam, tuple) else (variant.lam,)
    keeps_norm = variant.layernorm or variant.norm_site == "block"
    return keeps_norm and variant.skip_site == "residual" and all(lam != 0 for lam in lams)


def remaining(gains: Sequence[float], variant: Variant, dtype: torch.dtype) -> list[float]:
    """e_k for k = 0..K: what the layers from k on can still add to a row, in the scale of X_k; infinite where no bound applies."""
    if not applies(variant):
        return [math.inf] * (len(gains) + 1)
    left = [0.0]
    for layer in reversed(range(len(gains))):
        left.append((gains[layer] * MARGIN[dtype] + left[-1]) / abs(variant.lam_at(layer)))
    return left[::-1]


def log2_change(log2_left: Tensor, shortest: Tensor, down: Tensor) -> Tensor:
    """log2 of e_k / min_i ||x_i|| of every excerpt, (B,), for an X carried as X * 2^-down; not finite where a row is zero.

    log2_left, shortest, down: (B,) in float64: log2 of e_k, min_i of the rows of X, and whole numbers.
    """
    return log2_left - torch.log2(shortest) + down
