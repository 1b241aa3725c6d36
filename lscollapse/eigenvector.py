"""The unit eigenvector of the largest eigenvalue of Gram matrices, (..., n, n) -> (..., n) in float64, in two ways.

On a CPU LAPACK is the fastest. On a GPU it would have to be asked from the CPU, and squaring is products alone: nothing is read
back. What the measures need is not the vector but the energy in it. Where two eigenvalues are so near that float64 cannot tell
their vectors apart, any vector between them has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# p = 2^SQUARINGS. What an eigenvalue (1 - g) lam leaves in a column of G^p costs g exp(-2 p g) lam of the energy at most, which is
# never over lam / (2 e p) = 1e-17 lam. A gap that is lost to the rounding of p powers, some 2^-52, costs as little.
SQUARINGS = 54
# So many squarings in a row leave float64's range to no matrix of trace 1: 1 / n becomes n^-64.
IN_A_ROW = 6


def by_lapack(gram: Tensor) -> Tensor:
    """LAPACK's dsyevr for that one pair and on one thread: a third of the time of a full decomposition, and threads slow it
    down. A matrix with NaN gives any vector."""
    n, vectors = gram.shape[-1], []
    for matrix, (_, z, found, _) in _dsyevr(gram, range="I", il=n, iu=n):
        # Of eigenvalues that agree to some roundings it may find none, and say nothing.
        vectors.append(z[:, 0] if found == 1 else np.linalg.eigh(matrix)[1][:, -1])
    return torch.from_numpy(np.array(vectors).reshape(gram.shape[:-1]))


def eigenvalues(gram: Tensor) -> Tensor:
    """All of them, ascending, (..., n, n) -> (..., n); a GPU is waited for. Of a matrix with NaN they are any numbers."""
    if not gram.is_cpu:
        values: Tensor = torch.linalg.eigvalsh(torch.nan_to_num(gram))
        return values
    # Not by torch, whose last bits depend on where in memory a matrix lies.
    return torch.from_numpy(np.array([w for _, (w, *_) in _dsyevr(gram, compute_v=0)]).reshape(gram.shape[:-1]))


def _dsyevr(gram: Tensor, **wanted: Any) -> Iterator[tuple[np.ndarray, tuple[Any, ...]]]:
    """Each matrix, and what dsyevr finds of it: eigenvalues, vectors, the number of these and their supports."""
    from scipy.linalg.lapack import dsyevr

    n = gram.shape[-1]
    with _thread_pools().limit(limits=1):
        for matrix in torch.nan_to_num(gram.detach()).reshape(-1, n, n).numpy():
            *found, info = dsyevr(matrix, **wanted)
            if info != 0:
                raise ArithmeticError(f"LAPACK dsyevr failed with info={info} on a {n} x {n} Gram matrix")
            yield matrix, tuple(found)


@cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of the libraries loaded, looked for once: that takes longer than the eigenvector."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def by_squaring(gram: Tensor) -> Tensor:
    """The longest column of G^p; NaN for a matrix that is zero or has NaN."""
    P = gram / _trace(gram)
    for _ in range(SQUARINGS // IN_A_ROW):
        for _ in range(IN_A_ROW):
            P = P @ P
        P = P / _trace(P)
    longest = P.diagonal(dim1=-2, dim2=-1).argmax(-1)  # (...)
    column = torch.take_along_dim(P, longest[..., None, None], -1)[..., 0]  # (..., n)
    length: Tensor = torch.linalg.vector_norm(column, dim=-1, keepdim=True)
    return column / length


def _trace(P: Tensor) -> Tensor:
    trace: Tensor = P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return trace
