"""Which rows of a cache an update touches, and how their values are written.

The order of an update, as published with the streaming cache (Lindgren et al., NeurIPS 2021):
existing rows are updated first; then every new item replaces the oldest row that is left, the
smallest row first among equals. Masked entries change nothing. All shapes are fixed, so that an
update compiles.
"""

from typing import NamedTuple

import tensorflow as tf

# Accelerators have no kernel that gathers rows of these, and one for a dtype that holds them all.
_GATHERED_AS = {
    tf.int8: tf.int32,
    tf.int16: tf.int32,
    tf.uint8: tf.int32,
    tf.uint16: tf.int32,
    tf.uint32: tf.int64,
    # Casts of these wrap around, there and back.
    tf.uint64: tf.int64,
}


class MaskedRows(NamedTuple):
    """Rows to write, where an entry that is left out repeats one that is written anyway.

    Scatters of fixed shape cannot leave an entry out. An entry that must not be written therefore
    repeats the first entry that must; where there is none, all rewrite what row 0 holds.

    Attributes:
      rows: [n] int64, the rows to write; 0 where nothing is to be written.
      sources: [n] int32, the entry whose value goes to each of them.
      any_written: scalar bool.
    """

    rows: tf.Tensor
    sources: tf.Tensor
    any_written: tf.Tensor

    def values(self, new_values: tf.Tensor, old_values: tf.Tensor | tf.Variable) -> tf.Tensor:
        """The [n, ...] values to scatter into `rows`, out of `new_values` [n, ...].

        Where nothing is to be written they are what row 0 of `old_values` [C, ...] holds.
        """
        # Not a branch: an accelerator would have to tell the host which one to take.
        chosen = take_rows(new_values, self.sources)
        return tf.where(self.any_written, chosen, tf.gather(old_values, [0]))


def masked_rows(rows: tf.Tensor, mask: tf.Tensor) -> MaskedRows:
    """Redirects the entries of `rows` [n] where `mask` [n] bool is False."""
    entries = tf.range(tf.shape(mask)[0])
    # Not an argmax, which an empty batch has none of.
    first_written = tf.reduce_min(tf.where(mask, entries, tf.size(entries) - 1))
    sources = tf.where(mask, entries, first_written)
    any_written = tf.reduce_any(mask)
    rows = tf.gather(tf.cast(rows, tf.int64), sources)
    rows = tf.where(any_written, rows, tf.zeros_like(rows))
    return MaskedRows(rows, sources, any_written)


def take_rows(values: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """[n, ...], the `rows` [n] of a tensor [C, ...], by a kernel that accelerators have."""
    like = _GATHERED_AS.get(values.dtype)
    if like is None:
        return tf.gather(values, rows)
    return tf.cast(tf.gather(tf.cast(values, like), rows), values.dtype)


def oldest_rows(age: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """The `count` rows of largest `age` [C] int32, the smallest first among equals: int64."""
    # As unsigned numbers in the same order: accelerators sort those several times faster.
    order = tf.bitwise.bitwise_xor(tf.bitcast(age, tf.uint32), tf.constant(2**31, tf.uint32))
    return tf.cast(tf.math.top_k(order, k=count).indices, tf.int64)


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

    def untouched(self, last_touched: tf.Tensor) -> tf.Tensor:
        """[K] bool, which entries still are what they were: `rows` are `last_touched` [K] now."""
        return tf.equal(last_touched, self.last_touched)

    def first(self, usable: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows of the first entries with `usable` [K] bool; count <= K."""
        size = tf.size(usable)
        positions = tf.where(usable, tf.range(size), size)
        return tf.gather(self.rows, tf.math.top_k(-positions, k=count).indices)


# Whether a row is filled, and when it was last touched, are one number: t for a filled row that was
# touched at time t, and -1 - t, whose bits are the complement, for an empty one.


def is_filled(stamps: tf.Tensor) -> tf.Tensor:
    """[n] bool, whether rows with `stamps` [n] int32 hold a candidate."""
    # The sign as an unsigned number: TensorFlow compares int32 on the host, wherever they are.
    return tf.bitcast(stamps, tf.uint32) < tf.constant(2**31, tf.uint32)


def times_of(stamps: tf.Tensor) -> tf.Tensor:
    """[n] int32, when rows with `stamps` [n] int32 were last touched."""
    return tf.maximum(stamps, -1 - stamps)


def touched_at(time: tf.Tensor, stamps: tf.Tensor) -> tf.Tensor:
    """[n] int32, new stamps of rows with `stamps` [n] int32: touched, and as full as before."""
    return tf.where(is_filled(stamps), time, -1 - time)


def insertion_rows(oldest: tf.Tensor, new_items_mask: tf.Tensor) -> MaskedRows:
    """The rows that new items go to: the k-th unmasked item to the k-th oldest row.

    Args:
      oldest: [n] int64, the oldest rows of the cache in order.
      new_items_mask: [n] bool; items with False are not inserted.
    """
    rank = tf.maximum(tf.cumsum(tf.cast(new_items_mask, tf.int32)) - 1, 0)
    return masked_rows(tf.gather(oldest, rank), new_items_mask)
