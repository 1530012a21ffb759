"""Tests of what `CachedRetrieval` leaves out of the softmax, and of its log Q corrections."""

import math

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import FrequencyEstimator
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.layers import CachedRetrieval
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    STRING_ID,
    Table,
    call,
    cross_entropy,
    make_queries,
    make_table,
    make_task,
)

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
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cache_size", [0, 8])
def test_without_a_cache_it_is_the_task_of_tf_recommenders(
    temperature, remove_accidental_hits, num_hard_negatives, corrected, masked, cache_size
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
        # Without a cache, what is too small is clipped where the task clips it.
        smallest = 1e-3 if cache_size else 0.0
        probability = tf.constant([0.3, 0.1, 0.02, 0.1, smallest, 0.5])
        call_kwargs["candidate_sampling_probability"] = probability
    if masked:
        mask = np.random.default_rng(2).random([5, 6]) < 0.7
        call_kwargs["score_mask"] = tf.constant(mask | np.eye(5, 6, dtype=bool))
    theirs = tfrs.tasks.Retrieval(**kwargs)(
        tf.constant(queries), tf.constant(table[ids]), candidate_ids=tf.constant(ids), **call_kwargs
    )
    ours = call(
        make_task(table, cache_size, in_batch_negatives=True, reduction="sum", **kwargs),
        queries,
        ids,
        table,
        **call_kwargs,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_given_probabilities_correct_batch_and_cache():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, in_batch_negatives=True, reduction="none", cache_size=5)
    cached, cached_p = [5, 6, 7], np.float32([0.5, 0.01, 1e-12])
    task.add_to_cache({"id": tf.constant(cached, tf.int64)}, tf.constant(cached_p))
    batch_p = np.float32([0.2, 0.05])
    loss = call(task, queries, [0, 1], table, candidate_sampling_probability=tf.constant(batch_p))
    # 3 filled rows and 2 candidates in the batch are 5 draws from the stream; a candidate of
    # probability p stands among them 5 p times. Probabilities are clipped at 1e-9.
    log_expected = np.log(5 * np.maximum([*batch_p, *cached_p], 1e-9))
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


@pytest.mark.one_keras
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


def test_frequencies_are_known_from_the_first_step_on():
    table, queries = make_table(), make_queries(3)
    frequency = {"frequency_correction": True, "use_lru": False}
    task = make_task(table, in_batch_negatives=True, reduction="none", **frequency)
    # Candidates 0 and 1 come once in 4 draws, 2 twice. They are the only negatives, 4 draws from
    # the stream: each is expected as often as it is there, and 2 twice.
    ids = [0, 1, 2, 2]
    loss = call(task, queries, ids, table)
    logits = (queries @ table.T)[:, ids] - np.log([1.0, 1.0, 2.0, 2.0])
    for i in range(3):
        positive = queries[i] @ table[ids[i]]
        expected = cross_entropy(positive, np.delete(logits[i], i))
        np.testing.assert_allclose(loss[i], expected, rtol=1e-5)


@pytest.mark.parametrize("cache_size", [8, 2**15])
def test_ids_that_are_multiples_of_a_power_of_two_have_frequencies_of_their_own(cache_size):
    task = make_task(make_table(), cache_size, frequency_correction=True, use_lru=False)
    ids = tf.range(8, dtype=tf.int64) * 2**17
    task._frequency.update(ids)
    # Each came once in 8 draws. In one bucket they would be one candidate that always comes.
    np.testing.assert_allclose(task._frequency.probability(ids), [1 / 8] * 8)


@pytest.mark.parametrize("draws_seen", [0, 1000])
def test_frequency_correction_leaves_rows_alone_that_the_stream_has_not_brought(draws_seen):
    table, queries = make_table(), make_queries(1)
    frequency = {"frequency_correction": True, "use_lru": False}
    task = make_task(table, filled_with=[5, 6, 7], **frequency)
    task._frequency.update(tf.constant([0] * draws_seen, tf.int64))
    scores = (queries @ table.T)[0].astype(np.float64)
    # They are there because they were put there, whatever number of draws did not bring them.
    np.testing.assert_allclose(
        call(task, queries, [0], table, training=False),
        cross_entropy(scores[0], scores[[5, 6, 7]]),
        rtol=1e-5,
    )


@pytest.mark.one_keras
def test_a_corpus_much_larger_than_the_cache_has_frequencies_of_its_own():
    # 300,000 candidates, and a cache of 64.
    count, cache_size = 300_000, 64
    task = make_task(make_table(), cache_size, frequency_correction=True, use_lru=False)
    rng = np.random.default_rng(0)
    order = rng.permutation(np.tile(np.arange(count), 3))
    for start in range(0, len(order), 4096):
        task.frequency.update(tf.constant(order[start : start + 4096], tf.int64))
    found = task.frequency.probability(tf.range(0, count, 97, dtype=tf.int64)).numpy()
    # Of three occurrences estimates are rough; what matters is that they are not those of buckets
    # that many share. With 2^16 of them the median would be 5.
    assert 1.0 < np.median(found) * count < 2.0
    assert float(task.frequency.occupancy) == pytest.approx(-math.expm1(-count / 2**22), rel=0.02)


def test_an_estimator_may_be_given_and_is_saved():
    estimator = FrequencyEstimator(101, learning_rate=0.2)
    task = make_task(make_table(), frequency_correction=estimator, use_lru=False)
    assert task.frequency is estimator
    task.candidate_network = keras.layers.Dense(DIM)
    again = CachedRetrieval.from_config(task.get_config())
    assert (again.frequency.num_buckets, again.frequency.learning_rate) == (101, 0.2)


def test_lru_is_refused_where_the_cache_must_be_a_sample():
    with pytest.raises(ValueError, match="which it is with `use_lru=False` only"):
        make_task(make_table(), frequency_correction=True)
    make_task(make_table(), cache_size=0, frequency_correction=True, in_batch_negatives=True)
