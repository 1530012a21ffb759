"""Tests of towers that add to the loss: by `add_loss`, or by a regularizer of their activity."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder
from negative_cache._compat import keras

DIM, BATCH = 4, 4
FEATURES = np.random.default_rng(0).normal(size=[2 * BATCH, DIM]).astype(np.float32)


class Tower(keras.layers.Layer):
    """A table that adds `amount` to the loss at every call, by itself and by a layer within."""

    def __init__(self, amount):
        super().__init__()
        self.amount = amount
        self.dense = keras.layers.Dense(
            DIM,
            kernel_initializer="identity",
            # The mean over the batch of the rows' sums.
            activity_regularizer=lambda outputs: amount * tf.reduce_sum(outputs * 0.0 + 1.0),
        )

    def call(self, features):
        self.add_loss(tf.constant(1.0) * self.amount)
        return self.dense(features["x"])


def losses_of(amount, run_eagerly, **options):
    """The losses of a batch as `fit` and `evaluate` report them."""
    tower = Tower(amount)
    options = {"cache_size": 8, "embedding_dim": DIM, "seed": 1, **options}
    spec = {"x": tf.io.FixedLenFeature([DIM], tf.float32)}
    task = CachedRetrieval(tower, spec, in_batch_negatives=True, **options)
    model = DualEncoder(keras.layers.Dense(DIM, kernel_initializer="identity"), tower, task)
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=run_eagerly)
    data = {"query": FEATURES, "candidate": {"x": FEATURES}}
    data = tf.data.Dataset.from_tensor_slices(data).batch(BATCH)
    fitted = model.fit(data, epochs=1, verbose=0, shuffle=False).history["loss"][0]
    evaluated = model.evaluate(data, verbose=0, return_dict=True)["loss"]
    task.refresh_cache(verbose=0) if task.cache_size else None
    return np.array([fitted, evaluated])


@pytest.mark.parametrize(
    ["options", "run_eagerly"],
    [
        ({"cache_size": 0}, False),
        ({}, False),
        ({"num_negatives": 3}, True),
        ({"refresh_fraction": 0.25}, False),
        ({"refresh_fraction": 0.01}, False),
        ({"probe_size": 2, "probe_every": 1}, False),
    ],
)
def test_what_a_tower_adds_counts_once_for_the_encoding_of_the_batch(options, run_eagerly):
    # What adds nothing has the same losses in a graph, which takes long to trace.
    without = losses_of(0.0, run_eagerly=True, **options)
    once = losses_of(1.0, run_eagerly, **options)
    # 1 of `add_loss`; of the regularizer, in Keras 3 the sum over the outputs, else per candidate.
    size = BATCH if once[0] - without[0] > 1.5 + DIM else 1
    np.testing.assert_allclose(once - without, 1.0 + size * DIM, rtol=1e-4)


def test_in_a_step_of_ones_own_the_losses_are_there_after_the_task():
    tower = Tower(1.0)
    spec = {"x": tf.io.FixedLenFeature([DIM], tf.float32)}
    task = CachedRetrieval(tower, spec, 8, embedding_dim=DIM, refresh_fraction=0.25)
    features = {"x": tf.constant(FEATURES)}

    @tf.function
    def step():
        embeddings = tower(features)
        before = tf.add_n(tower.losses)
        task(tf.constant(FEATURES), embeddings, features)
        return before, tf.add_n(tower.losses)

    before, after = step()
    assert float(before) == float(after) > 1.0
