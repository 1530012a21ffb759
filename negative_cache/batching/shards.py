"""Passes over a dataset that does not fit into memory, one shard of consecutive pairs at a time."""

import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._features import Features
from negative_cache.batching import keep_apart
from negative_cache.batching.ids import Ids
from negative_cache.batching.plan import BatchMaker, Order

# Features of some pairs, and the numbers [n] of these pairs in the dataset.
_Part: TypeAlias = tuple[Mapping[str, Features], np.ndarray]


class Shards:
    """Batches of similar pairs from a dataset of single pairs. A call makes one pass over it.

    Args:
      maker: orders and cuts each shard.
      dataset: single pairs, see `GlobalContrastiveBatches.from_dataset`.
      shard_size: the number of pairs that are ordered together.
      candidate_id_key: name of the candidate feature that is an id, or None.
      query_id_key: name of the query feature that is an id, or None.
      initial_epoch: the number of the first pass.
    """

    def __init__(
        self,
        maker: BatchMaker,
        dataset: tf.data.Dataset,
        *,
        shard_size: int,
        candidate_id_key: str | None,
        query_id_key: str | None,
        initial_epoch: int,
    ):
        self._maker = maker
        self._keys = query_id_key, candidate_id_key
        self._parts_of_shard = math.ceil(shard_size / 1024)
        part_size = math.ceil(shard_size / self._parts_of_shard)
        self._parts = dataset.batch(part_size).prefetch(tf.data.AUTOTUNE)
        self._epoch = _validation.check_count(initial_epoch, "initial_epoch", at_least=0) - 1
        self._weights: list[int] | None = None
        self._has_warned = False

    def __call__(self) -> Iterator[Mapping[str, Features]]:
        self._begin_pass()
        epoch = self._epoch
        rest: list[_Part] = []
        for shard, parts in enumerate(self._shards()):
            pairs, numbers = _features.concatenate([*rest, *parts])
            # Only the shard itself stays in memory.
            parts.clear()
            rest.clear()
            for rows in self._batches(pairs, numbers, [epoch, shard]):
                batch = tf.nest.map_structure(lambda values: values[rows], pairs)  # noqa: B023
                if len(rows) == self._maker.plan.batch_size:
                    yield batch
                else:
                    rest.append((batch, numbers[rows]))
            # The shard must not stay in memory while the next one is read.
            del pairs, numbers
        if rest and not self._maker.plan.drop_remainder:
            yield rest[0][0]

    def _begin_pass(self) -> None:
        """Counts the pass, unless the weights have not changed since the last pass."""
        towers = self._maker.towers
        if towers.have_changed(self._weights):
            self._epoch += 1
        self._weights = None

    def _batches(
        self, pairs: Mapping[str, Features], numbers: np.ndarray, stream: list[int]
    ) -> list[np.ndarray]:
        maker, epoch = self._maker, stream[0]
        maker.towers.build(pairs)
        if self._weights is None:
            self._weights = maker.towers.fingerprint()
        ids = Ids.from_features(pairs, *self._keys)
        if not self._has_warned:
            self._has_warned = keep_apart.warn_of_conflicts(ids, maker.plan.batch_size)
        order = Order(np.arange(len(numbers)))
        if maker.plan.random_fraction_of(epoch) < 1.0:
            order = maker.order(pairs, ids, stream, numbers)
        return maker.batches(order, ids, epoch, stream)

    def _shards(self) -> Iterator[list[_Part]]:
        """Yields the parts of each shard."""
        parts: list[_Part] = []
        num_pairs = 0
        for part in self._parts.as_numpy_iterator():
            size = _features.num_rows(part)
            parts.append((part, np.arange(num_pairs, num_pairs + size)))
            num_pairs += size
            if len(parts) == self._parts_of_shard:
                yield parts
                parts = []
        if parts:
            yield parts
