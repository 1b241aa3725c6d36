"""Corrected statements on random instances; actual values are computed here with plain numpy."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lscollapse.theory import bounds, certificates, constants, theorem41

SLACK = 1 + 1e-9
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(2, 7), st.integers(1, 5))
signs = st.sampled_from([-1, 1])
examples = settings(max_examples=60, deadline=None, derandomize=True)


def rownorm(Z):
    lengths = np.linalg.norm(Z, axis=1, keepdims=True)
    assume(lengths.min() > 1e-6)
    return Z / lengths


def m_of(Y):
    return np.linalg.norm(Y - Y.mean(0)) / np.linalg.norm(Y)


def stochastic(rng, N, sharp=1.0):
    weights = np.exp(sharp * rng.standard_normal((N, N)))
    return weights / weights.sum(1, keepdims=True)


def mixer(rng, N, kind):
    noise = rng.standard_normal((N, N))
    return {
        "gaussian": noise,
        "attention": stochastic(rng, N, 2.0),
        "causal": np.tril(noise),
        "rank one": np.outer(noise[0], noise[1]),
        "averaging": np.ones((N, N)) / N - 0.7 * (np.eye(N) - 1 / N),
    }[kind]


kinds = st.sampled_from(["gaussian", "attention", "causal", "rank one", "averaging"])


def start(rng, N, d, spread):
    return rownorm(rng.standard_normal(d) + spread * rng.standard_normal((N, d)))


spreads = st.sampled_from([0.05, 0.5, 3.0])


@examples
@given(seeds, sizes, kinds, signs, spreads, st.floats(0.1, 30))
def test_repaired_one_step_inequality(seed, size, kind, sign, spread, strength):
    rng, (N, d) = np.random.default_rng(seed), size
    Y, M, C_V = start(rng, N, d, spread), mixer(rng, N, kind), np.eye(d) + 0.3 * rng.standard_normal((d, d))
    sigma, C = np.linalg.svd(C_V)[1], np.linalg.svd(M)[1][0]
    assume(sigma[-1] > 1e-3)
    lam = sign * strength * C
    after = rownorm((lam * Y + M @ Y) @ C_V)
    bound = theorem41.one_step(N * m_of(Y) ** 2, lam, N, C, sigma[-1], sigma[0])
    assert N * m_of(after) ** 2 * SLACK >= bound


@examples
@given(seeds, sizes, kinds, signs, spreads, st.floats(0.05, 0.99), st.integers(1, 8), st.booleans())
def test_theorem41_at_the_smallest_certified_lambda(seed, size, kind, sign, spread, a, K, repaired):
    rng, (N, d) = np.random.default_rng(seed), size
    Ms, Y0 = [mixer(rng, N, kind) for _ in range(K)], start(rng, N, d, spread)
    assume(m_of(Y0) > 1e-3)
    C = max(np.linalg.norm(M, 2) if repaired else np.linalg.norm(M) for M in Ms)
    variant = "repaired" if repaired else "abs"
    lam = sign * theorem41.lambda_required(a, K, C, min(1.0, m_of(Y0) ** 2), variant=variant) * (1 + 1e-9)
    assert theorem41.b(lam, a, K, N, C, variant=variant) <= N * m_of(Y0) ** 2 * SLACK
    Y = Y0
    for M in Ms:
        Y = rownorm(lam * Y + M @ Y)
    assert m_of(Y) ** 2 * SLACK >= a**K * m_of(Y0) ** 2


@examples
@given(seeds, sizes, signs, spreads, st.integers(1, 8), st.floats(0.5, 6), st.sampled_from([0.0, 1.0, 100.0]))
def test_angle_certificates(seed, size, sign, spread, K, room, pull):
    """A priori and a posteriori, on outputs that pull towards the mean row or not."""
    rng, (N, d) = np.random.default_rng(seed), size
    Ys, gains = [start(rng, N, d, spread)], rng.uniform(0.1, 2, K)
    lam = sign * room * gains.sum()
    for G in gains:
        Y = Ys[-1]
        out = rng.standard_normal((N, d)) + pull * sign * (Y.mean(0) - Y)
        Ys.append(rownorm(lam * Y + G * rownorm(out)))
    actual = np.array([m_of(Y) for Y in Ys]) + 1e-9
    assert (actual >= certificates.certificate(min(1.0, m_of(Ys[0])), gains, lam)).all()
    assert (actual >= certificates.measured(np.array(Ys), lam)).all()


@examples
@given(seeds, sizes, kinds, signs, spreads, st.floats(1, 20))
def test_angle_certificate_for_eq6(seed, size, kind, sign, spread, strength):
    rng, (N, d) = np.random.default_rng(seed), size
    Y, M, C_V = start(rng, N, d, spread), mixer(rng, N, kind), np.eye(d) + 0.3 * rng.standard_normal((d, d))
    sigma, G = np.linalg.svd(C_V)[1], np.abs(M).sum(1).max()
    lam = sign * strength * G
    bound = certificates.one_step_eq6(min(1.0, m_of(Y)), lam, G, sigma[-1], sigma[0])
    assert m_of(rownorm((lam * Y + M @ Y) @ C_V)) + 1e-9 >= bound


@examples
@given(seeds, sizes, signs, spreads, st.integers(1, 40), st.floats(1.05, 6), st.floats(0.01, 1.5))
def test_prenorm_certificates(seed, size, sign, spread, K, strength, gain):
    """A-priori at depth K, at infinite depth, and from measured ratios; constant bound on the norm of O."""
    rng, (N, d) = np.random.default_rng(seed), size
    X = rng.standard_normal(d) + spread * rng.standard_normal((N, d))
    m0, r0, lam, ratios = m_of(X), np.linalg.norm(X), sign * strength, []
    G = gain * r0 * (strength - 1)
    for _ in range(K):
        out = 0.1 * rng.standard_normal((N, d)) - sign * (X - X.mean(0)) / np.linalg.norm(X)
        out *= G / np.linalg.norm(out)
        ratios.append(np.linalg.norm(out) / (strength * np.linalg.norm(X)))
        X = lam * X + out
    actual = m_of(X) + 1e-9
    assert actual >= certificates.prenorm_certificate(min(1.0, m0), lam, np.full(K, G), r0)[-1]
    assert actual >= certificates.prenorm_certificate_infinite(min(1.0, m0), lam, G, r0)
    assert actual >= certificates.from_ratios(min(1.0, m0), ratios)[-1]


def cone(rng, N, d):
    return rownorm(np.abs(rng.standard_normal((N, d))) + rng.choice([0.0, 1.0]))


@examples
@given(seeds, sizes, st.integers(1, 4), st.booleans())
def test_theorem42_explicit(seed, size, blocks, window):
    """Full attention, or a causal window of one past token, where r = N - 1; orthogonal value matrices."""
    rng, (N, d) = np.random.default_rng(seed), size
    r = N - 1 if window else 1
    mask = np.tri(N) - np.tri(N, k=-2) if window else np.ones((N, N))
    Ms = np.array([stochastic(rng, N, 2.0) * mask for _ in range(blocks * r)])
    Ms /= Ms.sum(2, keepdims=True)
    Y, W = cone(rng, N, d), np.linalg.qr(rng.standard_normal((d, d)))[0]
    bound = bounds.attention_layernorm(Ms, max(0.0, (Y @ Y.T).min().clip(max=1)), r)
    for M in Ms:
        Y = rownorm(M @ Y @ W)
    assert np.sqrt(N) * m_of(Y) <= bound[-1] * SLACK + 1e-9


@examples
@given(seeds, sizes, st.integers(1, 6), st.floats(0.05, 1.0), st.sampled_from([0.0, 0.3, 1.0, 10.0]), st.booleans())
def test_theorem43_corrected_and_with_skip(seed, size, K, alpha, lam, isotropic):
    rng, (N, d) = np.random.default_rng(seed), size
    Y, W = cone(rng, N, d), np.eye(d) * 2 if isotropic else np.abs(rng.standard_normal((d, d)))
    lag = np.subtract.outer(np.arange(N), np.arange(N))
    L, phi0, Ms = np.where(lag >= 0, alpha ** np.abs(lag), 0.0), (Y @ Y.T).min().clip(0, 1), []
    for _ in range(K):
        Ms.append(L * (Y @ W @ Y.T))
        assume((Ms[-1] >= 0).all())
        Y = rownorm(lam * Y + Ms[-1] @ Y)
    assert np.sqrt(N) * m_of(Y) <= bounds.layernorm(Ms, phi0, lam)[-1] * SLACK + 1e-9


@examples
@given(seeds, sizes, st.booleans(), st.floats(0.05, 1.0))
def test_lemmas_a4_and_a5_corrected(seed, size, symmetric, alpha):
    rng, (N, d) = np.random.default_rng(seed), size
    Y, W = cone(rng, N, d), rng.standard_normal((d, d))
    W = W @ W.T if symmetric else W
    phi = (Y @ Y.T).min().clip(0, 1)
    assert (Y @ W @ Y.T).min() >= bounds.entry_factor(W, phi) - 1e-9
    lag = np.subtract.outer(np.arange(N), np.arange(N))
    M = np.where(lag >= 0, alpha ** np.abs(lag), 0.0) * (Y @ W @ Y.T)
    assert np.linalg.norm(M @ Y, axis=1).max() <= SLACK / bounds.layernorm_factor(W, N)
    if symmetric and alpha > 0.3:
        Q = M / M.sum(1, keepdims=True)
        assert (Q @ Q.T).min() * SLACK >= bounds.selective_overlap(W, phi, alpha, N) or (M < 0).any()


@examples
@given(seeds, sizes, st.floats(0.1, 1.0), st.floats(0.1, 2.0))
def test_attention_without_layernorm(seed, size, scale, weight):
    rng, (N, d) = np.random.default_rng(seed), size
    Y = rng.standard_normal(d) + scale * rng.standard_normal((N, d))
    W, V = weight * rng.standard_normal((d, d)), rng.standard_normal((d, d))
    B, mu0 = np.linalg.norm(W, 2) * np.linalg.norm(V, 2), np.linalg.norm(Y - Y.mean(0))
    for k in (1, 2):
        one_step = bounds.attention_one_step(Y, B)
        logits = Y @ W @ Y.T
        M = np.exp(logits - logits.max(1, keepdims=True))
        Y = (M / M.sum(1, keepdims=True)) @ Y @ V
        mu = np.linalg.norm(Y - Y.mean(0))
        assert mu <= one_step * SLACK + 1e-12 * np.linalg.norm(Y)
        assert np.log(mu + 1e-300) <= max(
            bounds.attention_log_bound(B, mu0, k), np.log(1e-12 + 1e-12 * np.linalg.norm(Y))
        )


@examples
@given(seeds, sizes, st.integers(1, 6), st.floats(0.2, 3.0))
def test_lti_bounds(seed, size, K, scale):
    rng, (N, d) = np.random.default_rng(seed), size
    Ws, Y = scale * np.tril(rng.standard_normal((K, N, N))), rng.standard_normal((N, d))
    found, total = bounds.lti(Ws, np.linalg.norm(Y)), np.linalg.norm(Y)
    for W in Ws:
        Y, total = W @ Y, total * np.linalg.norm(W, 2)
    assert np.linalg.norm(Y - Y.mean(0)) <= np.exp(found.sharp) + 1e-9 * total
    assert found.sharp <= found.spectral + 1e-9 and found.spectral <= found.frobenius + 1e-9
    np.testing.assert_allclose(np.exp(found.spectral), total)


@examples
@given(seeds, sizes, st.integers(1, 4), st.floats(-1.0, 1.0), st.floats(0.1, 2.0))
def test_selective_without_layernorm(seed, size, K, alpha, scale):
    rng, (N, d) = np.random.default_rng(seed), size
    Y, W = rng.standard_normal((N, d)), scale * rng.standard_normal((d, d))
    lag, norm0 = np.subtract.outer(np.arange(N), np.arange(N)), np.linalg.norm(Y)
    for k in range(1, K + 1):
        Y = np.where(lag >= 0, alpha ** np.abs(lag), 0.0) * (Y @ W @ Y.T) @ Y
        size_k = np.linalg.norm(Y)
        assume(1e-60 < size_k < 1e60)
        sharp = bounds.selective_log_bound(W, N, norm0, k, sharp=True)
        assert np.log(size_k) <= sharp + 1e-9
        assert sharp <= bounds.selective_log_bound(W, N, norm0, k) + 1e-9


@examples
@given(seeds, st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)))
def test_lemma_a1_and_the_norms_of_corollary_a31(seed, size):
    rng, (m, n, extra) = np.random.default_rng(seed), size
    A, B = rng.standard_normal((m, n)), rng.standard_normal((n, n + extra))
    assert np.linalg.norm(A @ B) * SLACK >= bounds.product_lower_bound(A, B)
    mixed = np.sqrt(np.abs(A).sum(0).max() * np.abs(A).sum(1).max())
    assert mixed <= A.size**0.25 * np.linalg.norm(A) * SLACK
    assert np.linalg.norm(A) <= np.sqrt(min(m, n)) * mixed * SLACK


@examples
@given(seeds, sizes, st.floats(-1.0, 1.0), st.integers(1, 4))
def test_footnote3_corrected(seed, size, alpha, H):
    rng, (N, d) = np.random.default_rng(seed), size
    lag = np.subtract.outer(np.arange(N), np.arange(N))
    Y, W = start(rng, N, d, 1.0), rng.standard_normal((d, d))
    M = np.where(lag >= 0, alpha ** np.abs(lag), 0.0) * (Y @ W @ Y.T)
    limit = constants.selective(W, alpha, N)
    assert np.linalg.norm(M) <= limit.frobenius * SLACK and np.abs(M).sum(1).max() <= limit.max_row_sum * SLACK
    A, B, C = rng.standard_normal((H, H)) / np.sqrt(H), rng.standard_normal((H, 1)), rng.standard_normal((1, H))
    kernel = np.array([(C @ np.linalg.matrix_power(A, s) @ B).item() for s in range(N)])
    M = np.where(lag >= 0, kernel[np.abs(lag)], 0.0)
    limit = constants.lti(np.linalg.norm(A, 2), np.linalg.norm(B, 2), np.linalg.norm(C, 2), N)
    assert np.linalg.norm(M) <= limit.frobenius * SLACK and np.abs(M).sum(1).max() <= limit.max_row_sum * SLACK
    assert np.linalg.norm(stochastic(rng, N, 3.0)) <= np.sqrt(N)


@examples
@given(seeds, sizes, st.integers(1, 3), st.integers(1, 3))
def test_attention_gains(seed, size, h, e):
    rng, (N, d) = np.random.default_rng(seed), size
    Ms = np.array([stochastic(rng, N, 2.0) for _ in range(h)])
    V, O = rng.standard_normal((h, d, e)), rng.standard_normal((h, e, d))
    X = start(rng, N, d, 2.0)
    out = np.concatenate([M @ X @ v for M, v in zip(Ms, V, strict=True)], axis=1) @ np.concatenate(O)
    limit = constants.attention(Ms, V, O)
    assert np.linalg.norm(out, axis=1).max() <= limit.row * SLACK + 1e-12
    assert np.linalg.norm(out) <= limit.frobenius * np.linalg.norm(X) * SLACK + 1e-12
