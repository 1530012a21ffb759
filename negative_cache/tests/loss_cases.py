"""Caches, losses and laws that the tests of losses share."""

import numpy as np
import tensorflow as tf
from scipy.special import logsumexp

from negative_cache import retrieval_fns
from negative_cache.losses import CacheClassificationLoss
from negative_cache.negative_cache import NegativeCache

TABLE = np.array([[1, 0, 1], [0, 2, 0], [1, 1, 1], [-1, 0, 2], [0.5, 1, 0], [0, 0, -1]], np.float32)
QUERIES = np.array([[1, 0.5, -0.5], [-0.5, 0.25, 1]], np.float32)
POSITIVES = np.array([[0.5, 1, 0], [1, 0, 1]], np.float32)
NUM_DRAWS = 4000


def make_cache(rows, drift=0.0, dtype=tf.float32):
    """A cache of rows of `TABLE`; a `drift` other than 0 makes its embeddings stale."""
    rows = np.asarray(rows)
    embeddings = tf.constant(TABLE[rows] + drift, dtype)
    data = {"id": tf.constant(rows), "title": tf.as_string(rows), "embedding": embeddings}
    return NegativeCache(data, tf.zeros([len(rows)], tf.int32))


def look_up(features):
    """A doc network without weights."""
    return tf.gather(TABLE, features["id"])


def make_loss(loss_class=CacheClassificationLoss, **kwargs):
    return loss_class("embedding", ["id"], **{"reducer": None, **kwargs})


def expected_interpretable_loss(rows, transform=lambda scores: scores, drift=0.0):
    """-log p⁺ = log(exp s⁺ + Σ exp s) - s⁺."""
    positive = transform(np.sum(QUERIES * POSITIVES, axis=1))
    scores = transform(QUERIES @ (TABLE[rows] + drift).T)
    everything = np.concatenate([positive[:, np.newaxis], scores], axis=1)
    return logsumexp(everything, axis=1) - positive


def see_all_scores(scores):
    """Gumbel-max in disguise, so that the loss does not sample by blocks."""
    return retrieval_fns.GumbelMaxRetrievalFn()(scores)


def both_paths(loss):
    """The loss as it is, which samples by blocks, and as it samples from all scores."""
    yield loss
    loss._retrieval_fn = see_all_scores
    yield loss


def softmax_gradient(queries, positives, table, rows):
    """Gradients of Σ_x -log p⁺ with respect to queries, positives and candidate table."""
    queries, positives, table = (tf.constant(values) for values in (queries, positives, table))
    with tf.GradientTape() as tape:
        tape.watch([queries, positives, table])
        positive = tf.reduce_sum(queries * positives, axis=1, keepdims=True)
        negative = tf.matmul(queries, tf.gather(table, rows), transpose_b=True)
        log_probabilities = tf.nn.log_softmax(tf.concat([positive, negative], axis=1))
        loss = -tf.reduce_sum(log_probabilities[:, 0])
    return [tf.convert_to_tensor(part) for part in tape.gradient(loss, [queries, positives, table])]


def gradient_samples(loss, sources):
    """Independent draws of the loss's gradient, laid out as `softmax_gradient`."""
    table = tf.Variable(TABLE)

    def gradients(_):
        queries, positives = tf.constant(QUERIES), tf.constant(POSITIVES)
        with tf.GradientTape() as tape:
            tape.watch([queries, positives])
            result = loss(
                lambda features: tf.gather(table, features["id"]), queries, positives, sources
            )
            value = tf.reduce_sum(result.training_loss)
        parts = tape.gradient(value, [queries, positives, table])
        return [tf.convert_to_tensor(part) for part in parts]

    @tf.function
    def sample():
        return tf.map_fn(gradients, tf.range(NUM_DRAWS), fn_output_signature=[tf.float32] * 3)

    return [part.numpy() for part in sample()]
