"""`BackupAndRestore`: a killed training continues at the next batch, with bit-identical results.

Keras keeps control of the data and the training loop. The callback saves and restores the complete
state, and skips the batches that the model was already trained on.
"""

import os
from collections.abc import Iterator, Mapping

import tensorflow as tf

from negative_cache import _compat, _validation
from negative_cache._compat import keras
from negative_cache.layers._state import StateLayer

_DATA_ENDED_EARLY = (
    "The data ended before the batch at which the training was interrupted. They are not the data"
    " of the interrupted training."
)


class BackupAndRestore(keras.callbacks.Callback):
    """Continues an interrupted `fit` with the bits it would have had without the interruption.

    It replaces `keras.callbacks.BackupAndRestore`, which restarts the interrupted epoch with
    weights from the middle of it. This callback writes a TensorFlow checkpoint every `save_freq`
    batches. It holds the weights, the optimizer, metrics, random states, caches, the state of their
    sampling, and the position in the data. When `fit` is called again with the same arguments, it
    loads the last checkpoint and starts in its epoch. It reads the batches that were trained on
    before, but does not train on them again.

    A checkpoint is written completely or not at all, so the process may be killed at any moment.

    The data must come again in the same order:

    * Give `fit` a `tf.data.Dataset`, because it shuffles arrays.
    * Without `steps_per_epoch`, every epoch reads the dataset again, and a resumed `fit` begins
      with the interrupted epoch. The order must not depend on earlier epochs: use no `shuffle`, or
      one with a `seed` and `reshuffle_each_iteration=False`.
    * With `steps_per_epoch`, all epochs read one stream, such as `dataset.shuffle(…, seed=1)
      .repeat().batch(…)`, which may reshuffle. A resumed `fit` reads the stream from its start.

    As with the callback of Keras, a Keras 3 model must be built before `fit`, for instance by a
    call on a batch. Place this callback last, so that a backup contains the changes of other
    callbacks, for instance of the learning rate. Other callbacks see the skipped batches too.

    The following is not restored:

    * The state of other callbacks. For example, `EarlyStopping` starts to count again.
    * The running means of the losses and metrics that the model is compiled with. The metrics of
      layers are restored.
    * The random numbers of dropout in Keras 2, because no variable holds their state.

    Args:
      backup_dir: a folder for this training alone. When `fit` ends, the checkpoints in it are
        deleted, and the folder too if it is empty then.
      save_freq: "epoch", or a number of batches.
      steps_per_epoch: the argument of the same name that `fit` is given, if any.
      delete_checkpoint: whether to delete the checkpoints when `fit` ends.

    Raises:
      ValueError: if `save_freq` or `steps_per_epoch` is out of range. When training begins, if the
        model is not built, the folder holds a damaged checkpoint or one of another model,
        `steps_per_epoch` differs from that of `fit`, or there are several workers. During training,
        if the data end too early.

    Example:
      >>> backup = nc.BackupAndRestore("backup", save_freq=1000, steps_per_epoch=5000)
      >>> model.fit(data, epochs=10, steps_per_epoch=5000, callbacks=[backup])
    """

    def __init__(
        self,
        backup_dir: str,
        save_freq: str | int = "epoch",
        *,
        steps_per_epoch: int | None = None,
        delete_checkpoint: bool = True,
    ):
        super().__init__()
        if save_freq != "epoch":
            save_freq = _validation.check_count(save_freq, "save_freq")
        if steps_per_epoch is not None:
            steps_per_epoch = _validation.check_count(steps_per_epoch, "steps_per_epoch")
        self.backup_dir = str(backup_dir)
        self.save_freq = save_freq
        self.steps_per_epoch = steps_per_epoch
        self.delete_checkpoint = delete_checkpoint

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        model = self.model
        self._check_fit()
        _compat.prepare_to_restore(model)
        # The current epoch, the number of its batches that were read, and the number of batches
        # that earlier epochs read from the same stream.
        self._progress = tf.Variable([0, 0, 0], dtype=tf.int64, trainable=False)
        self._checkpoint = tf.train.Checkpoint(
            model=model,
            optimizer=model.optimizer,
            variables=_compat.all_variables(model),
            # States are saved even if the user chose to leave them out of files.
            states=[
                layer.checkpointable_state
                for layer in model._flatten_layers()
                if isinstance(layer, StateLayer)
            ],
            progress=self._progress,
        )
        self._manager = tf.train.CheckpointManager(self._checkpoint, self.backup_dir, max_to_keep=1)
        # The number of batches of this epoch at the last checkpoint. If the last checkpoint is of
        # an earlier epoch, it is minus the number of batches from there to this epoch.
        self._num_saved = 0
        self._num_seen = 0
        self._num_earlier = 0
        self._num_to_skip = 0
        self._restored_metrics = None
        if self._manager.latest_checkpoint:
            self._restore(self._manager.latest_checkpoint)
            epoch, self._num_saved, self._num_earlier = self._progress.numpy().tolist()
            self._restored_metrics = [(v, v.numpy()) for v in _compat.metric_variables(model)]
            _compat.set_first_epoch(model, epoch)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self._epoch = epoch
        if self._restored_metrics is None:
            self._num_saved -= self._num_seen
            self._num_earlier += self._num_seen
            self._num_seen = 0
            return
        # Keras has used the first epoch by now, and has just reset the metrics.
        _compat.set_first_epoch(self.model, None)
        # Metrics of a finished epoch must not go into the next one.
        for variable, value in self._restored_metrics if self._num_saved else ():
            variable.assign(value)
        self._restored_metrics = None
        is_stream = self.steps_per_epoch is not None
        self._skip_batches(self._num_earlier if is_stream else 0, self._num_saved)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self._num_seen = batch + 1
        if isinstance(self.save_freq, int) and self._num_seen - self._num_saved >= self.save_freq:
            self._save(self._epoch, self._num_seen, self._num_earlier)
            self._num_saved = self._num_seen

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        if self._num_to_skip:
            raise ValueError(_DATA_ENDED_EARLY)
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0, self._num_earlier + self._num_seen)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        _compat.set_first_epoch(self.model, None)
        if self.delete_checkpoint:
            self._delete_checkpoints()

    def _check_fit(self) -> None:
        if isinstance(self.model.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError(
                "Several workers cannot write one backup. Received a model of a"
                " `MultiWorkerMirroredStrategy`."
            )
        steps = (self.params or {}).get("steps")
        if self.steps_per_epoch is not None and steps not in (None, self.steps_per_epoch):
            raise ValueError(
                "`steps_per_epoch` must be the argument that `fit` is given. Received:"
                f" {self.steps_per_epoch}, for a training of {steps} steps per epoch."
            )

    def _save(self, epoch: int, num_batches: int, num_earlier: int) -> None:
        self._progress.assign([epoch, num_batches, num_earlier])
        self._manager.save()

    def _restore(self, path: str) -> None:
        try:
            # A Keras 2 model creates some of its variables later.
            status = self._checkpoint.restore(path).expect_partial()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"The checkpoint in {self.backup_dir!r} is of another model, or damaged. Remove the"
                f" folder to start from the beginning. {error}"
            ) from error

    def _delete_checkpoints(self) -> None:
        """Removes the checkpoints, and the folder if there is nothing else in it."""
        files = tf.io.gfile
        for path in self._manager.checkpoints:
            for part in files.glob(path + ".*"):
                files.remove(part)
        state = os.path.join(self.backup_dir, "checkpoint")
        if files.exists(state):
            files.remove(state)
        if files.isdir(self.backup_dir) and not files.listdir(self.backup_dir):
            files.rmtree(self.backup_dir)

    def _skip_batches(self, num_earlier: int, num_in_epoch: int) -> None:
        """Makes the model read batches without training, of earlier epochs and then of this one."""
        model, train = self.model, self.model.train_function
        stream, self._num_to_skip = None, num_in_epoch

        def read(iterator: Iterator, count: int) -> None:
            try:
                for _ in range(count):
                    next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                raise ValueError(_DATA_ENDED_EARLY) from None

        def read_then_train(iterator: Iterator) -> dict[str, tf.Tensor]:
            nonlocal num_earlier, stream
            stream = iterator if stream is None else stream
            # Another iterator belongs to another `fit`, after this one was interrupted.
            if iterator is stream:
                read(iterator, num_earlier)
                num_earlier = 0
                if self._num_to_skip > 0:
                    count = min(_compat.steps_per_execution(model), self._num_to_skip)
                    self._num_to_skip -= count
                    read(iterator, count)
                    return model.get_metrics_result()
            model.train_function = train
            return train(iterator)

        if num_earlier or num_in_epoch:
            model.train_function = read_then_train
