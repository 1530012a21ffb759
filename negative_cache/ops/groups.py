"""Grouping of equal numbers in a list, in fixed shapes."""

from typing import NamedTuple

import tensorflow as tf

_NOTHING = tf.int32.max


class Groups(NamedTuple):
    """The entries of a list of numbers, grouped by number.

    There are as many groups as entries, in ascending order of their numbers. Unused groups come
    last and are empty.

    Attributes:
      group: [n] int32, the group of each entry.
      numbers: [n] int32, the number of each group; 0 for an empty group.
      is_some: [n] bool, whether each group has entries.
      rank: [n] int32, the position of each entry in its group, in the order of the list.
    """

    group: tf.Tensor
    numbers: tf.Tensor
    is_some: tf.Tensor
    rank: tf.Tensor

    @classmethod
    def of(cls, numbers: tf.Tensor, mask: tf.Tensor) -> "Groups":
        """Groups the `numbers` [n] >= 0. Entries with False in `mask` [n] belong to no group."""
        size = tf.shape(numbers)[0]
        keys = tf.where(mask, numbers, _NOTHING)
        order = tf.argsort(keys, stable=True)
        keys = tf.gather(keys, order)
        is_first = tf.concat([tf.ones([1], tf.bool), keys[1:] != keys[:-1]], axis=0)[:size]
        group = tf.cumsum(tf.cast(is_first, tf.int32)) - 1
        place = tf.range(size)
        start = tf.math.unsorted_segment_min(place, group, size)
        rank = place - tf.gather(start, group)
        # The inverse of the permutation.
        back = tf.argsort(order)
        numbers = tf.math.unsorted_segment_min(keys, group, size)
        is_some = numbers != _NOTHING
        return cls(
            tf.gather(group, back),
            tf.where(is_some, numbers, 0),
            is_some,
            tf.gather(rank, back),
        )

    def sum(self, values: tf.Tensor) -> tf.Tensor:
        """[n, ...], the sum of `values` [n, ...] over each group."""
        return tf.math.unsorted_segment_sum(values, self.group, tf.shape(self.group)[0])

    def max(self, values: tf.Tensor) -> tf.Tensor:
        """[n, ...], the maximum of `values` [n, ...] over each group.

        It is the lowest number of the dtype for an empty group.
        """
        return tf.math.unsorted_segment_max(values, self.group, tf.shape(self.group)[0])
