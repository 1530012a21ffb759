"""Tests of `TreeIndex`: its invariants, its bounds, and what it refuses."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from negative_cache._compat import keras
from negative_cache.layers import TreeIndex
from negative_cache.layers._tree import make as make_module
from negative_cache.tests.layers.tree_cases import (
    DIM,
    assert_bounds,
    clustered,
    filled_index,
    index_of,
    make_index,
    queries_of,
)
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.tree_invariants import check_tree, log_partition


@pytest.mark.one_keras
def test_an_empty_tree(root_width):
    index = make_index()
    check_tree(index, {})
    queries = queries_of(np.random.default_rng(0), 2)
    sample, log_probability = index.sample_with_log_probability(queries, 3)
    np.testing.assert_array_equal(sample.indices, -np.ones([2, 3]))
    np.testing.assert_array_equal(sample.scores, np.full([2, 3], -np.inf))
    np.testing.assert_array_equal(sample.log_partition, [-np.inf] * 2)
    assert not np.any(np.isnan(log_probability))
    for bound in index.log_partition_bounds(queries):
        np.testing.assert_array_equal(bound, [-np.inf] * 2)
    scores, indices = index.top_k(queries, 2)
    np.testing.assert_array_equal(indices, -np.ones([2, 2]))
    np.testing.assert_array_equal(scores, np.full([2, 2], -np.inf))
    _, gradient = index.sample_with_gradient(queries)
    np.testing.assert_array_equal(gradient, np.zeros([2, DIM]))


@pytest.mark.one_keras
def test_a_tree_built_at_once(root_width):
    rng = np.random.default_rng(1)
    index, vectors = filled_index(rng)
    check_tree(index, vectors)
    assert_bounds(index, queries_of(rng, 4), vectors)


@functools.cache
def shared_index(is_deep):
    """One that examples build anew: its functions are traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_module, "_MAX_ROOT_WIDTH", 12 if is_deep else 4096)
        return make_index(capacity=120)


@pytest.mark.one_keras
@given(seed=st.integers(0, 2**16), is_deep=st.booleans(), start=st.integers(0, 60))
@settings(max_examples=12)
def test_invariants_and_bounds_hold_after_any_sequence_of_changes(seed, is_deep, start):
    rng = np.random.default_rng(seed)
    index = shared_index(is_deep)
    skipped = int(index.num_skipped)
    index.index(clustered(rng, start), verbose=0)
    vectors = {i: row for i, row in enumerate(index._candidates.embeddings.numpy()[:start])}
    for _ in range(12):
        kind = rng.choice(
            ["move", "jump", "collapse", "remove", "tighten"], p=[0.4, 0.3, 0.1, 0.1, 0.1]
        )
        ids = rng.choice(120, 24, replace=False)
        rows = clustered(rng, 24)
        if kind == "tighten":
            index.tighten()
            continue
        if kind == "remove":
            index.remove(ids)
            vectors = {i: row for i, row in vectors.items() if i not in set(ids.tolist())}
            continue
        if kind == "move":
            near = np.stack([vectors.get(i, row) for i, row in zip(ids.tolist(), rows)])
            rows = (near + 0.05 * rng.normal(size=near.shape)).astype(np.float32)
        if kind == "collapse":
            rows[:] = rows[0]
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
    check_tree(index, vectors)
    queries = queries_of(rng, 4, scale=10.0 ** rng.uniform(-2, 1.5))
    loose = assert_bounds(index, queries, vectors, beam=int(rng.integers(1, 30)))
    assert int(index.num_skipped) == skipped
    index.tighten()
    check_tree(index, vectors)
    if vectors:
        tight = assert_bounds(index, queries, vectors, beam=30)
        assert np.all(tight <= loose + 1e-2 * (1 + np.abs(loose)))


@pytest.mark.one_keras
def test_thousands_of_updates():
    rng = np.random.default_rng(3)
    index, vectors = filled_index(rng, count=300)
    for step in range(150):
        ids = rng.choice(300, 32, replace=False)
        drift = 0.3 if step % 5 == 0 else 0.02
        rows = np.stack([vectors[i] for i in ids.tolist()]) + drift * rng.normal(size=[32, DIM])
        rows = rows.astype(np.float32)
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
        if step % 25 == 0:
            assert_bounds(index, queries_of(rng, 4), vectors)
    check_tree(index, vectors)


@pytest.mark.one_keras
@given(
    temperature=st.floats(0.02, 5.0),
    dim=st.integers(1, 40),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15)
def test_bounds_of_random_trees(temperature, dim, count, seed):
    rng = np.random.default_rng(seed)
    index = TreeIndex(300, dim, leaf_size=8, branching=4, beam=int(rng.integers(1, 9)))
    rows = clustered(rng, count, dim) * np.float32(10.0 ** rng.uniform(-2, 1))
    index.index(rows, verbose=0)
    queries = rng.normal(size=[5, dim]).astype(np.float32)
    lower, upper = index.log_partition_bounds(queries, temperature=temperature)
    expected = log_partition(queries.astype(np.float64) / temperature, dict(enumerate(rows)))
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


@pytest.mark.one_keras
def test_bounds_with_a_transform_contain_the_log_partition(root_width):
    rng = np.random.default_rng(4)
    index, vectors = filled_index(rng)
    queries = queries_of(rng, 5)
    lower, upper = index.log_partition_bounds(queries, score_transform=tf.nn.softplus)
    rows = np.stack(list(vectors.values())).astype(np.float64)
    scores = np.logaddexp(0.0, queries.astype(np.float64) @ rows.T)
    expected = np.logaddexp.reduce(scores, axis=1)
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


@pytest.mark.one_keras
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_embeddings_of_half_precision(dtype):
    rng = np.random.default_rng(12)
    index, vectors = filled_index(rng, embedding_dtype=dtype)
    ids = rng.choice(200, 50, replace=False)
    rows = clustered(rng, 50)
    index.update(ids, rows)
    vectors.update(zip(ids.tolist(), rows))
    kept = {i: tf.cast(tf.cast(row, dtype), tf.float32).numpy() for i, row in vectors.items()}
    check_tree(index, kept)
    assert_bounds(index, queries_of(rng, 3), kept)


@pytest.mark.one_keras
def test_rows_that_are_not_finite_are_skipped_and_counted():
    rng = np.random.default_rng(13)
    rows = clustered(rng, 40)
    rows[3], rows[17, 1] = np.nan, np.inf
    index = index_of(rows)
    vectors = {i: row for i, row in enumerate(rows) if i not in (3, 17)}
    check_tree(index, vectors)
    assert int(index.num_skipped) == 2
    new = clustered(rng, 3)
    new[1, 2] = np.nan
    index.update([3, 5, 50], new)
    vectors.update({3: new[0], 50: new[2]})
    check_tree(index, vectors)
    assert int(index.num_skipped) == 3


def test_in_a_graph_bad_indices_are_skipped_and_counted():
    rng = np.random.default_rng(14)
    index, vectors = filled_index(rng)
    update = tf.function(index.update)
    rows = clustered(rng, 6)
    update(tf.constant([4, -1, 300, 4, 2**40, 7], tf.int64), tf.constant(rows))
    vectors.update({4: rows[0], 7: rows[5]})
    check_tree(index, vectors)
    assert int(index.num_skipped) == 4


# Trees of several levels take seconds to trace, and do not depend on the dtype of candidates.
@pytest.mark.one_keras
@pytest.mark.parametrize(
    "dtype, far, root_width",
    [
        ("float32", 1e20, 4096),
        ("float32", 1e20, 12),
        ("float16", 7e4, 4096),
        ("bfloat16", 3e38, 4096),
    ],
    indirect=["root_width"],
)
def test_rows_too_long_to_be_squared_are_skipped_and_counted(root_width, dtype, far):
    rng = np.random.default_rng(14)
    index, vectors = filled_index(rng, embedding_dtype=dtype)
    vectors = {i: tf.cast(tf.cast(row, dtype), tf.float32).numpy() for i, row in vectors.items()}
    index.update([3, 250], np.full([2, DIM], far, np.float32))
    check_tree(index, vectors)
    assert int(index.num_skipped) == 2
    assert_bounds(index, queries_of(rng, 2), vectors)
    rows = np.stack(list(vectors.values()))
    rows[7] = far
    index.index(rows, verbose=0)
    check_tree(index, {i: row for i, row in enumerate(rows) if i != 7})
    assert int(index.num_skipped) == 3


@pytest.mark.one_keras
def test_bounds_allow_for_the_rounding_of_scores():
    rng = np.random.default_rng(14)
    rows = np.full([50, DIM], 1.7, np.float32) + 1e-6 * rng.normal(size=[50, DIM])
    index = index_of(rows.astype(np.float32))
    queries = queries_of(rng, 50, scale=1e4)
    vectors = dict(enumerate(rows.astype(np.float32)))
    assert_bounds(index, queries, vectors, beam=1)
    assert_bounds(index, queries, vectors, beam=50)


@pytest.mark.one_keras
@pytest.mark.parametrize(
    "transform", [tf.floor, lambda s: tf.where(s > 0.5, s, -np.inf)], ids=["floor", "cutoff"]
)
def test_bounds_with_transforms_that_are_flat_or_minus_infinity(root_width, transform):
    rng = np.random.default_rng(14)
    index, vectors = filled_index(rng)
    queries = queries_of(rng, 5)
    lower, upper = index.log_partition_bounds(queries, score_transform=transform, beam=2)
    scores = queries.astype(np.float64) @ np.stack(list(vectors.values())).T.astype(np.float64)
    expected = np.logaddexp.reduce(transform(tf.constant(scores)).numpy(), axis=1)
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


def test_a_strategy_is_known_outside_of_its_scope():
    rows = clustered(np.random.default_rng(14), 20)
    with two_replicas().scope():
        index = make_index()
    index.index(rows, verbose=0)
    index.update([30], rows[:1])
    results = two_replicas().run(lambda: index.num_candidates)
    counts = [int(count) for count in two_replicas().experimental_local_results(results)]
    assert counts == [21, 21]


@pytest.mark.one_keras
def test_masked_entries_change_nothing():
    rng = np.random.default_rng(15)
    index, vectors = filled_index(rng)
    rows = clustered(rng, 3)
    index.update([2, 2, -7], rows, mask=[False, True, False])
    vectors[2] = rows[1]
    check_tree(index, vectors)
    index.update([5, 6], rows[:2], mask=[False, False])
    check_tree(index, vectors)
    assert int(index.num_skipped) == 0


@pytest.mark.one_keras
def test_a_full_tree_without_free_blocks_still_takes_every_candidate():
    rng = np.random.default_rng(16)
    index = make_index(capacity=60)
    vectors = {}
    # Far apart, so that leaves hold few and no leaf is free in the end.
    for start in range(0, 60, 20):
        rows = (10.0 * rng.normal(size=[20, DIM])).astype(np.float32)
        index.update(range(start, start + 20), rows)
        vectors.update(zip(range(start, start + 20), rows))
    for _ in range(40):
        ids = rng.choice(60, 30, replace=False)
        rows = np.repeat(10.0 * rng.normal(size=[1, DIM]), 30, axis=0).astype(np.float32)
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
    check_tree(index, vectors)
    assert int(index.num_skipped) == 0


def test_does_not_retrace():
    rng = np.random.default_rng(17)
    index, vectors = filled_index(rng)
    traces = []

    @tf.function
    def step(ids, rows, queries):
        traces.append(None)
        index.update(ids, rows)
        return index.sample(queries, 2, seed=[0, 1])

    for _ in range(3):
        ids = rng.choice(300, 40, replace=False)
        rows = clustered(rng, 40)
        sample = step(tf.constant(ids), tf.constant(rows), tf.constant(queries_of(rng, 3)))
        vectors.update(zip(ids.tolist(), rows))
        assert np.all(sample.indices.numpy() >= 0)
    check_tree(index, vectors)
    assert len(traces) == 1


def test_two_replicas_have_trees_of_their_own():
    strategy = two_replicas()
    rng = np.random.default_rng(18)
    rows = clustered(rng, 20)
    with strategy.scope():
        index = make_index()
        index.index(rows[:12], verbose=0)

    @tf.function
    def step(new):
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            index.update([20 + replica], tf.gather(new, [replica]))
            return index.sample(tf.ones([1, DIM])).log_partition

        return strategy.run(replica_step)

    results = strategy.experimental_local_results(step(tf.constant(rows[12:14])))
    for replica, result in enumerate(results):
        vectors = dict(enumerate(rows[:12])) | {20: rows[12 + replica]}
        expected = log_partition(np.ones([1, DIM]), vectors)
        lower = expected - 1.0
        assert lower <= result.numpy() <= expected + 1.0


def test_config_round_trip():
    index = make_index(store_embeddings=False, residual_bytes=2, beam=5, saved=False)
    config = index.get_config()
    assert TreeIndex.from_config(config).get_config() == config


@pytest.mark.parametrize("arguments", [{}, {"store_embeddings": False, "residual_bytes": 2}])
def test_a_checkpoint_and_a_keras_file_hold_the_tree(tmp_path, arguments):
    rng = np.random.default_rng(19)
    index, _ = filled_index(rng, **arguments)
    index.update(range(190, 210), clustered(rng, 20))
    queries = queries_of(rng, 3)
    expected = index.sample(queries, 3, seed=7)
    path = tf.train.Checkpoint(index=index).save(str(tmp_path / "checkpoint"))
    restored = make_index(**arguments)
    tf.train.Checkpoint(index=restored).restore(path).assert_consumed()
    inputs = keras.Input([1])
    weights = str(tmp_path / "model.weights.h5")
    models = []
    for tree in (index, make_index(**arguments)):
        model = keras.Model(inputs, inputs)
        model.tree = tree
        models.append(model)
    models[0].save_weights(weights)
    models[1].load_weights(weights)
    for tree in (restored, models[1].tree):
        for got, wanted in zip(tree.sample(queries, 3, seed=7), expected):
            np.testing.assert_array_equal(got, wanted)
        assert int(tree.num_candidates) == 210
    with pytest.raises(ValueError, match="Wanted"):
        tf.train.Checkpoint(index=make_index(capacity=400, **arguments)).restore(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"capacity": 0}, "`capacity`"),
        ({"beam": 0}, "`beam`"),
        ({"correction_steps": -1}, "`correction_steps`"),
        ({"leaf_size": 1}, "`leaf_size`"),
        ({"leaf_size": 0}, "`leaf_size`"),
        ({"branching": 3}, "`branching`"),
        ({"embedding_dtype": "foo"}, "`embedding_dtype`"),
        ({"embedding_dtype": tf.float64}, "`embedding_dtype`"),
        ({"embedding_dtype": tf.int32}, "`embedding_dtype`"),
        ({"store_embeddings": False, "residual_bytes": 4}, "`residual_bytes`"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_index(**arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda index: index.index(np.zeros([3, 5], np.float32)), "`embeddings` must have shape"),
        (lambda index: index.index(np.zeros([3, DIM], np.int32)), "floating"),
        (lambda index: index.index(np.zeros([301, DIM], np.float32)), "`capacity`"),
        (lambda index: index.update([1], np.zeros([1, 5], np.float32)), "must have shape"),
        (lambda index: index.update([1, 2], np.zeros([1, DIM], np.float32)), "`indices`"),
        (lambda index: index.update([300], np.zeros([1, DIM], np.float32)), "300"),
        (lambda index: index.update([-1], np.zeros([1, DIM], np.float32)), "-1"),
        (lambda index: index.update([2, 2], np.zeros([2, DIM], np.float32)), "more than once: 2"),
        (lambda index: index.remove([1, 1]), "more than once"),
        (lambda index: index.sample(np.zeros([2, 5], np.float32)), "`query_embeddings`"),
        (lambda index: index.sample(np.zeros([2, DIM], np.float32), -1), "`num_samples`"),
        (lambda index: index.sample(np.zeros([2, DIM], np.float32), beam=0), "`beam`"),
        (lambda index: index.top_k(np.zeros([2, DIM], np.float32), 0), "`k`"),
        (lambda index: index.top_k(np.zeros([2, DIM], np.float32), 301), "`k`"),
        (
            lambda index: index.sample(np.zeros([2, DIM], np.float32), candidate_ids=[1, 2]),
            "needs `positive_ids`",
        ),
        (
            lambda index: tf.function(index.index)(np.zeros([3, DIM], np.float32)),
            "`index` runs on the host",
        ),
    ],
)
def test_calls_refuse_and_change_nothing(call, message):
    rng = np.random.default_rng(20)
    index, vectors = filled_index(rng, count=30)
    with pytest.raises(ValueError, match=message):
        call(index)
    check_tree(index, vectors)
