"""`FrequencyEstimator`, and the log Q correction for the frequency of candidates.

Let n negatives be draws from the training stream. Then a candidate of probability p occurs n p
times among them on average. Subtracting log(n p) from its score makes the sum over the negatives an
estimate of the sum over the corpus, in which every candidate occurs once. The user gives the
probability, or it is estimated from the stream.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers._dividing import State, copies
from negative_cache.layers._state import StateLayer, on_every_replica
from negative_cache.layers._variables import make_state_variable, scatter_rows
from negative_cache.ops._hashing import mixed

# Of 12 bytes each; 2 % of 100,000 candidates share theirs.
_NUM_BUCKETS = 2**22
# Given probabilities are clipped from below: a mistaken zero would let one candidate dominate the
# sum. In a batch the limit is that of TF-Recommenders. Among millions of cached candidates, smaller
# probabilities are meaningful.
SMALLEST_IN_BATCH = 1e-6
SMALLEST_IN_CACHE = 1e-9
# The logarithm of an unknown probability. No probability has this logarithm.
_UNKNOWN = 1.0


@keras.utils.register_keras_serializable("negative_cache")
class FrequencyEstimator(StateLayer):
    """Estimates a candidate's sampling probability from the average gap between its occurrences.

    This is the streaming frequency estimation of Yi et al. (RecSys 2019). Candidates are hashed to
    buckets. One array keeps when a bucket was last seen, another keeps the moving average of its
    gaps, and p̂ = 1 / gap. Time is counted in candidates, not in steps, and c occurrences within a
    batch count as c gaps of equal length. So p̂ is the probability *per draw*, for any batch size
    and also for a candidate that is in every batch.

    Candidates in the same bucket share one estimate, which is too high for each of them. In a
    corpus of N candidates, the fraction of candidates that share a bucket is about N / num_buckets.
    To keep it at a few percent, use about 30 buckets per candidate. `occupancy` measures it.

    It is a Keras layer, so that a model that has one saves it. It is not called.

    Args:
      num_buckets: size of both arrays. Together they take 12 bytes per bucket, in memory and in
        files.
      learning_rate: weight of the newest gap in the moving average.

    Raises:
      ValueError: if `num_buckets` is not positive, or `learning_rate` is outside (0, 1].

    Examples:
      >>> frequency = FrequencyEstimator(num_buckets=2**16)
      >>> task = CachedRetrieval(
      ...     candidate_tower,
      ...     specs,
      ...     cache_size=0,
      ...     in_batch_negatives=True,
      ...     candidate_id_key="title",
      ...     frequency_correction=frequency,
      ... )
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

    def _divided(self, states: list[State], num_replicas: int) -> list[State]:
        """One estimate for all replicas: they count parts of one stream."""
        gaps, last_seen, num_seen = (
            np.stack([state[name] for state in states]) for name in ("gap", "last_seen", "num_seen")
        )
        # How long ago a bucket was seen has the same law on all of them, and so have its gaps.
        ago = num_seen[:, np.newaxis] - last_seen
        is_seen = last_seen > 0
        count = np.maximum(np.sum(is_seen, axis=0), 1)
        total = np.sum(num_seen)
        mean_ago = np.sum(np.where(is_seen, ago, 0), axis=0) // count
        merged = {
            "gap": (np.sum(np.where(is_seen, gaps, 0.0), axis=0) / count).astype(np.float32),
            "last_seen": np.where(np.any(is_seen, axis=0), total - mean_ago, 0),
            # A candidate that none has seen has not come in all of these.
            "num_seen": total,
        }
        return copies([merged], num_replicas)

    def update(self, keys: tf.Tensor) -> None:
        """Counts the occurrences of a batch, given by their integer `keys` [n].

        Raises:
          ValueError: if the keys are not integers.
        """
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
        # One step of the moving average for each occurrence.
        rate = 1.0 - tf.pow(1.0 - self.learning_rate, occurrences)
        moved = old_gap + rate * (new_gap - old_gap)
        # The first gap of a candidate is the time of its first occurrence, not a step away from an
        # arbitrary initial value.
        scatter_rows(self._state.gap, buckets, tf.where(last_seen == 0, new_gap, moved))
        scatter_rows(self._state.last_seen, buckets, tf.fill(tf.shape(buckets), now))

    def probability(self, keys: tf.Tensor, never_seen: float | None = None) -> tf.Tensor:
        """Estimates the probability of each candidate per draw from the stream.

        Args:
          keys: [n] int, the candidates. For string ids, a task uses their fingerprints.
          never_seen: the result for a candidate that has never been seen. If None, it is the
            probability of one occurrence in the whole stream so far.

        Returns:
          [n] float32.

        Raises:
          ValueError: if the keys are not integers.
        """
        if never_seen is None:
            never_seen = 1.0 / (tf.cast(self._state.num_seen, tf.float32) + 1.0)
        gap = tf.gather(self._state.gap, self._bucket(_as_keys(keys)))
        return tf.where(gap > 0.0, 1.0 / tf.maximum(gap, 1.0), never_seen)

    @property
    def occupancy(self) -> tf.Tensor:
        """Scalar float32, the fraction of buckets that the stream has reached.

        It is about the fraction of candidates that share a bucket with another candidate.
        """
        return tf.reduce_mean(tf.cast(tf.convert_to_tensor(self._state.gap) > 0.0, tf.float32))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_buckets": self.num_buckets,
            "learning_rate": self.learning_rate,
        }

    def _bucket(self, keys: tf.Tensor) -> tf.Tensor:
        return bucket_of(keys, self.num_buckets)


def bucket_of(keys: tf.Tensor, num_buckets: int) -> tf.Tensor:
    """[n] int64, one of `num_buckets` buckets for each of `keys` [n] int64."""
    hashes = mixed(keys)
    hashes = tf.bitwise.bitwise_xor(hashes, hashes // 2**32)
    return tf.math.floormod(hashes, tf.constant(num_buckets, tf.int64))


def estimator_of(
    correction: bool | FrequencyEstimator | None, cache_sizes: Iterable[int]
) -> FrequencyEstimator | None:
    """The estimator that the argument `frequency_correction` of a task asks for, if it does."""
    if isinstance(correction, FrequencyEstimator):
        return correction
    if not correction:
        return None
    return FrequencyEstimator(max([_NUM_BUCKETS, *(4 * size for size in cache_sizes)]))


def _as_keys(keys: tf.Tensor) -> tf.Tensor:
    keys = tf.convert_to_tensor(keys)
    if not keys.dtype.is_integer:
        raise ValueError(f"`keys` must be integers. Received dtype: {keys.dtype.name}.")
    return tf.cast(keys, tf.int64)


def log_given_probability(probability: tf.Tensor, smallest: float) -> tf.Tensor:
    """[n] log of probabilities [n] clipped to [smallest, 1]; NaN stands for an unknown one."""
    is_known = ~tf.math.is_nan(probability)
    clipped = tf.clip_by_value(tf.where(is_known, probability, 1.0), smallest, 1.0)
    return tf.where(is_known, tf.math.log(clipped), _UNKNOWN)


def log_unknown_probability(size: tf.Tensor) -> tf.Tensor:
    """[size] float32, the marker of an unknown probability for each candidate."""
    return tf.fill([size], _UNKNOWN)


def log_estimated_probability(
    frequency: FrequencyEstimator, ids: tf.Tensor, *, of_rows: bool = False
) -> tf.Tensor:
    """[n] log of the estimated probabilities of `ids` [n].

    With `of_rows`, the probability of a candidate that the stream has not reached is marked as
    unknown.
    """
    never_seen = math.exp(_UNKNOWN) if of_rows else None
    return tf.math.log(frequency.probability(ids, never_seen))


def log_expected_occurrences(log_probability: tf.Tensor, num_negatives: tf.Tensor) -> tf.Tensor:
    """[n] log(num_negatives · p); zero, that is no correction, if the probability is unknown."""
    log_count = tf.math.log(tf.maximum(num_negatives, 1.0))
    return tf.where(log_probability > 0.5 * _UNKNOWN, 0.0, log_probability + log_count)
