"""Tests of `CachedRetrieval` against softmax cross-entropy written out in NumPy."""

import math

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.layers import CachedRetrieval
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.statistics import assert_draws_follow, assert_mean_is

INT_ID = tf.io.FixedLenFeature([], tf.int64)
STRING_ID = tf.io.FixedLenFeature([], tf.string)
DIM = 3


class Table(keras.layers.Layer):
    """A tower that looks embeddings up by {"id": int}; row i is candidate i's embedding."""

    def __init__(self, values):
        super().__init__()
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features):
        return tf.gather(tf.convert_to_tensor(self.table), features["id"])


def make_table(num_candidates=12, seed=0):
    return np.random.default_rng(seed).normal(size=[num_candidates, DIM]).astype(np.float32)


def make_queries(num_queries, seed=1):
    return np.random.default_rng(seed).normal(size=[num_queries, DIM]).astype(np.float32)


def make_task(table, cache_size=6, *, filled_with=(), **kwargs):
    kwargs = {"seed": 1, "candidate_id_key": "id", "embedding_dim": DIM, **kwargs}
    task = CachedRetrieval(Table(table), {"id": INT_ID}, cache_size, **kwargs)
    if len(filled_with):
        task.add_to_cache({"id": tf.constant(filled_with, tf.int64)})
    return task


def call(task, queries, ids, table, **kwargs):
    ids = np.asarray(ids, np.int64)
    return task(tf.constant(queries), tf.constant(table[ids]), {"id": tf.constant(ids)}, **kwargs)


def cross_entropy(positive, negatives):
    """-s⁺ + log(exp s⁺ + Σ exp s⁻) of one query, in float64."""
    logits = np.concatenate([[positive], np.asarray(negatives, np.float64)])
    return np.logaddexp.reduce(logits) - positive


def copy_of_state(task):
    state = [variable.numpy() for variable in task.cache.data.values()]
    return [*state, task.cache.age.numpy(), task.cache.filled.numpy(), task._sampling_state.numpy()]


def assert_same_state(left, right):
    for a, b in zip(left, right):
        np.testing.assert_array_equal(a, b)


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
    task._update_cache = lambda items, updates: None
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
    task._update_cache = lambda items, updates: None
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


# What is left out, and corrections.


@pytest.mark.parametrize("as_string", [False, True])
def test_accidental_hits_are_left_out_of_batch_and_cache(as_string):
    table, queries = make_table(), make_queries(3)
    convert = (lambda ids: tf.strings.as_string(ids)) if as_string else tf.identity
    tower = Table(table)

    def network(features):
        ids = features["id"]
        return tower({"id": tf.strings.to_number(ids, tf.int64) if as_string else ids})

    task = CachedRetrieval(
        network,
        {"id": STRING_ID if as_string else INT_ID},
        6,
        candidate_id_key="id",
        remove_accidental_hits=True,
        in_batch_negatives=True,
        reduction="none",
        num_negatives=20,
    )
    task.add_to_cache({"id": convert(tf.constant([0, 4, 0], tf.int64))})
    ids = [0, 0, 1]
    loss = task(
        tf.constant(queries),
        tf.constant(table[ids]),
        {"id": convert(tf.constant(ids, tf.int64))},
    )
    scores = queries @ table.T
    # Queries 0 and 1 share candidate 0, which also stands in the cache twice.
    expected = [
        cross_entropy(scores[0, 0], scores[0, [1, 4]]),
        cross_entropy(scores[1, 0], scores[1, [1, 4]]),
        cross_entropy(scores[2, 1], scores[2, [0, 0, 0, 4, 0]]),
    ]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_margin_leaves_out_what_scores_close_to_the_positive():
    table = np.zeros([12, DIM], np.float32)
    table[:, 0] = [5.0, 4.2, 3.0, 6.0, 4.5, 1.0, 0, 0, 0, 0, 0, 0]
    queries = np.float32([[1.0, 0.0, 0.0]])
    task = make_task(
        table,
        filled_with=[3, 4, 5],
        in_batch_negatives=True,
        false_negative_margin=1.0,
        num_negatives=8,
    )
    # s⁺ = 5: in the batch 4.2 is out and 3 in; in the cache 6 and 4.5 are out and 1 is in. The
    # positive itself is never out.
    loss = call(task, queries, [0, 1, 2], table)
    np.testing.assert_allclose(loss, cross_entropy(5.0, [3.0, 1.0]), rtol=1e-5)


@pytest.mark.parametrize("num_hard_negatives", [1, 2, 100])
def test_hard_negatives_are_the_highest_in_the_batch(num_hard_negatives):
    table, queries = make_table(), make_queries(4)
    task = make_task(
        table,
        filled_with=[7, 8],
        in_batch_negatives=True,
        num_hard_negatives=num_hard_negatives,
        reduction="none",
    )
    loss = call(task, queries, [0, 1, 2, 3], table)
    scores = queries @ table.T
    for i in range(4):
        in_batch = sorted((scores[i, j] for j in range(4) if j != i), reverse=True)
        negatives = [*in_batch[:num_hard_negatives], *scores[i, [7, 8]]]
        np.testing.assert_allclose(loss[i], cross_entropy(scores[i, i], negatives), rtol=1e-5)


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders needs Keras 2")
@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("remove_accidental_hits", [False, True])
@pytest.mark.parametrize("num_hard_negatives", [None, 2])
@pytest.mark.parametrize("corrected", [False, True])
def test_without_a_cache_it_is_the_task_of_tf_recommenders(
    temperature, remove_accidental_hits, num_hard_negatives, corrected
):
    import tensorflow_recommenders as tfrs

    table, queries, ids = make_table(), make_queries(5), [0, 1, 2, 1, 3, 4]
    kwargs = {
        "temperature": temperature,
        "remove_accidental_hits": remove_accidental_hits,
        "num_hard_negatives": num_hard_negatives,
    }
    weight = tf.constant([1.0, 2.0, 0.5, 0.0, 1.0])
    call_kwargs = {"sample_weight": weight}
    if corrected:
        call_kwargs["candidate_sampling_probability"] = tf.constant([0.3, 0.1, 0.02, 0.1, 0.0, 0.5])
    theirs = tfrs.tasks.Retrieval(**kwargs)(
        tf.constant(queries), tf.constant(table[ids]), candidate_ids=tf.constant(ids), **call_kwargs
    )
    ours = call(
        make_task(table, 0, in_batch_negatives=True, reduction="sum", **kwargs),
        queries,
        ids,
        table,
        **call_kwargs,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_given_probabilities_correct_batch_and_cache():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, in_batch_negatives=True, reduction="none", cache_size=5)
    cached, cached_p = [5, 6, 7], np.float32([0.5, 0.01, 1e-9])
    task.add_to_cache({"id": tf.constant(cached, tf.int64)}, tf.constant(cached_p))
    batch_p = np.float32([0.2, 0.05])
    loss = call(task, queries, [0, 1], table, candidate_sampling_probability=tf.constant(batch_p))
    # 3 filled rows and 2 candidates in the batch are 5 draws from the stream; a candidate of
    # probability p stands among them 5 p times. Probabilities are clipped at 1e-6, as TFRS does.
    log_expected = np.log(5 * np.maximum([*batch_p, *cached_p], 1e-6))
    scores = (queries @ table.T)[:, [0, 1, 5, 6, 7]] - log_expected
    expected = [cross_entropy(scores[0, 0], scores[0, 1:])]
    expected.append(cross_entropy(scores[1, 1], scores[1, [0, 2, 3, 4]]))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_rows_that_came_without_a_probability_are_not_corrected():
    table, queries = make_table(), make_queries(1)
    task = make_task(table, filled_with=[5, 6])
    probability = tf.constant([0.5])
    loss = call(task, queries, [0], table, candidate_sampling_probability=probability)
    scores = (queries @ table.T)[0]
    np.testing.assert_allclose(loss, cross_entropy(scores[0], scores[[5, 6]]), rtol=1e-5)


def test_frequency_correction_estimates_the_partition_of_the_corpus():
    num_candidates, cache_size, batch = 60, 512, 64
    table = make_table(num_candidates, seed=3)
    law = 1.0 / np.arange(1, num_candidates + 1)
    law /= law.sum()
    rng = np.random.default_rng(4)
    # The most popular candidates score highest, so that their repetition matters most.
    query = np.float32([[1.0, 0.0, 0.0]])
    table[:, 0] = np.linspace(2.0, -2.0, num_candidates)
    tasks = {
        corrected: make_task(table, cache_size, frequency_correction=corrected, use_lru=False)
        for corrected in (False, True)
    }
    for _ in range(120):
        ids = rng.choice(num_candidates, size=batch, p=law)
        items = {"id": tf.constant(ids)}
        for corrected, task in tasks.items():
            if corrected:
                task._frequency.update(items["id"])
            task.add_to_cache(items)
    scores = table.astype(np.float64) @ query[0]
    log_corpus = np.logaddexp.reduce(scores)
    errors = {}
    for corrected, task in tasks.items():
        loss = call(task, query, [0], table, training=False)
        # loss = log(exp s⁺ + Z) - s⁺, so that log Z = s⁺ + log(exp(loss) - 1).
        log_partition = scores[0] + math.log(math.expm1(float(loss)))
        errors[corrected] = abs(log_partition - log_corpus)
    # Uncorrected, Z is 512 Σ p exp s instead of Σ exp s. Corrected, the estimate has the sampling
    # error of 512 rows and of the moving averages, both of the order of 10 %.
    uncorrected = np.logaddexp.reduce(scores + np.log(cache_size * law))
    assert errors[False] == pytest.approx(abs(uncorrected - log_corpus), rel=0.1)
    assert errors[False] > 1.0
    assert errors[True] < 0.25


@pytest.mark.parametrize("cache_size", [8, 2**15])
def test_ids_that_are_multiples_of_a_power_of_two_have_frequencies_of_their_own(cache_size):
    task = make_task(make_table(), cache_size, frequency_correction=True)
    ids = tf.range(8, dtype=tf.int64) * 2**17
    task._frequency.update(ids)
    # Each came once in 8 draws. In one bucket they would be one candidate that always comes.
    np.testing.assert_allclose(task._frequency.probability(ids), [1 / 8] * 8)


@pytest.mark.parametrize("draws_seen", [0, 1000])
def test_frequency_correction_leaves_rows_alone_that_the_stream_has_not_brought(draws_seen):
    table, queries = make_table(), make_queries(1)
    task = make_task(table, filled_with=[5, 6, 7], frequency_correction=True)
    task._frequency.update(tf.constant([0] * draws_seen, tf.int64))
    scores = (queries @ table.T)[0].astype(np.float64)
    # They are there because they were put there, whatever number of draws did not bring them.
    np.testing.assert_allclose(
        call(task, queries, [0], table, training=False),
        cross_entropy(scores[0], scores[[5, 6, 7]]),
        rtol=1e-5,
    )


# Metrics.


class Sum(keras.metrics.Metric):
    """Remembers what it was given."""

    def __init__(self, name):
        super().__init__(name=name)
        self.calls = []

    def update_state(self, *args, sample_weight=None):
        weight = None if sample_weight is None else np.asarray(sample_weight)
        self.calls.append((*[np.asarray(argument) for argument in args], weight))

    def result(self):
        return tf.constant(0.0)


def test_metrics_are_given_what_the_docstring_says():
    table, queries, ids = make_table(), make_queries(2), [0, 1, 2]
    metrics, batch_metric, loss_metric = Sum("task"), Sum("batch"), Sum("loss_value")
    task = make_task(
        table,
        in_batch_negatives=True,
        # A positive has its own id, and is no hit.
        remove_accidental_hits=True,
        metrics=metrics,
        batch_metrics=[batch_metric],
        loss_metrics=[loss_metric],
        temperature=0.5,
    )
    weight = tf.constant([1.0, 3.0])
    loss = call(task, queries, ids, table, sample_weight=weight)
    given_queries, given_positives, given_weight = metrics.calls[0]
    np.testing.assert_array_equal(given_queries, queries)
    np.testing.assert_array_equal(given_positives, table[[0, 1]])
    np.testing.assert_array_equal(given_weight, [1.0, 3.0])
    labels, scores, given_weight = batch_metric.calls[0]
    np.testing.assert_array_equal(labels, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(scores, queries @ table[ids].T / 0.5, rtol=1e-5)
    np.testing.assert_array_equal(given_weight, [1.0, 3.0])
    assert loss_metric.calls[0][0] == loss.numpy()
    call(task, queries, ids, table, compute_metrics=False, compute_batch_metrics=False)
    assert len(metrics.calls) == len(batch_metric.calls) == 1
    assert len(loss_metric.calls) == 2


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders needs Keras 2")
def test_takes_the_factorized_metrics_of_tf_recommenders():
    import tensorflow_recommenders as tfrs

    table, queries = make_table(), make_queries(2)
    corpus = tf.data.Dataset.from_tensor_slices(table).batch(4)
    metric = tfrs.metrics.FactorizedTopK(candidates=corpus, ks=[1, 12])
    task = make_task(table, metrics=metric)
    call(task, queries, [0, 1], table, sample_weight=tf.constant([1.0, 1.0]))
    # All 12 candidates contain the positive; the best one is it or not.
    top_1 = np.mean(np.argmax(queries @ table.T, axis=1) == [0, 1])
    np.testing.assert_allclose(metric.result(), [top_1, 1.0])


# Graphs, replicas, precision and seeds.


def test_does_not_retrace_in_steady_state_and_makes_its_cache_at_the_first_call():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, embedding_dim=None)
    assert task.cache is None
    traces = []

    @tf.function
    def step(queries, ids):
        traces.append(None)
        return task(queries, task.candidate_network({"id": ids}), {"id": ids}, training=True)

    for i in range(5):
        step(tf.constant(queries), tf.constant([i, i + 1], tf.int64))
    # tf.function traces twice where the first trace makes variables.
    assert len(traces) <= 2
    assert int(task.cache.num_filled) == 6


def test_call_without_training_trains():
    table = make_table()
    task = make_task(table)
    call(task, make_queries(2), [0, 1], table)
    assert int(task.cache.num_filled) == 2


def test_half_precision_embeddings_are_scored_in_float32():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, filled_with=[5, 6])
    half = [tf.cast(values, tf.float16) for values in (queries, table[[0, 1]])]
    loss = task(*half, {"id": tf.constant([0, 1], tf.int64)}, training=False)
    assert loss.dtype == tf.float32
    scores = half[0].numpy().astype(np.float64) @ table.T
    own = np.sum(half[0].numpy().astype(np.float64) * half[1].numpy(), axis=1)
    each = [cross_entropy(own[i], scores[i, [5, 6]]) for i in range(2)]
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)


def test_seeds_near_the_largest_integer_do_not_overflow():
    table = make_table()
    for seed in (2**31 - 1, 2**40):
        task = make_task(table, filled_with=[5, 6], seed=seed)
        call(task, make_queries(2), [0, 1], table)
        assert task._next_seed().numpy().tolist() == [seed, 2]


@pytest.mark.parametrize("same_seed", [True, False])
def test_global_seed_makes_trainings_identical(same_seed):
    def train(seed):
        keras.utils.set_random_seed(seed)
        table, queries = make_table(), tf.Variable(make_queries(4))
        task = make_task(table, filled_with=[5, 6, 7, 8, 9, 10], seed=None)
        for _ in range(5):
            with tf.GradientTape() as tape:
                ids = tf.range(4, dtype=tf.int64)
                loss = task(queries, tf.constant(table[:4]), {"id": ids})
            queries.assign_sub(tape.gradient(loss, queries))
        return queries.numpy()

    first, second = train(1), train(1 if same_seed else 2)
    assert np.array_equal(first, second) == same_seed


def test_replicas_have_caches_and_draws_of_their_own():
    table = make_table()
    strategy = two_replicas()
    with strategy.scope():
        task = make_task(table, cache_size=2)

    @tf.function
    def step(ids):
        def replica_step(ids):
            queries = tf.zeros([2, DIM])
            task(queries, task.candidate_network({"id": ids}), {"id": ids}, training=True)
            return task._next_seed()

        return strategy.run(replica_step, (ids,))

    values = iter([[0, 1], [2, 3]])
    ids = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant(next(values), tf.int64)
    )
    seeds = [seed.numpy() for seed in strategy.experimental_local_results(step(ids))]
    assert not np.array_equal(*seeds)
    cached = strategy.experimental_local_results(task.cache.data["id"])
    assert [rows.numpy().tolist() for rows in cached] == [[0, 1], [2, 3]]


def test_outside_of_the_replicas_candidates_reach_every_cache():
    strategy = two_replicas()
    with strategy.scope():
        task = make_task(make_table(), cache_size=3, filled_with=[5, 6])
        task._next_seed()
    for rows in strategy.experimental_local_results(task.cache.data["id"]):
        assert rows.numpy().tolist() == [5, 6, 0]
    for state in strategy.experimental_local_results(task._sampling_state):
        assert state.numpy() == 1


# Bad input.


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"reduction": "mean"}, "`reduction` must be one of .* Received: 'mean'"),
        ({"num_negatives": 0}, "`num_negatives` must be at least 1. Received: 0"),
        ({"cache_size": -1}, "`cache_size` must not be negative. Received: -1"),
        ({"temperature": 0.0}, "`temperature` must be positive. Received: 0.0"),
        ({"num_hard_negatives": 2}, "needs `in_batch_negatives=True`"),
        ({"candidate_id_key": "title"}, "Received: 'title', and specs for .'id'"),
        (
            {"candidate_id_key": None, "remove_accidental_hits": True},
            "`remove_accidental_hits=True` needs a `candidate_id_key`",
        ),
        (
            {"candidate_id_key": None, "frequency_correction": True},
            "`frequency_correction=True` needs a `candidate_id_key`",
        ),
        ({"feature_specs": {"id": tf.io.FixedLenFeature([], tf.float32)}}, "scalar integer or"),
        ({"feature_specs": {"id": INT_ID, "embedding": INT_ID}}, "Received: .'embedding'"),
        ({"feature_specs": {}}, "`specs` must map at least one"),
    ],
)
def test_constructor_refuses(kwargs, message):
    kwargs = {"feature_specs": {"id": INT_ID}, "cache_size": 4, "candidate_id_key": "id", **kwargs}
    with pytest.raises(ValueError, match=message):
        CachedRetrieval(Table(make_table()), **kwargs)


def test_constructor_refuses_a_network_known_to_return_no_embeddings():
    inputs = keras.Input([4])
    network = keras.Model(inputs, keras.layers.Reshape([2, 2])(inputs))
    with pytest.raises(ValueError, match=r"shape \[n, dim\].*\(None, 2, 2\)"):
        CachedRetrieval(network, tf.io.FixedLenFeature([4], tf.float32), 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"queries": np.zeros([2, 4], np.float32)}, r"same dimension.*\(2, 4\) and \(2, 3\)"),
        ({"queries": np.zeros([2, 1, 3], np.float32)}, r"`query_embeddings`.*\(2, 1, 3\)"),
        ({"candidates": np.zeros([2, 3], np.int32)}, "`candidate_embeddings`.*int32"),
        ({"queries": np.zeros([3, 3], np.float32)}, "needs a positive"),
        ({"features": {"title": tf.constant([1, 2])}}, "exactly the keys .'id'.*'title'"),
        ({"features": {"id": tf.constant(["a", "b"])}}, "int64.*Received: dtype string"),
        ({"features": {"id": tf.constant([[0], [1]], tf.int64)}}, r"shape \(2, 1\)"),
        (
            {"features": {"id": tf.constant([0, 1, 2], tf.int64)}},
            r"`candidate_features.'id'.`.*\(3,\)",
        ),
        ({"negative_embeddings": tf.zeros([2, 3])}, r"`negative_embeddings`.*\(2, 3\)"),
        ({"negative_embeddings": tf.zeros([2, 5, 4])}, r"`negative_embeddings`.*\(2, 5, 4\)"),
        ({"negative_embeddings": tf.zeros([3, 5, 3])}, r"`negative_embeddings`.*\(3, 5, 3\)"),
        ({"sample_weight": tf.zeros([3])}, r"`sample_weight`.*\(3,\)"),
        (
            {"candidate_sampling_probability": tf.zeros([3])},
            r"`candidate_sampling_probability`.*\(3,\)",
        ),
    ],
)
def test_call_refuses_and_leaves_the_cache_alone(changes, message):
    table = make_table()
    task = make_task(table, filled_with=[5, 6])
    before = copy_of_state(task)
    arguments = {
        "queries": make_queries(2),
        "candidates": table[[0, 1]],
        "features": {"id": tf.constant([0, 1], tf.int64)},
        **changes,
    }
    queries, candidates, features = (
        arguments.pop(name) for name in ("queries", "candidates", "features")
    )
    with pytest.raises(ValueError, match=message):
        task(tf.constant(queries), tf.constant(candidates), features, **arguments)
    assert_same_state(copy_of_state(task), before)


def test_training_refuses_a_batch_larger_than_the_cache_and_inference_does_not():
    table = make_table()
    task = make_task(table, cache_size=2, filled_with=[5])
    before = copy_of_state(task)
    with pytest.raises(ValueError, match="fit into the cache.*3 rows for a `cache_size` of 2"):
        call(task, make_queries(3), [0, 1, 2], table)
    assert_same_state(copy_of_state(task), before)
    assert call(task, make_queries(3), [0, 1, 2], table, training=False) > 0


def test_training_refuses_a_batch_larger_than_the_cache_of_unknown_size_until_it_runs():
    table = make_table()
    task = make_task(table, cache_size=2)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def step(ids):
        candidates = task.candidate_network({"id": ids})
        return task(candidates, candidates, {"id": ids}, training=True)

    step(tf.constant([0, 1], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="fit into the cache"):
        step(tf.constant([0, 1, 2], tf.int64))


def test_call_refuses_to_compare_with_nothing():
    table = make_table()
    with pytest.raises(ValueError, match="nothing to tell a positive from"):
        call(make_task(table, cache_size=0), make_queries(2), [0, 1], table)


@pytest.mark.parametrize("shape", [[2], [2, 3, 1]])
def test_network_that_returns_no_embeddings_is_refused(shape):
    task = CachedRetrieval(lambda features: tf.zeros(shape), {"id": INT_ID}, 4)
    with pytest.raises(ValueError, match=r"shape \[n, dim\]. Received from"):
        task.add_to_cache({"id": tf.constant([0, 1], tf.int64)})


def test_network_of_another_dimension_than_the_candidates_is_refused():
    task = CachedRetrieval(lambda features: tf.zeros([2, 5]), {"id": INT_ID}, 4)
    features = {"id": tf.constant([0, 1], tf.int64)}
    with pytest.raises(ValueError, match="embeddings of dimension 3. Received embeddings of 5"):
        task(tf.zeros([2, 3]), tf.zeros([2, 3]), features)


def test_candidates_without_a_finite_embedding_do_not_enter():
    table = make_table()
    table[1] = np.inf
    task = make_task(table)
    task.add_to_cache({"id": tf.constant([5, 1, 6], tf.int64)})
    assert task.cache.data["id"].numpy()[:3].tolist() == [5, 6, 0]
    assert int(task.cache.num_filled) == 2
    assert int(task.cache.num_skipped) == 1
