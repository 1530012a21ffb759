"""Pairs of a query and a candidate that are left out by id, found without comparing all pairs.

A query leaves out the candidates that have one of its ids: a handful of many thousands. On a CPU
their places are found by a sorted join of the two lists of ids, and only those scores are changed.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from negative_cache.ops._hashing import mixed

# The table of a first, inexact selection has so many bits of a hash: 64 KiB, which a processor
# caches.
_BITS = 16


class LeftOutPairs(NamedTuple):
    """The m pairs, in ascending order of candidates.

    Attributes:
      candidates: [m] int32.
      queries: [m] int32.
    """

    candidates: tf.Tensor
    queries: tf.Tensor

    @classmethod
    def of(cls, candidate_ids: tf.Tensor, positive_ids: tf.Tensor) -> LeftOutPairs:
        """Finds the pairs with `candidate_ids` [C] among `positive_ids` [B, P], both integers."""
        wanted = tf.reshape(positive_ids, [-1])
        order = tf.argsort(wanted)
        wanted = tf.gather(wanted, order)
        likely = _share_slots(candidate_ids, wanted)
        ids = tf.gather(candidate_ids, likely)
        # A query may have an id several times, and its pair comes as often.
        first = tf.searchsorted(wanted, ids, side="left")
        counts = tf.searchsorted(wanted, ids, side="right") - first
        starts = tf.repeat(first - tf.cumsum(counts, exclusive=True), counts)
        places = starts + tf.range(tf.size(starts))
        queries = tf.gather(order, places) // tf.maximum(tf.shape(positive_ids)[1], 1)
        return cls(tf.repeat(likely, counts), queries)

    def between(self, start: int | tf.Tensor, size: int | tf.Tensor) -> LeftOutPairs:
        """Those of the `size` candidates from `start` on, counted from there."""
        first, last = tf.unstack(tf.searchsorted(self.candidates, [start, start + size]))
        return LeftOutPairs(self.candidates[first:last] - start, self.queries[first:last])

    def set_to(self, scores: tf.Tensor, value: float) -> tf.Tensor:
        """`scores` [B, C] with `value` at the pairs."""
        places = tf.stack([self.queries, self.candidates], axis=1)
        values = tf.fill(tf.shape(self.queries), value)
        return tf.tensor_scatter_nd_update(scores, places, values)


def _share_slots(ids: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """[l] int32, ascending places of `ids` [C] in the slot of one of `wanted`."""
    slots = _slots(wanted)
    table = tf.tensor_scatter_nd_update(
        tf.zeros([2**_BITS], tf.bool), slots[:, tf.newaxis], tf.ones_like(slots, tf.bool)
    )
    found = tf.gather(table, _slots(ids))
    return tf.cast(tf.where(found)[:, 0], tf.int32)


def _slots(ids: tf.Tensor) -> tf.Tensor:
    """[n] int32, hashes of `_BITS` bits."""
    hashes = tf.bitcast(mixed(tf.cast(ids, tf.int64)), tf.uint64)
    return tf.cast(tf.bitwise.right_shift(hashes, tf.constant(64 - _BITS, tf.uint64)), tf.int32)
