"""Tests of the choice of landmarks, and of the Nyström update."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from negative_cache.ops import landmarks
from negative_cache.tests.statistics import assert_draws_follow


def mask_of(size, rows):
    return tf.constant(np.isin(np.arange(size), list(rows)))


@hypothesis.given(
    mask=st.lists(st.booleans(), min_size=1, max_size=30), data=st.data(), seed=st.integers(0, 99)
)
def test_uniform_rows_are_different_and_those_of_the_mask_come_first(mask, data, seed):
    count = data.draw(st.integers(1, len(mask)))
    rows = landmarks.uniform_rows(tf.constant(mask), count, [seed, 0]).numpy()
    assert len(set(rows)) == count
    num_there = min(sum(mask), count)
    assert all(mask[row] for row in rows[:num_there])
    assert not any(mask[row] for row in rows[num_there:])


def test_uniform_rows_are_uniform():
    mask = mask_of(10, [0, 1, 2, 5, 9])
    draws = [landmarks.uniform_rows(mask, 2, [seed, 3]).numpy() for seed in range(600)]
    law = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 1]) / 5
    for position in range(2):
        assert_draws_follow(np.array(draws)[:, position], law)


def planted(num_clusters, size, distance=100.0):
    """Points of clusters that are far from each other, cluster i at rows i, i + num_clusters, …"""
    rng = np.random.default_rng(0)
    centres = distance * np.eye(num_clusters, dtype=np.float32)
    which = np.arange(size) % num_clusters
    noise = 1e-2 * rng.normal(size=[size, num_clusters])
    return (centres[which] + noise).astype(np.float32), which


# Of the larger size a pool of 32 a landmark is looked at.
@pytest.mark.parametrize("size", [60, 2000])
@pytest.mark.parametrize("as_variable", [False, True])
def test_kmeans_plus_plus_takes_one_of_each_cluster(size, as_variable):
    points, which = planted(6, size)
    points = tf.Variable(points) if as_variable else tf.constant(points)
    for seed in range(5):
        rows = landmarks.kmeans_plus_plus_rows(points, tf.ones([size], tf.bool), 6, [seed, 0])
        assert sorted(which[rows.numpy()]) == list(range(6))


def test_kmeans_plus_plus_is_that_of_its_seed():
    points, _ = planted(4, 80)
    mask = tf.ones([80], tf.bool)
    first, again, other = (
        landmarks.kmeans_plus_plus_rows(points, mask, 4, [seed, 0]).numpy() for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_kmeans_plus_plus_begins_anywhere_and_goes_on_by_squared_distance():
    points = np.float32([[0.0], [1.0], [3.0]])
    mask = tf.ones([3], tf.bool)
    draw = tf.function(lambda seed: landmarks.kmeans_plus_plus_rows(points, mask, 2, seed))
    draws = [draw(tf.constant([seed, 0], tf.int64)).numpy() for seed in range(900)]
    pairs = np.array(draws) @ [3, 1]
    squares = np.square(points - points.T)
    law = squares / squares.sum(axis=1, keepdims=True) / 3
    assert_draws_follow(pairs, law.reshape(-1))


@pytest.mark.parametrize("size", [40, 500])
def test_kmeans_plus_plus_chooses_of_the_mask(size):
    points, _ = planted(2, size)
    there = range(5, size, 4)
    rows = landmarks.kmeans_plus_plus_rows(points, mask_of(size, there), 7, [3, 1]).numpy()
    assert set(rows) <= set(there)
    assert len(set(rows)) == 7


def test_kmeans_plus_plus_of_equal_points_takes_different_rows():
    points = tf.ones([9, 2])
    rows = landmarks.kmeans_plus_plus_rows(points, tf.ones([9], tf.bool), 9, [0, 0]).numpy()
    assert sorted(rows) == list(range(9))


def rbf_of(a, b, scale):
    squares = np.square(a[:, np.newaxis] - b).sum(axis=-1)
    return np.exp(-squares / (2 * scale**2))


def random_problem(count, dim=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=[count, dim]), 0.3 * rng.normal(size=[count, dim])


def float32(*arrays):
    return [tf.constant(values, tf.float32) for values in arrays]


def test_rbf_kernel():
    a, b = (random_problem(count, seed=count)[0] for count in (4, 6))
    values = landmarks.rbf_kernel(*float32(a, b), 0.7)
    np.testing.assert_allclose(values, rbf_of(a, b, 0.7), rtol=1e-5, atol=1e-6)


@hypothesis.given(
    count=st.integers(1, 8),
    scale=st.floats(0.5, 2.0),
    ridge=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
def test_coefficients_are_those_of_the_formula(count, scale, ridge, seed):
    stale, drift = random_problem(count, seed=seed)
    share = np.random.default_rng(seed).uniform(0.0, 2.0, size=count)
    phi, matrix = np.diag(share), rbf_of(stale, stale, scale)
    expected = phi @ np.linalg.inv(phi @ matrix @ phi + ridge * np.eye(count)) @ drift
    found = landmarks.nystrom_coefficients(*float32(matrix, drift, share), ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_coefficients_of_landmarks_of_one_age_are_those_of_the_paper():
    stale, drift = random_problem(7)
    matrix = rbf_of(stale, stale, 1.2)
    expected = np.linalg.solve(matrix + 0.1 * np.eye(7), drift)
    found = landmarks.nystrom_coefficients(*float32(matrix, drift, np.ones(7)), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_features", [2, 5])
def test_linear_coefficients_are_those_of_their_kernel(num_features):
    features, _ = random_problem(9, dim=num_features, seed=3)
    _, drift = random_problem(9, seed=4)
    share = np.random.default_rng(5).uniform(0.0, 2.0, size=9)
    kernel = features @ features.T
    coefficients = landmarks.nystrom_coefficients(*float32(kernel, drift, share), 0.1)
    found = landmarks.linear_coefficients(*float32(features, drift, share), 0.1)
    np.testing.assert_allclose(found, features.T @ coefficients.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("garbage", [5.0, np.nan, np.inf])
def test_landmarks_that_are_not_there_contribute_nothing(garbage):
    stale, drift = random_problem(5)
    places = [0, 3]
    share = np.insert(np.ones(5), places, 0.0)
    more_drift, more_stale = (
        np.insert(values, places, garbage, axis=0) for values in (drift, stale)
    )
    kernel = rbf_of(stale, stale, 1.0)
    expected = landmarks.nystrom_coefficients(*float32(kernel, drift, np.ones(5)), 0.1)
    more_kernel = np.insert(np.insert(kernel, places, garbage, axis=0), places, garbage, axis=1)
    found = landmarks.nystrom_coefficients(*float32(more_kernel, more_drift, share), 0.1).numpy()
    np.testing.assert_allclose(found[share > 0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[share == 0], np.zeros([2, 3]))
    expected = landmarks.linear_coefficients(*float32(stale, drift, np.ones(5)), 0.1)
    found = landmarks.linear_coefficients(*float32(more_stale, more_drift, share), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
