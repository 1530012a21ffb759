"""Small retrieval tasks that the tests of `CachedRetrieval` share."""

import numpy as np
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import CachedRetrieval

INT_ID = tf.io.FixedLenFeature([], tf.int64)
STRING_ID = tf.io.FixedLenFeature([], tf.string)
DIM = 3


class Table(keras.layers.Layer):
    """A tower that looks embeddings up by {"id": int}; row i is candidate i's embedding."""

    def __init__(self, values):
        super().__init__()
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features):
        return tf.gather(tf.convert_to_tensor(self.table), features["id"])


def make_table(num_candidates=12, seed=0):
    return np.random.default_rng(seed).normal(size=[num_candidates, DIM]).astype(np.float32)


def make_queries(num_queries, seed=1):
    return np.random.default_rng(seed).normal(size=[num_queries, DIM]).astype(np.float32)


class Curve(keras.layers.Layer):
    """A `score_transform` whose slope and height are learned."""

    def __init__(self):
        super().__init__(autocast=False, dtype="float32")
        constant = keras.initializers.Constant
        self.height = self.add_weight(shape=[], initializer=constant(3.0), name="height")
        self.slope = self.add_weight(shape=[], initializer=constant(0.7), name="slope")

    def call(self, scores):
        height, slope = tf.convert_to_tensor(self.height), tf.convert_to_tensor(self.slope)
        return height * tf.tanh(slope * scores)


def make_task(table, cache_size=6, *, filled_with=(), **kwargs):
    kwargs = {"seed": 1, "candidate_id_key": "id", "embedding_dim": DIM, **kwargs}
    task = CachedRetrieval(Table(table), {"id": INT_ID}, cache_size, **kwargs)
    if len(filled_with):
        task.add_to_cache({"id": tf.constant(filled_with, tf.int64)})
    return task


def call(task, queries, ids, table, **kwargs):
    ids = np.asarray(ids, np.int64)
    return task(tf.constant(queries), tf.constant(table[ids]), {"id": tf.constant(ids)}, **kwargs)


def freeze_cache(task):
    """Lets no step change the cache: every draw is from the same law."""
    task.cached.end_step = lambda batch, contribution: None


def cross_entropy(positive, negatives):
    """-s⁺ + log(exp s⁺ + Σ exp s⁻) of one query, in float64."""
    logits = np.concatenate([[positive], np.asarray(negatives, np.float64)])
    return np.logaddexp.reduce(logits) - positive


def copy_of_state(task):
    state = [variable.numpy() for variable in task.cache.data.values()]
    return [
        *state,
        task.cache.age.numpy(),
        task.cache.filled.numpy(),
        task.cached._state.sampling.numpy(),
    ]


def assert_same_state(left, right):
    for a, b in zip(left, right):
        np.testing.assert_array_equal(a, b)
