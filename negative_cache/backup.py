"""`BackupAndRestore`: training that was killed goes on at the next batch, to the bit.

The data and the training loop stay Keras's: what is added is that nothing of the state is lost and
that batches which were already trained on are passed over.
"""

import os
from collections.abc import Iterator, Mapping

import tensorflow as tf

from negative_cache import _compat, _validation
from negative_cache._compat import keras
from negative_cache.layers._state import StateLayer

_ENDED = (
    "The data ended before the batch was reached at which the training was interrupted: they are"
    " not those of the interrupted training."
)


class BackupAndRestore(keras.callbacks.Callback):
    """Goes on with an interrupted `fit`, to the bit as if it had not been interrupted.

    It takes the place of `keras.callbacks.BackupAndRestore`, which begins the interrupted epoch
    anew, with weights from the middle of it. Here every `save_freq` batches a TensorFlow checkpoint
    is written: weights, optimizer, metrics, random states, caches and the state of their sampling,
    and where training stood. When `fit` is run again with the same arguments, it starts with the
    last checkpoint, in the epoch of it, and reads without training on them the batches that were
    trained on before.

    A checkpoint appears whole or not at all: a process may be killed at any moment.

    The data must come again in the same order:

    * Given as a `tf.data.Dataset`: arrays are shuffled by `fit`.
    * Without `steps_per_epoch`, every epoch reads the dataset anew, and a resumed `fit` begins with
      the interrupted epoch. Its order must not depend on the epochs before: no `shuffle`, or one
      with a `seed` and `reshuffle_each_iteration=False`.
    * With `steps_per_epoch`, all epochs read one stream, such as `dataset.shuffle(…, seed=1)
      .repeat().batch(…)`, which may reshuffle. A resumed `fit` reads it from its start.

    As with the callback of Keras, a model of Keras 3 must be built before `fit`, by a call on a
    batch for instance. Place it last among the callbacks, so that a backup holds what the others
    have changed, a learning rate for instance. Other callbacks see the batches that are passed
    over, and keep no state of their own: an `EarlyStopping` starts to count anew. So do the running
    means of losses and metrics that a model is compiled with, as opposed to those of its layers.
    Dropout of Keras 2 goes on with other random numbers, which no variable holds.

    Args:
      backup_dir: folder of this training alone. The checkpoints in it are deleted when `fit` has
        come to its end, and it too where it is empty then.
      save_freq: "epoch", or a number of batches.
      steps_per_epoch: what `fit` is given under this name, if it is given.
      delete_checkpoint: whether to delete the checkpoints when `fit` has come to its end.

    Raises:
      ValueError: where `save_freq` or `steps_per_epoch` is out of range, or when training begins,
        where the model is not built, the folder holds a checkpoint of another one or a damaged one,
        `steps_per_epoch` is not that of `fit`, or there are several workers; when it goes on, where
        the data end too early.

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
        # The epoch that is under way, the number of its batches that were read, and the number of
        # batches that earlier epochs have read from the same stream.
        self._progress = tf.Variable([0, 0, 0], dtype=tf.int64, trainable=False)
        self._checkpoint = tf.train.Checkpoint(
            model=model,
            optimizer=model.optimizer,
            variables=_compat.all_variables(model),
            # Those too that files do not hold on demand.
            states=[
                layer.checkpointable_state
                for layer in model._flatten_layers()
                if isinstance(layer, StateLayer)
            ],
            progress=self._progress,
        )
        self._manager = tf.train.CheckpointManager(self._checkpoint, self.backup_dir, max_to_keep=1)
        # The number of the epoch's batches that the last checkpoint knows of; less than zero by
        # those of earlier epochs that it does not.
        self._num_saved = 0
        self._num_seen = 0
        self._num_earlier = 0
        self._num_to_pass = 0
        self._metrics = None
        if self._manager.latest_checkpoint:
            self._restore(self._manager.latest_checkpoint)
            epoch, self._num_saved, self._num_earlier = self._progress.numpy().tolist()
            self._metrics = [(v, v.numpy()) for v in _compat.metric_variables(model)]
            _compat.set_first_epoch(model, epoch)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        self._epoch = epoch
        if self._metrics is None:
            self._num_saved -= self._num_seen
            self._num_earlier += self._num_seen
            self._num_seen = 0
            return
        # Keras has read the first epoch, and has just reset the metrics.
        _compat.set_first_epoch(self.model, None)
        # Those of an epoch that had come to its end are not those of the next.
        for variable, value in self._metrics if self._num_saved else ():
            variable.assign(value)
        self._metrics = None
        is_stream = self.steps_per_epoch is not None
        self._pass_over(self._num_earlier if is_stream else 0, self._num_saved)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self._num_seen = batch + 1
        if isinstance(self.save_freq, int) and self._num_seen - self._num_saved >= self.save_freq:
            self._save(self._epoch, self._num_seen, self._num_earlier)
            self._num_saved = self._num_seen

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        if self._num_to_pass:
            raise ValueError(_ENDED)
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0, self._num_earlier + self._num_seen)

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        _compat.set_first_epoch(self.model, None)
        if self.delete_checkpoint:
            self._delete()

    def _check_fit(self) -> None:
        if isinstance(self.model.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError(
                "Several workers cannot write one backup. Received a model of a"
                " `MultiWorkerMirroredStrategy`."
            )
        steps = (self.params or {}).get("steps")
        if self.steps_per_epoch is not None and steps not in (None, self.steps_per_epoch):
            raise ValueError(
                "`steps_per_epoch` must be what `fit` is given. Received:"
                f" {self.steps_per_epoch}, for a training of {steps} steps an epoch."
            )

    def _save(self, epoch: int, num_batches: int, num_earlier: int) -> None:
        self._progress.assign([epoch, num_batches, num_earlier])
        self._manager.save()

    def _restore(self, path: str) -> None:
        try:
            # A model of Keras 2 makes some of its variables later.
            status = self._checkpoint.restore(path).expect_partial()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"The checkpoint in {self.backup_dir!r} is of another model, or damaged. Remove the"
                f" folder to start again. {error}"
            ) from error

    def _delete(self) -> None:
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

    def _pass_over(self, num_earlier: int, num_in_epoch: int) -> None:
        """Lets the model read batches without training: all of earlier epochs, and of this one."""
        model, train = self.model, self.model.train_function
        stream, self._num_to_pass = None, num_in_epoch

        def read(iterator: Iterator, count: int) -> None:
            try:
                for _ in range(count):
                    next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                raise ValueError(_ENDED) from None

        def read_then_train(iterator: Iterator) -> dict[str, tf.Tensor]:
            nonlocal num_earlier, stream
            stream = iterator if stream is None else stream
            # Another iterator is that of another `fit`, begun after this one was interrupted.
            if iterator is stream:
                read(iterator, num_earlier)
                num_earlier = 0
                if self._num_to_pass > 0:
                    count = min(_compat.steps_per_execution(model), self._num_to_pass)
                    self._num_to_pass -= count
                    read(iterator, count)
                    return model.get_metrics_result()
            model.train_function = train
            return train(iterator)

        if num_earlier or num_in_epoch:
            model.train_function = read_then_train
