"""Filter functions: which items of a batch are worth a row of a cache.

A filter's result is what `update_cache` takes as `new_items_mask`.
"""

import abc
from collections.abc import Mapping, Sequence

import tensorflow as tf

from negative_cache.negative_cache import NegativeCache


class CacheFilterFn(abc.ABC):
    """Decides for every new item whether it enters the cache."""

    @abc.abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Returns [B] bool, True for items to insert, of `new_items` (feature name -> [B, ...])."""


class IsInCacheFilterFn(CacheFilterFn):
    """Leaves out an item of which the cache has a row already, so that no candidate takes two rows.

    Rows that were never filled hold zeros and empty strings, and an item that looks like them is
    left out too. Equal items of one batch do not see each other.

    Args:
      keys: the features that identify an item. An item is in the cache where one row equals it in
        all of them.

    Raises:
      ValueError: where there is no key.
    """

    def __init__(self, keys: Sequence[str]):
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        if not self.keys:
            raise ValueError("`keys` must name at least one feature. Received none.")

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Returns [B] bool, False where the cache has the item.

        Takes time and memory proportional to C + B: no item is compared with every row.
        """
        codes = tf.stack([self._number(cache.data, new_items, key) for key in self.keys], axis=1)
        codes = _number_rows(codes)
        cache_size = tf.shape(tf.convert_to_tensor(cache.data[self.keys[0]]))[0]
        return codes[cache_size:] > tf.reduce_max(codes[:cache_size])

    def _number(
        self, cache_data: Mapping[str, tf.Tensor], new_items: Mapping[str, tf.Tensor], key: str
    ) -> tf.Tensor:
        """[C + B] int32, equal where two rows or items are equal in this feature."""
        for what, features in (("cache", cache_data), ("new_items", new_items)):
            if key not in features:
                raise ValueError(
                    f"`{what}` must have the features {list(self.keys)}. Received:"
                    f" {sorted(features)}."
                )
        rows = tf.convert_to_tensor(cache_data[key])
        items = tf.convert_to_tensor(new_items[key], rows.dtype)
        if not items.shape[1:].is_compatible_with(rows.shape[1:]):
            raise ValueError(
                f"`new_items[{key!r}]` must have shape {[None, *rows.shape[1:]]}. Received shape:"
                f" {items.shape}."
            )
        return _number_rows(tf.concat([rows, items], axis=0))


def _number_rows(values: tf.Tensor) -> tf.Tensor:
    """Numbers the distinct rows of `values` [n, ...] in order of first occurrence: [n] int32."""
    if values.dtype == tf.bool:
        values = tf.cast(values, tf.int32)
    values = tf.reshape(values, [tf.shape(values)[0], tf.reduce_prod(tf.shape(values)[1:])])
    return tf.raw_ops.UniqueV2(x=values, axis=[0]).idx
