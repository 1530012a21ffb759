"""Towers, models and pairs that the tests of contrastive batches share."""

import numpy as np
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder
from negative_cache._compat import keras
from negative_cache.batching.plan import BatchPlan

NUM_PAIRS, DIM = 22, 4
TITLES = np.array([f"ü{i}" for i in range(NUM_PAIRS)])
PAIRS = {"query": {"id": np.arange(NUM_PAIRS)}, "candidate": {"id": np.arange(NUM_PAIRS)}}


class Tower(keras.layers.Layer):
    """Looks up row `features["id"]` of a table of embeddings, and counts its traces."""

    def __init__(self, values):
        super().__init__()
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )
        self.traces = 0

    def call(self, features):
        self.traces += 1
        return tf.gather(tf.convert_to_tensor(self.table), features["id"])


class TitleTower(keras.layers.Layer):
    """Embeds titles; it has no variables before it has seen some."""

    def __init__(self):
        super().__init__()
        self.hashing, self.table = keras.layers.Hashing(50), keras.layers.Embedding(50, DIM)

    def call(self, features):
        return self.table(self.hashing(features["title"]))


def random_tower(seed=0):
    return Tower(np.random.default_rng(seed).normal(size=[NUM_PAIRS, DIM]))


def make_model(cache_size=0, learning_rate=0.1, run_eagerly=True):
    candidate_tower = random_tower(1)
    task = CachedRetrieval(
        candidate_tower,
        {"id": tf.io.FixedLenFeature([], tf.int64)},
        cache_size,
        in_batch_negatives=True,
        seed=1,
    )
    model = DualEncoder(random_tower(0), candidate_tower, task)
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), run_eagerly=run_eagerly)
    return model


def make_plan(**changes):
    """A plan of batches of 8, all ordered, with `changes`."""
    arguments = {
        "batch_size": 8,
        "num_neighbors": 4,
        "quantile": None,
        "start_epoch": 0,
        "random_fraction": 0.0,
        "group_size": changes.get("batch_size", 8),
        "grow": False,
        "drop_remainder": False,
        "index": None,
        "embedding_batch_size": 1024,
        "seed": 0,
        "verbose": 0,
    }
    return BatchPlan(**{**arguments, **changes})


def clusters(num_clusters=6, size=4):
    """Towers, functions of a pair's number, that put it near its cluster; and the clusters."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(num_clusters), size))
    embeddings = tf.one_hot(labels, num_clusters) + 0.01 * tf.random.normal([len(labels), 1])
    return (lambda ids: tf.gather(embeddings, ids),) * 2, labels


def pairs_of(num_pairs):
    return {"query": np.arange(num_pairs), "candidate": np.arange(num_pairs)}


def read(batches):
    """The query ids of each batch of an epoch."""
    batches = [batches[i] for i in range(len(batches))]
    for batch in batches:
        for ids in tf.nest.flatten(batch):
            np.testing.assert_array_equal(ids, tf.nest.flatten(batch)[0])
    return [tf.nest.flatten(batch)[0].numpy() for batch in batches]


def next_epoch(batches):
    batches.on_epoch_end()
    return read(batches)


class Recorder:
    """Remembers the ids of the batches that a model is trained on, eagerly."""

    def __init__(self, model):
        self.batches = []
        train_step = model.train_step

        def record(data):
            batch = data[0] if isinstance(data, tuple) else data
            self.batches.append(batch["query"]["id"].numpy())
            return train_step(data)

        model.train_step = record

    def epochs(self, num_batches):
        return [self.batches[i : i + num_batches] for i in range(0, len(self.batches), num_batches)]


def assert_each_once(epoch, num_pairs=NUM_PAIRS):
    np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(num_pairs))
