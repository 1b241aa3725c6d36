"""The package's own Triton kernels, as the GPU runs them; fused.py and products.py launch them.

Everything is float32 but logarithms of decays, which are summed in float64, and the halves of `product_kernel`.
Capitals are constants that a kernel is compiled for: mostly sizes of tiles, powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def _exponent(x):
    """floor(log2(x)) of a positive x; -127 for 0 and subnormal numbers, 128 for inf and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def _power(exponent):
    """2^exponent, for exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rows_kernel(
    y_ptr, gate_ptr, weight_ptr, out_ptr, low_ptr, scale_ptr, y_stride, gate_stride, groups, width, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One row of `groups` parts of `width`: u = y silu(gate), then weight * u / rms(u); out rounded, or as two halves."""
    row = tl.program_id(0).to(tl.int64)
    group, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    at, there = group * width + column, (group < groups) & (column < width)  # (GROUPS, WIDTH)
    u = tl.load(y_ptr + row * y_stride + at, mask=there, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(gate_ptr + row * gate_stride + at, mask=there, other=0.0).to(tl.float32)
        u *= z * tl.sigmoid(z)
    if NORM:
        # A part above 2^30 is first scaled down by a power of two: squares of a finite u never overflow.
        shift = tl.maximum(_exponent(tl.max(tl.abs(u), 1, keep_dims=True)) - 30, 0)  # (GROUPS, 1)
        down = _power(-shift)
        u *= down
        square = tl.sum(u * u, 1, keep_dims=True) / width + eps * down * down
        u *= (1.0 / tl.sqrt_rn(square)) * tl.load(weight_ptr + at, mask=there, other=0.0)
    to = row * groups * width + at
    if HALVES:
        # The largest of a row becomes 2^14 to 2^15, so that what float16 rounds away of a row is 2^-24 of its largest.
        shift = tl.maximum(_exponent(tl.max(tl.max(tl.abs(u), 1), 0)) - 14, -126)
        u *= _power(-shift)
        high = u.to(tl.float16)
        rest = u - high.to(tl.float32)
        low = tl.where(tl.abs(u) == float("inf"), 0.0, rest).to(tl.float16)
        tl.store(out_ptr + to, high, mask=there)
        tl.store(low_ptr + to, low, mask=there)
        tl.store(scale_ptr + row, _power(shift))
    else:
        tl.store(out_ptr + to, u.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _convolved(
    x_ptr, row_stride, taps_ptr, bias_ptr, channels, columns, first, length,
    ROWS: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """silu of the causal convolution for ROWS tokens from `first` on and the channels `columns`; 0 beyond `length`."""
    t = first + tl.arange(0, ROWS)
    y = tl.zeros((ROWS, columns.shape[0]), tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + columns)[None, :]
    for back in tl.static_range(TAPS):
        tap = tl.load(taps_ptr + (TAPS - 1 - back) * channels + columns)  # taps (TAPS, channels)
        there = ((t >= back) & (t < length))[:, None]
        x = tl.load(x_ptr + (t - back)[:, None] * row_stride + columns[None, :], mask=there, other=0.0)
        y += tap[None, :] * x.to(tl.float32)
    return tl.where((t < length)[:, None], y * tl.sigmoid(y), 0.0)  # (ROWS, len(columns))


@triton.jit
def scores_kernel(
    xBC_ptr, taps_ptr, bias_ptr, scores_ptr, batch_stride, row_stride, length, channels, inner, groups,
    STATE: tl.constexpr, PART: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """C_i . B_j of one excerpt and group, (LENGTH, LENGTH), a tile of ROWS x ROWS a program, none above the diagonal."""
    pair, tile = tl.program_id(0), tl.program_id(1)
    excerpt, group = pair // groups, pair % groups
    i, j = tile // (LENGTH // ROWS), tile % (LENGTH // ROWS)
    if i >= j:
        x_ptr = xBC_ptr + excerpt.to(tl.int64) * batch_stride
        acc = tl.zeros((ROWS, ROWS), tl.float32)
        for part in range(STATE // PART):
            columns = inner + group * STATE + part * PART + tl.arange(0, PART)
            B = _convolved(x_ptr, row_stride, taps_ptr, bias_ptr, channels, columns, j * ROWS, length, ROWS, TAPS, BIAS)
            columns += groups * STATE
            C = _convolved(x_ptr, row_stride, taps_ptr, bias_ptr, channels, columns, i * ROWS, length, ROWS, TAPS, BIAS)
            acc = tl.dot(C, tl.trans(B), acc, input_precision="tf32x3")
        t = tl.arange(0, ROWS)
        at = (i * ROWS + t)[:, None] * LENGTH + (j * ROWS + t)[None, :]
        tl.store(scores_ptr + pair.to(tl.int64) * LENGTH * LENGTH + at, acc)


@triton.jit
def _softplus(x):
    """log(1 + e^x) in float64, whose last bits count where it is a small time step."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-5, e * (1.0 - 0.5 * e), tl.log(1.0 + e))


@triton.jit
def decays_kernel(
    dt_ptr, A_ptr, dt_bias_ptr, step_ptr, high_ptr, low_ptr, batch_stride, row_stride, length, heads, dt_min, dt_max,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """Time steps of one excerpt and head, and the sums of their logarithms of decay, as high + low: (LENGTH,) each."""
    pair, t = tl.program_id(0), tl.arange(0, LENGTH)
    at = (pair // heads).to(tl.int64) * batch_stride + t * row_stride + pair % heads
    raw = tl.load(dt_ptr + at, mask=t < length, other=0.0).to(tl.float64)
    step = _softplus(raw + tl.load(dt_bias_ptr + pair % heads).to(tl.float64))
    step = tl.where(step < dt_min, dt_min, step)  # a NaN stays
    step = tl.where(t < length, tl.where(step > dt_max, dt_max, step), 0.0)
    log = step * tl.load(A_ptr + pair % heads).to(tl.float64)
    # exp(-1e4) is 0 in float32, so that more decay changes nothing and the sum stays a size that two float32 hold.
    cum = tl.cumsum(tl.where(log < -1e4, -1e4, log), 0)
    high = cum.to(tl.float32)
    to = pair.to(tl.int64) * LENGTH + t
    tl.store(step_ptr + to, step.to(tl.float32))
    tl.store(high_ptr + to, high)
    tl.store(low_ptr + to, (cum - high.to(tl.float64)).to(tl.float32))


@triton.jit
def scan_kernel(
    xBC_ptr, scores_ptr, step_ptr, high_ptr, low_ptr, taps_ptr, bias_ptr, D_ptr, y_ptr,
    batch_stride, row_stride, D_stride, length, channels, heads, per_group,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y = M x of one excerpt and head, (length, HEAD_DIM): M_ij = C_i.B_j exp(cum_i - cum_j) dt_j, and D more for i = j."""
    pair, t = tl.program_id(0).to(tl.int64), tl.arange(0, LENGTH)
    excerpt, head = pair // heads, pair % heads
    columns = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    x_ptr = xBC_ptr + excerpt * batch_stride
    x = _convolved(x_ptr, row_stride, taps_ptr, bias_ptr, channels, columns, 0, length, LENGTH, TAPS, BIAS)
    D = tl.load(D_ptr + excerpt * D_stride + head)
    step_j, high_j, low_j = (
        tl.load(step_ptr + pair * LENGTH + t)[None, :],
        tl.load(high_ptr + pair * LENGTH + t)[None, :],
        tl.load(low_ptr + pair * LENGTH + t)[None, :],
    )
    scores_ptr += (excerpt * (heads // per_group) + head // per_group) * LENGTH * LENGTH
    for first in range(0, LENGTH, ROWS):
        i = first + tl.arange(0, ROWS)
        high_i, low_i = tl.load(high_ptr + pair * LENGTH + i), tl.load(low_ptr + pair * LENGTH + i)
        log = (high_i[:, None] - high_j) + (low_i[:, None] - low_j)
        past = i[:, None] >= t[None, :]  # (ROWS, LENGTH)
        scores = tl.load(scores_ptr + i[:, None] * LENGTH + t[None, :], mask=past, other=0.0)
        M = tl.where(past, scores * tl.exp(tl.minimum(log, 0.0)) * step_j, 0.0)
        M += tl.where(i[:, None] == t[None, :], D, 0.0)
        y = tl.dot(M, x, input_precision="tf32x3")
        to = (excerpt * length + i)[:, None] * (heads * HEAD_DIM) + columns[None, :]
        tl.store(y_ptr + to, y, mask=(i < length)[:, None])


@triton.jit
def product_kernel(
    high_ptr, low_ptr, scale_ptr, w_high_ptr, w_low_ptr, w_scale_ptr, has_low_ptr, bias_ptr, out_ptr, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    SCALED: tl.constexpr, LOW: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of X W^T + bias: X (m, k) = scale (high + low) by rows, W (n, k) likewise, or as stored if not SCALED.

    A tensor core cuts the sum that it adds to at every step, so each BK terms are summed there from 0 and then added in
    float32. Tiles of BAND rows of tiles are neighbours in time: what they read stays in the cache.
    """
    tile, across, down = tl.program_id(0), tl.cdiv(n, BN), tl.cdiv(m, BM)
    band = tile // (BAND * across)
    rows_left = tl.minimum(down - band * BAND, BAND)
    inside = tile % (BAND * across)
    i = (band * BAND + inside % rows_left) * BM + tl.arange(0, BM)  # (BM,)
    j = (inside // rows_left) * BN + tl.arange(0, BN)  # (BN,)
    t = tl.arange(0, BK)
    x_at = tl.minimum(i, m - 1).to(tl.int64)[:, None] * k + t[None, :]  # (BM, BK)
    w_at = tl.minimum(j, n - 1).to(tl.int64)[None, :] * k + t[:, None]  # (BK, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        here = t < k - start
        w = tl.load(w_high_ptr + w_at + start, mask=here[:, None], other=0.0)
        part = tl.dot(tl.load(low_ptr + x_at + start, mask=here[None, :], other=0.0), w)
        acc += tl.dot(tl.load(high_ptr + x_at + start, mask=here[None, :], other=0.0), w, part)
    if LOW:
        rest = tl.zeros((BM, BN), tl.float32)  # 2^-11 of the sum: there the cut does not matter
        for start in range(0, k * tl.load(has_low_ptr), BK):
            here = t < k - start
            w = tl.load(w_low_ptr + w_at + start, mask=here[:, None], other=0.0)
            rest = tl.dot(tl.load(high_ptr + x_at + start, mask=here[None, :], other=0.0), w, rest)
        acc += rest
    scale = tl.load(scale_ptr + i, mask=i < m, other=0.0)[:, None]
    if SCALED:
        # The smaller of two scales first: large weights of small rows leave the range in no other order.
        w_scale = tl.load(w_scale_ptr + j, mask=j < n, other=0.0)[None, :]
        acc = acc * tl.minimum(scale, w_scale) * tl.maximum(scale, w_scale)
    else:
        acc *= scale
    if BIAS:
        acc += tl.load(bias_ptr + j, mask=j < n, other=0.0)[None, :]
    to = i.to(tl.int64)[:, None] * n + j[None, :]
    tl.store(out_ptr + to, acc, mask=(i < m)[:, None] & (j < n)[None, :])


@triton.jit
def combine_kernel(x_ptr, o_ptr, skips_ptr, scales_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """skips*X + scales*O, one number of each an excerpt of `size` numbers; where a factor is 0, X or O is not read."""
    blocks = tl.cdiv(size, BLOCK)
    excerpt = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    skip, scale = tl.load(skips_ptr + excerpt).to(tl.float32), tl.load(scales_ptr + excerpt).to(tl.float32)
    o = tl.load(o_ptr + excerpt * size + at, mask=at < size * (scale != 0.0).to(tl.int32), other=0.0).to(tl.float32)
    x = tl.load(x_ptr + excerpt * size + at, mask=at < size * (skip != 0.0).to(tl.int32), other=0.0)
    tl.store(y_ptr + excerpt * size + at, scale * o + skip * x, mask=at < size)
