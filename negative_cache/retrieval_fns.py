"""Retrieval functions, which choose the negative of a query by the scores of all candidates.

A retrieval function is any callable scores [B, C] -> indices [B, 1]. It may replace the
`_retrieval_fn` of a loss.
"""

import abc

import numpy as np
import tensorflow as tf


class AbstractRetrievalFn(tf.Module, metaclass=abc.ABCMeta):
    """Picks one candidate for every query."""

    @abc.abstractmethod
    def __call__(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns [B, 1] int64, the column of `scores` [B, C] that each query picks."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """Picks the highest score: the hardest negative."""

    def __call__(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns [B, 1] int64, argmax_y s(x, y) of `scores` [B, C], the first of equal scores."""
        return tf.argmax(scores, axis=1, output_type=tf.int64)[:, tf.newaxis]


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """Draws candidate y with probability exp(β s(x, y)) / Σ_y' exp(β s(x, y')).

    argmax_y (β s(x, y) + G_y) with independent standard Gumbel variables G_y has exactly this law.

    Args:
      inv_temp: β, a number or a scalar tensor or variable.
    """

    def __init__(self, inv_temp: float | tf.Tensor = 1.0):
        super().__init__()
        self.inv_temp = inv_temp

    def __call__(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns [B, 1] int64, one draw for every query from `scores` [B, C]."""
        scores = tf.convert_to_tensor(scores)
        noise = tf.cast(_sample_gumbel(tf.shape(scores)), scores.dtype)
        perturbed = tf.cast(self.inv_temp, scores.dtype) * scores + noise
        return tf.argmax(perturbed, axis=1, output_type=tf.int64)[:, tf.newaxis]


def _sample_gumbel(shape: tf.Tensor) -> tf.Tensor:
    """Returns [shape] float32 Gumbel variables, -log(-log(U)) with U uniform on (0, 1).

    It is called once for each retrieval. Users may patch it, for instance to fix the noise in a
    test.
    """
    tiny = np.finfo(np.float32).tiny
    return -tf.math.log(-tf.math.log(tf.random.uniform(shape, minval=tiny)))


_own_sample_gumbel = _sample_gumbel


def draws_from_softmax(retrieval_fn: object) -> bool:
    """Whether `retrieval_fn` is known to draw from the softmax of the scores.

    A sampler that never holds all scores may then replace it. If `_sample_gumbel` is patched, the
    patched noise must be used, so the answer is False.
    """
    if type(retrieval_fn) is not GumbelMaxRetrievalFn:
        return False
    if not isinstance(retrieval_fn.inv_temp, int | float):
        return False
    return retrieval_fn.inv_temp == 1 and _sample_gumbel is _own_sample_gumbel
