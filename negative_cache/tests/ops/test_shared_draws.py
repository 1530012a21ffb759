"""Tests of draws that all queries share: shares, strata, weights, and what follows from them."""

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops import shared_draws
from negative_cache.ops.shared_draws import balanced_weights, choose_queries, mixture_shares
from negative_cache.tests.statistics import assert_draws_follow

NOTHING = -1e30
# The largest number that a generator of uniform float32 returns, and the smallest.
EDGES = [np.nextafter(np.float32(1.0), np.float32(0.0)), np.float32(0.0)]


@pytest.fixture
def checked():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


# Shares.

log_weights = st.one_of(
    st.floats(-1e4, 1e4, width=32), st.sampled_from([math.nan, math.inf, -math.inf, NOTHING])
)


@given(st.lists(log_weights, min_size=1, max_size=12))
def test_nine_tenths_follow_the_weights_and_one_tenth_is_alike(values):
    values = np.array(values, np.float64)
    has_some = np.isfinite(values) & (values > -1e29)
    expected = np.zeros(len(values))
    if has_some.any():
        weights = np.exp(values[has_some] - values[has_some].max())
        expected[has_some] = 0.9 * weights / weights.sum() + 0.1 / has_some.sum()
    found = mixture_shares(tf.constant(values, tf.float32)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    # Exactly: a query without a share must never be chosen.
    np.testing.assert_array_equal(found > 0.0, has_some)
    assert found.sum() == pytest.approx(float(has_some.any()), abs=1e-5)


def test_an_empty_batch_has_no_shares():
    assert mixture_shares(tf.zeros([0])).shape == [0]


def test_shares_are_finite_in_every_part(checked):
    for values in ([0.0, NOTHING, -1e4], [NOTHING, NOTHING], [3.0], [-1e28, 0.0]):
        shares = mixture_shares(tf.constant(values)).numpy()
        np.testing.assert_array_equal(shares > 0.0, np.array(values) > -1e29)


# Strata.


def law_of_strata(shares, num_draws):
    """[n, B] float64, P(draw j is from query x): how much of the j-th n-th of [0, 1) is x's."""
    ends = np.cumsum(np.asarray(shares, np.float64))
    ends /= ends[-1]
    starts = np.concatenate([[0.0], ends[:-1]])
    first = np.arange(num_draws)[:, np.newaxis] / num_draws
    overlaps = np.minimum(ends, first + 1 / num_draws) - np.maximum(starts, first)
    return num_draws * np.maximum(overlaps, 0.0)


def with_uniforms(monkeypatch, values):
    """Lets the draws be made with given uniform numbers, [n] or a scalar for all of them."""
    monkeypatch.setattr(
        shared_draws,
        "draw_uniforms",
        lambda shape, seed: tf.broadcast_to(tf.constant(values, tf.float32), shape),
    )


SHARES = [0.05, 0.0, 0.3, 0.45, 0.2, 0.0]


@pytest.mark.parametrize("num_draws", [1, 2, 3, 6, 11])
def test_the_law_of_a_choice_is_that_of_its_stratum(num_draws, monkeypatch):
    # By the midpoints of a grid the law is known to 1 / 400 for each of two ends of an interval.
    counts = np.zeros([num_draws, len(SHARES)])
    for uniform in (np.arange(400) + 0.5) / 400:
        with_uniforms(monkeypatch, uniform)
        chosen = choose_queries(tf.constant(SHARES), num_draws, [1, 2]).numpy()
        counts[np.arange(num_draws), chosen] += 1 / 400
    np.testing.assert_allclose(counts, law_of_strata(SHARES, num_draws), atol=2 / 400)


def test_choices_have_that_law_and_are_independent():
    num_draws = 3

    @tf.function
    def choose(seeds):
        return tf.map_fn(
            lambda seed: choose_queries(tf.constant(SHARES), num_draws, seed),
            seeds,
            fn_output_signature=tf.int32,
        )

    seeds = tf.stack([tf.range(4000), tf.ones([4000], tf.int32)], axis=1)
    chosen = choose(seeds).numpy()
    law = law_of_strata(SHARES, num_draws)
    joint = np.einsum("a,b,c->abc", *law).reshape(-1)
    assert_draws_follow(chosen @ [36, 6, 1], joint)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any),
    st.integers(1, 60),
    st.integers(0, 2**31 - 1),
)
def test_a_query_is_chosen_as_often_as_its_share_but_for_the_two_strata_at_its_ends(
    parts, num_draws, seed
):
    shares = np.array(parts, np.float32) / sum(parts)
    chosen = choose_queries(tf.constant(shares), num_draws, [seed, 0]).numpy()
    assert chosen.shape == (num_draws,) and chosen.dtype == np.int32
    assert np.all(np.diff(chosen) >= 0)
    counts = np.bincount(chosen, minlength=len(shares))
    assert np.all(np.abs(counts - num_draws * shares) < 2.0 + 1e-3)
    assert np.all(counts[shares == 0.0] == 0)


@pytest.mark.parametrize("num_queries", [1, 5, 64])
@pytest.mark.parametrize("times", [1, 3])
def test_equal_shares_are_chosen_equally_often(num_queries, times):
    shares = mixture_shares(tf.zeros([num_queries]))
    chosen = choose_queries(shares, times * num_queries, [3, 4])
    np.testing.assert_array_equal(chosen, np.repeat(np.arange(num_queries), times))


@pytest.mark.parametrize("num_draws", [1, 3, 64, 1000])
@pytest.mark.parametrize("uniform", EDGES)
def test_a_query_without_a_share_is_not_chosen_by_the_extreme_numbers(
    uniform, num_draws, monkeypatch
):
    # n - 1 + 0.99999994 is n in float32, from n = 3 on.
    with_uniforms(monkeypatch, uniform)
    for shares in ([0.0, 0.5, 0.5, 0.0], [0.0, 0.1, 0.0], [0.0, 0.3, 0.3, 0.3, 0.1, 0.0]):
        chosen = choose_queries(tf.constant(shares), num_draws, [1, 2]).numpy()
        assert np.all(np.array(shares)[chosen] > 0.0)
        assert chosen[0] == 1 or uniform > 0.0


def test_other_seeds_choose_otherwise_and_the_same_seed_does_not():
    shares = mixture_shares(0.1 * tf.range(9.0))
    first, again, other = (choose_queries(shares, 20, seed) for seed in ([1, 2], [1, 2], [1, 3]))
    np.testing.assert_array_equal(first, again)
    assert np.any(first.numpy() != other.numpy())


@pytest.mark.parametrize("is_known", [True, False])
def test_of_an_empty_batch_nobody_is_chosen(is_known):
    shape = [0] if is_known else [None]
    choose = tf.function(
        lambda shares: choose_queries(shares, 4, [1, 2]), input_signature=[tf.TensorSpec(shape)]
    )
    assert choose(tf.zeros([0])).shape == [0]
    assert choose_queries(tf.zeros([0]), 4, [1, 2]).shape == [0]


def test_of_queries_without_any_share_some_are_chosen():
    chosen = choose_queries(tf.zeros([3]), 5, [1, 2]).numpy()
    assert chosen.shape == (5,) and np.all((chosen >= 0) & (chosen < 3))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("size", [None, 5])
def test_queries_are_chosen_alike_in_graphs(jit_compile, size):
    def draw(log_weights):
        shares = mixture_shares(log_weights)
        return choose_queries(shares, -(-tf.size(shares) // 2), [5, 6])

    values = tf.constant([0.0, 1.0, NOTHING, 2.0, 0.5])
    spec = tf.TensorSpec([size])
    in_graph = tf.function(draw, input_signature=[spec], jit_compile=jit_compile)
    np.testing.assert_array_equal(in_graph(values), draw(values))
    assert in_graph(values).shape == [3]
    if size is None:
        assert in_graph(values[:2]).shape == [1]
        assert in_graph(values[:0]).shape == [0]


# Weights.


def random_law(rng, queries, candidates, left_out=0.2):
    """[B, C] float64 P(y|x) with some zeros; every query has a candidate."""
    law = rng.dirichlet(np.full(candidates, 0.7), size=queries)
    law[:, 1:] *= rng.random([queries, candidates - 1]) > left_out
    return law / law.sum(axis=1, keepdims=True)


def log_of(law):
    return np.where(law > 0.0, np.log(np.maximum(law, 1e-300)), NOTHING).astype(np.float32)


def weights_by_formula(law, shares):
    """[B, n]: P(y_j|x) / (n Σ_x' π_x' P(y_j|x')); zero if the draw is nobody's."""
    mixture = np.asarray(shares, np.float64) @ law
    return np.divide(law, mixture * law.shape[1], out=np.zeros_like(law), where=mixture > 0.0)


problems = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6))


@given(problems)
def test_weights_are_the_formula(problem):
    queries, draws, seed = problem
    rng = np.random.default_rng(seed)
    law = random_law(rng, queries, draws)
    shares = rng.dirichlet(np.ones(queries))
    found = balanced_weights(log_of(law), tf.constant(shares, tf.float32)).numpy()
    np.testing.assert_allclose(found, weights_by_formula(law, shares), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[law == 0.0], 0.0)
    # Σ_x π_x w_xj = 1 / n for every draw that some query can have drawn.
    is_drawable = np.any(law > 0.0, axis=0)
    np.testing.assert_allclose(shares @ found, is_drawable / draws, rtol=1e-4, atol=1e-7)


@given(problems)
def test_no_weight_exceeds_what_the_tenth_allows(problem):
    queries, draws, seed = problem
    rng = np.random.default_rng(seed)
    shares = mixture_shares(tf.constant(10.0 * rng.normal(size=queries), tf.float32))
    found = balanced_weights(log_of(random_law(rng, queries, draws)), shares).numpy()
    assert np.all(found <= 10.0 * queries / draws * (1 + 1e-4))


def test_a_query_without_a_share_has_no_weights_and_counts_in_none():
    # Its log partition is none, so that its log probabilities are of anything.
    log_law = np.log([[0.5, 0.25], [0.2, 0.6]]).astype(np.float32)
    alone = balanced_weights(log_law, tf.constant([0.3, 0.7])).numpy()
    for anything in (0.0, 1e30, NOTHING, math.nan, math.inf):
        rows = np.concatenate([log_law, np.full([1, 2], anything, np.float32)])
        found = balanced_weights(rows, tf.constant([0.3, 0.7, 0.0])).numpy()
        np.testing.assert_allclose(found[:2], alone, rtol=1e-6)
        np.testing.assert_array_equal(found[2], [0.0, 0.0])


def test_a_nan_is_of_its_pair_alone():
    log_law = np.log([[0.5, 0.25], [0.2, 0.6]]).astype(np.float32)
    log_law[1, 0] = math.nan
    found = balanced_weights(log_law, tf.constant([0.5, 0.5])).numpy()
    expected = weights_by_formula(np.array([[0.5, 0.25], [0.0, 0.6]]), [0.5, 0.5])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("tiny", [1e-37, 1e-20, 0.0])
def test_tiny_shares_neither_overflow_nor_give_nan(tiny, checked):
    # The first draw is likely for the query of tiny share only, and the last is nobody's.
    log_law = tf.constant([[-1e-3, -50.0, NOTHING], [-1e4, -1e-3, NOTHING], [NOTHING] * 3])
    found = balanced_weights(log_law, tf.constant([tiny, 1.0, 0.0])).numpy()
    assert np.all(np.isfinite(found))
    if tiny:
        # P / (n π P), to the precision of exp and log.
        np.testing.assert_allclose(found[0, 0], 1.0 / (3 * tiny), rtol=1e-4)
    # Beside it, the other query is the only one.
    np.testing.assert_allclose(found[1, 1], 1.0 / 3, rtol=1e-4)
    np.testing.assert_array_equal(found[:, 2], [0.0] * 3)
    np.testing.assert_array_equal(found[2], [0.0] * 3)


@pytest.mark.parametrize("shape", [(0, 0), (3, 0), (0, 2)])
def test_nothing_has_no_weights(shape):
    assert balanced_weights(tf.zeros(shape), tf.zeros(shape[:1])).shape == shape


@pytest.mark.parametrize("jit_compile", [False, True])
def test_weights_in_graphs_of_unknown_sizes(jit_compile):
    rng = np.random.default_rng(0)
    weigh = tf.function(
        balanced_weights,
        input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None])],
        jit_compile=jit_compile,
    )
    for queries, draws in ((4, 3), (2, 7)):
        law, shares = random_law(rng, queries, draws), rng.dirichlet(np.ones(queries))
        found = weigh(log_of(law), tf.constant(shares, tf.float32))
        np.testing.assert_allclose(found, weights_by_formula(law, shares), rtol=1e-4, atol=1e-6)


# The estimator, by enumeration: every outcome of n draws, with its probability.


def outcomes(law, shares, num_draws):
    """Yields each outcome's probability and the weights [B, n] of its draws, and the draws."""
    laws = law_of_strata(shares, num_draws) @ law
    for draws in itertools.product(range(law.shape[1]), repeat=num_draws):
        probability = np.prod(laws[np.arange(num_draws), list(draws)])
        if probability > 0.0:
            log_law = tf.constant(log_of(law)[:, list(draws)])
            weights = balanced_weights(log_law, tf.constant(shares, tf.float32)).numpy()
            yield probability, weights, list(draws)


@pytest.mark.parametrize("num_draws", [1, 2, 3, 4])
def test_every_query_has_the_mean_under_its_own_softmax(num_draws):
    rng = np.random.default_rng(num_draws)
    law, values = random_law(rng, 3, 4), rng.normal(size=[3, 4])
    # A row that is no negative of a query, and one that is of a single query.
    law[0, 3] = law[1:, 2] = 0.0
    law /= law.sum(axis=1, keepdims=True)
    shares = mixture_shares(tf.constant([0.0, -3.0, 1.0])).numpy()
    total, means = 0.0, np.zeros(3)
    for probability, weights, draws in outcomes(law, shares, num_draws):
        total += probability
        means += probability * np.sum(weights * values[:, draws], axis=1)
    assert total == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(means, np.sum(law * values, axis=1), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 3), st.integers(0, 10**6), st.booleans())
def test_the_variance_is_bounded_as_the_documentation_says(num_draws, seed, with_tenth):
    rng = np.random.default_rng(seed)
    law, importance = random_law(rng, 3, 4), rng.uniform(0.01, 1.0, size=3)
    values = rng.normal(size=[3, 4, 2])
    largest = np.max(np.linalg.norm(values, axis=2))
    total = importance.sum()
    shares = importance / total
    if with_tenth:
        shares = mixture_shares(tf.constant(np.log(importance), tf.float32)).numpy()

    def of_batch(weights, draws):
        """Σ_x ω_x F(x)."""
        return np.einsum("x,xj,xjd->d", importance, weights, values[:, draws])

    found = [
        (p, of_batch(weights, draws)) for p, weights, draws in outcomes(law, shares, num_draws)
    ]
    mean = np.einsum("x,xy,xyd->d", importance, law, values)
    variance = sum(p * np.sum((value - mean) ** 2) for p, value in found)
    # Independent draws from Q: the variance of one of them, over n.
    mixture = shares @ law
    alone = [of_batch(law[:, [y]] / mixture[y], [y]) for y in range(4) if mixture[y] > 0.0]
    alone = np.array(alone) - mean
    independent = np.sum(mixture[mixture > 0.0] * np.sum(alone**2, axis=1)) / num_draws
    assert variance <= independent * (1 + 1e-4) + 1e-9
    # With the tenth, no draw weighs more than Ω / 0.9 n.
    bound = (total * largest / (0.9 if with_tenth else 1.0)) ** 2 / num_draws
    assert independent <= bound * (1 + 1e-4)
