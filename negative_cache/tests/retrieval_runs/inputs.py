"""What the runs train and on what: a tower, candidates and their features."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from negative_cache._compat import keras

NUM_QUERIES, NUM_STEPS, DIM, NUM_CANDIDATES, CACHE_SIZE = 4, 8, 4, 24, 10
CONTENT_SIZE = 3


@keras.utils.register_keras_serializable("negative_cache.tests")
class Table(keras.layers.Layer):
    """A tower that looks embeddings up by the id of a candidate.

    In training it returns other embeddings than in inference, as dropout would, but not at random:
    who mixes up the two modes gets other numbers.

    Args:
      seed: of the table [NUM_CANDIDATES, DIM].
      unit: whether embeddings have unit length, then in both modes.
      output_dtype: of the embeddings.
      penalty: factor of a loss of the tower's own, Σ ‖embedding‖².
      broken: a candidate whose embedding is not finite; it is never in a batch.
    """

    def __init__(
        self, seed=0, unit=False, output_dtype="float32", penalty=0.0, broken=None, **kwargs
    ):
        super().__init__(**kwargs)
        self.options = {
            "seed": seed,
            "unit": unit,
            "output_dtype": output_dtype,
            "penalty": penalty,
            "broken": broken,
        }
        values = np.random.default_rng(seed).normal(size=[NUM_CANDIDATES, DIM])
        if broken is not None:
            values[broken] = np.nan
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features, training=None):
        ids = features
        if isinstance(features, Mapping):
            ids = features["title"] if "title" in features else features["id"]
        if ids.dtype == tf.string:
            # An unfilled row of a cache has no title.
            ids = tf.strings.to_number(tf.where(tf.equal(ids, ""), "0", ids), tf.int64)
        embeddings = tf.gather(tf.convert_to_tensor(self.table), ids)
        if self.options["penalty"]:
            self.add_loss(self.options["penalty"] * tf.reduce_sum(embeddings**2))
        embeddings *= 1.1 if training else 1.0
        if self.options["unit"]:
            embeddings = tf.math.l2_normalize(embeddings, axis=1)
        return tf.cast(embeddings, self.options["output_dtype"])

    def get_config(self):
        return {**super().get_config(), **self.options}


@keras.utils.register_keras_serializable("negative_cache.tests")
def squashed(scores):
    """A score transform that is increasing and not linear."""
    return 3.0 * tf.tanh(scores / 3.0)


# How candidates are described: what a tower takes, and the specs of that.
SPECS = {
    "id": {"id": tf.io.FixedLenFeature([], tf.int64)},
    "title": {"title": tf.io.FixedLenFeature([], tf.string)},
    "tensor": tf.io.FixedLenFeature([], tf.int64),
    "content": {
        "id": tf.io.FixedLenFeature([], tf.int64),
        "content": tf.io.FixedLenFeature([CONTENT_SIZE], tf.float32),
    },
}
ID_KEYS = {"id": "id", "title": "title", "tensor": "candidate", "content": "id"}
_CONTENT = np.random.default_rng(5).normal(size=[NUM_CANDIDATES, CONTENT_SIZE])


def as_ids(kind: str, ids):
    """`ids`, integers of any shape, in the form that the feature has; -1 is padding."""
    ids = tf.constant(ids, tf.int64)
    if kind != "title":
        return ids
    return tf.where(ids < 0, "", tf.strings.as_string(ids))


def as_features(kind: str, ids):
    """The features [n, ...] of candidates [n], as `SPECS[kind]` describes them."""
    if kind == "tensor":
        return as_ids(kind, ids)
    features = {ID_KEYS[kind]: as_ids(kind, ids)}
    if kind == "content":
        features["content"] = tf.constant(_CONTENT[np.asarray(ids)], tf.float32)
    return features
