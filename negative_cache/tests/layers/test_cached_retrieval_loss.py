"""Tests of the loss of `CachedRetrieval` and its gradient against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    assert_same_state,
    call,
    copy_of_state,
    cross_entropy,
    freeze_cache,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.statistics import assert_draws_follow, assert_mean_is

pytestmark = pytest.mark.one_keras

# The value of the loss.


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("num_explicit", [0, 2])
@pytest.mark.parametrize("cached", [[], [5, 6, 7], [5, 6, 7, 8, 9, 10]])
def test_value_is_minus_log_probability_of_the_positive(in_batch, num_explicit, cached):
    table, queries, ids = make_table(), make_queries(3), [0, 1, 2]
    explicit = np.random.default_rng(2).normal(size=[3, num_explicit, DIM]).astype(np.float32)
    task = make_task(
        table, filled_with=cached, in_batch_negatives=in_batch, reduction="none", temperature=0.7
    )
    kwargs = {"negative_embeddings": tf.constant(explicit)} if num_explicit else {}
    loss = call(task, queries, ids, table, **kwargs)
    scores = queries.astype(np.float64) @ table.T.astype(np.float64) / 0.7
    for i in range(3):
        negatives = list(scores[i, cached])
        if in_batch:
            negatives += [scores[i, j] for j in ids if j != i]
        negatives += list(explicit[i] @ queries[i] / 0.7)
        np.testing.assert_allclose(loss[i], cross_entropy(scores[i, i], negatives), rtol=1e-5)


def test_further_candidates_of_the_batch_are_negatives_of_every_query_and_enter_the_cache():
    table, queries, ids = make_table(), make_queries(2), [0, 1, 2, 3]
    task = make_task(table, cache_size=4, in_batch_negatives=True, reduction="none")
    loss = call(task, queries, ids, table)
    scores = queries @ table.T
    for i in range(2):
        negatives = [scores[i, j] for j in ids if j != i]
        np.testing.assert_allclose(loss[i], cross_entropy(scores[i, i], negatives), rtol=1e-5)
    assert sorted(task.cache.data["id"].numpy()) == ids


def test_transform_is_applied_after_the_temperature():
    table, queries = make_table(), make_queries(2)
    task = make_task(
        table,
        filled_with=[5, 6],
        temperature=0.5,
        score_transform=lambda scores: tf.square(scores),
        reduction="none",
    )
    loss = call(task, queries, [0, 1], table)
    scores = (queries @ table.T / 0.5) ** 2
    for i in range(2):
        expected = cross_entropy(scores[i, i], scores[i, [5, 6]])
        np.testing.assert_allclose(loss[i], expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "none", None])
def test_sample_weight_and_reduction(reduction):
    table, queries, weight = make_table(), make_queries(3), np.float32([2.0, 0.0, 0.5])
    task = make_task(table, filled_with=[5, 6], reduction=reduction)
    loss = call(task, queries, [0, 1, 2], table, sample_weight=tf.constant(weight))
    scores = queries @ table.T
    each = weight * [cross_entropy(scores[i, i], scores[i, [5, 6]]) for i in range(3)]
    # Like Keras, the mean divides by the batch size and not by the sum of the weights.
    expected = {"sum": each.sum(), "sum_over_batch_size": each.sum() / 3}.get(reduction, each)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_nothing_in_an_empty_cache_gives_a_loss_of_zero_and_zero_gradients():
    table, queries = make_table(), tf.Variable(make_queries(3))
    # A tower that is NaN for candidate 0: its id must not be encoded because a row is unfilled.
    table[0] = np.nan
    task = make_task(table)
    ids = tf.constant([1, 2, 3], tf.int64)
    with tf.GradientTape() as tape:
        candidates = task.candidate_network({"id": ids})
        loss = task(queries, candidates, {"id": ids})
    gradients = tape.gradient(loss, [queries, *task.candidate_network.trainable_variables])
    assert loss.numpy() == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(tf.convert_to_tensor(gradient), np.zeros(gradient.shape))


# The gradient of the loss.


def draw_gradients(task, table, queries, ids, num_draws):
    """[num_draws, ...] gradients by the queries and the tower of losses that differ in their draws.

    The cache is frozen, so that every draw is from the same law; one call has all draws as its
    batch, whose rows are the same queries over and over.
    """
    batch = len(ids)
    freeze_cache(task)
    many_queries = tf.constant(np.tile(queries, [num_draws, 1]))
    many_ids = tf.constant(np.tile(ids, num_draws), tf.int64)
    tower = task.candidate_network
    tables = tf.Variable(np.tile(table, [num_draws, 1, 1]))
    copies = tf.repeat(tf.range(num_draws, dtype=tf.int64), batch)

    def encode(features):
        # Every repetition has a copy of the table, hence a gradient of its own.
        copy = tf.repeat(copies, tf.size(features["id"]) // tf.size(copies))
        return tf.gather_nd(tables, tf.stack([copy, features["id"]], axis=1))

    task.candidate_network = encode
    with tf.GradientTape() as tape:
        tape.watch(many_queries)
        loss = task(many_queries, encode({"id": many_ids}), {"id": many_ids})
    by_query, by_table = tape.gradient(loss, [many_queries, tables])
    task.candidate_network = tower
    by_table = tf.convert_to_tensor(by_table).numpy()
    return by_query.numpy().reshape([num_draws, batch, DIM]), by_table


def exact_gradients(table, queries, ids, cached):
    """∇L = Σ_y P(y) ∇s(x, y) - ∇s(x, y⁺) over {y⁺} ∪ cache, summed over the queries."""
    by_query, by_table = np.zeros(queries.shape), np.zeros(table.shape)
    for i, positive in enumerate(ids):
        support = [positive, *cached]
        scores = queries[i].astype(np.float64) @ table[support].T
        probabilities = np.exp(scores - np.logaddexp.reduce(scores))
        by_query[i] = probabilities @ table[support] - table[positive]
        np.add.at(by_table, support, probabilities[:, None] * queries[i])
        by_table[positive] -= queries[i]
    return by_query, by_table


@pytest.mark.parametrize("exact_query_gradient", [False, True])
@pytest.mark.parametrize("num_negatives", [1, 4])
def test_expected_gradient_is_the_softmax_gradient(num_negatives, exact_query_gradient):
    table, queries, ids, cached = make_table(), make_queries(2), [0, 1], [5, 6, 7, 8, 9]
    task = make_task(
        table,
        filled_with=cached,
        num_negatives=num_negatives,
        exact_query_gradient=exact_query_gradient,
        reduction="sum",
        cache_size=6000,
    )
    by_query, by_table = draw_gradients(task, table, queries, ids, num_draws=3000)
    expected_by_query, expected_by_table = exact_gradients(table, queries, ids, cached)
    assert_mean_is(by_query, expected_by_query)
    assert_mean_is(by_table, expected_by_table)
    # The rows that neither are positives nor stand in the cache take part in nothing.
    assert not by_table[:, [2, 3, 4, 10, 11]].any()


def test_several_negatives_divide_the_variance_of_the_gradient():
    table, queries, cached = make_table(), make_queries(1), [5, 6, 7, 8, 9]
    variances = {}
    for num_negatives in (1, 4):
        task = make_task(
            table,
            filled_with=cached,
            num_negatives=num_negatives,
            exact_query_gradient=False,
            reduction="sum",
            cache_size=4000,
        )
        by_query, _ = draw_gradients(task, table, queries, [0], num_draws=4000)
        variances[num_negatives] = by_query.var(axis=0).sum()
    # The mean of 4 independent draws has a quarter of the variance. A variance over 4,000 draws has
    # a relative standard error of about 3 %.
    assert variances[1] / variances[4] == pytest.approx(4.0, rel=0.25)


def test_exact_query_gradient_of_a_fresh_cache_has_no_variance():
    table, queries, cached = make_table(), make_queries(2), [5, 6, 7, 8, 9]
    task = make_task(table, filled_with=cached, reduction="sum", cache_size=200)
    by_query, _ = draw_gradients(task, table, queries, [0, 1], num_draws=100)
    expected, _ = exact_gradients(table, queries, [0, 1], cached)
    np.testing.assert_allclose(by_query, np.tile(expected, [100, 1, 1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", [None, lambda scores: 2.0 * tf.tanh(scores)])
def test_exact_query_gradient_of_a_stale_cache_keeps_the_mean_and_cuts_the_variance(transform):
    old_table, queries, cached = make_table(), make_queries(1), [5, 6, 7, 8, 9]
    drift = 0.2 * np.random.default_rng(3).normal(size=old_table.shape).astype(np.float32)
    table = old_table + drift

    # Both estimate p̂_cache (Σ_y P̂(y) s'(⟨x, g⟩) g(y) - ∇s⁺): stale probabilities, fresh embeddings.
    def scores_and_slopes(products):
        if transform is None:
            return products, np.ones_like(products)
        return 2.0 * np.tanh(products), 2.0 / np.cosh(products) ** 2

    query = queries[0].astype(np.float64)
    stale_scores, _ = scores_and_slopes(old_table[cached] @ query)
    _, fresh_slopes = scores_and_slopes(table[cached] @ query)
    positive_score, positive_slope = scores_and_slopes(table[0] @ query)
    log_partition = np.logaddexp.reduce(stale_scores)
    in_cache = 1.0 / (1.0 + np.exp(positive_score - log_partition))
    probabilities = np.exp(stale_scores - log_partition)
    expected = in_cache * ((probabilities * fresh_slopes) @ table[cached])
    expected -= in_cache * positive_slope * table[0]

    variance = {}
    for exact in (False, True):
        task = make_task(
            old_table,
            filled_with=cached,
            exact_query_gradient=exact,
            score_transform=transform,
            reduction="sum",
            cache_size=4000,
        )
        task.candidate_network.table.assign(table)
        by_query, _ = draw_gradients(task, table, queries, [0], num_draws=4000)
        assert_mean_is(by_query, expected[np.newaxis])
        variance[exact] = by_query.var(axis=0).sum()
    assert variance[True] < 0.5 * variance[False]


def test_no_gradient_reaches_the_cache_and_drawn_rows_are_refreshed():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, cache_size=4, filled_with=[5, 6], num_negatives=64)
    cached = task.cache.embeddings
    task.candidate_network.table.assign(2.0 * table)
    with tf.GradientTape() as tape:
        # A trainable variable would be watched by itself.
        tape.watch(cached.handle)
        loss = call(task, queries, [0, 1], table)
    assert tape.gradient(loss, cached.handle) is None
    # With 64 draws per query both rows are drawn; the free rows take the batch's embeddings.
    np.testing.assert_array_equal(task.cache.data["id"], [5, 6, 0, 1])
    expected = [2.0 * table[5], 2.0 * table[6], table[0], table[1]]
    np.testing.assert_allclose(cached.numpy(), expected, rtol=1e-6)


def test_staleness_is_the_relative_squared_change_of_the_drawn_rows():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, filled_with=[5], num_negatives=3)
    task.candidate_network.table.assign(2.0 * table)
    call(task, queries, [0, 1], table)
    # ‖g/2 - g‖² / ‖g‖² = 1/4 of the only row.
    logs = {metric.name: float(metric.result()) for metric in task.training_metrics}
    assert logs["staleness"] == pytest.approx(0.25, rel=1e-5)
    assert logs["fill"] == pytest.approx(3 / 6)
    assert logs["skipped_rows"] == 0


def test_draws_follow_the_softmax_and_differ_from_call_to_call():
    table, queries, cached = make_table(), make_queries(1), [5, 6, 7, 8]
    task = make_task(table, filled_with=cached, cache_size=20)
    seen = []
    task.candidate_network = lambda features: (
        seen.append(features["id"].numpy()) or tf.gather(tf.constant(table), features["id"])
    )
    freeze_cache(task)
    # 20 queries alike at a call: draws of one call differ, and of one call from the next.
    for _ in range(30):
        call(task, np.repeat(queries, 20, axis=0), [0] * 20, table)
    logits = (queries @ table.T)[0]
    probabilities = np.zeros(12)
    probabilities[cached] = np.exp(logits[cached]) / np.exp(logits[cached]).sum()
    assert_draws_follow(np.concatenate(seen), probabilities)


def test_inference_changes_nothing_and_encodes_nothing():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, filled_with=[5, 6, 7])
    call(task, queries, [0, 1], table)
    before = copy_of_state(task)
    logs = [float(metric.result()) for metric in task.training_metrics]
    cached = task.cache.data["id"].numpy()[task.cache.filled.numpy()]

    def fail(features):
        raise AssertionError("encoded a candidate")

    task.candidate_network = fail
    loss = call(task, queries, [2, 3], table, training=False)
    scores = queries @ table.T
    each = [cross_entropy(scores[i, i + 2], scores[i, cached]) for i in range(2)]
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)
    assert_same_state(copy_of_state(task), before)
    assert [float(metric.result()) for metric in task.training_metrics] == logs
