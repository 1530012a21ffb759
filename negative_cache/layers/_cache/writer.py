"""Writes the rows of a `Cache` on one replica: insertions, updates and filling."""

import functools
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache.layers._cache.partition import Partition
from negative_cache.layers._cache.rows import CacheRows, Items
from negative_cache.layers._cache.times import RowTimes
from negative_cache.layers._corpus import RowsById
from negative_cache.layers._state import on_every_replica_of
from negative_cache.layers._variables import StateVariable
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops import _execution, insertion_rows, masked_rows
from negative_cache.ops.cache_rows import MaskedRows
from negative_cache.ops.groups import Groups

# How many rows at a time an index is given that is made again.
_INDEXED_AT_ONCE = 1024
# Pairs of rows [n] and masks [n].
Changed: TypeAlias = list[tuple[tf.Tensor, tf.Tensor]]


class RowUpdates(NamedTuple):
    """New values of existing rows.

    Attributes:
      items: feature name -> [m, ...].
      rows: [m] int64.
      mask: [m] bool; entries with False change nothing.
    """

    items: Items
    rows: tf.Tensor
    mask: tf.Tensor


class CacheWriter:
    """Writes rows and their times, counts refused rows, and updates the index.

    Args:
      rows: the features of the rows.
      times: the times when the rows were touched.
      num_skipped: scalar int64 variable, the number of rows refused so far.
      embedding_key: name of the feature that is the embedding.
      use_lru: whether updating a row resets its age.
      index: the index over the rows, or None.
      row_key: name of the feature that identifies a candidate and so its row; None if new items
        replace the oldest rows.
      rows_by_id: the variables of `RowsById` if there is a `row_key`, else empty.
      partition: which candidates of a corpus this replica holds.
    """

    def __init__(
        self,
        rows: CacheRows,
        times: RowTimes,
        num_skipped: tf.Variable,
        *,
        embedding_key: str,
        use_lru: bool,
        index: TreeIndex | None,
        row_key: str | None,
        rows_by_id: Mapping[str, StateVariable],
        partition: Partition,
    ):
        self._rows = rows
        self._times = times
        self._num_skipped = num_skipped
        self._embedding_key = embedding_key
        self._use_lru = use_lru
        self._index = index
        self._row_key = row_key
        self._rows_by_id = rows_by_id
        self._partition = partition
        self._strategy = tf.distribute.get_strategy()

    def update(self, new_items: Items, mask: tf.Tensor, updates: RowUpdates | None) -> None:
        """`Cache.update` with checked arguments, for the `new_items` with True in `mask` [n]."""
        with tf.control_dependencies(self._assert_fits(mask)):
            self._times.step.assign_add(1)
        rows = None
        if self._row_key is not None:
            # Ids are looked up here, because they may be strings, which an accelerator cannot hold.
            rows = RowsById.find(self._rows_by_id, new_items[self._row_key])
        known = None
        if updates is not None:
            known = updates._replace(items=CacheRows.for_device(updates.items))
        inserted, updated, changed = _execution.as_constant(
            self._update_device,
            CacheRows.for_device(new_items),
            mask,
            rows,
            known,
            like=self._times.stamps,
        )
        if updates is not None and updated is not None:
            self._rows.write_on_host(updated, updates.items)
        self._rows.write_on_host(inserted, new_items)
        self._follow(changed)

    def rewrite(self, updates: RowUpdates) -> None:
        """`Cache.rewrite` with checked arguments."""
        mask = self._admit(updates.items, updates.mask)
        written = masked_rows(updates.rows, mask)
        self._rows.write(written, updates.items)
        self._times.touch(written)
        self._follow([(updates.rows, mask)])

    def fill(self, start: tf.Tensor, items: Items) -> None:
        """Writes those of `items` that this replica holds. It does not update the index.

        Args:
          start: scalar int64, the place of the first item in the corpus.
          items: feature name -> [n, ...].
        """
        count = tf.shape(items[self._embedding_key], tf.int64)[0]
        places, is_own = self._partition.places(start, count)
        mask = self._admit(items, is_own)
        rows = masked_rows(places, mask)
        self._rows.write(rows, items)
        self._times.fill(rows, mask)

    def index_corpus(self, *, verbose: int) -> None:
        """Builds the index over the rows of a corpus, of every replica if it holds a part."""
        index = self._index
        if index is None:
            return

        def build() -> None:
            embeddings = self._rows.on_host(self._embedding_key, self._times.filled.numpy())
            index.index(embeddings, verbose=verbose)

        if self._partition.num_shards > 1:
            on_every_replica_of(self._strategy, build)
        else:
            build()

    def remake_index(self) -> None:
        """Makes the index of every replica of its filled rows, which are other ones now."""
        assert self._index is not None, "the caller knows"
        if self._row_key is not None:
            self.index_corpus(verbose=0)
            return
        self._index.reset()
        on_every_replica_of(self._strategy, self._index_rows)

    def _index_rows(self) -> None:
        num_rows = self._times.num_rows
        for start in range(0, num_rows, _INDEXED_AT_ONCE):
            rows = tf.range(start, min(start + _INDEXED_AT_ONCE, num_rows), dtype=tf.int64)
            self._follow([(rows, self._times.is_filled(rows))])

    def know_ids(self, ids: np.ndarray) -> None:
        """Stores whose rows these are, by the `ids` [N] of the whole corpus, in its order."""
        RowsById.assign(self._rows_by_id, self._partition.part(ids))

    def count_skipped(self, is_skipped: tf.Tensor) -> None:
        """Counts rows that are not written, those with True in `is_skipped` [n]."""
        self._num_skipped.assign_add(tf.math.count_nonzero(is_skipped))

    def forget(self) -> None:
        """Empties all rows of a cache with a `row_key`. It does not update the index."""
        self._times.forget()
        RowsById.clear(self._rows_by_id)

    def _assert_fits(self, mask: tf.Tensor) -> list[tf.Operation]:
        """Asserts that a batch of unknown size fits into the cache, before anything changes."""
        if self._row_key is not None or mask.shape[0] is not None:
            return []
        fits = tf.debugging.assert_less_equal(
            tf.size(mask),
            self._times.num_rows,
            "A batch must fit into the cache. Received a batch with more than `cache_size`"
            " candidates. Increase `cache_size`, or make the batches smaller.",
        )
        # In eager execution the assertion has already run and returns None.
        return [] if fits is None else [fits]

    def _update_device(
        self,
        new_items: Items,
        new_mask: tf.Tensor,
        rows: tf.Tensor | None,
        updates: RowUpdates | None,
    ) -> tuple[MaskedRows, MaskedRows | None, Changed]:
        """The part of an update that runs on the device, without host features and the index.

        Args:
          new_items: feature name -> [n, ...], without strings.
          new_mask: [n] bool, the items to write.
          rows: [n] int64, the rows of the items by their ids; None if they replace the oldest rows.
          updates: new values of existing rows, or None.

        Returns:
          inserted: the `MaskedRows` of the new items.
          updated: the `MaskedRows` of the updates, or None.
          changed: pairs of rows and masks, the rows whose embeddings have changed.
        """
        changed, updated = [], None
        if updates is not None:
            mask = self._admit(updates.items, updates.mask)
            updated = masked_rows(updates.rows, mask)
            self._rows.write_on_device(updated, updates.items)
            if self._embedding_key in updates.items:
                changed.append((updates.rows, mask))
            if self._use_lru:
                self._times.touch(updated)
        mask = self._admit(new_items, new_mask)
        if rows is None:
            size = tf.size(mask) if mask.shape[0] is None else mask.shape[0]
            inserted = insertion_rows(self._times.oldest(size), mask)
        else:
            inserted, mask = self._known_rows(rows, mask)
        self._rows.write_on_device(inserted, new_items)
        self._times.fill(inserted, mask)
        return inserted, updated, [*changed, (inserted.rows, mask)]

    def _known_rows(self, rows: tf.Tensor, mask: tf.Tensor) -> tuple[MaskedRows, tf.Tensor]:
        """Selects the new items that are written to their own rows, and counts unknown ids.

        Args:
          rows: [n] int64, the rows of the items; -1 for unknown ids.
          mask: [n] bool, the items to write.

        Returns:
          The `MaskedRows` of the items, and [n] bool, whether each item is written.
        """
        is_known = mask & (rows >= 0)
        self.count_skipped(mask & ~is_known)
        # If a batch has a candidate several times, it is written once.
        is_known &= Groups.of(tf.cast(rows, tf.int32), is_known).rank == 0
        return masked_rows(rows, is_known), is_known

    def _admit(self, items: Items, mask: tf.Tensor) -> tf.Tensor:
        """`mask` [n] without entries with a non-finite embedding, which are counted."""
        if self._embedding_key not in items:
            return mask
        finite = tf.reduce_all(tf.math.is_finite(items[self._embedding_key]), axis=1)
        self.count_skipped(mask & ~finite)
        return mask & finite

    def _follow(self, changed: Changed) -> None:
        """Updates the index with the rows whose embeddings have changed."""
        index = self._index
        if index is None:
            return
        mask = tf.concat([mask for _, mask in changed], axis=0)
        rows = tf.concat([tf.cast(rows, tf.int64) for rows, _ in changed], axis=0)
        rows = tf.where(mask, rows, 0)
        # Read outside the compiled function, because the embeddings may be on the host.
        embeddings = tf.gather(self._rows.variables[self._embedding_key], rows)
        update = functools.partial(self._update_index, index)
        _execution.as_constant(update, rows, embeddings, mask, like=index.state_variable)

    def _update_index(
        self, index: TreeIndex, rows: tf.Tensor, embeddings: tf.Tensor, mask: tf.Tensor
    ) -> None:
        numbers = tf.cast(rows, tf.int32)
        # A row may occur several times.
        mask &= Groups.of(numbers, mask).rank == 0
        mask &= self._times.is_filled(rows)
        index.update(numbers, embeddings, mask)
