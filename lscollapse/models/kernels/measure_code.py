# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, disable-error-code="no-untyped-def,misc"
"""Triton kernels of the measures of X (B, N, d), in float64 from the load on; fused_measures.py launches them.

A program has all rows of one excerpt, ROWS >= N, and goes through its columns, COLUMNS at a time, so that what is summed down a
column is whole at once. Numbers of 32 and fewer bits are squared in float64 without leaving its range: nothing is scaled.
Row numbers are int32 within an excerpt, int64 between them.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(x_ptr, excerpt, first, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of one excerpt in float64, (ROWS, COLUMNS), zero beside it."""
    row, column = tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLUMNS)[None, :]
    there = (row < n) & (column < d)
    return tl.load(x_ptr + excerpt * n * d + row * d + column, mask=there, other=0.0).to(tl.float64)


@triton.jit
def _centred(Y, start, inside, share):
    """Some columns less their mean: `start`, the first row, goes first, and the mean is taken twice."""
    R = tl.where(inside, Y - start[None, :], 0.0)
    R = tl.where(inside, R - (tl.sum(R, 0) * share)[None, :], 0.0)
    return tl.where(inside, R - (tl.sum(R, 0) * share)[None, :], 0.0)


@triton.jit
def _place(lengths, row, n, place):
    """The number at `place` of the first n lengths when they are sorted, equal ones in the order of their rows."""
    shorter = (lengths[None, :] < lengths[:, None]) | (
        (lengths[None, :] == lengths[:, None]) & (row[None, :] < row[:, None])
    )
    before = tl.sum(tl.where(shorter & (row < n)[None, :], 1, 0), 1)
    return tl.sum(tl.where((row < n) & (before == place), lengths, 0.0), 0)


@triton.jit
def sums_kernel(
    x_ptr, lengths_ptr, sums_ptr, n, d, alike, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr
):  # fmt: skip
    """Squared lengths of rows (B, N); norms of Y and of R, Y minus its mean row, their norms 1,inf, the scale, 1 or NaN, the largest
    entry, the length of the shortest row, that of the longest over the median, and the first of the longest: 9 of the sums."""
    excerpt = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    inside = (row < n)[:, None]
    share = tl.full((COLUMNS,), 1.0, tl.float64) / n  # of a row in a mean
    lengths, size, centred = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    centred_size = tl.zeros((ROWS,), tl.float64)
    peaks = tl.zeros((COLUMNS,), tl.float32)
    column_sums, centred_column_sums = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
    for first in tl.range(0, d, COLUMNS, num_stages=3):
        Y = _tile(x_ptr, excerpt, first, n, d, ROWS, COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        start = tl.load(x_ptr + excerpt * n * d + column, mask=column < d, other=0.0).to(tl.float64)
        lengths += tl.sum(Y * Y, 1)
        size += tl.sum(tl.abs(Y), 1)
        peaks = tl.maximum(peaks, tl.max(tl.abs(Y), 0).to(tl.float32))  # Y was float32
        column_sums = tl.maximum(column_sums, tl.sum(tl.abs(Y), 0))
        R = _centred(Y, start, inside, share)
        centred += tl.sum(R * R, 1)
        centred_size += tl.sum(tl.abs(R), 1)
        centred_column_sums = tl.maximum(centred_column_sums, tl.sum(tl.abs(R), 0))
    tl.store(lengths_ptr + excerpt * n + row, lengths, mask=row < n)
    whole = tl.sum(lengths, 0)
    # Infinite or NaN where an entry is, which a maximum need not be: so it makes NaN of all.
    nan = whole - whole
    to = sums_ptr + excerpt * SUMS
    tl.store(to, tl.sqrt(whole) + nan)
    tl.store(to + 1, tl.sqrt(tl.sum(centred, 0)) + nan)
    tl.store(to + 2, tl.sqrt(tl.max(column_sums, 0) * tl.max(size, 0)) + nan)
    tl.store(to + 3, tl.sqrt(tl.max(centred_column_sums, 0) * tl.max(centred_size, 0)) + nan)
    tl.store(to + 6, 1.0 + nan)
    tl.store(to + 7, tl.max(peaks, 0).to(tl.float64) + nan)
    tl.store(to + 8, tl.sqrt(tl.min(tl.where(row < n, lengths, float("inf")), 0)))
    lengths = tl.sqrt(lengths)
    low, high = _place(lengths, row, n, (n - 1) // 2), _place(lengths, row, n, n // 2)
    longest = tl.max(lengths, 0)
    first = tl.min(tl.where((row < n) & (lengths >= alike * longest), row, ROWS), 0).to(tl.float64)
    tl.store(to + 10, longest / ((low + high) / 2) + nan)
    tl.store(to + 11, tl.where(longest > 0, first, float("nan")) + nan)


@triton.jit
def gram_kernel(
    x_ptr, gram_ptr, n, d, ROWS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Y Y^T of Y (N, d), a tile on or over the diagonal and its mirror image a program, into the first of (B, 2, ROWS, ROWS)."""
    # Programs of one excerpt are neighbours, so that they read it once from memory.
    excerpt, tile = tl.program_id(0).to(tl.int64) // TILES, tl.program_id(0) % TILES
    i, j = tile, 0
    while i > j:  # the tile's number over the diagonal: 0 is (0, 0), 1 (0, 1), 2 (1, 1)
        j += 1
        i -= j
    t, k = tl.arange(0, TILE), tl.arange(0, COLUMNS)
    left, right = i * TILE + t, j * TILE + t
    x_ptr += excerpt * n * d
    gram = tl.zeros((TILE, TILE), tl.float64)
    for first in range(0, d, COLUMNS):
        column = first + k
        a = tl.load(
            x_ptr + left[:, None] * d + column[None, :], mask=(left < n)[:, None] & (column < d)[None, :], other=0.0
        )
        b = tl.load(
            x_ptr + right[None, :] * d + column[:, None], mask=(right < n)[None, :] & (column < d)[:, None], other=0.0
        )
        gram = tl.dot(a.to(tl.float64), b.to(tl.float64), gram, input_precision="ieee", out_dtype=tl.float64)
    gram_ptr += excerpt * 2 * ROWS * ROWS
    tl.store(gram_ptr + left[:, None] * ROWS + right[None, :], gram)
    if i != j:
        tl.store(gram_ptr + right[:, None] * ROWS + left[None, :], tl.trans(gram))


@triton.jit
def leading_kernel(
    gram_ptr, u_ptr, n, squarings, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """u (B, N) of the first matrix G of each of (B, 2, ROWS, ROWS), the other being room: the longest column of G^p.

    P becomes (P / tr P)^2 until that is of trace 1 - 2^-20 or more, so that P before had 2^-21 beside its first eigenvalue and
    this one has the square of it, or until `squarings` are done.
    """
    excerpt = tl.program_id(0).to(tl.int64)
    gram_ptr += excerpt * 2 * ROWS * ROWS
    row, t, k = tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, COLUMNS)
    old, new = 0, ROWS * ROWS
    trace = tl.sum(tl.load(gram_ptr + row * (ROWS + 1)), 0)
    left, done = trace * 0.0 + 1.0, 0
    while (left > 1e-6) & (done < squarings):
        scale = 1.0 / (trace * trace)
        for i in range(ROWS // TILE):
            for j in range(i, ROWS // TILE):
                down, across = i * TILE + t, j * TILE + t
                P = tl.zeros((TILE, TILE), tl.float64)
                for first in range(0, ROWS, COLUMNS):
                    a = tl.load(gram_ptr + old + down[:, None] * ROWS + (first + k)[None, :])
                    b = tl.load(gram_ptr + old + (first + k)[:, None] * ROWS + across[None, :])
                    P = tl.dot(a, b, P, input_precision="ieee", out_dtype=tl.float64)
                P *= scale
                tl.store(gram_ptr + new + down[:, None] * ROWS + across[None, :], P)
                if i != j:
                    tl.store(gram_ptr + new + across[:, None] * ROWS + down[None, :], tl.trans(P))
        tl.debug_barrier()  # every thread's part of P is there before any is read, and read before any is overwritten
        trace = tl.sum(tl.load(gram_ptr + new + row * (ROWS + 1)), 0)
        left, done = 1.0 - trace, done + 1
        old, new = new, old
    longest = tl.argmax(tl.load(gram_ptr + old + row * (ROWS + 1)), 0)
    column = tl.load(gram_ptr + old + longest * ROWS + row) / trace
    tl.store(u_ptr + excerpt * n + row, column / tl.sqrt(tl.sum(column * column, 0)), mask=row < n)


@triton.jit
def rest_kernel(
    x_ptr, u_ptr, lengths_ptr, w_ptr, sums_ptr, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr
):  # fmt: skip
    """The other 3 sums: the norm of Y less its leading component, as `passes._residual` has it, and of the rows scaled to length 1 the
    square of their sum, and their norm less their mean over their norm. Room: w (B, 2, d)."""
    excerpt = tl.program_id(0).to(tl.int64)
    row, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < n)[:, None]
    share = tl.full((COLUMNS,), 1.0, tl.float64) / n
    u = tl.load(u_ptr + excerpt * n + row, mask=row < n, other=0.0)[:, None]
    length = tl.sqrt(tl.load(lengths_ptr + excerpt * n + row, mask=row < n, other=1.0))
    shorten = (1.0 / length)[:, None]
    w_ptr += excerpt * 2 * d
    e, apart = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    w_square, aligned = tl.zeros((COLUMNS,), tl.float64), tl.zeros((COLUMNS,), tl.float64)
    for first in tl.range(0, d, COLUMNS, num_stages=3):
        Y = _tile(x_ptr, excerpt, first, n, d, ROWS, COLUMNS)
        U = Y * shorten
        together = tl.sum(U, 0)
        aligned += together * together
        C = _centred(U, tl.sum(tl.where(row[:, None] == 0, U, 0.0), 0), inside, share)
        apart += tl.sum(C * C, 1)
        w = tl.sum(Y * u, 0)
        R = Y - u * w[None, :]
        e += tl.sum(R * w[None, :], 1)
        w_square += w * w
        tl.store(w_ptr + first + k, w, mask=first + k < d)
        tl.store(w_ptr + d + first + k, tl.sum(R * u, 0), mask=first + k < d)
    tl.debug_barrier()  # w and u^T R are written before other threads read them
    e = (e / tl.sum(w_square, 0))[:, None]
    shared = tl.sum(tl.sum(e * u, 1), 0)
    rest = tl.zeros((ROWS,), tl.float64)
    for first in tl.range(0, d, COLUMNS, num_stages=3):
        Y = _tile(x_ptr, excerpt, first, n, d, ROWS, COLUMNS)
        w = tl.load(w_ptr + first + k, mask=first + k < d, other=0.0)
        other = tl.load(w_ptr + d + first + k, mask=first + k < d, other=0.0) - shared * w
        R = Y - u * w[None, :]
        R -= e * w[None, :] + u * other[None, :]
        rest += tl.sum(R * R, 1)
    to = sums_ptr + excerpt * SUMS
    tl.store(to + 4, tl.sqrt(tl.sum(rest, 0)))
    tl.store(to + 5, tl.sum(aligned, 0))
    angular = tl.sqrt(tl.sum(apart, 0) / n)
    tl.store(to + 9, tl.where(angular > 1.0, 1.0, angular))  # NaN stays
