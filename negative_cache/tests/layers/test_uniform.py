"""Tests of `Uniform`: what it draws, and what its draws add to the loss."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CacheSpec, FromCache, InBatch, Retrieval, Uniform
from negative_cache.layers._negatives.uniform import draw_evenly
from negative_cache.tests.layers.corpus_cases import CountingTable
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    call,
    cross_entropy,
    make_queries,
)
from negative_cache.tests.layers.uniform_cases import SIZE, SPECS, TABLE, corpus
from negative_cache.tests.statistics import assert_draws_follow, assert_mean_is


def make_task(*sources, **kwargs):
    """A task, and the tower that knows what it was asked for: draws, and nothing else."""
    tower = CountingTable(TABLE)
    kwargs = {"candidate_id_key": "id", "reduction": "none", **kwargs}
    return Retrieval(tower, list(sources), **kwargs), tower


def scores_of(queries, temperature=1.0):
    return queries.astype(np.float64) @ TABLE.T.astype(np.float64) / temperature


@functools.cache
def draws_of(num_candidates, count, num_steps, seed=3):
    """[num_steps, count] rows and sizes of parts, which tests leave as they are."""
    seeds = tf.stack([tf.fill([num_steps], seed), tf.range(num_steps)], axis=1)
    draw = tf.function(
        lambda: tf.map_fn(
            lambda seed: draw_evenly(tf.constant(num_candidates, tf.int64), count, seed),
            tf.cast(seeds, tf.int64),
            fn_output_signature=(tf.int64, tf.int64),
        )
    )
    return [part.numpy() for part in draw()]


# The draws.


@pytest.mark.one_keras
@pytest.mark.parametrize(["size", "count"], [(12, 4), (11, 4), (7, 7), (5, 1)])
def test_draws_are_distinct_and_each_is_uniform(size, count):
    rows, part_sizes = draws_of(size, count, 6000)
    assert all(len(set(step)) == count for step in rows.tolist())
    assert set(part_sizes.sum(axis=1)) == {size}
    assert np.ptp(part_sizes) <= 1
    # Steps are independent, draws of one step are not.
    for column in rows.T:
        assert_draws_follow(column, np.full(size, 1.0 / size))


@pytest.mark.one_keras
@pytest.mark.parametrize(["size", "count"], [(12, 4), (11, 4), (3, 5)])
def test_weighted_draws_estimate_the_sum_over_all_rows(size, count):
    rows, part_sizes = draws_of(size, count, 6000)
    values = np.exp(np.random.default_rng(0).normal(size=size))
    sums = np.sum(part_sizes * values[rows], axis=1)
    assert_mean_is(sums, values.sum())
    if count > size:
        # Each row is a part of its own, and the other parts are empty.
        np.testing.assert_allclose(sums, values.sum())


@pytest.mark.one_keras
def test_over_random_orders_the_variance_is_that_without_replacement():
    size, count, num_steps = 12, 4, 6000
    rows, part_sizes = draws_of(size, count, num_steps)
    rng = np.random.default_rng(0)
    values = rng.permuted(np.tile(rng.normal(size=size), [num_steps, 1]), axis=1)
    sums = np.sum(part_sizes * np.take_along_axis(values, rows, axis=1), axis=1)
    # N² / n (1 - n / N) S², with S² the variance of all values by N - 1.
    expected = size**2 / count * (1.0 - count / size) * values[0].var(ddof=1)
    assert_mean_is(np.square(sums - values[0].sum()), expected)


def test_nothing_is_drawn_from_nothing():
    rows, part_sizes = draw_evenly(tf.constant(0, tf.int64), 3, tf.constant([1, 2], tf.int64))
    assert rows.numpy().tolist() == part_sizes.numpy().tolist() == [0, 0, 0]


# The loss.


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_the_draws(scaled, training):
    task, tower = make_task(Uniform(corpus(), 4, scaled=scaled, seed=1), temperature=0.5)
    queries = make_queries(3)
    losses = call(task, queries, [0, 1, 2], TABLE, training=training)
    (drawn,) = tower.asked
    assert len(set(drawn)) == 4
    # Each of the draws stands for 12 / 4 candidates.
    scores = scores_of(queries, 0.5)
    negatives = scores[:, drawn] + (np.log(3.0) if scaled else 0.0)
    expected = [cross_entropy(scores[i, i], negatives[i]) for i in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.one_keras
def test_the_sum_estimates_that_over_the_corpus_without_what_is_left_out():
    # Eleven candidates, of which four are drawn: parts of two sizes.
    task, _ = make_task(Uniform(corpus(11), 4, seed=1), remove_accidental_hits=True)
    queries = tf.constant(make_queries(2))
    step = tf.function(
        lambda: task(queries, TABLE[:2], {"id": tf.range(2, dtype=tf.int64)}, training=True)
    )
    losses = np.array([step().numpy() for _ in range(2000)], np.float64)
    scores = scores_of(queries.numpy())
    # exp L = 1 + Σ exp s⁻ / exp s⁺
    expected = [
        1.0 + np.sum(np.exp(scores[i, [y for y in range(11) if y != i]] - scores[i, i]))
        for i in range(2)
    ]
    assert_mean_is(np.exp(losses), expected)


def test_gradients_are_those_of_the_softmax_over_the_draws():
    task, tower = make_task(Uniform(corpus(), 4, seed=1), reduction="sum_over_batch_size")
    queries = tf.Variable(make_queries(3))
    ids = tf.range(3, dtype=tf.int64)
    table = tower.table if isinstance(tower.table, tf.Variable) else tower.table.value
    with tf.GradientTape() as tape:
        loss = task(tf.identity(queries), TABLE[:3], {"id": ids}, training=True)
    of_queries, of_table = tape.gradient(loss, [queries, table])
    (drawn,) = tower.asked
    scores = scores_of(queries.numpy())
    # d/ds_i of log(exp s⁺ + 3 Σ exp s_i) is the mass of draw i.
    masses = 3.0 * np.exp(scores[:, drawn])
    masses /= np.exp(np.diag(scores))[:, np.newaxis] + masses.sum(axis=1, keepdims=True)
    expected = np.zeros([SIZE, DIM])
    expected[drawn] = masses.T @ queries.numpy() / 3.0
    np.testing.assert_allclose(tf.convert_to_tensor(of_table), expected, rtol=1e-4, atol=1e-6)
    expected = masses @ TABLE[drawn] - masses.sum(axis=1, keepdims=True) * TABLE[:3]
    np.testing.assert_allclose(of_queries, expected / 3.0, rtol=1e-4, atol=1e-6)


def test_right_ids_are_left_out():
    # All candidates are drawn, in some order.
    source = Uniform(corpus(), SIZE, seed=1)
    task, _ = make_task(source, remove_accidental_hits=True)
    queries, scores = make_queries(2), scores_of(make_queries(2))
    known = tf.ragged.constant([[5, 6], []], dtype=tf.int64)
    losses = call(task, queries, [0, 1], TABLE, known_positive_ids=known)
    left_out = [{0, 5, 6}, {1}]
    expected = [
        cross_entropy(scores[i, i], scores[i, [y for y in range(SIZE) if y not in left_out[i]]])
        for i in range(2)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_what_scores_above_a_margin_is_left_out():
    task, _ = make_task(Uniform(corpus(), SIZE, seed=1), false_negative_margin=0.2)
    queries, scores = make_queries(2), scores_of(make_queries(2))
    losses = call(task, queries, [0, 1], TABLE)
    kept = [scores[i, scores[i] <= scores[i, i] - 0.2] for i in range(2)]
    assert all(0 < len(part) < SIZE for part in kept)
    expected = [cross_entropy(scores[i, i], kept[i]) for i in range(2)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_it_mixes_with_the_batch_and_a_cache():
    cached = FromCache(CacheSpec(SPECS, 6), seed=1)
    task, tower = make_task(InBatch(), cached, Uniform(corpus(), 4, seed=1, scaled=False))
    cached.add({"id": tf.constant([5, 6], tf.int64)})
    tower.asked.clear()
    queries, scores = make_queries(2), scores_of(make_queries(2))
    losses = call(task, queries, [0, 1], TABLE, training=False)
    (drawn,) = tower.asked
    expected = [cross_entropy(scores[i, i], scores[i, [1 - i, 5, 6, *drawn]]) for i in range(2)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_an_evaluation_changes_nothing_and_is_the_same_again():
    losses = []
    for evaluates in (False, True):
        source = Uniform(feature_specs=SPECS, memory_size=6, num_draws=3, seed=1)
        task, _ = make_task(InBatch(), Uniform(corpus(), 4, seed=2), source)
        for step in range(3):
            ids = [step, step + 1]
            losses.append(call(task, make_queries(2), ids, TABLE).numpy())
            if evaluates:
                before = int(source.num_candidates), int(source.num_encoded)
                first, again = (
                    call(task, make_queries(2), ids, TABLE, training=False) for _ in range(2)
                )
                np.testing.assert_array_equal(first, again)
                assert before == (int(source.num_candidates), int(source.num_encoded))
    np.testing.assert_array_equal(losses[:3], losses[3:])


# A memory of the stream.


def test_a_memory_holds_the_last_candidates_of_the_stream():
    source = Uniform(feature_specs=SPECS, memory_size=5, num_draws=5, seed=1)
    task, tower = make_task(source)
    memory = collections.deque(maxlen=5)
    queries, scores = make_queries(2), scores_of(make_queries(2))
    for step in range(5):
        ids = [2 * step, 2 * step + 1]
        losses = call(task, queries, ids, TABLE)
        # All of the memory is drawn, before the batch enters it. A row weighs one.
        expected = [
            cross_entropy(scores[i, ids[i]], scores[i, list(memory)]) if memory else 0.0
            for i in range(2)
        ]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        # In the place of rows that there are not, the tower is given some that there are.
        assert set(tower.asked[-1]) == (set(memory) or {0})
        memory.extend(ids)
        assert int(source.num_candidates) == len(memory)


@pytest.mark.one_keras
@pytest.mark.parametrize("scaled", [True, False])
def test_draws_from_the_stream_are_corrected_for_popularity(scaled):
    source = Uniform(feature_specs=SPECS, memory_size=6, num_draws=3, scaled=scaled, seed=1)
    task, tower = make_task(InBatch(), source)
    queries, scores = make_queries(2), scores_of(make_queries(2))
    probability = np.linspace(0.01, 0.3, SIZE)
    for step in range(4):
        ids = [2 * step, 2 * step + 1]
        losses = call(task, queries, ids, TABLE, candidate_sampling_probability=probability[ids])
    drawn = tower.asked[-1]
    # Of the stream there are two draws in the batch. Scaled draws stand for six, two each.
    num_draws = 2 + (6 if scaled else 3)
    corrected = scores - np.log(num_draws * probability)
    of_draws = corrected[:, drawn] + (np.log(2.0) if scaled else 0.0)
    expected = [
        # The positive stands in the batch, and is corrected with it.
        cross_entropy(corrected[i, ids[i]], [corrected[i, ids[1 - i]], *of_draws[i]])
        for i in range(2)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.one_keras
def test_draws_from_the_stream_are_corrected_by_estimated_frequencies():
    source = Uniform(feature_specs=SPECS, memory_size=6, num_draws=6, seed=1)
    task, tower = make_task(source, frequency_correction=True)
    queries, scores = make_queries(2), scores_of(make_queries(2))
    for step in range(4):
        losses = call(task, queries, [0, 1 + step], TABLE)
    probability = task.frequency.probability(tf.range(SIZE)).numpy()
    assert probability[0] > 1.5 * probability[4]
    corrected = scores - np.log(6 * probability)
    drawn = tower.asked[-1]
    expected = [cross_entropy(scores[i, y], corrected[i, drawn]) for i, y in enumerate([0, 4])]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_draws_from_a_corpus_need_no_correction():
    task, tower = make_task(InBatch(), Uniform(corpus(), 4, seed=1))
    queries, scores = make_queries(2), scores_of(make_queries(2))
    given = tf.constant([0.1, 0.3])
    losses = call(task, queries, [0, 1], TABLE, candidate_sampling_probability=given)
    (drawn,) = tower.asked
    # Two draws from the stream, those of the batch.
    in_batch = scores[:, :2] - np.log(2.0 * given.numpy())
    expected = [
        cross_entropy(in_batch[i, i], [in_batch[i, 1 - i], *scores[i, drawn] + np.log(3.0)])
        for i in range(2)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
