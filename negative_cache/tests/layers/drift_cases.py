"""Drifts that correctors of stale embeddings are to learn."""

import numpy as np
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers.drift_corrector import Encoded

DIM = 4
AGE = 5


def points(count, seed=0, *, unit=False):
    """[count, DIM] float32 of lengths from 1.5 to 2.5, or of length 1."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=[count, DIM])
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    if not unit:
        values *= rng.uniform(1.5, 2.5, size=[count, 1])
    return values.astype(np.float32)


def rotation(angle=0.5, dim=DIM):
    """[dim, dim], a rotation by `angle` in the plane of each pair of axes."""
    matrix = np.eye(dim, dtype=np.float32)
    for first in range(0, dim - 1, 2):
        block = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix[first : first + 2, first : first + 2] = block
    return matrix


def encoded_of(stale, fresh, age=AGE, mask=None):
    mask = np.ones(len(stale), bool) if mask is None else mask
    age = np.broadcast_to(np.int32(age), [len(stale)])
    return Encoded(*(tf.constant(part) for part in (stale, fresh, age, mask)))


def built(corrector):
    corrector.build((None, DIM))
    return corrector


def product(queries):
    """Scores as those of a step with `queries` [B, d]."""
    return lambda embeddings: tf.matmul(queries, embeddings, transpose_b=True)


def learn(corrector, encoded, steps=1, optimizer=None, queries=None):
    """Lets a corrector learn from the same rows for some steps; the last loss."""
    weights = corrector.trainable_variables
    if optimizer is not None:
        optimizer.build(weights)
    score_fn = product(points(3, seed=9) if queries is None else queries)

    def step():
        with tf.GradientTape() as tape:
            loss = corrector.learn(encoded, corrector.displacement_fn(), score_fn)
        if optimizer is not None and weights:
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
        return tf.constant(0.0) if loss is None else loss

    # To trace takes as long as a few steps do.
    step = tf.function(step) if steps > 5 else step
    loss = None
    for _ in range(steps):
        loss = step()
    return loss


def trained(corrector, *, unit=False, count=200, steps=150, angle=0.5):
    """A corrector that has learned a rotation."""
    stale = points(count, unit=unit)
    fresh = stale @ rotation(angle)
    learn(built(corrector), encoded_of(stale, fresh), steps, keras.optimizers.Adam(0.01))
    return corrector


def error_of(values, fresh):
    """Σ ‖h - g‖²."""
    return float(np.sum(np.square(np.asarray(values, np.float64) - fresh)))
