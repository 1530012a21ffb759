"""Tests of a source of one's own on two replicas."""

import numpy as np
import tensorflow as tf

from negative_cache import Retrieval
from negative_cache.tests.layers.retrieval_cases import DIM, Table, make_queries
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
