"""`GlobalContrastiveBatches`: the batches of `fit`, and when an epoch of them begins."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache._features import Features
from negative_cache._towers import TowerPair, differ
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
    """Batches of similar pairs for `fit`, embedded and ordered anew between epochs.

    A Keras `PyDataset` (Keras 2: `Sequence`) over features in memory, of batches
    `{"query": …, "candidate": …}` as `DualEncoder` takes them. When an epoch begins, all pairs are
    embedded with the towers as they are now and ordered by `contrastive_order`; the order is cut
    into batches from a random place on; and the batches come in random sequence. What shares a
    batch is chosen, what is in an epoch is not: each pair once. `from_dataset` does the same with
    shards of a dataset that memory does not hold.

    The loss and the task stay as they are: a cache brings more negatives to such batches as to any
    other. See docs/contrastive_batches.md for where they help and where they do not.

    Batches are made in the thread that reads them, one at a time. A new epoch begins where every
    batch has been read and the weights of the towers have changed; so only `fit`, or a loop of your
    own, should read them while it trains. Leave `workers` at 1 (Keras 2: in
    `fit`): more threads read ahead into the next epoch, whose order they would make with unfinished
    weights. Processes cannot share the towers.

    Under a `tf.distribute` strategy each replica gets a run of neighboring pairs of each batch.

    Args:
      model: has `query_network` and `candidate_network`, as a `DualEncoder` has, or is the pair of
        both; under a strategy, in its scope.
      pairs: `{"query": …, "candidate": …}`: arrays or tensors of N rows, strings too, or nests of
        them. Other entries, such as "negative", come along.
      batch_size: B.
      num_neighbors: see `contrastive_order`.
      quantile: see `contrastive_order`.
      start_epoch: the first epoch with ordered batches; those before are shuffled.
      initial_epoch: how many epochs were trained before, if this goes on with an earlier training:
        epochs are counted from there.
      every: embed and order at every so many epochs; those between have the last order, cut at
        another random place.
      random_fraction: share of the batches whose pairs are shuffled among them, against
        overfitting to batches that are hard for the sake of noise; or a function of the epoch, for
        a schedule.
      group_size: how many similar pairs a batch has together, a divisor of B; the batch is made of
        random groups. None is B: all pairs of a batch are similar. With few of them a query has
        some hard negatives and many easy ones, see docs/contrastive_batches.md.
      grow: see `contrastive_order`; grown groups are much harder. They begin at another place of
        the order in each epoch.
      candidate_id_key: name of the candidate feature that identifies candidates, "candidate" where
        there is only one. Pairs that share one are kept apart, as by `contrastive_order` with
        `candidate_ids`. If nothing is given, that of `model.task`.
      candidate_ids: [N] ids of candidates that are not one of their features.
      query_id_key: name of the query feature that identifies queries, such as a user's id, where
        they have several positives, "query" where there is only one; see `query_ids` of
        `contrastive_order`.
      query_ids: [N] ids of queries that are not one of their features.
      drop_remainder: whether to leave out the last, smaller batch, of other pairs in each epoch.
      batches_per_epoch: how many batches to have in an epoch of Keras, where it is not all of them.
        It replaces `steps_per_epoch` of `fit`; pairs are still used once before any is used twice,
        and "epoch" in the arguments above means a pass over all pairs, that is embedded and ordered
        when the epoch of Keras begins in which it does.
      index: a `TreeIndex` to search with, of a capacity of at least N; it is filled at every
        ordering. Worth it from some hundred thousand pairs on.
      embedding_batch_size: features embedded at a time.
      seed: of all that is random.
      verbose: 1 shows progress bars of embedding and of ordering.

    Raises:
      ValueError: where features do not fit or an argument is out of range.

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
        self._ids = Ids.of(self._pairs, query_id_key, candidate_id_key)
        given = Ids.given(num_pairs, query_ids, candidate_ids)
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
        # Of the epoch of Keras, and those that are left for the next ones.
        self._batches: list[np.ndarray] = []
        self._left: list[np.ndarray] = []
        self._epoch = _validation.check_count(initial_epoch, "initial_epoch", at_least=0)
        self._last_order: _DatedOrder | None = None
        # The weights when the epoch of Keras began.
        self._weights: list[int] | None = None
        self._is_due, self._is_trained = True, False
        self._unread: set[int] = set()
        self._before = self._state()

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
        """A dataset of batches of similar pairs, from single pairs too many to hold in memory.

        At each pass, `shard_size` pairs at a time are read, embedded with the towers as they are
        then, ordered, and yielded as batches in random sequence. The rest of a shard that fills no
        batch goes to the next shard. In memory are a shard and its copy while it is put together.
        Shards are consecutive pairs: where neighbors in the file are alike, shuffle the
        dataset first, so that shards are samples of all pairs; a `shuffle` that reshuffles makes
        other shards at each pass.

        `fit` on a model that is not built reads the first batch of a pass in vain, under Keras 3:
        call it on a batch first, to save the embedding of a shard. For `steps_per_epoch`, repeat
        the result; it is read ahead, so that the first shard of a pass may be embedded some steps
        before the last pass ends.

        Args:
          model: see the class.
          dataset: single pairs `{"query": …, "candidate": …}` of dense features, re-iterable and
            finite.
          batch_size: B.
          shard_size: pairs that are ordered together, rounded up to parts of 1024 or fewer.
          num_neighbors: see the class.
          quantile: see the class.
          start_epoch: the first pass with ordered batches; in those before, shards are shuffled.
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
          ValueError: where an argument is out of range, or an element is not such a pair.
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
        """Batch `index` of the epoch: features as in `pairs`, of B rows or the rest."""
        with self._lock:
            if self._is_due:
                self._begin_epoch()
            rows = self._batches[index]
            self._unread.discard(index % self._num_batches)
        return _features.take(self._pairs, rows)

    def __iter__(self) -> Iterator[Features]:
        """The batches of an epoch, for a loop of your own; the next one begins another epoch."""
        for index in range(self._num_batches):
            yield self[index]
        self.on_epoch_end()

    def on_epoch_begin(self) -> None:
        # Keras 3 only. It has looked at batches, and then callbacks may have loaded weights.
        with self._lock:
            if self._is_due or self._is_trained:
                return
            self._unread = set(range(self._num_batches))
            if self._maker.towers.have_changed(self._weights):
                self._restart()

    def on_epoch_end(self) -> None:
        with self._lock:
            if self._is_due or not self._maker.towers.have_changed(self._weights):
                # Nothing has been trained: the batches are still to be used.
                return
            self._is_trained = True
            # With `steps_per_epoch` Keras 3 goes on with what is left, Keras 2 with a new iterator.
            self._is_due = IS_KERAS_2 or not self._unread

    def restart(self) -> None:
        """Makes the next batch begin the epoch anew, ordered by the weights of then.

        For the cases that are not noticed: `fit` was interrupted in the middle of an epoch and is
        called again; or, under Keras 2, a callback such as `BackupAndRestore` has loaded weights
        when training began. Then it belongs into a callback after it:
        `LambdaCallback(on_train_begin=lambda logs: batches.restart())`. Training that a callback
        stops in the middle of an epoch is interrupted, too.
        """
        with self._lock:
            self._restart()

    def _restart(self) -> None:
        if not self._is_due:
            self._epoch, self._left, self._last_order = self._before
            self._is_due = True

    def _state(self) -> tuple[int, list[np.ndarray], _DatedOrder | None]:
        return self._epoch, self._left, self._last_order

    def embed(self) -> tuple[np.ndarray, np.ndarray]:
        """[N, d] float32 embeddings of the queries and of the candidates, by the towers of now."""
        return self._maker.embed(self._pairs)

    @property
    def order(self) -> np.ndarray | None:
        """[N] int64, the last order of the pairs; None where there is none, as before the first."""
        return None if self._last_order is None else self._last_order.order.rows

    def _begin_epoch(self) -> None:
        self._before = self._state()
        self._maker.towers.build(self._pairs)
        self._weights = weights = self._maker.towers.fingerprint()
        batches = self._left
        while len(batches) < self._num_batches:
            batches = [*batches, *self._pass(weights)]
        self._batches, self._left = batches[: self._num_batches], batches[self._num_batches :]
        self._is_due, self._is_trained = False, False
        self._unread = set(range(self._num_batches))

    def _pass(self, weights: list[int]) -> list[np.ndarray]:
        """Rows of the batches of the next pass over all pairs."""
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
        return epoch - last.epoch >= self._every and differ(weights, last.weights)


def _task_key(model: TowerPair) -> str | None:
    """The `candidate_id_key` of a model's task, if it has one."""
    return getattr(getattr(model, "task", None), "candidate_id_key", None)
