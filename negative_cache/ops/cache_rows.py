"""Which rows of a cache an update touches, and how their values are written.

The order of an update, as published with the streaming cache (Lindgren et al., NeurIPS 2021):
existing rows are updated first; then every new item replaces the oldest row that is left, the
smallest row first among equals. Masked entries change nothing. All shapes are fixed, so that an
update compiles.
"""

from typing import NamedTuple

import tensorflow as tf


class MaskedRows(NamedTuple):
    """Rows to write, where an entry that is left out repeats one that is written anyway.

    Scatters of fixed shape cannot leave an entry out. An entry that must not be written therefore
    repeats the first entry that must; where there is none, it rewrites what its row holds.

    Attributes:
      rows: [n] int64, the rows to write.
      sources: [n] int64, the entry whose value goes to each of them.
      any_written: scalar bool.
    """

    rows: tf.Tensor
    sources: tf.Tensor
    any_written: tf.Tensor

    def values(self, new_values: tf.Tensor, old_values: tf.Tensor | tf.Variable) -> tf.Tensor:
        """The [n, ...] values to scatter into `rows`, out of `new_values` [n, ...].

        Where nothing is to be written they are what `rows` of `old_values` [C, ...] hold.
        """
        chosen = tf.gather(new_values, self.sources)
        return tf.cond(self.any_written, lambda: chosen, lambda: tf.gather(old_values, self.rows))


def masked_rows(rows: tf.Tensor, mask: tf.Tensor) -> MaskedRows:
    """Redirects the entries of `rows` [n] where `mask` [n] bool is False."""
    entries = tf.range(tf.shape(mask, out_type=tf.int64)[0])
    # Not an argmax, which an empty batch has none of.
    first_written = tf.reduce_min(tf.where(mask, entries, tf.size(entries, tf.int64) - 1))
    sources = tf.where(mask, entries, first_written)
    any_written = tf.reduce_any(mask)
    rows = tf.where(
        any_written, tf.gather(tf.cast(rows, tf.int64), sources), tf.zeros_like(entries)
    )
    return MaskedRows(rows, sources, any_written)


def oldest_rows(age: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """The `count` rows of largest `age` [C] int32, the smallest first among equals: int64."""
    return tf.cast(tf.math.top_k(age, k=count).indices, tf.int64)


class OldestRows(NamedTuple):
    """A queue of the rows touched longest ago, so that not every update has to look at all C.

    The queue is the start of the list of all rows ordered by (when last touched, row), as it was at
    some time. A row that has been touched since has another time than its entry, which is then
    passed over. All other rows of the cache are later in that order, and rows touched since are
    later still, so the entries that are left *are* the oldest rows, in their exact order, until the
    queue has too few and is made anew.

    Attributes:
      rows: [K] int64.
      last_touched: [K] int32, when each was last touched as the queue was made; -1 in an entry
        that is not to be used again.
    """

    rows: tf.Tensor
    last_touched: tf.Tensor

    @classmethod
    def of(cls, last_touched: tf.Tensor, size: int | tf.Tensor) -> "OldestRows":
        """The `size` oldest of the rows [C] that were `last_touched` [C] int32."""
        # Of equal elements top-k takes the one of lower index first.
        oldest = tf.math.top_k(-last_touched, k=size)
        return cls(tf.cast(oldest.indices, tf.int64), -oldest.values)

    def untouched(self, last_touched: tf.Tensor | tf.Variable) -> tf.Tensor:
        """[K] bool, which entries still are what they were."""
        return tf.equal(tf.gather(last_touched, self.rows), self.last_touched)

    def first(self, usable: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows of the first entries with `usable` [K] bool; count <= K."""
        size = tf.size(usable)
        positions = tf.where(usable, tf.range(size), size)
        return tf.gather(self.rows, tf.math.top_k(-positions, k=count).indices)


def insertion_rows(oldest: tf.Tensor, new_items_mask: tf.Tensor) -> MaskedRows:
    """The rows that new items go to: the k-th unmasked item to the k-th oldest row.

    Args:
      oldest: [n] int64, the oldest rows of the cache in order.
      new_items_mask: [n] bool; items with False are not inserted.
    """
    rank = tf.maximum(tf.cumsum(tf.cast(new_items_mask, tf.int32)) - 1, 0)
    return masked_rows(tf.gather(oldest, rank), new_items_mask)
