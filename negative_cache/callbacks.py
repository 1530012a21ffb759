"""Keras callbacks.

| Callback | Purpose |
| --- | --- |
| `CorpusMetrics` | evaluates the model over the whole corpus |
| `CacheWarmStart` | fills a cache before training |
| `CacheRefresh` | encodes all cached candidates again |
| `CacheSummaries` | writes summaries of a cache for TensorBoard |
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import tensorflow as tf

from negative_cache import _features, _towers, _validation, evaluation
from negative_cache._compat import keras
from negative_cache._features import Values
from negative_cache._towers import Tower
from negative_cache.layers import Cache, FromCache, FromCorpus, Retrieval
from negative_cache.layers._negatives.cached import CachedNegatives

# A task with caches, or one of its sources of negatives.
CacheOwner: TypeAlias = Retrieval | CachedNegatives


class CorpusMetrics(keras.callbacks.Callback):
    """Adds `val_recall_at_{k}` and `val_mrr` over the whole corpus to the logs of an epoch.

    `evaluation.evaluate` defines the metrics and the validation batches, in which a query may have
    several positives and excluded candidates. It also works without this callback.

    Place this callback before callbacks that read its logs, such as `EarlyStopping` or
    `ModelCheckpoint`. Under a `tf.distribute` strategy the replicas divide the corpus, and all of
    them get the metrics of the whole, see `evaluation.evaluate`.

    Args:
      candidates: the corpus as batches of candidate features. It is read in every evaluation, so it
        must be re-iterable, for instance a batched `tf.data.Dataset`.
      validation: batches of `{"query": …, "candidate": …}`, re-iterable. They may have ids of
        several `"positives"` and of `"excluded"` candidates. Every positive must be in the corpus:
        without ids that cannot be seen, and it competes with the others only.
      k: the cut-offs of recall.
      candidate_id_key: name of the candidate feature that is unique in the corpus, as in
        `evaluation.evaluate`.
      every: the number of epochs from one evaluation to the next. The epochs in between repeat the
        last metrics, because `ModelCheckpoint` of Keras 3 saves a model whose metric is missing. A
        `patience` counts epochs, not evaluations.
      verbose: 1 shows a progress bar while the corpus is encoded.
      networks: the pair (query network, candidate network). Needed if the model does not have the
        attributes `query_network` and `candidate_network`.

    Raises:
      ValueError: if `k` or `every` is not positive. When training begins, if the model lacks the
        two networks and `networks` is not given.

    Examples:
      >>> metrics = CorpusMetrics(candidates.batch(1024), validation.batch(1024), k=(1, 10))
      >>> model.fit(pairs.batch(128), callbacks=[metrics])
    """

    def __init__(
        self,
        candidates: Iterable,
        validation: Iterable,
        k: Sequence[int] = (1, 10, 100),
        *,
        candidate_id_key: str | None = None,
        every: int = 1,
        verbose: int = 0,
        networks: tuple[Tower, Tower] | None = None,
    ):
        super().__init__()
        evaluation.check_cutoffs(k)
        if every < 1:
            raise ValueError(f"`every` must be at least 1. Received: {every}.")
        self.candidates = candidates
        self.validation = validation
        self.k = tuple(k)
        self.candidate_id_key = candidate_id_key
        self.every = every
        self.verbose = verbose
        self.networks = networks
        self._encoders = None if networks is None else _towers.encoders_of(networks)
        self._last_metrics: dict[str, float] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "CorpusMetrics":
        # Tuners copy callbacks for each trial, and datasets cannot be copied.
        return copy.copy(self)

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        self._last_metrics = {}

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if logs is None:
            return
        if (epoch + 1) % self.every == 0:
            self._last_metrics = {f"val_{name}": value for name, value in self.evaluate().items()}
        logs.update(self._last_metrics)

    def evaluate(self, model: keras.Model | None = None) -> dict[str, float]:
        """Computes the metrics of `model` now, or of the callback's model if `model` is None."""
        if model is not None:
            self.set_model(model)
        if self._encoders is None:
            raise ValueError("There is no model to evaluate. Received: `model=None`.")
        with _towers.scope_of(self.model):
            return evaluation.evaluate(
                self._encoders,
                self.candidates,
                self.validation,
                self.k,
                candidate_id_key=self.candidate_id_key,
                verbose=self.verbose,
            )

    def set_model(self, model: keras.Model) -> None:
        is_other = getattr(self, "model", None) is not model
        super().set_model(model)
        # Encoders are compiled functions, so they are kept for all epochs.
        if self.networks is None and (is_other or self._encoders is None):
            self._encoders = _towers.encoders_of(model)


class CacheWarmStart(keras.callbacks.Callback):
    """Fills the cache of a `DualEncoder` from a dataset before the first training step.

    Without this callback a streaming cache starts empty, and the first steps train against few
    negatives. The callback encodes batches until the cache is full or the dataset ends. A cache
    that already holds rows, for instance from a restored checkpoint, does not change. Under a
    `tf.distribute` strategy every replica's cache gets the same candidates, or if they are one pool
    different ones.

    Args:
      candidates: batches of candidate features.
      verbose: 1 shows a progress bar.
      task: the task, or one of its sources of negatives. If None, it is the attribute `task` of the
        model.

    Raises:
      ValueError: when training begins, if the dataset is empty or the model has no cache.

    Examples:
      >>> model.fit(pairs.batch(128), callbacks=[CacheWarmStart(candidates.batch(1024))])
    """

    def __init__(self, candidates: Iterable, *, verbose: int = 1, task: CacheOwner | None = None):
        super().__init__()
        self.candidates = candidates
        self.verbose = verbose
        self.task = task

    def __deepcopy__(self, memo: dict[int, object]) -> "CacheWarmStart":
        return copy.copy(self)

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        for source in cached_sources(self.model, self.task):
            # In the scope but outside of the replicas, so that every replica gets the rows.
            with self.model.distribute_strategy.scope():
                if not _holds_rows(source):
                    self._fill(source)

    def _fill(self, source: FromCache | FromCorpus) -> None:
        if isinstance(source, FromCorpus):
            source.fill(self.candidates, verbose=self.verbose)
            return
        batches: Iterator[Mapping[str, Values]] = map(_features.as_dict, self.candidates)
        if source.cache is None and (first := next(batches, None)) is not None:
            # Creates the cache. A checkpoint that was read before restores its rows now.
            source.encode(_features.first_rows(first, 1))
            if _holds_rows(source):
                return
            batches = itertools.chain([first], batches)
        bar = keras.utils.Progbar(source.pool_size, unit_name="row", verbose=self.verbose)
        num_added = _add_until_full(source, batches, bar)
        if not num_added:
            raise ValueError("The dataset to fill the cache from is empty.")
        if num_added < source.pool_size:
            bar.update(num_added, finalize=True)


def _add_until_full(
    source: FromCache, batches: Iterable[Mapping[str, Values]], bar: keras.utils.Progbar
) -> int:
    """Adds candidates to a streaming cache until it is full, and returns their number."""
    add = tf.function(source.add, reduce_retracing=True)
    num_added = 0
    for features in batches:
        num_rows = min(_features.num_rows(features), source.pool_size - num_added)
        add(_features.first_rows(features, num_rows))
        num_added += num_rows
        bar.update(num_added)
        if num_added >= source.pool_size:
            break
    return num_added


class CacheRefresh(keras.callbacks.Callback):
    """Encodes all cached candidates again, at the beginning of epochs or every `every_steps` steps.

    This is the refresh of ANCE (Xiong et al., arXiv 2007.00808). Between two refreshes the cached
    embeddings become stale, because the towers change. `candidates_encoded` in the logs shows the
    cost. The features come from the cache, so no dataset is read. A cache that has just been filled
    is not refreshed. The cache counts steps over all calls of `fit`, and files keep the count.

    Args:
      every_steps: training steps from one refresh to the next. If None, the cache is refreshed when
        an epoch begins. With `steps_per_execution` a refresh waits for the end of the execution.
      batch_size: the number of candidates that are encoded at a time.
      verbose: 1 shows a progress bar at every refresh.
      task: the task, or one of its sources of negatives. If None, it is the attribute `task` of the
        model.

    Raises:
      ValueError: if `every_steps` or `batch_size` is not positive. When training begins, if the
        model has no cache.

    Examples:
      >>> model.fit(pairs.batch(128), callbacks=[CacheRefresh(every_steps=1000)])
    """

    def __init__(
        self,
        every_steps: int | None = None,
        *,
        batch_size: int = 1024,
        verbose: int = 1,
        task: CacheOwner | None = None,
    ):
        super().__init__()
        if every_steps is not None:
            _validation.check_count(every_steps, "every_steps")
        self.every_steps = every_steps
        self.batch_size = _validation.check_count(batch_size, "batch_size")
        self.verbose = verbose
        self.task = task
        # Cache number -> how many refreshes have been due since its first step.
        self._num_due: dict[int, int] = {}

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        cached_sources(self.model, self.task)
        self._num_due = {}

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        for i, source in enumerate(cached_sources(self.model, self.task)):
            if self.every_steps is not None:
                # Other callbacks restore the step of a cache when training begins, so it is read
                # here.
                if i not in self._num_due:
                    self._num_due[i] = _num_refreshes_due(source, self.every_steps)
            elif source.cache is not None and _has_aged(source.cache):
                self._refresh(source)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        if self.every_steps is None:
            return
        for i, source in enumerate(cached_sources(self.model, self.task)):
            # Keras does not tell how many steps an execution had, but the cache counts them.
            num_due = _num_refreshes_due(source, self.every_steps)
            if num_due > self._num_due[i]:
                self._refresh(source)
                self._num_due[i] = num_due

    def _refresh(self, source: CachedNegatives) -> None:
        with self.model.distribute_strategy.scope():
            source.refresh(self.batch_size, verbose=self.verbose)


class CacheSummaries(keras.callbacks.Callback):
    """Writes summaries of the caches of a task for TensorBoard, side by side under `cache/`.

    * `cache/age`: histogram of the ages of filled rows, in steps.
    * `cache/fill`: the share of rows that hold a candidate.
    * `cache/log_partition`: mean log partition of the cache over the queries.
    * `cache/skipped_rows`: the number of rows rejected so far because they were not finite.
    * `cache/staleness`: mean ‖ĝ - g‖² / ‖g‖² of the drawn rows.

    The means are over the epoch so far, as in the progress bar. If `update_freq` is "epoch", the
    step of a summary is the epoch, otherwise it is the number of training steps.

    Args:
      log_dir: folder of the event files, for instance the one of the `TensorBoard` callback.
      update_freq: "epoch", or a number of batches.
      task: the task, or one of its sources of negatives. If None, it is the attribute `task` of the
        model.

    Raises:
      ValueError: if `update_freq` is out of range. When training begins, if there is no task with a
        cache.

    Examples:
      >>> model.fit(pairs.batch(128), callbacks=[CacheSummaries("logs")])
    """

    def __init__(
        self, log_dir: str, update_freq: str | int = "epoch", *, task: CacheOwner | None = None
    ):
        super().__init__()
        if update_freq != "epoch":
            update_freq = _validation.check_count(update_freq, "update_freq")
        self.log_dir = str(log_dir)
        self.update_freq = update_freq
        self.task = task
        self._writer: tf.summary.SummaryWriter | None = None

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        self._sources = cached_sources(self.model, self.task)
        task = self.task if self.task is not None else self.model.task
        self._metrics = task.training_metrics
        self._num_unwritten = 0
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self._last_batch = -1

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self._num_unwritten += batch - self._last_batch
        self._last_batch = batch
        if isinstance(self.update_freq, int) and self._num_unwritten >= self.update_freq:
            self._num_unwritten = 0
            self._write(int(self.model.optimizer.iterations))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        if self.update_freq == "epoch":
            self._write(epoch)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _write(self, step: int) -> None:
        caches = [
            (source.log_prefix, source.cache)
            for source in self._sources
            if source.cache is not None
        ]
        if not caches or self._writer is None:
            # There was no training step yet: a resumed training skips batches.
            return
        with self._writer.as_default(step=step):
            for metric in self._metrics:
                tf.summary.scalar(f"cache/{metric.name}", metric.result())
            for prefix, cache in caches:
                age = tf.boolean_mask(cache.age, cache.filled)
                tf.summary.histogram(f"cache/{prefix}age", age)


def _num_refreshes_due(source: CachedNegatives, every_steps: int) -> int:
    if source.cache is None:
        return 0
    return int(tf.convert_to_tensor(source.cache.step)) // every_steps


def _has_aged(cache: Cache) -> bool:
    waits = cache.filled & (cache.age > 0)
    return bool(tf.reduce_any(waits))


def cached_sources(
    model: keras.Model, task: CacheOwner | None = None
) -> tuple[CachedNegatives, ...]:
    """Returns the sources of negatives that have a cache.

    Args:
      model: the model, whose attribute `task` is used if `task` is None.
      task: a task, or a single source.

    Raises:
      ValueError: if there is no such source.
    """
    task = task if task is not None else getattr(model, "task", None)
    if isinstance(task, CachedNegatives):
        return (task,)
    sources = getattr(task, "cached_negatives", ())
    if not sources:
        raise ValueError(
            "There is no cache: the model needs an attribute `task` with a cache, or the callback"
            f" needs the argument `task`. Received: {task!r}."
        )
    return sources


def _holds_rows(source: CachedNegatives) -> bool:
    return source.cache is not None and int(tf.convert_to_tensor(source.cache.num_filled)) > 0
