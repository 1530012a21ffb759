"""Tests of `FrequencyEstimator` on streams whose law is known."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.tests.replicas import two_replicas


def update(estimator, keys):
    estimator.update(tf.constant(keys, tf.int64))


def probability(estimator, *keys):
    return estimator.probability(tf.constant(keys, tf.int64)).numpy()


def test_moving_average_of_gaps_by_hand():
    estimator = FrequencyEstimator(100, learning_rate=0.5)
    # Nothing seen: the probability of one occurrence in a stream of one.
    np.testing.assert_allclose(probability(estimator, 7), [1.0])
    update(estimator, [7, 1])  # 7 first came within 2 draws: gap 2.
    np.testing.assert_allclose(probability(estimator, 7), [1 / 2])
    update(estimator, [2, 3])
    update(estimator, [7, 4])  # 4 draws later: gap 2 + (4 - 2) / 2 = 3.
    np.testing.assert_allclose(probability(estimator, 7), [1 / 3])
    # Twice in 2 draws: two steps towards a gap of 1, 3 -> 2 -> 3/2.
    update(estimator, [7, 7])
    np.testing.assert_allclose(probability(estimator, 7), [2 / 3], rtol=1e-6)
    # 8 draws so far, 9 never came.
    np.testing.assert_allclose(probability(estimator, 9), [1 / 9])
    np.testing.assert_allclose(
        estimator.probability(tf.constant([7, 9], tf.int64), 0.25), [2 / 3, 0.25], rtol=1e-6
    )


@pytest.mark.one_keras
@pytest.mark.parametrize("batch_size", [16, 256])
def test_estimates_are_close_to_the_law_of_a_zipf_stream(batch_size):
    num_candidates, num_draws, rate = 200, 2**16, 0.02
    law = 1.0 / np.arange(1, num_candidates + 1)
    law /= law.sum()
    stream = np.random.default_rng(0).choice(num_candidates, size=num_draws, p=law)
    estimator = FrequencyEstimator(100_000, learning_rate=rate)
    step = tf.function(estimator.update)
    for start in range(0, num_draws, batch_size):
        step(tf.constant(stream[start : start + batch_size], tf.int64))
    estimates = probability(estimator, *range(num_candidates))
    # Gaps are about exponential, so that their moving average has a relative standard error of
    # sqrt(rate / (2 - rate)) = 10 %. Candidate 100 came about 110 times: what it started from has a
    # weight of at most 0.98^110 = 11 % left.
    ratios = estimates[:100] / law[:100]
    assert np.max(np.abs(np.log(ratios[:30]))) < 0.5
    # Over the candidates errors average out: to 2 %, and a bias of a few percent (E[1/gap] exceeds
    # 1/E[gap] by the variance, 1 %). Counting a batch with several occurrences as one gap would be
    # a bias of 20 % where p B is about 1.
    assert np.mean(np.log(ratios[:30])) == pytest.approx(0.0, abs=0.1)


def test_a_candidate_in_every_draw_has_probability_one():
    estimator = FrequencyEstimator(10)
    for _ in range(3):
        update(estimator, [5] * 8)
    np.testing.assert_allclose(probability(estimator, 5), [1.0])


def test_candidates_of_one_bucket_share_their_estimate():
    # There is but one.
    estimator = FrequencyEstimator(1)
    update(estimator, [3, 13])
    np.testing.assert_allclose(probability(estimator, 3, 13), [1.0, 1.0])


def test_negative_keys_have_a_bucket():
    estimator = FrequencyEstimator(10)
    update(estimator, [-1, -1])
    np.testing.assert_allclose(probability(estimator, -1), [1.0])


def test_config_round_trip():
    estimator = FrequencyEstimator(12, learning_rate=0.25)
    copy = FrequencyEstimator.from_config(estimator.get_config())
    assert (copy.num_buckets, copy.learning_rate) == (12, 0.25)


def test_two_replicas_count_streams_of_their_own():
    strategy = two_replicas()
    with strategy.scope():
        estimator = FrequencyEstimator(1000)

    @tf.function
    def step():
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            estimator.update(tf.cast(tf.stack([replica, replica, 5, 6]), tf.int64))
            return estimator.probability(tf.constant([0, 1], tf.int64))

        return strategy.run(replica_step)

    first, second = strategy.experimental_local_results(step())
    # Two of four draws; never came: one of five.
    np.testing.assert_allclose(first, [1 / 2, 1 / 5])
    np.testing.assert_allclose(second, [1 / 5, 1 / 2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_buckets": 0}, "`num_buckets` must be an integer >= 1. Received: 0"),
        ({"num_buckets": 5, "learning_rate": 0.0}, "`learning_rate` must lie in .0, 1.. Received"),
        ({"num_buckets": 5, "learning_rate": 1.5}, "Received: 1.5"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrequencyEstimator(**arguments)


@pytest.mark.parametrize("num_buckets", [30_000, 2**15, 30_001])
@pytest.mark.parametrize("stride", [1, 1000, 2**20])
def test_ids_of_any_stride_spread_over_the_buckets(num_buckets, stride):
    estimator = FrequencyEstimator(num_buckets)
    ids = np.arange(1000) * stride
    for _ in range(20):
        update(estimator, ids)
    estimates = probability(estimator, *ids)
    assert np.median(estimates) == pytest.approx(1e-3, rel=0.01)
    # About one in thirty shares a bucket.
    assert np.mean(estimates > 1.5e-3) < 0.06
    assert float(estimator.occupancy) == pytest.approx(1000 / num_buckets, rel=0.06)


def test_keys_that_are_no_integers_are_refused():
    estimator = FrequencyEstimator(100)
    estimator.update([1, 2])
    for keys in (["a"], [1.0]):
        with pytest.raises(ValueError, match="`keys` must be integers"):
            estimator.update(keys)
