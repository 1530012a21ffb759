"""Tests of tasks whose queries share draws: edges, precision, replicas."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, CacheSpec, FromCache, InBatch, Retrieval
from negative_cache._compat import keras
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    Table,
    call,
    cross_entropy,
    freeze_cache,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.replicas import two_replicas

TABLE = make_table(20)
SPECS = {"id": INT_ID}


def drawn_in(task):
    """The rows that the steps from now on draw, as `EncodedRows`, one a step."""
    drawn = []
    logits = task.cached.logits

    def seeing(batch, training):
        contribution = logits(batch, training)
        if contribution.pending is not None:
            drawn.append(contribution.pending.drawn)
        return contribution

    task.cached.logits = seeing
    return drawn


def gradients_of(task, queries, ids, **kwargs):
    """The loss of a training step, and its gradients by the queries and by the tower's table."""
    tower, queries = task.candidate_network, tf.constant(queries)
    features = {"id": tf.constant(ids, tf.int64)}
    table = tower.table if isinstance(tower.table, tf.Variable) else tower.table.value
    with tf.GradientTape() as tape:
        tape.watch(queries)
        loss = task(queries, tower(features), features, training=True, **kwargs)
    by_queries, by_table = tape.gradient(loss, [queries, table])
    return loss.numpy(), by_queries.numpy(), tf.convert_to_tensor(by_table).numpy()


# Edges.


@pytest.mark.parametrize("exact_query_gradient", [False, True])
@pytest.mark.parametrize("num_draws", [1, 7])
def test_an_empty_cache_is_no_negative(num_draws, exact_query_gradient):
    options = {"num_draws": num_draws, "exact_query_gradient": exact_query_gradient}
    task = make_task(TABLE, in_batch_negatives=True, reduction="none", **options)
    without = make_task(TABLE, 0, in_batch_negatives=True, reduction="none")
    drawn = drawn_in(task)
    found, expected = (gradients_of(each, make_queries(3), [0, 1, 2]) for each in (task, without))
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    # Nothing is drawn, and encoded in the place of draws are candidates of the batch.
    assert drawn[0].mask.numpy().tolist() == [False] * num_draws
    assert int(task.cache.num_filled) == 3


def test_where_no_query_has_a_negative_the_loss_is_zero():
    task = make_task(TABLE, filled_with=[4], remove_accidental_hits=True, reduction="sum")
    loss, by_queries, by_table = gradients_of(task, make_queries(2), [4, 4])
    assert loss == 0.0 and not np.any(by_queries) and not np.any(by_table)


def test_a_query_without_a_negative_is_drawn_for_by_nobody():
    known = np.array([[5, 6, 7], [5, 5, 5], [-1, -1, -1]])
    task = make_task(TABLE, filled_with=[5, 6, 7], num_draws=6, reduction="none")
    freeze_cache(task)
    drawn = drawn_in(task)
    for _ in range(20):
        loss, by_queries, _ = gradients_of(
            task, make_queries(3), [0, 1, 2], known_positive_ids=known
        )
        assert loss[0] == 0.0 and not np.any(by_queries[0]) and np.all(loss[1:] > 0.0)
    masks = np.stack([part.mask for part in drawn])
    assert np.all(masks)


@pytest.mark.parametrize("num_draws", [2, 5])
def test_a_query_that_is_nan_does_not_spoil_the_draws_of_others(num_draws):
    queries = make_queries(4)
    options = {"num_draws": num_draws, "reduction": "none", "filled_with": [5, 6, 7, 8]}
    task = make_task(TABLE, **options)
    freeze_cache(task)
    drawn = drawn_in(task)
    alone = gradients_of(task, queries, [0, 1, 2, 3])
    queries[1] = np.nan
    loss, by_queries, _ = gradients_of(task, queries, [0, 1, 2, 3])
    others = [0, 2, 3]
    assert np.isnan(loss[1])
    np.testing.assert_allclose(loss[others], alone[0][others], rtol=1e-5)
    np.testing.assert_allclose(by_queries[others], alone[1][others], rtol=1e-4, atol=1e-5)
    # No draw is lost to it.
    assert np.all(drawn[1].mask) and len(drawn[1].mask) == num_draws


def test_a_row_that_several_draw_is_written_once():
    task = make_task(TABLE, filled_with=[7], num_draws=6)
    moved = TABLE + 1.0
    task.candidate_network.table.assign(moved)
    call(task, make_queries(2), [0, 1], moved)
    assert int(task.cache.num_filled) == 3
    row = int(np.flatnonzero(task.cache.data["id"].numpy() == 7)[0])
    np.testing.assert_allclose(task.cache.embeddings[row], moved[7])


@pytest.mark.one_keras
@pytest.mark.parametrize("kwargs", [{}, {"num_draws": 3}, {"num_negatives": 2}])
@pytest.mark.parametrize("is_known", [False, True])
def test_an_empty_batch(kwargs, is_known):
    task = make_task(TABLE, filled_with=[5, 6], in_batch_negatives=True, **kwargs)
    encoded = int(task.cached.num_encoded)
    shape = [0] if is_known else [None]

    @tf.function(input_signature=[tf.TensorSpec([*shape, DIM]), tf.TensorSpec(shape, tf.int64)])
    def step(queries, ids):
        features = {"id": ids}
        with tf.GradientTape() as tape:
            tape.watch(queries)
            loss = task(queries, task.candidate_network(features), features, training=True)
        return loss, tape.gradient(loss, queries)

    loss, gradient = step(tf.zeros([0, DIM]), tf.zeros([0], tf.int64))
    assert float(loss) == 0.0 and gradient.shape == [0, DIM]
    assert int(task.cached.num_encoded) == encoded and int(task.cache.num_filled) == 2


@pytest.mark.parametrize(
    ["kwargs", "batch", "per_step"],
    [
        ({}, 4, 4),
        ({}, 1, 1),
        ({"num_draws": 3}, 5, 3),
        ({"num_draws": 8}, 5, 8),
        ({"num_negatives": 1}, 5, 5),
        ({"num_negatives": 2}, 5, 10),
    ],
)
def test_a_step_encodes_the_batch_and_the_draws(kwargs, batch, per_step):
    task = make_task(TABLE, 8, filled_with=[5, 6, 7], **kwargs)
    encoded = {metric.name: metric for metric in task.training_metrics}["candidates_encoded"]
    for step in (1, 2):
        call(task, make_queries(batch), range(batch), TABLE)
        assert int(encoded.result()) == 3 + step * (batch + per_step)
    call(task, make_queries(batch), range(batch), TABLE, training=False)
    assert int(task.cached.num_encoded) == 3 + 2 * per_step


def test_the_value_is_that_of_all_rows_whatever_is_drawn():
    queries, ids, cached = make_queries(3), [0, 1, 2], [5, 6, 7, 8]
    scores = queries.astype(np.float64) @ TABLE.T
    expected = [cross_entropy(scores[i, ids[i]], scores[i, cached]) for i in range(3)]
    for kwargs in ({}, {"num_draws": 1}, {"num_draws": 9}):
        task = make_task(TABLE, filled_with=cached, reduction="none", **kwargs)
        freeze_cache(task)
        for training in (True, False):
            losses = call(task, queries, ids, TABLE, training=training)
            np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_a_call_without_training_changes_nothing():
    task = make_task(TABLE, filled_with=[5, 6], num_draws=3)
    before = [task.cached._state.sampling.numpy(), task.cache.age.numpy()]
    call(task, make_queries(2), [0, 1], TABLE, training=False)
    after = [task.cached._state.sampling.numpy(), task.cache.age.numpy()]
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def checked():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


@pytest.mark.one_keras
def test_every_number_of_a_step_is_finite(checked):
    # From an empty cache on; queries with nothing to draw, with won positives, and with lost ones.
    known = tf.constant([[5, 6, 7, 8], [-1] * 4, [-1] * 4], tf.int64)
    task = make_task(TABLE, filled_with=[], num_draws=4, remove_accidental_hits=True)
    queries = np.array([1.0, 300.0, -300.0], np.float32)[:, np.newaxis] * TABLE[:3]

    @tf.function
    def step(ids):
        features = {"id": ids}
        with tf.GradientTape() as tape:
            candidates = task.candidate_network(features)
            loss = task(tf.constant(queries), candidates, features, known_positive_ids=known)
        return loss, tape.gradient(loss, candidates)

    for _ in range(3):
        step(tf.constant([0, 1, 2], tf.int64))
    task.add_to_cache({"id": tf.constant([5, 6, 7, 8], tf.int64)})
    loss, _ = step(tf.constant([0, 1, 2], tf.int64))
    assert np.isfinite(loss)


# Precision and replicas.


class FloatTable(keras.layers.Layer):
    """A table in float32, whatever the policy is."""

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        self.table = self.add_weight(
            shape=TABLE.shape, initializer=keras.initializers.Constant(TABLE), name="table"
        )

    def call(self, features):
        return tf.gather(tf.convert_to_tensor(self.table), features["id"])


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
def test_under_a_policy_of_mixed_precision_gradients_are_those_of_float32(name):
    def gradients(policy):
        keras.mixed_precision.set_global_policy(policy)
        # Scores beyond what half precision counts to, and finer than it tells apart.
        task = CachedRetrieval(
            FloatTable(),
            SPECS,
            6,
            score_transform=lambda scores: 30.0 * scores + 1000.0,
            num_draws=3,
            reduction="none",
            embedding_dim=DIM,
            seed=1,
        )
        task.add_to_cache({"id": tf.constant([5, 6, 7, 8], tf.int64)})
        return [gradients_of(task, make_queries(3), [0, 1, 2]) for _ in range(3)]

    try:
        found = tf.nest.flatten(gradients(name))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for one, other in zip(found, tf.nest.flatten(gradients("float32")), strict=True):
        assert one.dtype == np.float32 and np.any(one)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def replica_values(strategy, values):
    values = iter(values)
    return strategy.experimental_distribute_values_from_function(lambda _: next(values))


def test_replicas_share_draws_each_among_its_own_queries_also_none():
    # Fewer draws than a replica has queries, as many, and more.
    strategy, cached, num_draws = two_replicas(), [5, 6, 7, 8, 9], 3
    with strategy.scope():
        task = make_task(TABLE, 8, filled_with=cached, num_draws=num_draws, reduction="sum", seed=7)
    freeze_cache(task)
    drawn = drawn_in(task)

    @tf.function
    def step(queries, ids):
        def of_replica(queries, ids):
            features = {"id": ids}
            with tf.GradientTape() as tape:
                tape.watch(queries)
                loss = task(queries, task.candidate_network(features), features, training=True)
            rows = drawn[-1]
            return loss, tape.gradient(loss, queries), tf.where(rows.mask, rows.rows, -1)

        return strategy.run(of_replica, (queries, ids))

    encoded = {metric.name: metric for metric in task.training_metrics}["candidates_encoded"]
    all_queries, total = make_queries(4), len(cached)
    for sizes in ((4, 4), (4, 0), (1, 3)):
        parts = [all_queries[:size] for size in sizes]
        ids = [list(range(size)) for size in sizes]
        queries = replica_values(strategy, [tf.constant(part) for part in parts])
        features = replica_values(strategy, [tf.constant(part, tf.int64) for part in ids])
        results = [strategy.experimental_local_results(part) for part in step(queries, features)]
        for size, loss, gradient, rows in zip(sizes, *results, strict=True):
            # The cache is fresh: the queries' gradient has no variance.
            scores = all_queries[:size].astype(np.float64) @ TABLE.T
            own = np.arange(size)
            negatives = scores[:, cached]
            expected = [cross_entropy(scores[i, i], negatives[i]) for i in own]
            assert float(loss) == pytest.approx(np.sum(expected), rel=1e-5)
            weights = np.exp(np.concatenate([scores[own, own][:, np.newaxis], negatives], axis=1))
            weights /= weights.sum(axis=1, keepdims=True)
            by_queries = weights[:, 1:] @ TABLE[cached] + (weights[:, :1] - 1.0) * TABLE[own]
            np.testing.assert_allclose(gradient, by_queries, rtol=1e-4, atol=1e-5)
            count = num_draws if size else 0
            assert len(rows) == count and np.all(rows >= 0)
            total += size + count
        assert int(encoded.result()) == total
    # Of the same queries: the replicas' draws are their own.
    more = [strategy.experimental_local_results(step(*_same(strategy))[2]) for _ in range(5)]
    assert any(np.any(one.numpy() != other.numpy()) for one, other in more)


def _same(strategy):
    queries, ids = tf.constant(make_queries(4)), tf.range(4, dtype=tf.int64)
    return replica_values(strategy, [queries] * 2), replica_values(strategy, [ids] * 2)


def test_two_caches_draw_each_on_its_own():
    tower = Table(TABLE)
    sources = [
        InBatch(),
        FromCache(CacheSpec(SPECS, 6), seed=1, num_draws=3, name="shared"),
        FromCache(CacheSpec(SPECS, 6), seed=2, num_negatives=2, name="own"),
    ]
    task = Retrieval(tower, sources, candidate_id_key="id", reduction="none")
    features = {"id": tf.constant([5, 6, 7], tf.int64)}
    for source in task.cached_negatives:
        source.add(features)
    queries, ids = make_queries(4), [0, 1, 2, 3]
    candidates = tower({"id": tf.constant(ids, tf.int64)})
    loss = task(tf.constant(queries), candidates, {"id": tf.constant(ids, tf.int64)})
    scores = queries.astype(np.float64) @ TABLE.T
    for i in ids:
        others = [j for j in ids if j != i]
        negatives = scores[i, others + [5, 6, 7] * 2]
        np.testing.assert_allclose(loss[i], cross_entropy(scores[i, i], negatives), rtol=1e-5)
    assert [int(source.num_encoded) for source in task.cached_negatives] == [3 + 3, 3 + 8]
