"""Tests of `TreeIndex(store_embeddings=False)`, which keeps means and coded residuals only."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.layers import TreeIndex
from negative_cache.layers._tree import make as make_module
from negative_cache.ops.tree.cut import Scoring
from negative_cache.ops.tree.law import proposal_log_law, total_variation
from negative_cache.tests.tree_invariants import check_tree, log_partition

pytestmark = pytest.mark.one_keras

DIM = 8


def make_index(capacity=600, residual_bytes=4, **arguments):
    arguments = {"leaf_size": 24, "branching": 4, "beam": 4, **arguments}
    return TreeIndex(
        capacity, DIM, store_embeddings=False, residual_bytes=residual_bytes, **arguments
    )


def clustered(rng, count):
    centres = np.random.default_rng(0).normal(size=[12, DIM])
    rows = centres[rng.integers(12, size=count)] + 0.2 * rng.normal(size=[count, DIM])
    return rows.astype(np.float32)


def assert_bounds(index, vectors, rng):
    queries = (3.0 * rng.normal(size=[6, DIM])).astype(np.float32)
    lower, upper = index.log_partition_bounds(queries)
    expected = log_partition(queries, vectors)
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


# With one level of nodes, and with several, which take many seconds to trace.
@pytest.mark.parametrize(
    ["residual_bytes", "root_width"], [(0, 4096), (2, 4096), (4, 4096), (4, 6)]
)
def test_bounds_and_invariants_hold_through_updates(residual_bytes, root_width, monkeypatch):
    monkeypatch.setattr(make_module, "_MAX_ROOT_WIDTH", root_width)
    rng = np.random.default_rng(1)
    index = make_index(residual_bytes=residual_bytes)
    rows = clustered(rng, 400)
    index.index(rows, verbose=0)
    vectors = dict(enumerate(rows))
    # Spreads are only estimates once candidates have left that are known by their codes.
    check_tree(index, vectors, spread_tolerance=0.02)
    assert_bounds(index, vectors, rng)
    for step in range(12):
        ids = rng.choice(600, 60, replace=False)
        rows = clustered(rng, 60)
        if step % 2:
            near = np.stack([vectors.get(i, row) for i, row in zip(ids.tolist(), rows)])
            rows = (near + 0.05 * rng.normal(size=near.shape)).astype(np.float32)
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
        assert_bounds(index, vectors, rng)
    check_tree(index, vectors, spread_tolerance=np.inf)
    index.remove(range(0, 300))
    vectors = {i: row for i, row in vectors.items() if i >= 300}
    index.tighten()
    check_tree(index, vectors, spread_tolerance=np.inf)
    assert_bounds(index, vectors, rng)
    assert int(index.num_skipped) == 0


@pytest.mark.parametrize("residual_bytes", [0, 4])
def test_does_not_grow_from_nothing(residual_bytes):
    rows = clustered(np.random.default_rng(2), 60)
    index = make_index(residual_bytes=residual_bytes)
    with pytest.raises(ValueError, match="call `index` first"):
        index.update(range(60), rows)
    tf.function(index.update)(tf.range(60), tf.constant(rows))
    check_tree(index, {})
    assert int(index.num_skipped) == 60
    index.index(rows[:40], verbose=0)
    index.update(range(40, 60), rows[40:])
    check_tree(index, dict(enumerate(rows)), spread_tolerance=np.inf)
    index.reset()
    with pytest.raises(ValueError, match="call `index` first"):
        index.update(range(60), rows)


def test_indexing_again_forgets_how_far_codes_were_off():
    rows = clustered(np.random.default_rng(2), 300)
    indices = [make_index(), make_index()]
    indices[0].index(50.0 * rows, verbose=0)
    for index in indices:
        index.index(rows, verbose=0)
    queries = clustered(np.random.default_rng(3), 4)
    for again, fresh in zip(*(index.log_partition_bounds(queries) for index in indices)):
        np.testing.assert_allclose(again, fresh, rtol=1e-5)


def test_more_bytes_are_more_accurate():
    rng = np.random.default_rng(3)
    rows = clustered(rng, 600)
    queries = (2.0 * rng.normal(size=[20, DIM])).astype(np.float32)
    scores = queries.astype(np.float64) @ rows.T
    target = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    distances = []
    for residual_bytes in (0, 2, 8):
        index = make_index(residual_bytes=residual_bytes)
        index.index(rows, verbose=0)
        law = np.exp(proposal_log_law(index.tree, Scoring(tf.constant(queries)), 100))
        np.testing.assert_allclose(law.sum(axis=1), 1.0, atol=1e-3)
        distances.append(np.mean(total_variation(law, target)))
    assert distances[0] > 1.5 * distances[1] > 2.0 * distances[2]
    assert distances[2] < 0.05


def test_takes_150_times_less_memory_than_the_embeddings():
    # Shapes only: what the variables of a million candidates would take.
    index = TreeIndex(200_000, 768, store_embeddings=False)
    constant = 8 * 256 * 96 * 2
    per_candidate = (index.num_bytes - constant) / 200_000
    assert 768 * 4 / (per_candidate + constant / 1_000_000) >= 150


def test_codes_follow_the_directions_in_which_residuals_lie():
    rng = np.random.default_rng(20)
    basis = np.linalg.qr(rng.normal(size=[32, 8]))[0].T
    rows = (rng.normal(size=[2000, 8]) @ basis).astype(np.float32)
    index = TreeIndex(2000, 32, store_embeddings=False, residual_bytes=4)
    index.index(rows, verbose=0)
    queries = (rng.normal(size=[20, 8]) @ basis).astype(np.float32)
    scores, indices = index.top_k(queries, 2000, beam=100)
    products = np.take_along_axis(queries @ rows.T, indices.numpy(), axis=1)
    # Two of the eight directions to a byte leave 2^-8 of the variance at the least, k-means 0.006.
    # Eight coordinates in a row, each a mixture of all directions, leave 0.044.
    assert np.var(scores - products) < 0.02 * np.var(products)
