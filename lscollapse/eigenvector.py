"""The unit eigenvector of the largest eigenvalue of a Gram matrix (n, n) in float64: of one on a CPU, or of many by products alone.

What the measures need is not the vector but the energy in it. Where two eigenvalues are so near that float64 cannot tell
their vectors apart, any vector between them has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
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
# Smaller matrices are LAPACK's at once. Of larger ones the power method has so many steps between two proofs, as long as each
# leaves less than SLOW of what is beside the leading vector: else LAPACK is faster.
SMALL, STEPS, SLOW = 48, 4, 0.7
PROVED = 2.0**-58  # of the energy in the leading vector


def leading(gram: np.ndarray) -> tuple[np.ndarray, float]:
    """(n, n) -> (n,), and the share of the trace that is in it; of a matrix with NaN any vector, and NaN. LAPACK takes 0.4 ms for
    n = 128, and the interpreter waits for it."""
    from scipy.linalg.blas import ddot, dsymv

    G = gram / gram.trace()
    u = by_powers(G) if len(gram) > SMALL else None
    if u is None:
        u = by_lapack(G)
    return u, ddot(u, dsymv(1.0, G.T, u))


def by_powers(gram: np.ndarray) -> np.ndarray | None:
    """Of a matrix of trace 1, by the power method, proved; None where that would take long, or there is no proof.

    With t = u^T G u and r = ||G u - t u|| some eigenvalue is at least t - r. All others are at most q, with
    q^2 = ||G||_F^2 - (t - r)^2. Where that is less it was the largest, and u lacks r^2 / (t - r - q) of its energy at most (Temple,
    Kato).
    """
    # These keep the interpreter: letting go of it takes longer than they do.
    from scipy.linalg.blas import ddot, dnrm2, dsymv

    G = gram.T  # in BLAS's order
    squares = ddot(gram.ravel(), gram.ravel())
    u = G[:, G.diagonal().argmax()]  # the products of the longest row with all
    while squares > 0:  # not NaN
        for _ in range(STEPS):
            u = dsymv(1.0, G, u)
        u /= dnrm2(u)
        Gu = dsymv(1.0, G, u)
        t = ddot(u, Gu)
        r = dnrm2(Gu - t * u)
        q = math.sqrt(max(squares - (t - r) ** 2, 0.0))
        gap = t - r - q
        if gap > 0 and r * r <= PROVED * t * gap:
            return np.asarray(u)
        if not q < SLOW * t:
            break
    return None


def by_lapack(gram: np.ndarray) -> np.ndarray:
    """By LAPACK's dsyevr for that one pair: a third of the time of a full decomposition."""
    matrix, n = np.nan_to_num(gram), len(gram)
    _, z, found, _ = _dsyevr(matrix, range="I", il=n, iu=n)
    # Of eigenvalues that agree to some roundings it may find none, and say nothing.
    return np.asarray(z[:, 0] if found == 1 else np.linalg.eigh(matrix)[1][:, -1])


def eigenvalues(gram: np.ndarray) -> np.ndarray:
    """All of them, ascending, (n, n) -> (n,); of a matrix with NaN any numbers."""
    return np.asarray(_dsyevr(np.nan_to_num(gram), compute_v=0)[0])


def _dsyevr(matrix: np.ndarray, **wanted: Any) -> tuple[Any, ...]:
    """Eigenvalues, vectors, the number of these and their supports."""
    from scipy.linalg.lapack import dsyevr

    *found, info = dsyevr(matrix, **wanted)
    if info != 0:
        raise ArithmeticError(f"LAPACK dsyevr failed with info={info} on a {len(matrix)} x {len(matrix)} Gram matrix")
    return tuple(found)


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and LAPACK of numpy and scipy on one thread each: more slow small matrices down, and round otherwise."""
    with _thread_pools().limit(limits=1):
        yield


@cache
def _thread_pools() -> ThreadpoolController:
    """Of the libraries loaded, looked for once: that takes longer than an eigenvector."""
    import scipy.linalg.lapack  # noqa: F401  # has one of its own
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def by_squaring(gram: Tensor) -> Tensor:
    """(..., n, n) -> (..., n), the longest column of G^p; NaN for a matrix that is zero or has NaN. Nothing is read back from a GPU."""
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
