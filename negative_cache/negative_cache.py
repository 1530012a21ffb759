"""`CacheManager`: a negative cache as an immutable value, and the pure function that updates it.

A negative cache holds the features and embeddings of C candidates (Lindgren, Reddi, Guo and
Kumar, "Efficient Training of Retrieval Models using Negative Cache", NeurIPS 2021).
`layers.Cache` has the same semantics, but updates variables in place.
"""

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from negative_cache import _validation
from negative_cache.ops.cache_rows import (
    MaskedRows,
    insertion_rows,
    masked_rows,
    oldest_rows,
)


class NegativeCache(NamedTuple):
    """The rows of a cache.

    Attributes:
      data: feature name -> [C, ...] tensor or variable.
      age: [C] int32, the number of cache updates since each row was inserted or updated.
    """

    data: Mapping[str, tf.Tensor]
    age: tf.Tensor


class CacheManager:
    """Makes and updates caches with the same features and size.

    Args:
      specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype).
      cache_size: C, the number of rows.
      use_lru: if True, updating a row resets its age, so that the least recently *used* row is
        replaced first. If False, rows are replaced in the order of insertion.

    Raises:
      ValueError: if `specs` are not specs of features, or `cache_size` is not positive.

    Examples:
      >>> manager = CacheManager({"id": tf.io.FixedLenFeature([], tf.int64)}, cache_size=3)
      >>> cache = manager.update_cache(manager.init_cache(), new_items={"id": [7, 8]})
      >>> cache.data["id"].numpy().tolist(), cache.age.numpy().tolist()
      ([7, 8, 0], [0, 0, 1])
    """

    def __init__(
        self,
        specs: Mapping[str, tf.io.FixedLenFeature],
        cache_size: int,
        use_lru: bool = True,
    ):
        self.specs = _validation.check_specs(specs)
        self.cache_size = _validation.check_count(cache_size, "cache_size")
        self.use_lru = use_lru

    def init_cache(self) -> NegativeCache:
        """Returns a cache of zeros, or empty strings, with all ages 0."""
        data = {
            key: tf.zeros(tf.TensorShape([self.cache_size]).concatenate(spec.shape), spec.dtype)
            for key, spec in self.specs.items()
        }
        return NegativeCache(data, tf.zeros([self.cache_size], tf.int32))

    def update_cache(
        self,
        cache: NegativeCache,
        *,
        new_items: Mapping[str, tf.Tensor] | None = None,
        new_items_mask: tf.Tensor | None = None,
        updated_item_data: Mapping[str, tf.Tensor] | None = None,
        updated_item_indices: tf.Tensor | None = None,
        updated_item_mask: tf.Tensor | None = None,
    ) -> NegativeCache:
        """Updates existing rows, then replaces the oldest rows by new items.

        1. Every age grows by one.
        2. Updated rows get their new values and, with LRU, age 0.
        3. New items replace the oldest rows in order, each item the oldest row that is left. Among
           rows of equal age the smallest row comes first. The replaced rows get age 0.

        Args:
          cache: the cache to update. It does not change.
          new_items: feature name -> [n, ...] new candidates, n <= C, with exactly the cache's
            features. If None, nothing is inserted.
          new_items_mask: [n] bool. Items with False are not inserted.
          updated_item_data: feature name -> [m, ...] new values of existing rows, for any of the
            cache's features. If None, no row is updated.
          updated_item_indices: [m] int, the rows to update.
          updated_item_mask: [m] bool. Entries with False change nothing, whatever their row.

        Returns:
          The updated cache.

        Raises:
          ValueError: if names, dtypes or shapes do not match the specs, or n > C.
        """
        _validation.check_keys(cache.data, self.specs, what="cache.data", exact=True)
        if new_items is not None:
            new_items = _validation.check_items(new_items, self.specs, what="new_items", exact=True)
            _validation.check_fits(new_items, self.cache_size, what="new_items")
        cache = NegativeCache(dict(cache.data), tf.convert_to_tensor(cache.age) + 1)
        if updated_item_data is not None:
            cache = self._update_rows(
                cache, updated_item_data, updated_item_indices, updated_item_mask
            )
        if new_items is None:
            return cache
        like = next(iter(new_items.values()))
        mask = _validation.check_mask(new_items_mask, like, what="new_items_mask")
        rows = insertion_rows(oldest_rows(cache.age, tf.size(mask)), mask)
        return _reset_age(_write(cache, rows, new_items), rows)

    def _update_rows(
        self,
        cache: NegativeCache,
        items: Mapping[str, tf.Tensor],
        indices: tf.Tensor | None,
        mask: tf.Tensor | None,
    ) -> NegativeCache:
        items = _validation.check_items(items, self.specs, what="updated_item_data", exact=False)
        like = next(iter(items.values()))
        indices = _validation.check_indices(
            indices, like, what="updated_item_indices", needed_by="updated_item_data"
        )
        mask = _validation.check_mask(mask, like, what="updated_item_mask")
        rows = masked_rows(indices, mask)
        cache = _write(cache, rows, items)
        return _reset_age(cache, rows) if self.use_lru else cache


def _write(cache: NegativeCache, rows: MaskedRows, items: Mapping[str, tf.Tensor]) -> NegativeCache:
    written = {key: _scatter(cache.data[key], rows, value) for key, value in items.items()}
    return cache._replace(data={**cache.data, **written})


def _reset_age(cache: NegativeCache, rows: MaskedRows) -> NegativeCache:
    return cache._replace(age=_scatter(cache.age, rows, tf.zeros_like(rows.rows, tf.int32)))


def _scatter(old: tf.Tensor, rows: MaskedRows, new: tf.Tensor) -> tf.Tensor:
    values = tf.stop_gradient(rows.values(new, old))
    return tf.tensor_scatter_nd_update(old, rows.rows[:, tf.newaxis], values)
