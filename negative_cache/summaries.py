"""`CacheSummaries`: what a cache does, for TensorBoard."""

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.callbacks import cached_sources


class CacheSummaries(keras.callbacks.Callback):
    """Writes summaries of a `CachedRetrieval` for TensorBoard, side by side under `cache/`.

    * `cache/age`: histogram of the filled rows' ages, in steps.
    * `cache/fill`: the share of rows that hold a candidate.
    * `cache/log_partition`: mean log partition of the cache over the queries.
    * `cache/skipped_rows`: rows refused so far because they were not finite.
    * `cache/staleness`: mean ‖ĝ - g‖² / ‖g‖² of the drawn rows.

    The means are over the epoch so far, as in the progress bar. Summaries of epochs have the epoch
    as their step, others the number of training steps.

    Args:
      log_dir: folder of the event files, such as that of the `TensorBoard` callback.
      update_freq: "epoch", or a number of batches.
      task: the task, or one of its sources of negatives; the attribute `task` of the model if it is
        None.

    Raises:
      ValueError: where `update_freq` is out of range; when training begins, where there is no task
        with a cache.
    """

    def __init__(self, log_dir: str, update_freq: str | int = "epoch", *, task=None):
        super().__init__()
        if update_freq != "epoch":
            update_freq = _validation.check_count(update_freq, "update_freq")
        self.log_dir = str(log_dir)
        self.update_freq = update_freq
        self.task = task
        self._writer = None

    def on_train_begin(self, logs=None):
        self._sources = cached_sources(self.model, self.task)
        task = self.task if self.task is not None else self.model.task
        self._metrics = task.training_metrics
        self._num_unwritten = 0
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_epoch_begin(self, epoch, logs=None):
        self._last_batch = -1

    def on_train_batch_end(self, batch, logs=None):
        self._num_unwritten += batch - self._last_batch
        self._last_batch = batch
        if self.update_freq != "epoch" and self._num_unwritten >= self.update_freq:
            self._num_unwritten = 0
            self._write(int(self.model.optimizer.iterations))

    def on_epoch_end(self, epoch, logs=None):
        if self.update_freq == "epoch":
            self._write(epoch)

    def on_train_end(self, logs=None):
        self._writer.flush()

    def _write(self, step):
        sources = [source for source in self._sources if source.cache is not None]
        if not sources:
            # The batch was not trained on: a resumed training passes over it.
            return
        with self._writer.as_default(step=step):
            for metric in self._metrics:
                tf.summary.scalar(f"cache/{metric.name}", metric.result())
            for source in sources:
                age = tf.boolean_mask(source.cache.age, source.cache.filled)
                tf.summary.histogram(f"cache/{source.log_prefix}age", age)
