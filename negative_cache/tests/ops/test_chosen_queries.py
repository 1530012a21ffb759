"""Tests of exact draws for some queries only, of none, and of candidates at a limit."""

import math

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.ops import _execution, sample_softmax, sample_softmax_with_gradient
from negative_cache.tests.statistics import assert_draws_follow

QUERIES, CANDIDATES, DIM = 4, 150, 4
# One query several times, another not at all, in no order.
CHOSEN = [2, 0, 2, 3, 2]


@pytest.fixture(autouse=True, params=["CPU", "GPU"])
def device_type(request, monkeypatch):
    """Draws as on a CPU, and as on a GPU: by other code, of the same law."""
    monkeypatch.setattr(_execution, "device_type", lambda like=None: request.param)
    return request.param


def random_problem(queries=QUERIES, candidates=CANDIDATES):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=[queries, DIM]).astype(np.float32),
        rng.normal(size=[candidates, DIM]).astype(np.float32),
    )


def always(chosen):
    return lambda log_partition: tf.constant(chosen, tf.int32)


def options():
    """What shapes the law of each query otherwise, and the scores that it leads to."""
    queries, candidates = random_problem()
    rng = np.random.default_rng(1)
    mask, ids = rng.random(CANDIDATES) < 0.7, np.arange(CANDIDATES) % 9
    weights = rng.normal(size=CANDIDATES).astype(np.float32)
    positive_ids = np.array([[0, 1], [2, 2], [3, 8], [4, 5]])
    limits = np.array([1.0, 2.0, 0.5, 3.0], np.float32)
    scores = queries.astype(np.float64) @ candidates.T
    scores = np.where(scores <= limits[:, np.newaxis], scores, -np.inf) + weights
    is_left_out = np.any(ids[:, np.newaxis] == positive_ids[:, np.newaxis], axis=2)
    scores[is_left_out | ~mask] = -np.inf
    return scores, {
        "candidate_mask": mask,
        "candidate_ids": ids,
        "positive_ids": positive_ids,
        "log_weights": weights,
        "max_scores": limits,
    }


def check_law(sample, gradient, scores, chosen):
    """Checks a sample of many draws for `chosen` queries against scores [B, C]."""
    _, candidates = random_problem()
    log_partition = np.logaddexp.reduce(scores, axis=1)
    law = np.exp(scores - log_partition[:, np.newaxis])
    np.testing.assert_allclose(sample.log_partition, log_partition, rtol=1e-5)
    np.testing.assert_allclose(gradient, law @ candidates, rtol=1e-4, atol=1e-5)
    assert sample.indices.shape[0] == sample.scores.shape[0] == len(chosen)
    indices = sample.indices.numpy()
    for query in set(chosen):
        places = np.flatnonzero(np.array(chosen) == query)
        assert_draws_follow(indices[places], law[query])
    expected = np.take_along_axis(scores[chosen], indices, axis=1)
    np.testing.assert_allclose(sample.scores, expected, rtol=1e-4, atol=1e-4)


def draw_for_chosen(queries, candidates, **options):
    return sample_softmax_with_gradient(
        queries, candidates, num_samples=4000, choose_queries=always(CHOSEN), **options
    )


# One block; blocks that do not divide the candidates; many.
@pytest.mark.parametrize("block_size", [None, 128, 7])
def test_draws_for_chosen_queries_have_their_laws(block_size):
    queries, candidates = random_problem()
    sample, gradient = draw_for_chosen(queries, candidates, block_size=block_size, seed=1)
    check_law(sample, gradient, queries.astype(np.float64) @ candidates.T, CHOSEN)


@pytest.mark.parametrize("block_size", [None, 128])
def test_each_chosen_query_keeps_its_own_options(block_size):
    queries, candidates = random_problem()
    scores, scoring = options()
    sample, gradient = draw_for_chosen(
        queries, candidates, block_size=block_size, seed=2, **scoring
    )
    check_law(sample, gradient, scores, CHOSEN)


def test_draws_of_one_query_that_was_chosen_twice_are_independent():
    queries, candidates = random_problem(candidates=6)
    sample, _ = sample_softmax_with_gradient(
        queries, candidates, num_samples=20_000, choose_queries=always([1, 1]), seed=5
    )
    scores = candidates.astype(np.float64) @ queries[1]
    law = np.exp(scores - np.logaddexp.reduce(scores))
    assert_draws_follow([6, 1] @ sample.indices.numpy(), np.outer(law, law).reshape(-1))


def test_the_choice_is_made_by_the_log_partitions():
    queries, candidates = random_problem()
    seen = []

    def choose(log_partition):
        seen.append(log_partition.numpy())
        return tf.argsort(log_partition)[:2]

    sample, _ = sample_softmax_with_gradient(
        queries, candidates, num_samples=3, choose_queries=choose
    )
    scores = queries.astype(np.float64) @ candidates.T
    expected = np.logaddexp.reduce(scores, axis=1)
    np.testing.assert_allclose(seen, [expected], rtol=1e-5)
    lowest = np.argsort(expected)[:2]
    found = np.take_along_axis(scores[lowest], sample.indices.numpy(), axis=1)
    np.testing.assert_allclose(sample.scores, found, rtol=1e-4, atol=1e-5)


def test_all_in_order_is_no_choice():
    queries, candidates = random_problem()
    kwargs = {"num_samples": 3, "block_size": 128, "seed": 4}
    chosen = sample_softmax_with_gradient(
        queries, candidates, choose_queries=always(range(QUERIES)), **kwargs
    )
    plain = sample_softmax_with_gradient(queries, candidates, **kwargs)
    for one, other in zip(tf.nest.flatten(chosen), tf.nest.flatten(plain)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_sizes_may_be_unknown(jit_compile):
    _, candidates = random_problem()
    variable = tf.Variable(candidates)

    @tf.function(
        input_signature=[tf.TensorSpec([None, DIM]), tf.TensorSpec([None], tf.int32)],
        jit_compile=jit_compile,
    )
    def sample(queries, chosen):
        return sample_softmax_with_gradient(
            queries, variable, num_samples=2, choose_queries=lambda _: chosen, seed=[1, 2]
        )

    for num_queries, chosen in ((4, CHOSEN), (3, [1]), (2, []), (0, [])):
        queries, _ = random_problem(num_queries)
        found, gradient = sample(queries, np.array(chosen, np.int32))
        assert gradient.shape == queries.shape and found.log_partition.shape == [num_queries]
        assert found.indices.shape == found.scores.shape == [len(chosen), 2]
        scores = (queries @ candidates.T)[chosen]
        expected = np.take_along_axis(scores, found.indices.numpy(), axis=1)
        np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["left out", "NaN", "inf"])
def test_chosen_queries_without_a_law_draw_nothing_and_spoil_nothing(kind):
    queries, candidates = random_problem()
    ids = np.zeros([CANDIDATES], np.int64)
    positive_ids = np.array([1, 0 if kind == "left out" else 1, 1, 1])
    if kind != "left out":
        queries[1, 0] = float(kind)
    sample, gradient = sample_softmax_with_gradient(
        queries,
        candidates,
        num_samples=3,
        candidate_ids=ids,
        positive_ids=positive_ids,
        choose_queries=always([0, 1, 1, 3]),
    )
    np.testing.assert_array_equal(sample.indices[1:3], np.full([2, 3], -1))
    np.testing.assert_array_equal(sample.scores[1:3], np.full([2, 3], -math.inf))
    assert np.all(sample.indices.numpy()[[0, 3]] >= 0)
    others = [0, 2, 3]
    expected = np.logaddexp.reduce((queries @ candidates.T)[others], axis=1)
    np.testing.assert_allclose(sample.log_partition.numpy()[others], expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient.numpy()[others]))
    if kind == "left out":
        assert np.isneginf(sample.log_partition[1]) and np.all(gradient[1] == 0.0)
    else:
        assert not sample.log_partition[1] < math.inf


def test_of_no_candidates_chosen_queries_draw_nothing():
    sample, gradient = sample_softmax_with_gradient(
        tf.ones([2, DIM]), tf.zeros([0, DIM]), num_samples=3, choose_queries=always([1, 0, 1])
    )
    np.testing.assert_array_equal(sample.indices, np.full([3, 3], -1))
    np.testing.assert_array_equal(sample.scores, np.full([3, 3], -math.inf))
    np.testing.assert_array_equal(sample.log_partition, [-math.inf] * 2)
    np.testing.assert_array_equal(gradient, np.zeros([2, DIM]))


# No draws at all.


@pytest.mark.parametrize("block_size", [None, 128, 7])
@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_without_draws_there_are_the_log_partition_and_its_gradient(block_size, jit_compile):
    queries, candidates = random_problem()
    scores, scoring = options()

    def sample():
        return sample_softmax_with_gradient(
            queries, candidates, num_samples=0, block_size=block_size, **scoring
        )

    if jit_compile is not None:
        sample = tf.function(sample, jit_compile=jit_compile)
    found, gradient = sample()
    assert found.indices.shape == found.scores.shape == [QUERIES, 0]
    assert found.indices.dtype == tf.int64 and found.scores.dtype == tf.float32
    log_partition = np.logaddexp.reduce(scores, axis=1)
    law = np.exp(scores - log_partition[:, np.newaxis])
    np.testing.assert_allclose(found.log_partition, log_partition, rtol=1e-5)
    np.testing.assert_allclose(gradient, law @ candidates, rtol=1e-4, atol=1e-5)


def test_without_draws_nothing_is_nothing_and_nan_is_nan():
    queries, candidates = random_problem()
    queries[2] = math.nan
    sample = sample_softmax(
        queries,
        candidates,
        num_samples=0,
        candidate_ids=np.zeros([CANDIDATES], np.int64),
        positive_ids=np.array([1, 0, 1, 1]),
    )
    assert np.isneginf(sample.log_partition[1]) and np.isnan(sample.log_partition[2])
    expected = np.logaddexp.reduce(queries[[0, 3]] @ candidates.T, axis=1)
    np.testing.assert_allclose(sample.log_partition.numpy()[[0, 3]], expected, rtol=1e-5)
    nothing = sample_softmax(queries, candidates[:0], num_samples=0)
    assert nothing.indices.shape == [QUERIES, 0] and np.all(np.isneginf(nothing.log_partition))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_draws_are_of_what_the_log_partition_counts_if_scores_are_at_the_limit(jit_compile):
    # Each query has one candidate that outweighs all others, with a score at `max_scores`. Rounding
    # decides whether it is admitted, and the two scorings of a draw must agree on it.
    rng = np.random.default_rng(0)
    candidates = rng.normal(size=[4096, 64]).astype(np.float32)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    own = rng.choice(len(candidates), 64, replace=False)
    queries = 50.0 * candidates[own] + rng.normal(size=[64, 64]).astype(np.float32)

    @tf.function(jit_compile=jit_compile)
    def draw(queries):
        limits = tf.linalg.diag_part(tf.matmul(queries, candidates[own], transpose_b=True))
        return sample_softmax(queries, candidates, max_scores=limits, seed=1), limits

    sample, limits = draw(tf.constant(queries))
    # The others sum to about exp(30), the own candidate alone to about exp(50).
    is_admitted = sample.log_partition.numpy() > limits.numpy() - 1.0
    np.testing.assert_array_equal(sample.indices[:, 0] == own, is_admitted)
