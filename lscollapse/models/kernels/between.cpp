// What a Mamba-2 block computes on a CPU between its two matrix products, and the norm and the sum around them: one
// excerpt at a time, in one thread, float32 inside, float32 or bfloat16 outside. native.py compiles and calls it.
//
// The scan is that of ssd.py, by heads and chunks of Q tokens: y_i = C_i^T S exp(cum_i) + sum over j <= i of M_ij x_j,
// M_ij = C_i.B_j exp(cum_i - cum_j) dt_j, with the state S (state, head_dim) that earlier chunks left. All four products in
// it are `multiply_add`. What is read again is kept where the cache holds it: a few heads at a time go through convolution
// and scan, and M exists ROWS rows at a time. Loops are plain, the compiler makes vectors of them; scratch memory is the
// caller's, and its rows are padded to whole vectors, so that no loop over columns has a remainder.
//
// No exponent is ever positive, and cum is kept in double: a result is good to float32 under any decay.
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")  // the loop's rounds are independent: without this the compiler doubts it

typedef int64_t Index;
struct bf16 { uint16_t bits; };

// Sums of a register tile, 4 rows of WIDE vectors: as many as hide the latency of a multiply-add and leave room for factors.
#if defined(__AVX512F__)
constexpr Index LANES = 16, WIDE = 4;
constexpr char VECTORS[] = "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
constexpr Index LANES = 8, WIDE = 2;
constexpr char VECTORS[] = "avx2";
#else
constexpr Index LANES = 4, WIDE = 2;
constexpr char VECTORS[] = "vectors of 4";
#endif
constexpr Index ROWS = 16;  // of M in memory at a time; a multiple of LANES
constexpr Index STRIP = 512;  // channels that are convolved at a time: of rows this long the next ones are fetched ahead

struct Sizes {
    Index tokens, heads, head_dim, groups, state, taps, chunk;  // chunk: at most tokens; else at least taps - 1
    Index row_in, row_out;  // from one row of projected, or of out, to the next, in entries
    Index gate, norm;       // whether the mixer has them
    double eps;
    float dt_low, dt_high;
};

struct Weights {  // null where there is none
    const float *conv;       // (taps, channels of x, B and C)
    const float *conv_bias;  // (channels,)
    const float *A, *dt_bias;  // (heads,); A negative
    const float *norm;       // (heads * head_dim,)
};

INLINE Index least(Index a, Index b) { return a < b ? a : b; }
INLINE Index most(Index a, Index b) { return a > b ? a : b; }
INLINE Index padded(Index n, Index to) { return (n + to - 1) / to * to; }

INLINE float get(float v) { return v; }
INLINE float get(bf16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE void put(float &to, float v) { to = v; }
INLINE void put(bf16 &to, float v) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// e^v for v <= 88 to 1e-7, as 2^n e^r with |r| <= log(2) / 2 and the polynomial of Cephes; 0 below -87, NaN for NaN.
INLINE float exponential(float v) {
    float c = v < -87.0f ? -87.0f : v;
    float n = c * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer in its low bits
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = c - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts, the first exact
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t power = (uint32_t)(bits - 0x4B400000 + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return v < -87.0f ? 0.0f : p * scale;
}

// log(1 + e) for e >= 0 to 2e-7: Cephes' logarithm of u = 1 + e, and what rounding took from u.
INLINE float log_of_one_plus(float e) {
    float u = 1.0f + e;
    int32_t bits;
    memcpy(&bits, &u, 4);
    int32_t n = (bits - 0x3f3504f3) >> 23;  // u = 2^n m with m from sqrt(1/2) to sqrt(2)
    bits -= n * (1 << 23);
    float m;
    memcpy(&m, &bits, 4);
    float f = m - 1.0f, z = f * f, k = (float)n;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z - k * 2.12194440e-4f - 0.5f * z;
    return f + p + k * 0.693359375f + (e - (u - 1.0f)) / u;
}

INLINE float silu(float v) { return v / (1.0f + exponential(v < -88.0f ? 88.0f : -v)); }

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// y (N_ROWS, LANES * N) += M (N_ROWS, J) x (J, LANES * N), the sums in registers.
template <Index N_ROWS, Index N>
INLINE void tile(const float *M, Index M_row, const float *x, Index x_row, Index J, float *y, Index y_row) {
    vec sums[N_ROWS][N];
    for (Index i = 0; i < N_ROWS; i++)
        for (Index n = 0; n < N; n++) sums[i][n] = *(const vec *)(y + i * y_row + n * LANES);
    for (Index j = 0; j < J; j++) {
        vec row[N];
        for (Index n = 0; n < N; n++) row[n] = *(const vec *)(x + j * x_row + n * LANES);
        for (Index i = 0; i < N_ROWS; i++)
            for (Index n = 0; n < N; n++) sums[i][n] += M[i * M_row + j] * row[n];
    }
    for (Index i = 0; i < N_ROWS; i++)
        for (Index n = 0; n < N; n++) *(vec *)(y + i * y_row + n * LANES) = sums[i][n];
}

template <Index N_ROWS>
static void rows_of_tiles(
    const float *M, Index M_row, const float *x, Index x_row, Index J, Index columns, float *y, Index y_row) {
    Index c = 0;
    for (; c + LANES * WIDE <= columns; c += LANES * WIDE) tile<N_ROWS, WIDE>(M, M_row, x + c, x_row, J, y + c, y_row);
    for (; c < columns; c += LANES) tile<N_ROWS, 1>(M, M_row, x + c, x_row, J, y + c, y_row);
}

// y (rows, columns) += M (rows, J) x (J, columns); columns a multiple of LANES, all rows as long as *_row says.
static void multiply_add(
    Index rows, const float *M, Index M_row, const float *x, Index x_row, Index J, Index columns, float *y, Index y_row) {
    Index i = 0;
    for (; i + 4 <= rows; i += 4) rows_of_tiles<4>(M + i * M_row, M_row, x, x_row, J, columns, y + i * y_row, y_row);
    for (; i < rows; i++) rows_of_tiles<1>(M + i * M_row, M_row, x, x_row, J, columns, y + i * y_row, y_row);
}

// What `mix` works in. Q is the length of a chunk's rows, P that of a head's, both padded.
struct Scratch {
    Index Q, P, together;  // together: heads that go through convolution and scan at a time
    float *convolved;      // channels of one token that are convolved at a time, or one number a head
    float *history;        // (taps - 1, channels), the last tokens of the chunk before, as they were stored
    float *B, *C;          // (groups, state, Q), transposed; (tokens of a chunk, groups * state)
    float *scores;         // (groups, tokens of a chunk, Q): C_i.B_j, right where j <= i
    float *steps;          // (heads, Q): the time steps
    float *x, *y;          // (together, tokens of a chunk, P); (tokens of a chunk, inner)
    float *factors;        // the left factor of a product: rows of M, or what the state is multiplied with
    float *sums;           // (ROWS, P)
    float *decays;         // (Q,)
    float *states;         // (heads, state, P), where there is more than one chunk
    double *cum;           // (Q,), the log of the decay since the start of the chunk

    // Lays all of it out from `base` and returns how many floats that takes; base may be null.
    Index layout(const Sizes &s, float *base) {
        Index channels = (s.heads * s.head_dim + 2 * s.groups * s.state), wide = s.groups * s.state, taken = 0;
        auto take = [&](Index floats) {
            float *at = base + taken;
            taken += padded(floats, 16);  // 64 bytes
            return at;
        };
        Q = padded(s.chunk, ROWS), P = padded(s.head_dim, LANES);
        together = least(s.heads, most(1, STRIP / s.head_dim));
        convolved = take(most(most(STRIP, s.head_dim), s.heads));
        history = take((s.taps - 1) * channels);
        B = take(wide * Q), C = take(s.chunk * wide), scores = take(s.groups * s.chunk * Q);
        steps = take(s.heads * Q), x = take(together * s.chunk * P), y = take(s.chunk * s.heads * s.head_dim);
        factors = take(ROWS * most(Q, s.state)), sums = take(ROWS * P), decays = take(Q), cum = (double *)take(2 * Q);
        states = take(s.tokens > s.chunk ? s.heads * s.state * P : 0);
        return taken;
    }
};

// One chunk of the excerpt: its first row of x, B and C, how many tokens it has, and whether some went before and come after.
template <class T>
struct Chunk {
    const T *rows;
    Index tokens;
    bool first, last;
};

// Channels from..from + width of token t of the chunk, convolved with the tokens before it, into m.convolved.
template <class T>
static void convolve(const Sizes &s, const Weights &w, const Scratch &m, const Chunk<T> &chunk, Index t, Index from, Index width) {
    const Index channels = s.heads * s.head_dim + 2 * s.groups * s.state;
    const Index n = chunk.first ? least(t + 1, s.taps) : s.taps;
    float *sum = m.convolved;
    auto row = [&](Index back) {
        const T *history = (const T *)m.history + (s.taps - 1 + t - back) * channels;
        return (back <= t ? chunk.rows + (t - back) * s.row_in : history) + from;
    };
    auto taps = [&](Index back) { return w.conv + (s.taps - 1 - back) * channels + from; };
    if (w.conv_bias) memcpy(sum, w.conv_bias + from, width * 4);
    else memset(sum, 0, width * 4);
    if (n == 4) {  // as usual: all in one go
        const T *r0 = row(0), *r1 = row(1), *r2 = row(2), *r3 = row(3);
        const float *w0 = taps(0), *w1 = taps(1), *w2 = taps(2), *w3 = taps(3);
        SIMD for (Index c = 0; c < width; c++)
            sum[c] = silu(sum[c] + get(r0[c]) * w0[c] + get(r1[c]) * w1[c] + get(r2[c]) * w2[c] + get(r3[c]) * w3[c]);
        return;
    }
    for (Index back = 0; back < n; back++) {
        const T *r = row(back);
        const float *weights = taps(back);
        SIMD for (Index c = 0; c < width; c++) sum[c] += get(r[c]) * weights[c];
    }
    SIMD for (Index c = 0; c < width; c++) sum[c] = silu(sum[c]);
}

// B and C of the chunk, and with them the scores.
template <class T>
static void score(const Sizes &s, const Weights &w, const Scratch &m, const Chunk<T> &chunk) {
    const Index wide = s.groups * s.state, inner = s.heads * s.head_dim, Q = m.Q;
    for (Index from = 0; from < wide; from += STRIP) {
        const Index width = least(STRIP, wide - from);
        for (Index t = 0; t < chunk.tokens; t++) {
            convolve(s, w, m, chunk, t, inner + from, width);
            for (Index c = 0; c < width; c++) m.B[(from + c) * Q + t] = m.convolved[c];
            convolve(s, w, m, chunk, t, inner + wide + from, width);
            memcpy(m.C + t * wide + from, m.convolved, width * 4);
        }
    }
    for (Index g = 0; g < s.groups; g++)
        for (Index i = 0; i < chunk.tokens; i += 4) {
            const Index rows = least(4, chunk.tokens - i), columns = padded(i + rows, LANES);
            float *to = m.scores + (g * s.chunk + i) * Q;
            memset(to, 0, rows * Q * 4);
            multiply_add(rows, m.C + i * wide + g * s.state, wide, m.B + g * s.state * Q, Q, s.state, columns, to, Q);
        }
}

// The time steps of the chunk: clamp(softplus(dt + dt_bias), dt_low, dt_high), NaN where that is NaN.
template <class T>
static void time_steps(const Sizes &s, const Weights &w, const Scratch &m, const T *dt, Index tokens) {
    for (Index t = 0; t < tokens; t++, dt += s.row_in) {
        float *step = m.convolved;
        SIMD for (Index h = 0; h < s.heads; h++) {
            float raw = get(dt[h]) + (w.dt_bias ? w.dt_bias[h] : 0.0f);
            float soft = raw > 40.0f ? raw : log_of_one_plus(exponential(raw));
            soft = soft < s.dt_low ? s.dt_low : soft;
            step[h] = soft > s.dt_high ? s.dt_high : soft;
        }
        for (Index h = 0; h < s.heads; h++) m.steps[h * m.Q + t] = step[h];
    }
}

// Rows start..start + ROWS of M into m.factors, up to the diagonal and 0 right of it; D x_t is one more term of row t.
static void rows_of_M(const Scratch &m, Index start, Index rows, const float *steps, const float *scores, float D) {
    const double *cum = m.cum, border = start ? cum[start - 1] : 0.0;
    // Left of the diagonal block exp(cum_i - cum_j) is a product: up to the token before these rows, and from there on.
    SIMD for (Index j = 0; j < start; j++) m.decays[j] = exponential((float)(border - cum[j])) * steps[j];
    for (Index i = 0; i < rows; i++) {
        float *M = m.factors + i * m.Q;
        const float *score = scores + i * m.Q, after = exponential((float)(cum[start + i] - border));
        SIMD for (Index j = 0; j < start; j++) M[j] = after * score[j] * m.decays[j];
        const double at = cum[start + i];
        SIMD for (Index j = 0; j < ROWS; j++) {
            float decay = exponential((float)(at - cum[start + j])) * steps[start + j] * score[start + j];
            M[start + j] = j <= i ? decay : 0.0f;
        }
        M[start + i] += D;
    }
}

// Moves the state (state, P) of a head from the start to the end of the chunk.
static void hand_over(const Sizes &s, const Scratch &m, const float *x, const float *steps, const float *B, Index tokens,
                      bool first, float *state) {
    const double last = m.cum[tokens - 1];
    const float kept = exponential((float)last);
    if (first) memset(state, 0, s.state * m.P * 4);
    else SIMD for (Index k = 0; k < s.state * m.P; k++) state[k] *= kept;
    SIMD for (Index j = 0; j < tokens; j++) m.decays[j] = exponential((float)(last - m.cum[j])) * steps[j];
    for (Index k = 0; k < s.state; k += 4) {
        const Index rows = least(4, s.state - k);
        for (Index i = 0; i < rows; i++) {
            float *factors = m.factors + i * m.Q;
            const float *b = B + (k + i) * m.Q;
            SIMD for (Index j = 0; j < tokens; j++) factors[j] = m.decays[j] * b[j];
        }
        multiply_add(rows, m.factors, m.Q, x, m.P, tokens, m.P, state + k * m.P, m.P);
    }
}

// y of one head over one chunk, into its columns of m.y; x (tokens, P) are its convolved channels.
template <class T>
static void scan(const Sizes &s, const Scratch &m, const Chunk<T> &chunk, Index h, const float *x, float A, float D) {
    const Index Q = m.Q, P = m.P, g = h / (s.heads / s.groups), wide = s.groups * s.state, inner = s.heads * s.head_dim;
    const float *steps = m.steps + h * Q, *C = m.C + g * s.state;
    float *state = m.states + h * s.state * P;
    double sum = 0.0;
    for (Index i = 0; i < chunk.tokens; i++) m.cum[i] = sum += (double)steps[i] * (double)A;
    for (Index start = 0; start < chunk.tokens; start += ROWS) {
        const Index rows = least(ROWS, chunk.tokens - start);
        memset(m.sums, 0, rows * P * 4);
        if (!chunk.first) {  // C_i^T S exp(cum_i)
            for (Index i = 0; i < rows; i++) {
                const float decay = exponential((float)m.cum[start + i]), *c = C + (start + i) * wide;
                float *factors = m.factors + i * s.state;
                SIMD for (Index k = 0; k < s.state; k++) factors[k] = decay * c[k];
            }
            multiply_add(rows, m.factors, s.state, state, P, s.state, P, m.sums, P);
        }
        rows_of_M(m, start, rows, steps, m.scores + (g * s.chunk + start) * Q, D);
        for (Index i = 0; i < rows; i += 4) {  // up to the diagonal
            const Index some = least(4, rows - i);
            multiply_add(some, m.factors + i * Q, Q, x, P, start + i + some, P, m.sums + i * P, P);
        }
        for (Index i = 0; i < rows; i++)
            memcpy(m.y + (start + i) * inner + h * s.head_dim, m.sums + i * P, s.head_dim * 4);
    }
    if (!chunk.last) hand_over(s, m, x, steps, m.B + g * s.state * Q, chunk.tokens, chunk.first, state);
}

// out = weight * v / rms(v) over n entries; right where squares of a finite v leave float32, NaN where v is not finite.
template <class T>
static void norm_row(const float *v, const float *weight, double eps, Index n, T *out) {
    double squares = 0.0;
    for (Index c = 0; c < n; c += 64) {
        const Index stop = least(c + 64, n);
        float some = 0.0f;
        _Pragma("omp simd reduction(+ : some)") for (Index k = c; k < stop; k++) some += v[k] * v[k];
        squares += some;
    }
    if (!(squares > 1e-20 && squares < 1e38)) {
        squares = 0.0;
        for (Index c = 0; c < n; c++) squares += (double)v[c] * (double)v[c];
    }
    double rms = std::sqrt(squares / (double)n + eps);
    if (std::isinf(rms)) rms = NAN;
    const float divisor = (float)rms, factor = (float)(1.0 / rms);
    if (divisor < 1e-30f || divisor > 1e30f)  // 1 / rms has lost bits, or is 0 or infinite
        for (Index c = 0; c < n; c++) put(out[c], v[c] / divisor * weight[c]);
    else SIMD for (Index c = 0; c < n; c++) put(out[c], v[c] * factor * weight[c]);
}

// Gate and norm of m.y, rows (tokens, inner) -> out, which may lie over z and over the x that was convolved.
template <class T>
static void gate_and_norm(const Sizes &s, const Weights &w, const Scratch &m, const T *z, T *out, Index tokens) {
    const Index inner = s.heads * s.head_dim, part = inner / s.groups;
    for (Index t = 0; t < tokens; t++, z += s.row_in, out += s.row_out) {
        float *y = m.y + t * inner;
        if (s.gate) SIMD for (Index c = 0; c < inner; c++) y[c] *= silu(get(z[c]));
        if (!s.norm) SIMD for (Index c = 0; c < inner; c++) put(out[c], y[c]);
        else
            for (Index from = 0; from < inner; from += part)
                norm_row(y + from, w.norm + from, s.eps, part, out + from);
    }
}

// Convolution, scan, gate and norm of one excerpt: projected (tokens, [z,] x B C, dt) -> out (tokens, inner), which may be
// projected's first columns. D is (heads,).
template <class T>
static void mix(const Sizes &s, const Weights &w, const T *projected, const float *D, T *out, float *memory) {
    Scratch m;
    m.layout(s, memory);
    const Index inner = s.heads * s.head_dim, channels = inner + 2 * s.groups * s.state, P = m.P;
    if (P != s.head_dim) memset(m.x, 0, m.together * s.chunk * P * 4);  // its padding is multiplied too
    for (Index start = 0; start < s.tokens; start += s.chunk) {
        const T *rows = projected + start * s.row_in, *xBC = rows + (s.gate ? inner : 0);
        const Chunk<T> chunk = {xBC, least(s.chunk, s.tokens - start), start == 0, start + s.chunk >= s.tokens};
        score(s, w, m, chunk);
        time_steps(s, w, m, xBC + channels, chunk.tokens);
        for (Index h = 0; h < s.heads; h += m.together) {
            const Index n = least(m.together, s.heads - h);
            for (Index t = 0; t < chunk.tokens; t++) {
                convolve(s, w, m, chunk, t, h * s.head_dim, n * s.head_dim);
                for (Index k = 0; k < n; k++)
                    memcpy(m.x + (k * s.chunk + t) * P, m.convolved + k * s.head_dim, s.head_dim * 4);
            }
            for (Index k = 0; k < n; k++) scan(s, m, chunk, h + k, m.x + k * s.chunk * P, w.A[h + k], D[h + k]);
        }
        if (!chunk.last)  // before out overwrites them
            for (Index back = 1; back < s.taps; back++)
                memcpy((T *)m.history + (s.taps - 1 - back) * channels, xBC + (chunk.tokens - back) * s.row_in, channels * sizeof(T));
        gate_and_norm(s, w, m, rows, out + start * s.row_out, chunk.tokens);
    }
}

// Rows of X (rows, width), normed where there is a weight (width,).
template <class T>
static void enter(const float *X, const float *weight, double eps, Index rows, Index width, T *out) {
    for (Index t = 0; t < rows; t++, X += width, out += width)
        if (weight) norm_row(X, weight, eps, width, out);
        else SIMD for (Index c = 0; c < width; c++) put(out[c], X[c]);
}

// Y = skip X + scale O over n entries; a factor of 0 leaves X or O out, whatever it holds.
template <class T>
static void add(const float *X, const T *O, float skip, float scale, Index n, float *Y) {
    if (skip == 0.0f && scale == 0.0f) memset(Y, 0, n * 4);
    else if (skip == 0.0f) SIMD for (Index c = 0; c < n; c++) Y[c] = scale * get(O[c]);
    else if (scale == 0.0f) SIMD for (Index c = 0; c < n; c++) Y[c] = skip * X[c];
    else SIMD for (Index c = 0; c < n; c++) Y[c] = skip * X[c] + scale * get(O[c]);
}

#define EXPORTED(T, name)                                                                                                  \
    void mix_##name(const Sizes *s, const Weights *w, const T *projected, const float *D, T *out, float *memory) {         \
        mix(*s, *w, projected, D, out, memory);                                                                            \
    }                                                                                                                      \
    void enter_##name(const float *X, const float *weight, double eps, Index rows, Index width, T *out) {                  \
        enter(X, weight, eps, rows, width, out);                                                                           \
    }                                                                                                                      \
    void add_##name(const float *X, const T *O, float skip, float scale, Index n, float *Y) { add(X, O, skip, scale, n, Y); }

extern "C" {
EXPORTED(float, float32)
EXPORTED(bf16, bfloat16)
const char *vectors() { return VECTORS; }
// How many floats of memory `mix` needs.
Index scratch_floats(const Sizes *s) {
    Scratch m;
    return m.layout(*s, nullptr);
}
}
