"""Tests of the masses and bounds of single nodes, against their definitions."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops.tree.cut import Scoring
from negative_cache.ops.tree.shape import TreeShape

COUNT, SPREAD, RADIUS, ERROR = 5.0, 0.3, 0.8, 0.05
STATS = tf.constant([[[COUNT, SPREAD, RADIUS, 0.0]]])


def scoring(norm, transform=None, dim=4):
    query = np.zeros([1, dim], np.float32)
    query[0, 0] = norm
    return Scoring(tf.constant(query), transform)


def test_the_mass_of_a_node():
    # log 5 + s + ½ ‖x‖² v / d, and no more than log 5 + s + ‖x‖ r.
    mass = scoring(2.0).log_masses(tf.constant([[1.5]]), STATS)
    np.testing.assert_allclose(mass, [[np.log(5) + 1.5 + 0.5 * 4.0 * 0.3 / 4]], rtol=1e-6)
    mass = scoring(100.0).log_masses(tf.constant([[1.5]]), STATS)
    np.testing.assert_allclose(mass, [[np.log(5) + 1.5 + 100.0 * 0.8]], rtol=1e-6)
    # With a transform its slope scales both.
    mass = scoring(2.0, lambda s: 3.0 * s).log_masses(tf.constant([[1.5]]), STATS)
    np.testing.assert_allclose(mass, [[np.log(5) + 4.5 + 0.5 * 36.0 * 0.3 / 4]], rtol=1e-6)
    mass = scoring(2.0).log_masses(tf.constant([[1.5]]), tf.zeros([1, 1, 4]))
    assert mass[0, 0] <= -1e30


@pytest.mark.parametrize("limit", [0.3, 1.0, 2.5, 10.0])
def test_mass_and_gradient_of_a_node_with_a_limit_are_those_of_normal_scores(limit):
    rng = np.random.default_rng(0)
    mean, spread, query = np.array([0.4, -0.3, 0.2, 0.1]), 0.8, np.array([1.0, 0.5, -0.7, 0.9])
    rows = mean + rng.normal(size=[400_000, 4]) * np.sqrt(spread / 4)
    scores = rows @ query
    weights = np.where(scores <= limit, np.exp(scores), 0.0)
    queries = tf.constant(query[np.newaxis], tf.float32)
    stats = tf.constant([[[len(rows), spread, 10.0, 0.0]]], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(queries)
        products = queries @ tf.constant(mean[:, np.newaxis], tf.float32)
        limits = tf.constant([limit], tf.float32)
        mass = Scoring(queries, max_scores=limits).log_masses(products, stats)
    np.testing.assert_allclose(mass[0, 0], np.log(weights.sum()), atol=0.01)
    expected = weights @ rows / weights.sum()
    np.testing.assert_allclose(tape.gradient(mass, queries)[0], expected, atol=0.01)


def test_the_bounds_of_a_node():
    # |n| exp s and |n| exp s cosh(‖x‖ r)
    lower, upper = scoring(2.0).bounds(tf.constant([[1.5]]), STATS, tf.zeros([1]))
    np.testing.assert_allclose(lower, [[np.log(5) + 1.5]], rtol=1e-6)
    np.testing.assert_allclose(upper, [[np.log(5) + 1.5 + np.log(np.cosh(1.6))]], rtol=1e-6)
    # Where the centre may be off by e: exp(s - ‖x‖e), and the chord at a mean of s + ‖x‖e.
    stats = tf.constant([[[COUNT, SPREAD, RADIUS, ERROR]]])
    lower, upper = scoring(2.0).bounds(tf.constant([[1.5]]), stats, tf.zeros([1]))
    np.testing.assert_allclose(lower, [[np.log(5) + 1.5 - 0.1]], rtol=1e-6)
    chord = np.cosh(1.6) + 0.1 / 1.6 * np.sinh(1.6)
    np.testing.assert_allclose(upper, [[np.log(5) + 1.5 + np.log(chord)]], rtol=1e-6)
    lower, upper = scoring(2.0, tf.nn.softplus).bounds(tf.constant([[1.5]]), STATS, tf.zeros([1]))
    np.testing.assert_allclose(lower, [[np.log(5) + np.log1p(np.exp(1.5 - 1.6))]], rtol=1e-6)
    np.testing.assert_allclose(upper, [[np.log(5) + np.log1p(np.exp(1.5 + 1.6))]], rtol=1e-6)


@given(
    seed=st.integers(0, 2**16),
    scale=st.floats(0.01, 30.0),
    count=st.integers(1, 30),
    off=st.floats(0.0, 1.0),
)
def test_the_bounds_contain_the_partition_of_any_node(seed, scale, count, off):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=[count, 4]) ** 3
    mean = rows.mean(axis=0)
    centre = (mean + off * rng.normal(size=4) / 3).astype(np.float32)
    distances = np.linalg.norm(rows - centre, axis=1)
    error = np.linalg.norm(mean - centre)
    stats = [[[count, np.mean(distances**2), distances.max() * 1.00001, error * 1.00001]]]
    query = (scale * rng.normal(size=[1, 4])).astype(np.float32)
    scores = query.astype(np.float64) @ rows.T
    products = tf.constant(query) @ centre[:, np.newaxis]
    rounding = 1e-5 * np.linalg.norm(query, axis=1) * (1 + np.abs(rows).max())
    lower, upper = Scoring(tf.constant(query)).bounds(
        products, tf.constant(stats, tf.float32), tf.constant(rounding, tf.float32)
    )
    log_partition = np.logaddexp.reduce(scores[0])
    slack = 1e-5 * (1 + abs(log_partition))
    assert lower[0, 0] - slack <= log_partition <= upper[0, 0] + slack


@pytest.mark.parametrize("capacity", [1, 50, 10_000, 1_000_000, 20_000_000])
def test_every_block_finds_a_node_to_own_it(capacity):
    shape = TreeShape.of(
        capacity, 8, leaf_size=64, branching=16, max_root_width=10_000, leaf_fill=0.66, spare=2.0
    )
    assert shape.num_leaves * shape.leaf_size > capacity
    assert shape.num_blocks[0] == 1 and shape.widths[0] <= 10_000
    for depth in range(shape.num_levels):
        nodes = shape.num_blocks[depth] * shape.widths[depth]
        assert nodes >= shape.num_owned(depth)
        assert nodes < 2**31
