"""`FrequencyEstimator`, and the log Q correction: how often a candidate is among the negatives.

With n negatives that are draws from the training stream, a candidate of probability p stands among
them n p times. Subtracting log(n p) from its score makes a sum over the negatives an estimate of
the sum over the corpus, in which every candidate stands once. The probability is given by the user
or estimated from the stream.
"""

import math
from typing import Any

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers._state import StateLayer, on_every_replica
from negative_cache.layers._variables import make_state_variable, scatter_rows

# 2^64 over the golden ratio, as a signed number.
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
# A probability of zero is a slip of whoever counted, and must not make its candidate the only one
# that matters. In a batch it is clipped where TF-Recommenders clips it. Among millions of cached
# candidates smaller probabilities are meant.
SMALLEST_IN_BATCH = 1e-6
SMALLEST_IN_CACHE = 1e-9
# What marks the logarithm of a probability as not known: no probability has it.
_UNKNOWN = 1.0


@keras.utils.register_keras_serializable("negative_cache")
class FrequencyEstimator(StateLayer):
    """Estimates a candidate's sampling probability from the average gap between its occurrences.

    Streaming frequency estimation of Yi et al. (RecSys 2019): one array keeps when a hashed
    candidate was last seen, one keeps the moving average of its gaps, and p̂ = 1 / gap. Time is
    counted in candidates, not in steps, and c occurrences within a batch are c gaps of equal
    length. So p̂ is the probability *per draw* whatever the batch size is, also for a candidate
    that is in every batch.

    Candidates that share a bucket share their estimate, which then is too high. Of a corpus of N
    candidates that is about the share N / num_buckets of them: a few percent want some 30 buckets a
    candidate. `occupancy` says what came of it.

    It is a Keras layer so that a model that has one saves it. It is not called.

    Args:
      num_buckets: size of both arrays, of 12 bytes a bucket together, in memory and in files.
      learning_rate: weight of the newest gap in the moving average.

    Raises:
      ValueError: where `num_buckets` is not positive, `learning_rate` is outside (0, 1], or keys
        are no integers.
    """

    def __init__(self, num_buckets: int, learning_rate: float = 0.05, **kwargs: Any):
        super().__init__(**kwargs)
        num_buckets = _validation.check_count(num_buckets, "num_buckets")
        if not 0.0 < learning_rate <= 1.0:
            raise ValueError(f"`learning_rate` must lie in (0, 1]. Received: {learning_rate}.")
        self.num_buckets = num_buckets
        self.learning_rate = learning_rate
        self._hold_state(
            description={"num_buckets": self.num_buckets},
            last_seen=make_state_variable(lambda: tf.zeros([num_buckets], tf.int64), "last_seen"),
            gap=make_state_variable(lambda: tf.zeros([num_buckets]), "gap"),
            num_seen=make_state_variable(lambda: tf.zeros([], tf.int64), "num_seen"),
        )
        self.built = True

    def update(self, keys: tf.Tensor) -> None:
        """Counts the occurrences `keys` [n] of a batch, integers."""
        on_every_replica(self._update, _as_keys(keys))

    def _update(self, keys: tf.Tensor) -> None:
        buckets = self._bucket(keys)
        self._state.num_seen.assign_add(tf.shape(keys, out_type=tf.int64)[0])
        now = tf.convert_to_tensor(self._state.num_seen)
        last_seen = tf.gather(self._state.last_seen, buckets)
        same = tf.equal(buckets[:, tf.newaxis], buckets[tf.newaxis, :])
        occurrences = tf.reduce_sum(tf.cast(same, tf.float32), axis=1)
        new_gap = tf.cast(now - last_seen, tf.float32) / occurrences
        old_gap = tf.gather(self._state.gap, buckets)
        # One step towards each of the occurrences' gaps: rare and frequent candidates are alike.
        rate = 1.0 - tf.pow(1.0 - self.learning_rate, occurrences)
        moved = old_gap + rate * (new_gap - old_gap)
        # The first gap of a candidate is the time until it first came, not a step away from an
        # arbitrary start.
        scatter_rows(self._state.gap, buckets, tf.where(last_seen == 0, new_gap, moved))
        scatter_rows(self._state.last_seen, buckets, tf.fill(tf.shape(buckets), now))

    def probability(self, keys: tf.Tensor, never_seen: float | None = None) -> tf.Tensor:
        """Estimates the probability that a draw from the stream is each of `keys` [n]: [n] float32.

        Keys are integers; for ids that are strings a task takes their fingerprints.

        A candidate never seen has the probability `never_seen`, or where None that of one
        occurrence in the whole stream so far.
        """
        if never_seen is None:
            never_seen = 1.0 / (tf.cast(self._state.num_seen, tf.float32) + 1.0)
        gap = tf.gather(self._state.gap, self._bucket(_as_keys(keys)))
        return tf.where(gap > 0.0, 1.0 / tf.maximum(gap, 1.0), never_seen)

    @property
    def occupancy(self) -> tf.Tensor:
        """Scalar float32, the share of the buckets that the stream has come to.

        It is about the share of the candidates that have their bucket with others.
        """
        return tf.reduce_mean(tf.cast(tf.convert_to_tensor(self._state.gap) > 0.0, tf.float32))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_buckets": self.num_buckets,
            "learning_rate": self.learning_rate,
        }

    def _bucket(self, keys: tf.Tensor) -> tf.Tensor:
        # Ids are often multiples of a round number, which then share few buckets: mixed, they are
        # spread over all (Knuth's multiplicative hashing, wrapping around).
        mixed = keys * tf.constant(_MULTIPLIER, tf.int64)
        mixed = tf.bitwise.bitwise_xor(mixed, mixed // 2**32)
        return tf.math.floormod(mixed, tf.constant(self.num_buckets, tf.int64))


def _as_keys(keys: tf.Tensor) -> tf.Tensor:
    keys = tf.convert_to_tensor(keys)
    if not keys.dtype.is_integer:
        raise ValueError(f"`keys` must be integers. Received dtype: {keys.dtype.name}.")
    return tf.cast(keys, tf.int64)


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
