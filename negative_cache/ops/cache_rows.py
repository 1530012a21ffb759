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


def cache_update_rows(age: tf.Tensor, new_items_mask: tf.Tensor) -> MaskedRows:
    """The rows that new items go to: the k-th unmasked item to the k-th oldest row.

    Args:
      age: [C] int32, where rows that the update has touched already have age 0 and no other has.
      new_items_mask: [n] bool, n <= C; items with False are not inserted.

    Returns:
      The rows of the new items.
    """
    rows = oldest_rows(age, tf.shape(new_items_mask)[0])
    rank = tf.maximum(tf.cumsum(tf.cast(new_items_mask, tf.int32)) - 1, 0)
    return masked_rows(tf.gather(rows, rank), new_items_mask)
