"""Rank-collapse measures: pure functions of a layer's output Y, shape (..., N, d) -> (...).

N tokens, d channels; leading axes (excerpts, variants) are kept apart and never pooled. Everything is computed in
float64 after dividing by the largest entry, so values of 1e-300 or 1e300 are as good as values of 1, and subtracting
the first row before the mean keeps full relative accuracy when all rows agree to the last bits.

A layer output that holds NaN or infinity gives NaN; `status` says which it was.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg.lapack import dsyevr
from threadpoolctl import ThreadpoolController
from torch import Tensor

MEASURES = ("mu", "relative_mu", "rank1_residual", "stable_rank", "mean_cosine", "dong_residual")
STATUSES = ("ok", "below_floor", "overflow", "nan")

# Measures that a finite precision cannot tell from zero below its floor.
VANISHING = ("mu", "relative_mu", "rank1_residual", "dong_residual")


class Scaled(NamedTuple):
    """A finite Y as unit * scale with max|unit| = 1 (or Y = 0), and which of the leading entries are finite at all."""

    unit: Tensor  # (..., N, d), float64
    scale: Tensor  # (...)
    finite: Tensor  # (...), bool


def _scaled(Y: Tensor) -> Scaled:
    Y = Y.to(torch.float64)
    scale = torch.linalg.vector_norm(Y, math.inf, dim=(-2, -1))
    finite = torch.isfinite(scale)
    divisor = torch.where(finite & (scale > 0), scale, 1.0)
    unit = Y / divisor[..., None, None]
    return Scaled(unit if finite.all() else unit.masked_fill(~finite[..., None, None], math.nan), scale, finite)


def _norm(Z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(Z, dim=(-2, -1))


def _centred(unit: Tensor) -> Tensor:
    """Y minus its mean row, exact near collapse: the first row goes first, and the mean is taken twice."""
    R = unit - unit[..., :1, :]
    R -= R.mean(-2, keepdim=True)
    R -= R.mean(-2, keepdim=True)
    return R


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, torch.nan)


def mu(Y: Tensor) -> Tensor:
    """Frobenius norm of Y minus its mean row, (..., N, d) -> (...), in units of Y. Eq. (5), arXiv:2410.10609v3.

    Deviation: the text says "mean of columns"; the formula, and this function, subtract the mean row.
    """
    unit, scale, _ = _scaled(Y)
    return _norm(_centred(unit)) * scale


def relative_mu(Y: Tensor) -> Tensor:
    """mu(Y) / ||Y||_F, in [0, 1]; 1 when the mean row is zero, NaN for Y = 0. What the paper's figures plot."""
    unit = _scaled(Y).unit
    return _divide(_norm(_centred(unit)), _norm(unit)).clamp(max=1.0)


def rank1_residual(Y: Tensor) -> Tensor:
    """sqrt(1 - sigma_1^2 / sum sigma^2), in [0, 1]: the distance to the nearest rank-1 matrix over ||Y||_F.

    Sees the collapse of rows to +u and -u that mu cannot. Never larger than relative mu.
    """
    unit = _scaled(Y).unit
    return _divide(_norm(_deflated(unit)), _norm(unit))


def stable_rank(Y: Tensor) -> Tensor:
    """||Y||_F^2 / sigma_1^2, from 1 to min(N, d)."""
    residual = rank1_residual(Y)
    return 1.0 / (1.0 - residual.square())


def mean_cosine(Y: Tensor) -> Tensor:
    """Mean cosine between distinct rows, in [-1/(N-1), 1]. NaN when a row is zero or there is one row only."""
    return _mean_cosine(_scaled(Y).unit)


def dong_residual(Y: Tensor) -> Tensor:
    """||R||_{1,inf} / ||Y||_{1,inf} with R = Y minus its mean row and ||A||_{1,inf} = sqrt(||A||_1 ||A||_inf).

    The residual of Dong et al. (2021, arXiv:2103.03404), whose minimiser over rank-1 matrices 1x^T is replaced by the
    mean row; it may therefore exceed 1 (never 2).
    """
    unit = _scaled(Y).unit
    return _divide(_norm_1_inf(_centred(unit)), _norm_1_inf(unit))


def _norm_1_inf(A: Tensor) -> Tensor:
    size = A.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt()


def _deflated(unit: Tensor) -> Tensor:
    """Y without its leading singular component.

    The leading singular vector comes from the small Gram matrix; its error enters the residual only as sigma_1 * eps, so
    residuals down to 1e-15 are right although the Gram matrix squares the condition number.
    """
    finite = unit if unit.isfinite().all() else torch.nan_to_num(unit)
    if unit.shape[-2] <= unit.shape[-1]:
        u = _leading_eigenvector(finite @ finite.mT)[..., None]
        return unit - u @ (u.mT @ unit)
    v = _leading_eigenvector(finite.mT @ finite)[..., None]
    return unit - (unit @ v) @ v.mT


def _leading_eigenvector(gram: Tensor) -> Tensor:
    """Unit eigenvector of the largest eigenvalue, (..., n, n) symmetric -> (..., n).

    LAPACK's dsyevr for that one pair, on one thread: a third of the time of a full decomposition, and threads slow it down.
    """
    n = gram.shape[-1]
    flat = gram.detach().cpu().reshape(-1, n, n).numpy()
    vectors = np.empty((len(flat), n))
    with _thread_pools().limit(limits=1):
        for i, matrix in enumerate(flat):
            _, z, _, _, info = dsyevr(matrix, range="I", il=n, iu=n)
            if info != 0:
                raise ArithmeticError(f"LAPACK dsyevr failed with info={info} on a {n} x {n} Gram matrix")
            vectors[i] = z[:, 0]
    return torch.from_numpy(vectors).reshape(gram.shape[:-1]).to(gram.device)


@cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of the libraries loaded; looking for them takes longer than the eigenvector."""
    return ThreadpoolController()


def _mean_cosine(unit: Tensor) -> Tensor:
    n = unit.shape[-2]
    lengths = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    rows = _divide(unit, lengths)
    total = rows.sum(-2).square().sum(-1)
    return _divide(total - n, torch.full_like(total, float(n * (n - 1))))


def measure_all(Y: Tensor) -> dict[str, Tensor]:
    """Every measure of MEASURES at once, {name: (...)}, sharing the passes over Y."""
    unit, scale, _ = _scaled(Y)
    R = _centred(unit)
    size, centred = _norm(unit), _norm(R)
    residual = _divide(_norm(_deflated(unit)), size)
    return {
        "mu": centred * scale,
        "relative_mu": _divide(centred, size).clamp(max=1.0),
        "rank1_residual": residual,
        "stable_rank": 1.0 / (1.0 - residual.square()),
        "mean_cosine": _mean_cosine(unit),
        "dong_residual": _divide(_norm_1_inf(R), _norm_1_inf(unit)),
    }


def floor(dtype: torch.dtype) -> float:
    """Relative mu below which a forward pass in `dtype` cannot tell a value from zero: the unit round-off spacing."""
    return float(torch.finfo(dtype).eps)


def status(Y: Tensor) -> list[str]:
    """For Y of shape (B, N, d): "overflow" where an entry is infinite, "nan" where one is NaN, else "ok"."""
    flat = Y.flatten(1)
    overflow = flat.isinf().any(1).tolist()
    nan = flat.isnan().any(1).tolist()
    return ["overflow" if o else "nan" if n else "ok" for o, n in zip(overflow, nan, strict=True)]
