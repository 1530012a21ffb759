"""Which rows of a cache an update touches, and how their values are written.

The order of an update, as published with the streaming cache (Lindgren et al., NeurIPS 2021):
existing rows are updated first; then every new item replaces the oldest row that is left, the
smallest row first among equals. Masked entries change nothing. All shapes are fixed, so that an
update compiles.
"""

from typing import NamedTuple

import tensorflow as tf


class MaskedRows(NamedTuple):
    """Rows to write, with the entries that masks leave out redirected to an entry that is written
    anyway.

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
        """The [n, ...] values to scatter into `rows`, from `new_values` [n, ...] or, where none is, `old_values`."""
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
    """[count] int64: the rows of largest `age` [C] int32, oldest first, the smallest row first among equals."""
    return tf.cast(tf.math.top_k(age, k=count).indices, tf.int64)


def cache_update_rows(
    age: tf.Tensor, new_items_mask: tf.Tensor, touched: MaskedRows | None
) -> MaskedRows:
    """The rows that new items go to: the k-th unmasked item to the k-th oldest row.

    Args:
      age: [C] int32, ages before the update.
      new_items_mask: [n] bool, n <= C; items with False are not inserted.
      touched: rows whose age this update has already reset, which are therefore the youngest; or
        None.

    Returns:
      The rows of the new items.
    """
    if touched is not None:
        updates = tf.where(
            touched.any_written, tf.fill(tf.shape(touched.rows), -1), tf.gather(age, touched.rows)
        )
        age = tf.tensor_scatter_nd_update(age, touched.rows[:, tf.newaxis], updates)
    rows = oldest_rows(age, tf.shape(new_items_mask)[0])
    rank = tf.maximum(tf.cumsum(tf.cast(new_items_mask, tf.int32)) - 1, 0)
    return masked_rows(tf.gather(rows, rank), new_items_mask)
