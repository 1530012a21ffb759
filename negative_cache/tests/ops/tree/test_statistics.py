"""Tests of what a tree's nodes keep: against the definitions, in float64."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops.groups import Groups
from negative_cache.ops.tree.cut import COUNT, ERROR, RADIUS, SPREAD
from negative_cache.ops.tree.statistics import (
    bisect,
    candidate_stats,
    change_nodes,
    combine,
    round_means,
)


def statistics_of(rows, centre):
    """(count, spread, smallest radius, how far the centre is from the mean)."""
    distances = np.linalg.norm(rows - centre, axis=1)
    off = np.linalg.norm(rows.mean(axis=0) - centre)
    return len(rows), np.mean(distances**2), distances.max(), off


def test_combine_is_that_of_the_candidates():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=[size, 5]).astype(np.float32) for size in (3, 1, 6)]
    everyone = np.concatenate(parts).astype(np.float64)
    means, stats = zip(
        *(
            combine(part, candidate_stats(tf.fill([len(part)], True), tf.zeros(len(part))))
            for part in parts
        )
    )
    for part, mean, stat in zip(parts, means, stats):
        count, spread, radius, off = statistics_of(part.astype(np.float64), mean.numpy())
        assert stat[COUNT] == count
        np.testing.assert_allclose(stat[SPREAD], spread, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stat[RADIUS], radius, rtol=1e-4, atol=1e-5)
        assert stat[RADIUS] >= radius and stat[ERROR] >= off
    # With a part that is not there.
    means = tf.stack([*means, tf.fill([5], 100.0)])
    stats = tf.stack([*stats, tf.zeros([4])])
    mean, stat = combine(means, stats)
    np.testing.assert_allclose(mean, everyone.mean(axis=0), atol=1e-6)
    count, spread, radius, off = statistics_of(everyone, mean.numpy())
    assert stat[COUNT] == count and stat[RADIUS] >= radius and stat[ERROR] >= off
    np.testing.assert_allclose(stat[SPREAD], spread, rtol=1e-5)


@pytest.mark.parametrize("moves", [True, False])
@given(seed=st.integers(0, 2**16))
def test_a_change_keeps_the_statistics_true(moves, seed):
    rng = np.random.default_rng(seed)
    nodes = [list(rng.normal(size=[size, 3]).astype(np.float32)) for size in (4, 1, 7)]
    means, stats = [], []
    for rows in nodes:
        mean, stat = combine(
            tf.stack(rows), candidate_stats(tf.fill([len(rows)], True), tf.zeros(len(rows)))
        )
        means.append(mean)
        stats.append(stat)
    addresses, signs, vectors = [], [], []
    for address, rows in enumerate(nodes):
        for _ in range(int(rng.integers(0, len(rows) + 1))):
            addresses.append(address)
            signs.append(-1.0)
            vectors.append(rows.pop(int(rng.integers(len(rows)))))
        for _ in range(int(rng.integers(0, 4))):
            rows.append(rng.normal(size=3).astype(np.float32))
            addresses.append(address)
            signs.append(1.0)
            vectors.append(rows[-1])
    # One that is in no node, and so must not count.
    addresses.append(0)
    signs.append(0.0)
    vectors.append(np.full(3, 1e6, np.float32))
    groups = Groups.of(tf.constant(addresses, tf.int32), tf.constant(signs) != 0.0)
    new_means, new_stats = change_nodes(
        tf.gather(tf.stack(means), groups.numbers),
        tf.gather(tf.stack(stats), groups.numbers),
        groups,
        tf.constant(np.stack(vectors)),
        tf.constant(signs),
        tf.zeros(len(signs)),
        moves=moves,
    )
    for place in np.flatnonzero(groups.is_some):
        address = int(groups.numbers[place])
        mean, stat = new_means[place].numpy(), new_stats[place].numpy()
        if not nodes[address]:
            np.testing.assert_array_equal(stat, np.zeros(4))
            continue
        if not moves:
            np.testing.assert_array_equal(mean, means[address])
        rows = np.stack(nodes[address]).astype(np.float64)
        count, spread, radius, off = statistics_of(rows, mean)
        assert stat[COUNT] == count
        assert stat[RADIUS] >= radius and stat[ERROR] >= off
        if moves:
            assert stat[ERROR] < 1e-4
        np.testing.assert_allclose(stat[SPREAD], spread, rtol=1e-3, atol=1e-4)


def test_rounded_means_have_statistics_about_themselves():
    rows = np.random.default_rng(1).normal(size=[5, 4]).astype(np.float32)
    mean, stat = round_means(
        *combine(rows, candidate_stats(tf.fill([5], True), tf.zeros(5))), tf.bfloat16
    )
    np.testing.assert_array_equal(mean, tf.cast(tf.cast(mean, tf.bfloat16), tf.float32))
    count, spread, radius, off = statistics_of(rows.astype(np.float64), mean.numpy())
    assert off > 1e-5
    assert stat[COUNT] == count and stat[RADIUS] >= radius and stat[ERROR] >= off
    np.testing.assert_allclose(stat[SPREAD], spread, rtol=1e-3)


def test_bisect_finds_two_clusters():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=[3, 8, 4]).astype(np.float32)
    is_far = rng.random([3, 8]) < 0.5
    is_far[:, :3], is_far[:, 3:5] = True, False
    vectors[is_far] += 50.0
    is_there = np.ones([3, 8], bool)
    is_there[1, [0, 7]] = False
    part = bisect(vectors, is_there, 0.1).numpy()
    for side, far, there in zip(part, is_far, is_there):
        assert not np.any(side & ~there)
        assert set(far[side & there]) | set(far[~side & there]) == {True, False}
        assert len(set(far[side & there])) == len(set(far[~side & there])) == 1


@pytest.mark.parametrize("smallest_part, sizes", [(0.5, [4]), (0.25, [2, 3, 4, 5, 6])])
def test_bisect_keeps_both_parts_large_enough(smallest_part, sizes):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=[20, 8, 2]).astype(np.float32) ** 5
    vectors[0] = 1.0
    part = bisect(vectors, np.ones([20, 8], bool), smallest_part).numpy()
    assert set(part.sum(axis=1)) <= set(sizes)
    pair = bisect(vectors[:, :3], np.tile([True, False, True], [20, 1]), 0.25).numpy()
    assert set(pair.sum(axis=1)) == {1}
