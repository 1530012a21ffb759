"""Tests of `LatestValue`."""

import pytest
import tensorflow as tf

from negative_cache.metrics import LatestValue
from negative_cache.tests.replicas import two_replicas


def test_is_the_last_value_and_keeps_it_when_reset():
    metric = LatestValue(name="fill")
    assert metric.name == "fill"
    for value in (3.0, 1.0, 2):
        metric.update_state(value, sample_weight=5.0)
        assert float(metric.result()) == pytest.approx(value)
        metric.reset_state()
        assert float(metric.result()) == pytest.approx(value)


def test_is_the_mean_of_the_replicas_last_values():
    strategy = two_replicas()
    with strategy.scope():
        metric = LatestValue(name="fill")

    @tf.function
    def step():
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            metric.update_state(1.0 + tf.cast(replica, tf.float32))

        strategy.run(replica_step)

    for _ in range(3):
        step()
    assert float(metric.result()) == pytest.approx(1.5)
