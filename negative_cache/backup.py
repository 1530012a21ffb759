"""`BackupAndRestore`: a killed training continues at the next batch, with bit-identical results.

Keras keeps control of the data and the training loop. The callback saves and restores the complete
state, and skips the batches that the model was already trained on.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache import _compat, _validation, util
from negative_cache._compat import keras
from negative_cache.layers._state import StateLayer, on_the_same_replicas
from negative_cache.layers._variables import local_replicas

_DATA_ENDED_EARLY = (
    "The data ended before the batch at which the training was interrupted. They are not the data"
    " of the interrupted training."
)

_INDEX = re.compile(r"ckpt-(\d+)\.index")
# Of the files of a backup that is being written.
_UNFINISHED = "unfinished"
# The two that a worker keeps, and one that it was killed before it could remove.
_MOST_BACKUPS = 3


class BackupAndRestore(keras.callbacks.Callback):
    """Continues an interrupted `fit` with the bits it would have had without the interruption.

    It replaces `keras.callbacks.BackupAndRestore`, which restarts the interrupted epoch with
    weights from the middle of it. This callback writes a TensorFlow checkpoint every `save_freq`
    batches. It holds the weights, the optimizer, metrics, random states, caches, the state of their
    sampling, and the position in the data. When `fit` is called again with the same arguments, it
    loads the last checkpoint and starts in its epoch. It reads the batches that were trained on
    before, but does not train on them again.

    A checkpoint is written completely or not at all, so the process may be killed at any moment.

    Under a `MultiWorkerMirroredStrategy`, which the `fit` of Keras 2 supports, every worker holds
    caches of its own, and so writes a backup of its own: the chief into `backup_dir`, worker 1 into
    the folder `{backup_dir}_worker_1` beside it, and so on. Each keeps the last two backups. If any
    worker is killed, the others fail. Start all of them again with the same command: they go on
    from the newest backup that every worker has. The folders may be on a shared disk or on disks of
    the workers, which must still be there.

    The data must come again in the same order:

    * Give `fit` a `tf.data.Dataset`, because it shuffles arrays.
    * Without `steps_per_epoch`, every epoch reads the dataset again, and a resumed `fit` begins
      with the interrupted epoch. The order must not depend on earlier epochs: use no `shuffle`, or
      one with a `seed` and `reshuffle_each_iteration=False`.
    * With `steps_per_epoch`, all epochs read one stream, such as `dataset.shuffle(…, seed=1)
      .repeat().batch(…)`, which may reshuffle. A resumed `fit` reads the stream from its start.

    A backup of another number of replicas is refused.

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
        `steps_per_epoch` differs from that of `fit`, or the backups of several workers do not
        belong together. During training, if the data end too early.

    Examples:
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
        self._workers = _Workers(model.distribute_strategy)
        number, count = self._workers.number, self._workers.count
        self._layers = [each for each in model._flatten_layers() if isinstance(each, StateLayer)]
        checkpoint = tf.train.Checkpoint(
            model=model,
            optimizer=model.optimizer,
            variables=_compat.all_variables(model),
            # States are saved even if the user chose to leave them out of files.
            states=[layer.checkpointable_state for layer in self._layers],
            # A backup of another number of workers does not fit.
            **{"progress" if count == 1 else f"progress_{number}_of_{count}": self._progress},
        )
        beside = f"{self.backup_dir.rstrip('/')}_worker_{number}"
        self._backups = _Backups(checkpoint, beside if number else self.backup_dir)
        # The number of batches of this epoch at the last checkpoint. If the last checkpoint is of
        # an earlier epoch, it is minus the number of batches from there to this epoch.
        self._num_saved = 0
        self._num_seen = 0
        self._num_earlier = 0
        self._num_to_skip = 0
        self._restored_metrics = None
        newest = self._newest_of_all()
        if newest is not None:
            self._restore(newest)
            epoch, self._num_saved, self._num_earlier = self._progress.numpy().tolist()
            self._restored_metrics = [(v, v.numpy()) for v in _compat.metric_variables(model)]
            _compat.set_first_epoch(model, epoch)
        # The others are of a course of the training that did not go on.
        self._backups.keep([] if newest is None else [newest])

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
            # If a worker is killed in between, what is left is no contradiction.
            self._workers.wait()
            self._backups.keep(self._backups.numbers()[-1:])
            self._workers.wait()
            self._backups.remove()

    def _check_fit(self) -> None:
        steps = (self.params or {}).get("steps")
        if self.steps_per_epoch is not None and steps not in (None, self.steps_per_epoch):
            raise ValueError(
                "`steps_per_epoch` must be the argument that `fit` is given. Received:"
                f" {self.steps_per_epoch}, for a training of {steps} steps per epoch."
            )

    def _save(self, epoch: int, num_batches: int, num_earlier: int) -> None:
        # The last backup must be there on all workers before one of them removes another.
        self._workers.wait()
        self._progress.assign([epoch, num_batches, num_earlier])
        self._backups.write(num_earlier + num_batches)
        self._backups.keep(self._backups.numbers()[-self._workers.num_kept :])

    def _newest_of_all(self) -> int | None:
        """Returns the number of the newest backup that every worker has, or None to start anew."""
        own = self._backups.numbers()[-_MOST_BACKUPS:]
        gathered = self._workers.gather(own + [-1] * (_MOST_BACKUPS - len(own)))
        of_workers = [set(row) - {-1} for row in gathered.tolist()]
        common = set.intersection(*of_workers)
        if common:
            return max(common)
        # A worker may be killed before it writes its first backup, or before it removes its last.
        if max(map(len, of_workers)) <= 1 and set() in of_workers:
            return None
        raise ValueError(
            f"The backups of the workers in {self.backup_dir!r} and beside it do not belong"
            " together. Bring back what is missing, or remove all of these folders to start from"
            " the beginning. Received backups after so many batches, by worker:"
            f" {[sorted(numbers) for numbers in of_workers]}."
        )

    def _restore(self, number: int) -> None:
        try:
            with on_the_same_replicas(self._layers):
                self._backups.read(number)
        except (AssertionError, ValueError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"The checkpoint in {self._backups.folder!r} is of another model or another number"
                " of workers, or damaged. Remove the folder to start from the beginning."
                f" {error}"
            ) from error

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


class _Workers:
    """The processes that run the same `fit`, each with replicas of its own.

    Args:
      strategy: the strategy of the model.

    Attributes:
      count: how many there are.
      number: which of them this process is, from 0.
      num_kept: how many backups each of them keeps.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        local = local_replicas(strategy)
        self._num_local = len(local)
        self.count = strategy.num_replicas_in_sync // self._num_local
        self.number = local.start // self._num_local
        # One worker may have written a backup that another has not.
        self.num_kept = min(2, self.count)
        self._gather_on_replicas = tf.function(
            lambda values: strategy.run(lambda: util.cross_replica_concat(values, axis=0))
        )

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """Waits for all workers, and returns the `values` [n] of each, [count, n] int64."""
        own = tf.constant([values], tf.int64)
        if self.count == 1:
            return own.numpy()
        of_replicas = self._strategy.experimental_local_results(self._gather_on_replicas(own))[0]
        return of_replicas.numpy()[:: self._num_local]

    def wait(self) -> None:
        """Waits until all workers have come to this place."""
        self.gather([0])


class _Backups:
    """The backups of one worker, by their numbers: of the batches that were read before.

    A backup is there if its index is. The index is the last of its files to get its name, and the
    first to be removed.

    Args:
      checkpoint: writes and reads the state.
      folder: where the files are.
    """

    def __init__(self, checkpoint: tf.train.Checkpoint, folder: str):
        self.folder = folder
        self._checkpoint = checkpoint

    def numbers(self) -> list[int]:
        """The numbers of the backups, from the oldest to the newest."""
        found = [_INDEX.fullmatch(name) for name in self._names()]
        return sorted(int(match[1]) for match in found if match)

    def write(self, number: int) -> None:
        """Writes a backup."""
        files = tf.io.gfile
        self._checkpoint.write(os.path.join(self.folder, _UNFINISHED))
        # In alphabetical order the index comes after the data.
        for name in sorted(self._names(_UNFINISHED + ".")):
            new = name.replace(_UNFINISHED, _prefix(number), 1)
            files.rename(
                os.path.join(self.folder, name), os.path.join(self.folder, new), overwrite=True
            )

    def read(self, number: int) -> None:
        """Restores the state from a backup."""
        status = self._checkpoint.read(os.path.join(self.folder, _prefix(number)))
        # A Keras 2 model creates some of its variables later.
        status.expect_partial().assert_existing_objects_matched()

    def keep(self, numbers: Sequence[int]) -> None:
        """Removes all backups but those."""
        for number in self.numbers():
            if number not in numbers:
                for name in sorted(self._names(_prefix(number) + "."), reverse=True):
                    tf.io.gfile.remove(os.path.join(self.folder, name))

    def remove(self) -> None:
        """Removes all backups, and the folder if there is nothing else in it."""
        files = tf.io.gfile
        self.keep([])
        for name in self._names(_UNFINISHED):
            path = os.path.join(self.folder, name)
            files.rmtree(path) if files.isdir(path) else files.remove(path)
        if files.isdir(self.folder) and not files.listdir(self.folder):
            files.rmtree(self.folder)

    def _names(self, start: str = "") -> list[str]:
        """The names of the files in the folder that begin with `start`."""
        files = tf.io.gfile
        names = files.listdir(self.folder) if files.isdir(self.folder) else []
        return [name for name in names if name.startswith(start)]


def _prefix(number: int) -> str:
    return f"ckpt-{number}"
