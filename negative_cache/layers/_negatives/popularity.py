"""Notices that popular candidates repeat in the training stream, if nothing corrects for it.

Every training step counts its candidates in hashed buckets, in the graph. The host reads the counts
now and then, measures how uneven they are, and says so once.

Let candidate y of D come n_y times among n draws. Two different draws are the same candidate at the
rate

  r = Σ n_y (n_y - 1) / (n (n - 1)),

an unbiased estimate of Σ p_y² if the draws are independent. The skew D r compares it with that of D
equally popular candidates. It is about 1 + the squared coefficient of variation of their
popularity, and its logarithm bounds from above what a softmax without the correction gives away:
KL(p ‖ uniform) <= log(D Σ p²), in nats a query (Rényi divergences of order 1 and 2).

Only counts matter and not their order, so a stream that is sorted or clustered looks like a
shuffled one, and passes over distinct candidates have a skew of at most 1. Pairs of a finite
training set may be uneven by chance: if D candidates are drawn uniformly, λ times each on average,
the skew is (1 - e^-λ) (1 + 1/λ), at most 1.30. The notice begins at 1.5.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache.layers._negatives.base import Negatives
from negative_cache.layers._state import on_every_replica
from negative_cache.layers._variables import by_replica, kept_variable, make_state_variable
from negative_cache.layers.frequency import bucket_of

# A megabyte of float32. Collisions add 0.3 % of noise to the skew, for any number of candidates;
# beyond three million candidates D, and so the skew, is underestimated.
_NUM_BUCKETS = 2**18
# Of fewer draws nothing is said. The counts are read again whenever there are twice as many.
_FEWEST_DRAWS = 4096
# A sorted stream that breaks off in the middle of few candidates is uneven and means nothing.
_FEWEST_CANDIDATES = 10
_LARGEST_SKEW = 1.5


@dataclasses.dataclass(frozen=True)
class Popularity:
    """What the counts say of the stream.

    Attributes:
      num_draws: n, how many candidates have come.
      num_candidates: D, how many different ones among them, estimated.
      repeat_rate: r, how often two different draws are the same candidate.
    """

    num_draws: int
    num_candidates: float
    repeat_rate: float

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> Popularity:
        """From the number of draws [m] in each bucket."""
        counts = counts.astype(np.float64)
        num_buckets, num_draws = len(counts), float(np.sum(counts))
        # Linear counting: D candidates leave a bucket empty with probability e^(-D/m).
        num_empty = max(int(np.count_nonzero(counts == 0)), 1)
        num_candidates = -num_buckets * np.log(num_empty / num_buckets)
        # E[Σ counts²] = Σ n_y² + (n² - Σ n_y²) / m over the hash functions.
        squares = np.sum(np.square(counts)) - num_draws**2 / num_buckets
        squares /= 1.0 - 1.0 / num_buckets
        repeats = max(squares - num_draws, 0.0)
        rate = repeats / max(num_draws * (num_draws - 1.0), 1.0)
        return cls(int(num_draws), float(num_candidates), float(rate))

    @property
    def skew(self) -> float:
        """D r, how often draws repeat compared with equally popular candidates."""
        return self.num_candidates * self.repeat_rate

    @property
    def is_uneven(self) -> bool:
        """Whether a correction for popularity should be tried."""
        is_known = self.num_draws >= _FEWEST_DRAWS and self.num_candidates >= _FEWEST_CANDIDATES
        return is_known and self.skew > _LARGEST_SKEW


class PopularityWatch:
    """Counts the candidates of the training stream, and warns once if they are uneven.

    The counts are in no file: what was measured before is measured again.

    Args:
      sources: the sources of negatives, for which the notice says what to set.
    """

    def __init__(self, sources: Sequence[Negatives]):
        self._sources = tuple(sources)
        self._has_warned = False
        self._next_look = _FEWEST_DRAWS
        self._counts = make_state_variable(lambda: tf.zeros([_NUM_BUCKETS]), "popularity")
        self._num_draws = make_state_variable(lambda: tf.zeros([], tf.int64), "num_draws")
        # For a SavedModel of a training step, which must have all of its variables.
        self.trackable = tf.__internal__.tracking.AutoTrackable()
        self.trackable.variables = [
            part for kept in (self._counts, self._num_draws) for part in by_replica(kept)
        ]

    def count(self, ids: tf.Tensor) -> None:
        """Counts the candidates of a training step, given by the fingerprints [n] of their ids."""
        on_every_replica(self._count, ids)

    def _count(self, ids: tf.Tensor) -> None:
        tf.raw_ops.ResourceScatterAdd(
            resource=kept_variable(self._counts).handle,
            indices=bucket_of(ids, _NUM_BUCKETS),
            updates=tf.ones_like(ids, tf.float32),
        )
        self._num_draws.assign_add(tf.shape(ids, out_type=tf.int64)[0])

    def look(self) -> None:
        """Warns if the stream is uneven, once; does nothing where values cannot be read."""
        has_replicas = tf.distribute.get_strategy().num_replicas_in_sync > 1
        if self._has_warned or (has_replicas and not tf.distribute.in_cross_replica_context()):
            return
        # While a function is traced, there are values outside of it.
        with tf.init_scope():
            if not tf.executing_eagerly() or _total(self._num_draws) < self._next_look:
                return
            popularity = Popularity.of_counts(_total(self._counts))
        self._next_look = 2 * popularity.num_draws
        if popularity.is_uneven:
            self._has_warned = True
            warnings.warn(_notice(popularity, self._sources), stacklevel=2)


def watch_of(sources: Sequence[Negatives]) -> PopularityWatch | None:
    """A watch over the stream, if popularity would show in the negatives of these sources.

    It does in a sample of the stream. A cache that covers a corpus has every candidate once, and
    outweighs the batch beside it.
    """
    has_stream = any(source.is_of_stream for source in sources)
    has_corpus = any(source.is_cache and not source.is_of_stream for source in sources)
    return PopularityWatch(sources) if has_stream and not has_corpus else None


def _total(variable: Any) -> np.ndarray:
    """The sum over all replicas."""
    return np.sum([part.numpy() for part in by_replica(variable)], axis=0)


def _notice(popularity: Popularity, sources: Sequence[Negatives]) -> str:
    return (
        "Popular candidates repeat in the training stream, and no correction for popularity is set:"
        " they are negatives more often than others, and the model learns to rank them too low."
        f" Of {popularity.num_draws:,} candidates so far, about"
        f" {popularity.num_candidates:,.0f} were different. Two of them are the same with a"
        f" probability of {popularity.repeat_rate:.2g}, which is"
        f" {popularity.skew:.1f} times that of equally popular ones. {_setting(sources)} If this is"
        " as you want it, set `frequency_correction=False`."
    )


def _setting(sources: Sequence[Negatives]) -> str:
    """What to set against it."""
    caches = [source for source in sources if source.is_cache]
    # What does not go with the correction, or with the order that it needs.
    names = ("index", "corrector", "refresh_fraction", "probe_size")
    in_the_way = [name for name in names if any(getattr(cache, name) for cache in caches)]
    if in_the_way:
        return (
            f"With {' and '.join(f'`{name}`' for name in in_the_way)} a streaming cache cannot be"
            " corrected: leave them out and set `frequency_correction=True` and `use_lru=False`, or"
            " use a cache of the corpus (`Cache.from_dataset`), in which every candidate is once."
        )
    more = " and `use_lru=False`" if any(cache.use_lru for cache in caches) else ""
    return (
        f"Set `frequency_correction=True`{more}, or give the call the"
        f" `candidate_sampling_probability` of each candidate{more and ', with `use_lru=False`'}."
    )
