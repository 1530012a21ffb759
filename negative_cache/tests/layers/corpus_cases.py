"""Small tasks with a cache that covers a corpus."""

import numpy as np
import tensorflow as tf

from negative_cache.layers import Cache, CachedRetrieval
from negative_cache.layers.drift_corrector import Encoded
from negative_cache.tests.layers.retrieval_cases import DIM, Table


def corpus_of(num_candidates, batch=5):
    ids = np.arange(num_candidates, dtype=np.int64)
    return tf.data.Dataset.from_tensor_slices({"id": ids}).batch(batch)


class CountingTable(Table):
    """A table that knows which ids it was asked for, in eager calls."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = []

    def call(self, features):
        tf.py_function(lambda ids: self.asked.append(ids.numpy()), [features["id"]], [])
        return super().call(features)

    @property
    def num_asked(self):
        return sum(len(ids) for ids in self.asked)


def make_corpus_task(table, *, tower=None, cache=None, **kwargs):
    """A task with one row for each row of `table`, and the tower `task.candidate_network`."""
    tower = Table(table) if tower is None else tower
    cache = {"candidate_id_key": "id", "verbose": 0, **(cache or {})}
    cache = Cache.from_dataset(corpus_of(len(table)), tower, **cache)
    return CachedRetrieval(tower, cache=cache, **{"seed": 1, **kwargs})


def drifted(table, amount=0.2, seed=7):
    """`table` [n, d] after a linear drift."""
    matrix = np.random.default_rng(seed).normal(size=[DIM, DIM])
    return (table @ (np.eye(DIM) + amount * matrix)).astype(np.float32)


def set_tower(task, table):
    task.candidate_network.table.assign(table)


def step(task, queries, ids, **kwargs):
    """A training step whose positives are `ids`, encoded by the tower of now; the loss."""
    features = {"id": tf.constant(ids, tf.int64)}
    candidates = tf.stop_gradient(task.candidate_network(features))
    return task(tf.constant(queries), candidates, features, training=True, **kwargs)


def teach(corrector, stale, fresh, age, seed=0):
    """Gives a corrector something to correct by: weights or landmarks, and trust in them."""
    for weight in corrector.trainable_variables:
        values = np.random.default_rng(seed).normal(size=weight.shape)
        weight.assign(0.1 * values)
    encoded = Encoded(
        tf.constant(stale),
        tf.constant(fresh),
        tf.fill([len(stale)], age),
        tf.fill(len(stale), True),
    )
    for _ in range(2):
        corrector.learn(
            encoded, corrector.displacement_fn(), lambda rows: rows[:1] @ tf.transpose(rows)
        )
    corrector._state.agreement.assign([1.0, 1.0])


def corrected_rows(task):
    """[C, d] what the corrector makes of the rows of the cache, by its own `call`."""
    return task.corrector(task.cache.embeddings, task.cache.age).numpy()


def log_partitions(queries, rows, left_out):
    """[B] float64, log Z over `rows` but for the one of `left_out` [B]."""
    scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
    scores[np.arange(len(queries)), left_out] = -np.inf
    return np.logaddexp.reduce(scores, axis=1)


def losses_of(queries, rows, table, ids):
    """[B] float64, the cross-entropy of the positives `table[ids]` against the cached `rows`."""
    positive = np.sum(queries.astype(np.float64) * table[ids], axis=1)
    return np.logaddexp(positive, log_partitions(queries, rows, ids)) - positive
