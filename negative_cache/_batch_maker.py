"""What batches in memory and batches of shards have in common, and the shards."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse
import tensorflow as tf

from negative_cache import _batch_conflicts, _features, _pair_batches, _validation
from negative_cache._contrastive_order import (
    check_embeddings,
    check_index,
    check_quantile,
    neighbor_graph,
    order_of,
)
from negative_cache._grown_batches import grow_batches
from negative_cache._pair_ids import Ids
from negative_cache._towers import Towers


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows [N] int64 of pairs in order, with the graph of their neighbors to grow batches on.

    There is no graph where batches are cut from the order.
    """

    rows: np.ndarray
    graph: scipy.sparse.csr_matrix | None = None


class BatchMaker:
    """Orders pairs by the embeddings of two towers and cuts them into the batches of an epoch.

    The arguments are those of `GlobalContrastiveBatches`, which this checks. All that is random is
    drawn from `seed` and a `stream` of integers, such as the epoch and the number of the shard.
    """

    def __init__(
        self,
        model,
        batch_size: int,
        *,
        num_neighbors: int,
        quantile: float | None,
        start_epoch: int,
        random_fraction: float | Callable[[int], float],
        grow: bool,
        group_size: int | None,
        drop_remainder: bool,
        index,
        embedding_batch_size: int,
        seed: int,
        verbose: int,
    ):
        self.batch_size = _validation.check_count(batch_size, "batch_size")
        _validation.check_count(embedding_batch_size, "embedding_batch_size")
        self.towers = Towers(model, embedding_batch_size)
        self._num_neighbors = _validation.check_count(num_neighbors, "num_neighbors")
        self._quantile = check_quantile(quantile)
        self._start_epoch = _validation.check_count(start_epoch, "start_epoch", at_least=0)
        if not callable(random_fraction):
            _pair_batches.check_fraction(random_fraction, "random_fraction")
        self._random_fraction = random_fraction
        self._grow, self._group_size = bool(grow), self.batch_size
        if group_size is not None:
            self._group_size = _validation.check_count(group_size, "group_size")
            if batch_size % group_size:
                raise ValueError(
                    "`group_size` must divide `batch_size`. Received:"
                    f" {group_size} and {batch_size}."
                )
        self.drop_remainder = bool(drop_remainder)
        self._index = check_index(index)
        self._seed = _validation.check_count(seed, "seed", at_least=0)
        self._verbose = verbose

    def num_batches(self, num_pairs: int) -> int:
        """How many batches N pairs make."""
        if self.drop_remainder:
            return num_pairs // self.batch_size
        return math.ceil(num_pairs / self.batch_size)

    def random_fraction(self, epoch: int) -> float:
        """The share of random batches in an epoch; 1 before the first ordered one."""
        if epoch < self._start_epoch:
            return 1.0
        fraction = self._random_fraction
        if not callable(fraction):
            return fraction
        return _pair_batches.check_fraction(fraction(epoch), "random_fraction(epoch)")

    def embed(self, pairs) -> tuple[np.ndarray, np.ndarray]:
        """[N, d] embeddings of the queries and of the candidates."""
        return self.towers.embed(pairs, _features.num_rows(pairs), self._verbose)

    def order(
        self, pairs, ids: Ids, stream: Sequence[int], numbers: np.ndarray | None = None
    ) -> Order:
        """The order of pairs by the embeddings of now; errors name pairs by their numbers [N]."""
        embeddings = [
            check_embeddings(values, f"{name} embeddings", numbers)
            for values, name in zip(self.embed(pairs), ("query", "candidate"))
        ]
        seed = int(self._rng(stream).integers(2**31))
        graph = neighbor_graph(
            *embeddings,
            num_neighbors=self._num_neighbors,
            quantile=self._quantile,
            candidate_ids=ids.candidates,
            query_ids=ids.queries,
            index=self._index,
            seed=seed,
            verbose=self._verbose,
        )
        return Order(order_of(graph, seed), graph if self._grow else None)

    def batches(
        self, order: Order, ids: Ids, epoch: int, stream: Sequence[int]
    ) -> list[np.ndarray]:
        """Rows of the batches that an order makes, the last of them perhaps smaller."""
        rng, fraction = self._rng([*stream, 1]), self.random_fraction(epoch)
        if fraction == 1.0:
            rows = rng.permutation(order.rows)
        else:
            # From a random place on, so that the batches of two epochs differ.
            rows = np.roll(order.rows, -rng.integers(max(len(order.rows), 1)))
            if order.graph is not None:
                rows = grow_batches(order.graph, rows, self._group_size, ids)
        return _pair_batches.cut_batches(
            rows,
            self.batch_size,
            group_size=self._group_size,
            random_fraction=fraction,
            ids=ids,
            rng=rng,
        )

    def _rng(self, stream: Sequence[int]) -> np.random.Generator:
        return np.random.default_rng([self._seed, *stream])


class Shards:
    """Calling it passes over a dataset of single pairs and yields batches of similar ones.

    The arguments are those of `GlobalContrastiveBatches.from_dataset`.
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
        self._weights, self._has_warned = None, False

    def __call__(self) -> Iterator:
        self._begin_pass()
        epoch, rest = self._epoch, []
        for shard, parts in enumerate(self._shards()):
            pairs, numbers = _features.concatenate([*rest, *parts])
            # Only the shard itself stays in memory.
            parts.clear()
            rest.clear()
            for rows in self._batches(pairs, numbers, [epoch, shard]):
                batch = tf.nest.map_structure(lambda values: values[rows], pairs)  # noqa: B023
                if len(rows) == self._maker.batch_size:
                    yield batch
                else:
                    rest.append((batch, numbers[rows]))
            # Not kept while the next is read.
            del pairs, numbers
        if rest and not self._maker.drop_remainder:
            yield rest[0][0]

    def _begin_pass(self):
        """Counts the pass, unless nothing has been trained in the one before."""
        towers = self._maker.towers
        if self._weights is None or towers.have_changed(self._weights):
            self._epoch += 1
        self._weights = None

    def _batches(self, pairs, numbers: np.ndarray, stream: list[int]) -> list[np.ndarray]:
        maker, epoch = self._maker, stream[0]
        maker.towers.build(pairs)
        if self._weights is None:
            self._weights = maker.towers.fingerprint()
        ids = Ids.of(pairs, *self._keys)
        if not self._has_warned:
            self._has_warned = _batch_conflicts.warn_of_conflicts(ids, maker.batch_size)
        order = Order(np.arange(len(numbers)))
        if maker.random_fraction(epoch) < 1.0:
            order = maker.order(pairs, ids, stream, numbers)
        return maker.batches(order, ids, epoch, stream)

    def _shards(self) -> Iterator[list]:
        """The parts of one shard after the other: features, and the pairs' numbers."""
        parts, num_pairs = [], 0
        for part in self._parts.as_numpy_iterator():
            size = _features.num_rows(part)
            parts.append((part, np.arange(num_pairs, num_pairs + size)))
            num_pairs += size
            if len(parts) == self._parts_of_shard:
                yield parts
                parts = []
        if parts:
            yield parts
