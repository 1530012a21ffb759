"""`CacheSummaries`: what a cache does, for TensorBoard."""

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras


class CacheSummaries(keras.callbacks.Callback):
    """Writes summaries of a `CachedRetrieval` for TensorBoard, side by side under `cache/`.

    * `cache/age`: histogram of the filled rows' ages, in steps.
    * `cache/fill`: the share of rows that hold a candidate.
    * `cache/log_partition`: mean log partition of the cache over the queries.
    * `cache/skipped_rows`: rows refused so far because they were not finite.
    * `cache/staleness`: mean ‖ĝ - g‖² / ‖g‖² of the drawn rows.

    The means are over the epoch so far, as in the progress bar.

    Args:
      log_dir: folder of the event files, such as that of the `TensorBoard` callback.
      update_freq: "epoch", or a number of batches.
      task: the `CachedRetrieval`; the attribute `task` of the model where None.

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
        self._num_batches = 0

    def on_train_begin(self, logs=None):
        task = self.task if self.task is not None else getattr(self.model, "task", None)
        if not getattr(task, "cache_size", 0):
            raise ValueError(
                "There is no cache to summarize: the model needs an attribute `task` with a cache,"
                f" or give the `task`. Received: {task!r}."
            )
        self._task = task
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_train_batch_end(self, batch, logs=None):
        self._num_batches += 1
        if self.update_freq != "epoch" and self._num_batches % self.update_freq == 0:
            self._write(self._num_batches)

    def on_epoch_end(self, epoch, logs=None):
        if self.update_freq == "epoch":
            self._write(epoch)

    def on_train_end(self, logs=None):
        self._writer.flush()

    def _write(self, step):
        cache = self._task.cache
        with self._writer.as_default(step=step):
            for metric in self._task.training_metrics:
                tf.summary.scalar(f"cache/{metric.name}", metric.result())
            tf.summary.histogram("cache/age", tf.boolean_mask(cache.age, cache.filled))
