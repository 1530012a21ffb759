"""Tests of a source of one's own on two replicas."""

import numpy as np
import tensorflow as tf

from negative_cache import Retrieval
from negative_cache.tests.layers.retrieval_cases import DIM, Table, cross_entropy, make_queries
from negative_cache.tests.layers.source_cases import TABLE, Anchors
from negative_cache.tests.replicas import two_replicas


def test_every_replica_keeps_what_its_own_steps_have_written():
    strategy = two_replicas()
    with strategy.scope():
        source = Anchors(2)
        task = Retrieval(Table(TABLE), [source])

    @tf.function
    def step(queries, ids):
        features = {"id": ids}
        return strategy.run(lambda: task(queries, tf.gather(TABLE, ids), features, training=True))

    queries, ids = tf.constant(make_queries(2)), tf.constant([0, 1], tf.int64)
    for count in (1, 2, 3):
        losses = strategy.experimental_local_results(step(queries, ids))
        assert len(losses) == 2
        np.testing.assert_array_equal(*losses)
        num_steps = source.num_steps
        num_steps = num_steps if isinstance(num_steps, tf.Variable) else num_steps.value
        counts = strategy.experimental_local_results(num_steps)
        assert [float(part) for part in counts] == [count, count]
    assert losses[0].shape == [] and source.anchors.shape == (2, DIM)


def test_every_replica_has_the_loss_of_its_own_batch():
    strategy = two_replicas()
    with strategy.scope():
        task = Retrieval(Table(TABLE), [Anchors(2)])

    @tf.function
    def step(ids):
        def of_replica(ids):
            embeddings = tf.gather(TABLE, ids)
            return task(queries, embeddings, {"id": ids}, training=True)

        return strategy.run(of_replica, (ids,))

    queries, batches = tf.constant(make_queries(2)), [[0, 1], [2, 3]]
    values = iter(batches)
    ids = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant(next(values), tf.int64)
    )
    losses = [float(part) for part in strategy.experimental_local_results(step(ids))]
    scores = queries.numpy().astype(np.float64) @ TABLE.T
    # The anchors are ones.
    of_anchors = queries.numpy().astype(np.float64).sum(axis=1)
    expected = [
        np.mean([cross_entropy(scores[i, own[i]], [of_anchors[i]] * 2) for i in range(2)])
        for own in batches
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 0.01
