"""Tests of tasks under Keras's policies of mixed precision."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder
from negative_cache._compat import keras

NUM_CANDIDATES, DIM = 40, 8


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def policy(request):
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy("float32")


class Tower(keras.layers.Layer):
    """A table in float32, whatever the policy is."""

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        values = np.random.default_rng(0).normal(size=[NUM_CANDIDATES, DIM])
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features):
        return tf.gather(tf.convert_to_tensor(self.table), features["id"])


def make_task(tower, **kwargs):
    # Beyond what half precision can count to, and finer than it can tell apart.
    task = CachedRetrieval(
        tower,
        {"id": tf.io.FixedLenFeature([], tf.int64)},
        cache_size=NUM_CANDIDATES,
        score_transform=lambda scores: 30.0 * scores + 1000.0,
        embedding_dim=DIM,
        seed=1,
        **kwargs,
    )
    task.add_to_cache({"id": tf.range(NUM_CANDIDATES, dtype=tf.int64)})
    return task


def logs_of(steps=70):
    """What a task reports after some steps, called as a layer, and inside of another layer."""
    loss_metrics = [keras.metrics.Mean(name="mean_loss")]
    tower = Tower()
    task = make_task(tower, loss_metrics=loss_metrics)

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.task = task

        def call(self, features):
            embeddings = tower(features)
            return self.task(embeddings[:, ::-1], embeddings, features, training=True)

    outer = Outer()
    for call in (outer, lambda features: task(tower(features)[:, ::-1], tower(features), features)):
        call = tf.function(call)
        for i in range(steps):
            call({"id": tf.constant([i % NUM_CANDIDATES], tf.int64)})
    metrics = [*task.training_metrics, *loss_metrics]
    return {metric.name: float(metric.result()) for metric in metrics}


def test_metrics_are_counted_in_float32(policy):
    found = logs_of()
    keras.mixed_precision.set_global_policy("float32")
    assert found == pytest.approx(logs_of(), rel=1e-6)
    assert found["log_partition"] > 1000.0


def test_a_model_trains(policy):
    towers = [
        keras.Sequential([keras.layers.Embedding(NUM_CANDIDATES, DIM), keras.layers.Dense(DIM)])
        for _ in range(2)
    ]
    spec = tf.io.FixedLenFeature([], tf.int64)
    task = CachedRetrieval(
        towers[1], spec, NUM_CANDIDATES, temperature=0.1, in_batch_negatives=True, seed=1
    )
    model = DualEncoder(*towers, task)
    model.compile(keras.optimizers.Adam(0.01))
    ids = tf.range(NUM_CANDIDATES, dtype=tf.int64)
    pairs = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(8)
    losses = model.fit(pairs, epochs=12, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.7 * losses[2]
