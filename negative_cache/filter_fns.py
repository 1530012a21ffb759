"""Filter functions, which choose the items of a batch that enter a cache.

The result of a filter is the argument `new_items_mask` of `update_cache`.
"""

import abc
from collections.abc import Mapping, Sequence

import tensorflow as tf

from negative_cache.negative_cache import NegativeCache


class CacheFilterFn(abc.ABC):
    """Decides for every new item whether it enters the cache."""

    @abc.abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Returns [B] bool, True for the items of `new_items` (feature -> [B, ...]) to insert."""


class IsInCacheFilterFn(CacheFilterFn):
    """Leaves out items that the cache already has, so that no candidate takes two rows.

    Rows that were never filled hold zeros and empty strings, and an item that equals them is left
    out too. Items are not compared with each other, so equal items of one batch all enter the
    cache.

    Args:
      keys: the features that identify an item. An item is in the cache if one row equals it in all
        of these features.

    Raises:
      ValueError: if there is no key.
    """

    def __init__(self, keys: Sequence[str]):
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        if not self.keys:
            raise ValueError("`keys` must name at least one feature. Received none.")

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Returns [B] bool, False for items that the cache has.

        Time and memory are proportional to C + B, because no item is compared with every row.
        """
        codes = tf.stack([self._number(cache.data, new_items, key) for key in self.keys], axis=1)
        codes = _number_rows(codes)
        cache_size = tf.shape(tf.convert_to_tensor(cache.data[self.keys[0]]))[0]
        return codes[cache_size:] > tf.reduce_max(codes[:cache_size])

    def _number(
        self, cache_data: Mapping[str, tf.Tensor], new_items: Mapping[str, tf.Tensor], key: str
    ) -> tf.Tensor:
        """Returns [C + B] int32, the same number for rows and items with equal values."""
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
    """Numbers the distinct rows of `values` [n, ...] by first occurrence, and returns [n] int32."""
    if values.dtype == tf.bool:
        values = tf.cast(values, tf.int32)
    values = tf.reshape(values, [tf.shape(values)[0], tf.reduce_prod(tf.shape(values)[1:])])
    return tf.raw_ops.UniqueV2(x=values, axis=[0]).idx
