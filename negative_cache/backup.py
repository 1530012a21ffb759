"""`BackupAndRestore`: training that was killed goes on at the next batch, to the bit.

The data and the training loop stay Keras's: what is added is that nothing of the state is lost and
that batches which were already trained on are passed over.
"""

import pathlib
import shutil

import tensorflow as tf

from negative_cache import _compat, _validation
from negative_cache._compat import keras


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

    * Without `steps_per_epoch`, every epoch reads the dataset anew, and a resumed `fit` begins with
      the interrupted epoch. Its order must not depend on the epochs before: no `shuffle`, or one
      with a `seed` and `reshuffle_each_iteration=False`.
    * With `steps_per_epoch`, all epochs read one stream, such as `dataset.shuffle(…, seed=1)
      .repeat().batch(…)`, which may reshuffle. A resumed `fit` reads it from its start.

    As with the callback of Keras, a model of Keras 3 must be built before `fit`, by a call on a
    batch for instance. Other callbacks see the batches that are passed over, and keep no state of
    their own: an `EarlyStopping` starts to count anew. So do the running means of losses and
    metrics that a model is compiled with, as opposed to those of its layers. Dropout of Keras 2
    goes on with the same random numbers only after
    `keras.backend.experimental.enable_tf_random_generator()`.

    Args:
      backup_dir: folder of this training alone. It is deleted when `fit` has come to its end.
      save_freq: "epoch", or a number of batches.
      steps_per_epoch: what `fit` is given under this name, if it is given.
      delete_checkpoint: whether to delete the folder when `fit` has come to its end.

    Raises:
      ValueError: where `save_freq` or `steps_per_epoch` is out of range, or when training begins,
        where the model is not built or the folder holds a checkpoint of another one.

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
        self.backup_dir = pathlib.Path(backup_dir)
        self.save_freq = save_freq
        self.steps_per_epoch = steps_per_epoch
        self.delete_checkpoint = delete_checkpoint
        self._epoch = 0

    def on_train_begin(self, logs=None):
        model = self.model
        _compat.prepare_to_restore(model)
        # The epoch that is under way, and the number of its batches that were trained on.
        self._progress = tf.Variable([0, 0], dtype=tf.int64, trainable=False)
        self._checkpoint = tf.train.Checkpoint(
            model=model,
            optimizer=model.optimizer,
            variables=_compat.all_variables(model),
            progress=self._progress,
        )
        self._manager = tf.train.CheckpointManager(
            self._checkpoint, str(self.backup_dir), max_to_keep=1
        )
        # The number of the epoch's batches that the last checkpoint knows of; less than zero by
        # those of earlier epochs that it does not.
        self._num_saved = 0
        self._num_seen = 0
        self._to_restore = self._manager.latest_checkpoint
        if self._to_restore:
            self._restore()
            _compat.set_first_epoch(model, int(self._progress[0]))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._num_saved -= self._num_seen
        self._num_seen = 0
        if self._to_restore:
            # Keras has just reset the metrics.
            self._restore()
            self._to_restore = None
            self._num_saved = int(self._progress[1])
            self._pass_over(epoch * (self.steps_per_epoch or 0), self._num_saved)

    def on_train_batch_end(self, batch, logs=None):
        self._num_seen = batch + 1
        if self.save_freq != "epoch" and self._num_seen - self._num_saved >= self.save_freq:
            self._save(self._epoch, self._num_seen)
            self._num_saved = self._num_seen

    def on_epoch_end(self, epoch, logs=None):
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0)

    def on_train_end(self, logs=None):
        _compat.set_first_epoch(self.model, None)
        if self.delete_checkpoint:
            shutil.rmtree(self.backup_dir, ignore_errors=True)

    def _save(self, epoch, num_batches):
        self._progress.assign([epoch, num_batches])
        self._manager.save()

    def _restore(self):
        try:
            # A model of Keras 2 makes some of its variables later.
            status = self._checkpoint.restore(self._to_restore).expect_partial()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"The checkpoint in {str(self.backup_dir)!r} is of another model. Remove the folder"
                f" to start anew. {error}"
            ) from error

    def _pass_over(self, num_earlier, num_in_epoch):
        """Lets the model read batches without training: all of earlier epochs, and of this one."""
        model = self.model
        train, steps = model.train_function, _compat.steps_per_execution(model)

        def read(iterator, count):
            for _ in range(count):
                next(iterator)

        def read_then_train(iterator):
            nonlocal num_earlier, num_in_epoch
            read(iterator, num_earlier)
            num_earlier = 0
            if num_in_epoch > 0:
                num_in_epoch -= steps
                read(iterator, steps)
                return model.get_metrics_result()
            model.train_function = train
            return train(iterator)

        model.train_function = read_then_train
