"""Retrieval functions: which candidate of a row of scores a query takes as its negative.

A retrieval function is any callable scores [B, C] -> indices [B, 1]. A loss's `_retrieval_fn` may
be replaced by one.
"""

import abc

import numpy as np
import tensorflow as tf


class AbstractRetrievalFn(tf.Module, metaclass=abc.ABCMeta):
    """Picks one candidate for every query."""

    @abc.abstractmethod
    def __call__(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns the [B, 1] int64 picks from `scores` [B, C]."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """Picks the highest score: the hardest negative."""

    def __call__(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns argmax_y s(x, y), the first among equals: [B, 1] int64 from `scores` [B, C]."""
        return tf.argmax(scores, axis=1, output_type=tf.int64)[:, tf.newaxis]


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """Draws candidate y with probability exp(β s(x, y)) / Σ_y' exp(β s(x, y')).

    argmax_y (β s(x, y) + G_y) with independent standard Gumbel variables G_y has exactly that law.

    Args:
      inv_temp: β, a number or a scalar tensor or variable.
    """

    def __init__(self, inv_temp: float | tf.Tensor = 1.0):
        super().__init__()
        self.inv_temp = inv_temp

    def __call__(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns one draw for every query: [B, 1] int64 from `scores` [B, C]."""
        scores = tf.convert_to_tensor(scores)
        noise = tf.cast(_sample_gumbel(tf.shape(scores)), scores.dtype)
        perturbed = tf.cast(self.inv_temp, scores.dtype) * scores + noise
        return tf.argmax(perturbed, axis=1, output_type=tf.int64)[:, tf.newaxis]


def _sample_gumbel(shape: tf.Tensor) -> tf.Tensor:
    """[…] float32 standard Gumbel variables of a shape, -log(-log(U)) with U uniform on (0, 1).

    Called once a retrieval. Code may replace it, to fix the noise in a test for instance.
    """
    tiny = np.finfo(np.float32).tiny
    return -tf.math.log(-tf.math.log(tf.random.uniform(shape, minval=tiny)))


_own_sample_gumbel = _sample_gumbel


def draws_from_softmax(retrieval_fn: object) -> bool:
    """Whether `retrieval_fn` is known to draw from the softmax of the scores.

    A sampler that never holds all the scores may then stand in for it. Gumbel noise that somebody
    has patched must be used, so it counts as unknown.
    """
    if type(retrieval_fn) is not GumbelMaxRetrievalFn:
        return False
    if not isinstance(retrieval_fn.inv_temp, int | float):
        return False
    return retrieval_fn.inv_temp == 1 and _sample_gumbel is _own_sample_gumbel
