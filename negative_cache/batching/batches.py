"""`GlobalContrastiveBatches`, a Keras dataset that orders pairs again between epochs."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache._features import Features
from negative_cache._towers import TowerPair, weights_differ
from negative_cache.batching import keep_apart
from negative_cache.batching.ids import Ids
from negative_cache.batching.pairs import check_dataset, check_pairs
from negative_cache.batching.plan import BatchMaker, BatchPlan, Order
from negative_cache.batching.shards import Shards
from negative_cache.layers.tree_index import TreeIndex


@dataclasses.dataclass(frozen=True)
class _DatedOrder:
    """An order of pairs, the epoch in which it was made, and the weights of the towers then."""

    order: Order
    epoch: int
    weights: list[int]


class GlobalContrastiveBatches(keras.utils.Sequence):
    """Batches of similar pairs for `fit`, embedded and ordered again between epochs.

    It is a Keras `PyDataset` (Keras 2: `Sequence`) over features in memory. The batches
    `{"query": …, "candidate": …}` are those that `DualEncoder` takes. When an epoch begins:

    1. The towers embed all pairs with their current weights.
    2. `contrastive_order` orders the pairs.
    3. The order is cut into batches, from a random place on.
    4. The batches come in random sequence. Each pair is in one batch of the epoch.

    `from_dataset` does the same with shards of a dataset that does not fit into memory.

    The loss and the task do not change. A cache adds negatives to these batches as to any others.
    See docs/contrastive_batches.md for when they help and when they do not.

    Batches are made in the thread that reads them, one at a time. A new epoch begins when every
    batch has been read and the weights of the towers have changed. So during training only `fit`,
    or your own loop, should read batches. Leave `workers` at 1 (Keras 2: in `fit`), because more
    threads would read ahead into the next epoch and order it with unfinished weights. Processes
    cannot share the towers.

    Under a `tf.distribute` strategy each of R replicas gets a run of B / R neighboring pairs of a
    batch. Groups stay whole if `group_size` divides B / R.

    Args:
      model: a model with `query_network` and `candidate_network`, such as a `DualEncoder`, or the
        pair of both. Under a strategy, create this object in its scope.
      pairs: `{"query": …, "candidate": …}`, arrays or tensors of N rows, or nests of them. Strings
        are allowed. Other entries, such as "negative", are passed on with the batches.
      batch_size: B.
      num_neighbors: see `contrastive_order`.
      quantile: see `contrastive_order`.
      start_epoch: the first epoch with ordered batches. Earlier epochs have shuffled batches.
      initial_epoch: the number of epochs of an earlier training that this one continues.
      every: the number of epochs from one ordering to the next. The epochs in between cut the last
        order at another random place.
      random_fraction: the share of batches whose pairs are shuffled among them. It helps against
        overfitting to batches that are hard because of noise. It may be a function of the epoch.
      group_size: the number of similar pairs in a group, a divisor of B. A batch is made of random
        groups. If None, it is B, so all pairs of a batch are similar. With small groups a query has
        some hard negatives and many easy ones, see docs/contrastive_batches.md.
      grow: see `contrastive_order`. Grown groups are much harder. In each epoch they start at
        another place of the order.
      candidate_id_key: name of the candidate feature that identifies candidates. It is "candidate"
        if there is only one feature. Pairs with the same candidate are kept apart, as by
        `candidate_ids` of `contrastive_order`. If neither this nor `candidate_ids` is given, the
        key of `model.task` is used.
      candidate_ids: [N] ids of candidates, if they are not a feature.
      query_id_key: name of the query feature that identifies queries, such as a user's id. Needed
        if queries have several positives, see `query_ids` of `contrastive_order`. It is "query" if
        there is only one feature.
      query_ids: [N] ids of queries, if they are not a feature.
      drop_remainder: whether to leave out the last, smaller batch. Its pairs differ between epochs.
      batches_per_epoch: the number of batches in an epoch of Keras, if it is not all of them. It
        replaces `steps_per_epoch` of `fit`. Every pair is still used once before any is used twice.
        Then "epoch" in the arguments above means a pass over all pairs. Pairs are embedded and
        ordered for a pass at the start of the Keras epoch in which the pass begins.
      index: a `TreeIndex` to search with, with a capacity of at least N. It is filled at every
        ordering. It pays off from several hundred thousand pairs.
      embedding_batch_size: the number of rows that are embedded at a time.
      seed: the seed of all random choices.
      verbose: 1 shows progress bars of embedding and ordering.

    Raises:
      ValueError: if features do not match or an argument is out of range.

    Example:
      >>> pairs = {"query": queries, "candidate": {"title": titles}}
      >>> batches = GlobalContrastiveBatches(
      ...     model, pairs, 256, group_size=8, candidate_id_key="title"
      ... )
      >>> model.fit(batches, epochs=10)
    """

    def __init__(
        self,
        model: TowerPair,
        pairs: Mapping[str, Features],
        batch_size: int,
        *,
        num_neighbors: int = 16,
        quantile: float | None = None,
        start_epoch: int = 0,
        initial_epoch: int = 0,
        every: int = 1,
        random_fraction: float | Callable[[int], float] = 0.0,
        group_size: int | None = None,
        grow: bool = False,
        candidate_id_key: str | None = None,
        candidate_ids: np.ndarray | tf.Tensor | None = None,
        query_id_key: str | None = None,
        query_ids: np.ndarray | tf.Tensor | None = None,
        drop_remainder: bool = False,
        batches_per_epoch: int | None = None,
        index: TreeIndex | None = None,
        embedding_batch_size: int = 1024,
        seed: int = 0,
        verbose: int = 1,
    ):
        super().__init__()
        self._pairs, num_pairs = check_pairs(pairs)
        plan = BatchPlan(
            batch_size=batch_size,
            num_neighbors=num_neighbors,
            quantile=quantile,
            start_epoch=start_epoch,
            random_fraction=random_fraction,
            group_size=batch_size if group_size is None else group_size,
            grow=grow,
            drop_remainder=drop_remainder,
            index=index,
            embedding_batch_size=embedding_batch_size,
            seed=seed,
            verbose=verbose,
        )
        self._maker = BatchMaker(model, plan)
        self._every = _validation.check_count(every, "every")
        for name, key, given in (
            ("candidate", candidate_id_key, candidate_ids),
            ("query", query_id_key, query_ids),
        ):
            if key is not None and given is not None:
                raise ValueError(
                    f"Of `{name}_id_key` and `{name}_ids` only one can be given. Received: {key!r}"
                    f" and {given!r}."
                )
        if candidate_ids is None:
            candidate_id_key = candidate_id_key or _task_key(model)
        self._ids = Ids.from_features(self._pairs, query_id_key, candidate_id_key)
        given = Ids.from_arrays(num_pairs, query_ids, candidate_ids)
        if query_ids is not None:
            self._ids = dataclasses.replace(self._ids, queries=given.queries)
        if candidate_ids is not None:
            self._ids = dataclasses.replace(self._ids, candidates=given.candidates)
        keep_apart.warn_of_conflicts(self._ids, batch_size)
        plan.check_not_empty(num_pairs)
        self._num_batches = plan.num_batches(num_pairs)
        if batches_per_epoch is not None:
            self._num_batches = _validation.check_count(batches_per_epoch, "batches_per_epoch")
        self._lock = threading.Lock()
        # The batches of this epoch of Keras, and the batches that are left for the next epochs.
        self._batches: list[np.ndarray] = []
        self._remaining_batches: list[np.ndarray] = []
        self._epoch = _validation.check_count(initial_epoch, "initial_epoch", at_least=0)
        self._last_order: _DatedOrder | None = None
        # The weights when the epoch of Keras began.
        self._weights: list[int] | None = None
        self._epoch_is_due, self._has_trained = True, False
        self._unread_batches: set[int] = set()
        self._state_before_epoch = self._state()

    @staticmethod
    def from_dataset(
        model: TowerPair,
        dataset: tf.data.Dataset,
        batch_size: int,
        *,
        shard_size: int = 100_000,
        num_neighbors: int = 16,
        quantile: float | None = None,
        start_epoch: int = 0,
        initial_epoch: int = 0,
        random_fraction: float | Callable[[int], float] = 0.0,
        group_size: int | None = None,
        grow: bool = False,
        candidate_id_key: str | None = None,
        query_id_key: str | None = None,
        drop_remainder: bool = False,
        embedding_batch_size: int = 1024,
        seed: int = 0,
        verbose: int = 0,
    ) -> tf.data.Dataset:
        """Makes a dataset of batches of similar pairs, from more single pairs than memory holds.

        Each pass reads `shard_size` pairs at a time. It embeds them with the current weights of the
        towers, orders them, and yields them as batches in random sequence. Pairs of a shard that do
        not fill a batch go to the next shard. Memory holds one shard, and a copy while the shard is
        put together. Shards are consecutive pairs. If neighbors in the file are similar, shuffle
        the dataset first, so that shards are samples of all pairs. A `shuffle` that reshuffles
        makes other shards in each pass.

        Under Keras 3, `fit` on a model that is not built reads the first batch of a pass and
        discards it. Call the model on a batch first to save the embedding of a shard. With
        `steps_per_epoch`, repeat the result. It is read ahead, so the first shard of a pass may be
        embedded some steps before the last pass ends.

        Args:
          model: see the class.
          dataset: single pairs `{"query": …, "candidate": …}` of dense features, re-iterable and
            finite.
          batch_size: B.
          shard_size: the number of pairs that are ordered together. It is rounded up to equal parts
            of at most 1024 pairs.
          num_neighbors: see the class.
          quantile: see the class.
          start_epoch: the first pass with ordered batches. In earlier passes shards are shuffled.
          initial_epoch: see the class.
          random_fraction: see the class.
          group_size: see the class.
          grow: see the class.
          candidate_id_key: see the class.
          query_id_key: see the class.
          drop_remainder: see the class.
          embedding_batch_size: see the class.
          seed: see the class.
          verbose: 1 shows the progress bars of every shard.

        Returns:
          A dataset of batches, re-iterable.

        Raises:
          ValueError: if an argument is out of range, or `dataset` does not hold such pairs.
        """
        candidate_id_key = candidate_id_key or _task_key(model)
        spec = check_dataset(dataset, query_id_key, candidate_id_key)
        plan = BatchPlan(
            batch_size=batch_size,
            num_neighbors=num_neighbors,
            quantile=quantile,
            start_epoch=start_epoch,
            random_fraction=random_fraction,
            group_size=batch_size if group_size is None else group_size,
            grow=grow,
            drop_remainder=drop_remainder,
            index=None,
            embedding_batch_size=embedding_batch_size,
            seed=seed,
            verbose=verbose,
        )
        maker = BatchMaker(model, plan)
        if _validation.check_count(shard_size, "shard_size") < batch_size:
            raise ValueError(
                f"`shard_size` must be at least `batch_size`. Received: {shard_size} and"
                f" {batch_size}."
            )
        shards = Shards(
            maker,
            dataset,
            shard_size=shard_size,
            candidate_id_key=candidate_id_key,
            query_id_key=query_id_key,
            initial_epoch=initial_epoch,
        )
        size = batch_size if drop_remainder else None
        batches = tf.data.Dataset.from_generator(
            shards,
            output_signature=tf.nest.map_structure(
                lambda part: tf.TensorSpec([size, *part.shape], part.dtype), spec
            ),
        )
        num_pairs = int(dataset.cardinality())
        if num_pairs >= 0:
            plan.check_not_empty(num_pairs)
            batches = batches.apply(
                tf.data.experimental.assert_cardinality(plan.num_batches(num_pairs))
            )
        return batches

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Features:
        """Returns batch `index` of the epoch: features as in `pairs`, of B rows or the rest."""
        with self._lock:
            if self._epoch_is_due:
                self._begin_epoch()
            rows = self._batches[index]
            self._unread_batches.discard(index % self._num_batches)
        return _features.take(self._pairs, rows)

    def __iter__(self) -> Iterator[Features]:
        """Yields the batches of an epoch, for your own loop. The next loop begins another epoch."""
        for index in range(self._num_batches):
            yield self[index]
        self.on_epoch_end()

    def on_epoch_begin(self) -> None:
        # Only Keras 3 calls this. It has already read batches, and since then callbacks may have
        # loaded weights.
        with self._lock:
            if self._epoch_is_due or self._has_trained:
                return
            self._unread_batches = set(range(self._num_batches))
            if self._maker.towers.have_changed(self._weights):
                self._restart()

    def on_epoch_end(self) -> None:
        with self._lock:
            if self._epoch_is_due or not self._maker.towers.have_changed(self._weights):
                # There was no training, so the batches are still unused.
                return
            self._has_trained = True
            # With `steps_per_epoch` Keras 3 continues its iterator, Keras 2 makes a new one.
            self._epoch_is_due = IS_KERAS_2 or not self._unread_batches

    def restart(self) -> None:
        """Restarts the epoch at the next batch, with an order by the weights at that time.

        Call it in these cases, which are not detected:

        * `fit` was interrupted in the middle of an epoch and is called again. A callback that stops
          training in the middle of an epoch is an interruption too.
        * Under Keras 2, a callback such as `BackupAndRestore` loads weights when training begins.
          Then restart in a later callback:
          `LambdaCallback(on_train_begin=lambda logs: batches.restart())`.
        """
        with self._lock:
            self._restart()

    def _restart(self) -> None:
        if not self._epoch_is_due:
            self._epoch, self._remaining_batches, self._last_order = self._state_before_epoch
            self._epoch_is_due = True

    def _state(self) -> tuple[int, list[np.ndarray], _DatedOrder | None]:
        return self._epoch, self._remaining_batches, self._last_order

    def embed(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns [N, d] float32 embeddings of the queries, and of the candidates."""
        return self._maker.embed(self._pairs)

    @property
    def order(self) -> np.ndarray | None:
        """[N] int64, the last order of the pairs, or None before the first ordering."""
        return None if self._last_order is None else self._last_order.order.rows

    def _begin_epoch(self) -> None:
        self._state_before_epoch = self._state()
        self._maker.towers.build(self._pairs)
        self._weights = weights = self._maker.towers.fingerprint()
        batches = self._remaining_batches
        while len(batches) < self._num_batches:
            batches = [*batches, *self._next_pass(weights)]
        self._batches, self._remaining_batches = (
            batches[: self._num_batches],
            batches[self._num_batches :],
        )
        self._epoch_is_due, self._has_trained = False, False
        self._unread_batches = set(range(self._num_batches))

    def _next_pass(self, weights: list[int]) -> list[np.ndarray]:
        """Returns the rows of each batch of the next pass over all pairs."""
        epoch, maker = self._epoch, self._maker
        order = Order(np.arange(_features.num_rows(self._pairs)))
        if maker.plan.random_fraction_of(epoch) < 1.0:
            last = self._last_order
            if last is None or self._is_outdated(last, epoch, weights):
                last = _DatedOrder(maker.order(self._pairs, self._ids, [epoch]), epoch, weights)
                self._last_order = last
            order = last.order
        batches = maker.batches(order, self._ids, epoch, [epoch])
        self._epoch += 1
        return batches[: maker.plan.num_batches(len(order.rows))]

    def _is_outdated(self, last: _DatedOrder, epoch: int, weights: list[int]) -> bool:
        return epoch - last.epoch >= self._every and weights_differ(weights, last.weights)


def _task_key(model: TowerPair) -> str | None:
    """Returns the `candidate_id_key` of a model's task, if it has one."""
    return getattr(getattr(model, "task", None), "candidate_id_key", None)
