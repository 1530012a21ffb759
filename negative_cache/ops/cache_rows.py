"""Which rows of a cache an update touches, and how their values are written.

An update has the order published with the streaming cache (Lindgren et al., NeurIPS 2021). Existing
rows are updated first. Then every new item replaces the oldest remaining row. Among rows of equal
age the smallest index comes first. Masked entries change nothing. All shapes are fixed, so that an
update compiles.
"""

from typing import NamedTuple

import tensorflow as tf

# Accelerators have no kernel that gathers rows of these dtypes. They have one for the wider dtype.
_GATHERED_AS = {
    tf.int8: tf.int32,
    tf.int16: tf.int32,
    tf.uint8: tf.int32,
    tf.uint16: tf.int32,
    tf.uint32: tf.int64,
    # A cast to int64 wraps around, and the cast back restores the value.
    tf.uint64: tf.int64,
}


class MaskedRows(NamedTuple):
    """Rows to write in a scatter of fixed shape, in which masked entries have no effect.

    Such a scatter cannot leave an entry out. A masked entry therefore repeats the first entry that
    is not masked. If all entries are masked, they all write the present value of row 0 to row 0.

    Attributes:
      rows: [n] int64, the rows to write; 0 if all entries are masked.
      sources: [n] int32, the entry whose value is written to each row.
      any_written: scalar bool, whether any entry is not masked.
    """

    rows: tf.Tensor
    sources: tf.Tensor
    any_written: tf.Tensor

    def values(self, new_values: tf.Tensor, old_values: tf.Tensor | tf.Variable) -> tf.Tensor:
        """The [n, ...] values to scatter into `rows`, taken from `new_values` [n, ...].

        If all entries are masked, they are the value of row 0 of `old_values` [C, ...].
        """
        # Not a `tf.cond`: an accelerator would have to send the condition to the host.
        chosen = take_rows(new_values, self.sources)
        return tf.where(self.any_written, chosen, tf.gather(old_values, [0]))


def masked_rows(rows: tf.Tensor, mask: tf.Tensor) -> MaskedRows:
    """The `MaskedRows` that write to `rows` [n] wherever `mask` [n] bool is True."""
    entries = tf.range(tf.shape(mask)[0])
    # Not `tf.argmax`, which fails for an empty batch.
    first_written = tf.reduce_min(tf.where(mask, entries, tf.size(entries) - 1))
    sources = tf.where(mask, entries, first_written)
    any_written = tf.reduce_any(mask)
    rows = tf.gather(tf.cast(rows, tf.int64), sources)
    rows = tf.where(any_written, rows, tf.zeros_like(rows))
    return MaskedRows(rows, sources, any_written)


def take_rows(values: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """[n, ...], the `rows` [n] of a tensor [C, ...], by a kernel that exists on accelerators."""
    like = _GATHERED_AS.get(values.dtype)
    if like is None:
        return tf.gather(values, rows)
    return tf.cast(tf.gather(tf.cast(values, like), rows), values.dtype)


def oldest_rows(age: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """[count] int64, the rows of largest `age` [C] int32; the smaller index first among equals."""
    # Mapped to unsigned integers in the same order, which accelerators sort several times faster.
    order = tf.bitwise.bitwise_xor(tf.bitcast(age, tf.uint32), tf.constant(2**31, tf.uint32))
    return tf.cast(tf.math.top_k(order, k=count).indices, tf.int64)


class OldestRows(NamedTuple):
    """A queue of the rows touched longest ago, so that most updates need not look at all C rows.

    When the queue is made, it holds the first K rows in the order of (time last touched, row). If a
    row is touched later, its time differs from that of its entry, and the entry is ignored. All
    rows outside the queue come after it in that order, and touched rows come later still. So the
    remaining entries are exactly the oldest rows, in their exact order. When too few entries
    remain, the queue is made again.

    Attributes:
      rows: [K] int64.
      last_touched: [K] int32, when each row was last touched before the queue was made; -1 in an
        entry that must not be used.
    """

    rows: tf.Tensor
    last_touched: tf.Tensor

    @classmethod
    def of(cls, last_touched: tf.Tensor, size: int | tf.Tensor) -> "OldestRows":
        """The queue of the `size` oldest rows, given when each row was `last_touched` [C] int32."""
        # Among equal elements, top-k takes the lower index first.
        oldest = tf.math.top_k(-last_touched, k=size)
        return cls(tf.cast(oldest.indices, tf.int64), -oldest.values)

    def untouched(self, last_touched: tf.Tensor) -> tf.Tensor:
        """[K] bool, whether each entry is still valid.

        Args:
          last_touched: [K] int32, the current last touch of each of `rows`.
        """
        return tf.equal(last_touched, self.last_touched)

    def first(self, usable: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows of the first entries with True in `usable` [K]; count <= K."""
        size = tf.size(usable)
        positions = tf.where(usable, tf.range(size), size)
        return tf.gather(self.rows, tf.math.top_k(-positions, k=count).indices)


# A row's stamp is one number that says whether the row is filled and when it was last touched. It
# is t for a filled row that was touched at time t, and -1 - t for an empty one.


def is_filled(stamps: tf.Tensor) -> tf.Tensor:
    """[n] bool, whether rows with `stamps` [n] int32 hold a candidate."""
    # Not `stamps >= 0`: TensorFlow compares int32 on the host, even if they are on an accelerator.
    return tf.bitcast(stamps, tf.uint32) < tf.constant(2**31, tf.uint32)


def times_of(stamps: tf.Tensor) -> tf.Tensor:
    """[n] int32, when rows with `stamps` [n] int32 were last touched."""
    return tf.maximum(stamps, -1 - stamps)


def touched_at(time: tf.Tensor, stamps: tf.Tensor) -> tf.Tensor:
    """[n] int32, the new stamps if rows with `stamps` [n] int32 are touched at `time`.

    Filled rows stay filled, and empty rows stay empty.
    """
    return tf.where(is_filled(stamps), time, -1 - time)


def insertion_rows(oldest: tf.Tensor, new_items_mask: tf.Tensor) -> MaskedRows:
    """The rows that new items replace: the k-th unmasked item replaces the k-th oldest row.

    Args:
      oldest: [n] int64, the oldest rows of the cache, beginning with the oldest.
      new_items_mask: [n] bool; items with False are not inserted.

    Returns:
      The `MaskedRows` of the items.
    """
    rank = tf.maximum(tf.cumsum(tf.cast(new_items_mask, tf.int32)) - 1, 0)
    return masked_rows(tf.gather(oldest, rank), new_items_mask)
