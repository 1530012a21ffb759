"""The log Q correction: how often a candidate is expected among the negatives.

With n negatives that are draws from the training stream, a candidate of probability p stands among
them n p times. Subtracting log(n p) from its score makes a sum over the negatives an estimate of
the sum over the corpus, in which every candidate stands once.
"""

import math

import tensorflow as tf

from negative_cache.layers.frequency import FrequencyEstimator

# A probability of zero is a slip of whoever counted, and must not make its candidate the only one
# that matters. In a batch it is clipped where TF-Recommenders clips it. Among millions of cached
# candidates smaller probabilities are meant.
SMALLEST_IN_BATCH = 1e-6
SMALLEST_IN_CACHE = 1e-9
# What marks the logarithm of a probability as not known: no probability has it.
_UNKNOWN = 1.0


def log_given_probability(probability: tf.Tensor, smallest: float) -> tf.Tensor:
    """[n] log of given probabilities [n], clipped to [smallest, 1]; NaN marks an unknown one."""
    is_known = ~tf.math.is_nan(probability)
    clipped = tf.clip_by_value(tf.where(is_known, probability, 1.0), smallest, 1.0)
    return tf.where(is_known, tf.math.log(clipped), _UNKNOWN)


def log_unknown_probability(size: tf.Tensor) -> tf.Tensor:
    """[size] marks of candidates that came without a probability."""
    return tf.fill([size], _UNKNOWN)


def log_estimated_probability(
    frequency: FrequencyEstimator, ids: tf.Tensor, *, of_rows: bool = False
) -> tf.Tensor:
    """[n] log of estimated probabilities; rows that the stream has not brought are marked."""
    never_seen = math.exp(_UNKNOWN) if of_rows else None
    return tf.math.log(frequency.probability(ids, never_seen))


def log_expected_occurrences(log_probability: tf.Tensor, num_negatives: tf.Tensor) -> tf.Tensor:
    """[n] log of n p; zero, that is no correction, for candidates of unknown probability."""
    log_count = tf.math.log(tf.maximum(num_negatives, 1.0))
    return tf.where(log_probability > 0.5 * _UNKNOWN, 0.0, log_probability + log_count)
