from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import retrieval_fns
from negative_cache.tests.statistics import assert_draws_follow

pytestmark = pytest.mark.one_keras


def test_max_score_takes_the_first_of_the_highest():
    scores = tf.constant([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]])
    picks = retrieval_fns.MaxScoreRetrievalFn()(scores)
    assert picks.dtype == tf.int64
    assert picks.numpy().tolist() == [[1], [0]]


def test_gumbel_max_adds_the_noise_once():
    # 2 s + G = [0 + 1, 2 + 0, 4 - 3] and [6 + 0, 2 + 5, 0 + 0].
    noise = tf.constant([[1.0, 0.0, -3.0], [0.0, 5.0, 0.0]])
    scores = tf.constant([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    with mock.patch.object(retrieval_fns, "_sample_gumbel", return_value=noise) as sample_gumbel:
        picks = retrieval_fns.GumbelMaxRetrievalFn(inv_temp=2.0)(scores)
    sample_gumbel.assert_called_once()
    np.testing.assert_array_equal(sample_gumbel.call_args.args[0], [2, 3])
    assert picks.numpy().tolist() == [[1], [1]]


@pytest.mark.parametrize("inv_temp", [1.0, 0.5])
def test_law_of_gumbel_max(inv_temp):
    scores = np.array([0.0, 1.0, 3.0, -2.0], np.float32)
    draws = retrieval_fns.GumbelMaxRetrievalFn(inv_temp)(tf.tile(scores[np.newaxis], [20_000, 1]))
    weights = np.exp(inv_temp * scores.astype(np.float64))
    assert_draws_follow(draws.numpy(), weights / weights.sum())


def test_gumbel_noise_has_mean_eulers_constant():
    noise = retrieval_fns._sample_gumbel([100_000]).numpy()
    # The variance is π² / 6; six standard errors.
    assert abs(noise.mean() - np.euler_gamma) < 6 * np.pi / np.sqrt(6 * noise.size)


def test_only_the_untouched_gumbel_max_draws_from_the_softmax():
    class Own(retrieval_fns.GumbelMaxRetrievalFn):
        pass

    untouched = retrieval_fns.GumbelMaxRetrievalFn()
    assert retrieval_fns.draws_from_softmax(untouched)
    assert not retrieval_fns.draws_from_softmax(retrieval_fns.GumbelMaxRetrievalFn(2.0))
    assert not retrieval_fns.draws_from_softmax(retrieval_fns.GumbelMaxRetrievalFn(tf.ones([])))
    assert not retrieval_fns.draws_from_softmax(retrieval_fns.MaxScoreRetrievalFn())
    assert not retrieval_fns.draws_from_softmax(Own())
    with mock.patch.object(retrieval_fns, "_sample_gumbel"):
        assert not retrieval_fns.draws_from_softmax(untouched)


def test_the_abstract_function_cannot_be_made():
    with pytest.raises(TypeError):
        retrieval_fns.AbstractRetrievalFn()
