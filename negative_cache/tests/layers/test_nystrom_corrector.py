"""Tests of `NystromCorrector`: what it estimates, and its landmarks."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.layers import NystromCorrector
from negative_cache.tests.layers.drift_cases import (
    DIM,
    built,
    encoded_of,
    error_of,
    learn,
    points,
    rotation,
    trained,
)


def test_a_linear_kernel_recovers_a_linear_drift():
    corrector = trained(NystromCorrector(32, kernel="linear", bandwidth=0.1, ridge=1e-3), steps=40)
    stale = points(50, seed=1)
    np.testing.assert_allclose(corrector(stale), stale @ rotation(), atol=2e-3)


@pytest.mark.parametrize("unit", [False, True])
def test_a_radial_kernel_recovers_a_smooth_drift(unit):
    corrector = trained(NystromCorrector(128, ridge=1e-2), unit=unit, steps=40)
    stale = points(50, seed=1, unit=unit)
    fresh = stale @ rotation()
    assert error_of(corrector(stale), fresh) < error_of(stale, fresh) / 5


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_the_scale_of_embeddings_does_not_matter(kernel):
    moves = []
    for scale in (1.0, 100.0):
        stale = points(20)
        corrector = built(NystromCorrector(20, kernel=kernel))
        learn(corrector, encoded_of(scale * stale, scale * stale @ rotation()), steps=2)
        moves.append((corrector(scale * points(5, seed=1)) - scale * points(5, seed=1)) / scale)
    assert np.max(np.abs(moves[0])) > 0.01
    np.testing.assert_allclose(moves[1], moves[0], rtol=1e-2, atol=1e-3)


def test_landmarks_of_different_age_count_by_how_far_they_have_gone():
    # Each has moved in proportion to its age.
    stale, age = points(60), np.arange(1, 61, dtype=np.int32)
    typical = age.mean()
    share = np.minimum(age / typical, 2.0)[:, np.newaxis].astype(np.float32)
    displacement = stale @ (rotation(0.2) - np.eye(DIM, dtype=np.float32))
    corrector = built(NystromCorrector(60, kernel="linear", bandwidth=0.1, ridge=1e-3))
    learn(corrector, encoded_of(stale, stale + share * displacement, age), steps=30)
    np.testing.assert_allclose(corrector(stale), stale + displacement, atol=5e-3)


def landmarks_of(corrector):
    landmarks = corrector._state.landmarks
    there = landmarks["age"].numpy() >= 0
    return landmarks["stale"].numpy()[there, 0]


def numbered(start, count):
    values = np.zeros([count, DIM], np.float32)
    values[:, 0] = np.arange(start, start + count)
    return values


def test_landmarks_are_the_rows_encoded_last():
    corrector = built(NystromCorrector(8))
    for start, expected in ((0, range(5)), (5, range(2, 10)), (10, range(7, 15))):
        stale = numbered(start, 5)
        learn(corrector, encoded_of(stale, stale))
        assert sorted(landmarks_of(corrector)) == list(expected)


def test_what_is_masked_takes_no_place():
    corrector = built(NystromCorrector(8))
    mask = np.array([False, True, False, True, True])
    for start in (0, 10):
        stale = numbered(start, 5)
        learn(corrector, encoded_of(stale, stale, mask=mask))
    assert sorted(landmarks_of(corrector)) == [1, 3, 4, 11, 13, 14]


def test_more_rows_than_landmarks_may_be_encoded():
    corrector = built(NystromCorrector(4))
    for start in (0, 100):
        stale = numbered(start, 9)
        learn(corrector, encoded_of(stale, stale))
        assert len(landmarks_of(corrector)) == 4 and np.all(landmarks_of(corrector) >= start)


def test_encoded_landmarks_ask_for_no_rows():
    corrector = built(NystromCorrector(4))
    assert corrector.rows_to_encode(tf.Variable(points(9)), tf.Variable([True] * 9), [0, 0]) is None


@pytest.mark.parametrize("landmarks", ["uniform", "k-means++"])
def test_landmarks_are_chosen_once_there_are_enough_rows(landmarks):
    corrector = built(NystromCorrector(4, landmarks=landmarks))
    embeddings, filled = tf.Variable(points(9)), tf.Variable(np.arange(9) < 3)
    rows, there = corrector.rows_to_encode(embeddings, filled, tf.constant([0, 0], tf.int64))
    assert not np.any(there) and np.all(rows >= 0)
    filled.assign(np.arange(9) < 6)
    chosen, there = corrector.rows_to_encode(embeddings, filled, tf.constant([1, 0], tf.int64))
    assert np.all(there) and len(set(chosen.numpy())) == 4 and np.max(chosen) < 6
    again, _ = corrector.rows_to_encode(embeddings, filled, tf.constant([2, 0], tf.int64))
    np.testing.assert_array_equal(again, chosen)


def test_chosen_landmarks_are_encoded_in_turn():
    corrector = built(NystromCorrector(6, landmarks="uniform", num_encoded=4))
    embeddings, filled = tf.Variable(numbered(0, 9)), tf.Variable([True] * 9)
    asked = []
    for step in range(3):
        rows, there = corrector.rows_to_encode(embeddings, filled, tf.constant([step, 0], tf.int64))
        assert rows.shape == [4] and np.all(there)
        asked += rows.numpy().tolist()
        stale = tf.gather(embeddings, rows).numpy()
        corrector.learn_landmarks(encoded_of(stale, stale))
    assert len(set(asked[:6])) == 6
    assert asked == 2 * asked[:6]
    assert sorted(landmarks_of(corrector)) == sorted(asked[:6])


def test_configuration_round_trip():
    settings = {
        "num_landmarks": 9,
        "landmarks": "k-means++",
        "num_encoded": 3,
        "kernel": "linear",
        "bandwidth": 2.0,
        "ridge": 0.3,
        "warmup_steps": 4,
    }
    copy = NystromCorrector.from_config(NystromCorrector(**settings).get_config())
    assert {name: getattr(copy, name) for name in settings} == settings


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_landmarks": 0}, "`num_landmarks` must be an integer >= 1. Received: 0"),
        ({"landmarks": "grid"}, "`landmarks` must be one of .* Received: 'grid'"),
        ({"kernel": "cubic"}, "`kernel` must be one of .* Received: 'cubic'"),
        ({"bandwidth": 0.0}, "`bandwidth` must be positive. Received: 0.0"),
        ({"ridge": -1.0}, "`ridge` must be at least 0.001.* Received: -1.0"),
        ({"num_encoded": 3}, "`num_encoded` .* cannot be used with .* Received: num_encoded=3"),
        (
            {"num_landmarks": 4, "landmarks": "uniform", "num_encoded": 5},
            "at most `num_landmarks`.* num_encoded=5, num_landmarks=4",
        ),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        NystromCorrector(**arguments)
