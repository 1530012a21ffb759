"""Tests of `BackupAndRestore`: trainings that were interrupted end as those that were not."""

import json
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import BackupAndRestore, CachedRetrieval, DualEncoder, backup
from negative_cache._compat import IS_KERAS_2, keras

EPOCHS, STEPS = 3, 6


class Tower(keras.layers.Layer):
    def __init__(self, dim=4, dropout=True):
        super().__init__()
        self.table = keras.layers.Embedding(24, dim)
        # The random numbers of Dropout in Keras 2 are no variables, unless one asks for it.
        self.dropout = keras.layers.Dropout(0.3 if dropout and not IS_KERAS_2 else 0.0)

    def call(self, ids, training=None):
        return self.dropout(self.table(ids), training=training)


class Interrupt(keras.callbacks.Callback):
    """Stops the process, or the training, after so many batches were trained on or passed over."""

    def __init__(self, after, stop):
        super().__init__()
        self.remaining = after
        self.stop = stop

    def on_train_batch_end(self, batch, logs=None):
        self.remaining -= 1
        if self.remaining == 0:
            self.stop()


class Interrupted(Exception):
    pass


def interrupt():
    raise Interrupted


def make_model(dim=4, dropout=True, save_cache=True, **kwargs):
    query_tower, candidate_tower = Tower(dim, dropout), Tower(dim, dropout)
    spec = tf.io.FixedLenFeature([], tf.int64)
    task = CachedRetrieval(
        candidate_tower, spec, 16, in_batch_negatives=True, save_cache=save_cache
    )
    model = DualEncoder(query_tower, candidate_tower, task)
    # A new process would trace for seconds what runs in milliseconds.
    kwargs = kwargs if "steps_per_execution" in kwargs else {"run_eagerly": True}
    model.compile("adam", **kwargs)
    ids = tf.constant([0, 1], tf.int64)
    model({"query": ids, "candidate": ids})
    return model


def make_data(as_stream):
    ids = tf.range(24, dtype=tf.int64)
    data = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids})
    if as_stream:
        return data.shuffle(24, seed=3).repeat().batch(4)
    return data.shuffle(24, seed=3, reshuffle_each_iteration=False).batch(4)


def fit(
    folder,
    *,
    as_stream,
    save_freq=2,
    callbacks=(),
    before=(),
    kind=BackupAndRestore,
    initial_epoch=0,
    **kwargs,
):
    """Trains a new model, or goes on from `folder`: its state and the last logs, as JSON."""
    keras.utils.set_random_seed(1)
    model = make_model(**kwargs)
    steps = {"steps_per_epoch": STEPS} if as_stream else {}
    callback = kind(str(folder), save_freq, **(steps if kind is BackupAndRestore else {}))
    history = model.fit(
        make_data(as_stream),
        epochs=EPOCHS,
        verbose=0,
        callbacks=[*before, callback, *callbacks],
        initial_epoch=initial_epoch,
        **steps,
    )
    task = model.task
    optimizer = model.optimizer.variables
    variables = [*model.get_weights(), *(optimizer() if callable(optimizer) else optimizer)]
    state = [*variables, *task.cache.data.values(), task.cache.age, task.cached._state.sampling]
    logs = {name: values[-1] for name, values in history.history.items()}
    state = [np.asarray(tf.convert_to_tensor(values)).tolist() for values in state]
    # As text, in which a NaN is equal to itself.
    return json.dumps([state, logs], default=float)


# An epoch's 6 batches are no multiple of 4: Keras 2 makes the last execution shorter, Keras 3 reads
# on in the stream.
@pytest.mark.parametrize("as_stream, steps_per_execution", [(True, 1), (False, 2), (True, 4)])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    as_stream, steps_per_execution, tmp_path
):
    kwargs = {"as_stream": as_stream, "steps_per_execution": steps_per_execution}
    expected = fit(tmp_path / "whole", **kwargs)
    # In the first epoch, and right at the end of it.
    for after in (4, 8 if steps_per_execution == 4 else 6):
        with pytest.raises(Interrupted):
            fit(
                tmp_path / "parts",
                callbacks=[Interrupt(after // steps_per_execution, interrupt)],
                **kwargs,
            )
    assert fit(tmp_path / "parts", **kwargs) == expected
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("kind", [BackupAndRestore, keras.callbacks.BackupAndRestore])
@pytest.mark.parametrize("num_epochs", [1, 2])
def test_an_epoch_is_where_a_backup_of_epochs_goes_on(num_epochs, kind, tmp_path):
    # Keras keeps neither the place in a stream nor, in version 3, the random states of layers.
    kwargs = {"save_freq": "epoch", "kind": kind}
    kwargs |= {"as_stream": kind is BackupAndRestore, "dropout": kind is BackupAndRestore}
    expected = fit(tmp_path / "whole", **kwargs)
    with pytest.raises(Interrupted):
        callbacks = [Interrupt(num_epochs * STEPS + 2, interrupt)]
        fit(tmp_path / "parts", callbacks=callbacks, **kwargs)
    epochs = []
    record = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    resumed = fit(tmp_path / "parts", callbacks=[record], **kwargs)
    assert epochs == [1, 2][num_epochs - 1 :]
    assert resumed == expected


@pytest.mark.end_to_end
def test_a_killed_process_goes_on(tmp_path):
    expected = fit(tmp_path / "whole", as_stream=True)
    command = [sys.executable, __file__, str(tmp_path / "parts"), str(STEPS + 3)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # This process knows nothing of the other one but its files.
    resumed_at = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: resumed_at.append(epoch)
    )
    assert fit(tmp_path / "parts", as_stream=True, callbacks=[record]) == expected
    assert resumed_at == [1, 2]


def test_a_stream_is_counted_from_the_first_epoch_of_fit(tmp_path):
    kwargs = {"as_stream": True, "initial_epoch": 1}
    expected = fit(tmp_path / "whole", **kwargs)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[Interrupt(STEPS + 3, interrupt)], **kwargs)
    assert fit(tmp_path / "parts", **kwargs) == expected


def test_a_cache_that_files_leave_out_is_backed_up(tmp_path):
    kwargs = {"as_stream": True, "save_cache": False}
    expected = fit(tmp_path / "whole", **kwargs)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[Interrupt(STEPS + 3, interrupt)], **kwargs)
    assert fit(tmp_path / "parts", **kwargs) == expected


def test_a_schedule_of_learning_rates_goes_on(tmp_path):
    def schedule():
        return keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch))

    expected = fit(tmp_path / "whole", as_stream=True, before=[schedule()])
    with pytest.raises(Interrupted):
        fit(
            tmp_path / "parts",
            as_stream=True,
            before=[schedule()],
            callbacks=[Interrupt(STEPS + 3, interrupt)],
        )
    assert fit(tmp_path / "parts", as_stream=True, before=[schedule()]) == expected


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    fit(tmp_path, as_stream=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_data_that_end_too_early_are_refused_and_the_backup_is_kept(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, as_stream=False, callbacks=[Interrupt(5, interrupt)])
    callback = BackupAndRestore(str(tmp_path), 2)
    with pytest.raises(ValueError, match="The data ended before the batch"):
        make_model().fit(make_data(False).take(2), epochs=3, verbose=0, callbacks=[callback])
    assert list(tmp_path.iterdir())


def test_a_training_that_was_interrupted_again_leaves_no_trace_in_the_model(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, as_stream=False, callbacks=[Interrupt(STEPS + 4, interrupt)])
    model = make_model()
    with pytest.raises(Interrupted):
        model.fit(
            make_data(False),
            epochs=EPOCHS,
            verbose=0,
            callbacks=[BackupAndRestore(str(tmp_path), 2), Interrupt(1, interrupt)],
        )
    before = int(model.optimizer.iterations)
    history = model.fit(make_data(False), epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    assert int(model.optimizer.iterations) == before + 2 * STEPS


def test_a_second_training_starts_anew(tmp_path):
    model = make_model()
    for _ in range(2):
        history = model.fit(
            make_data(False),
            epochs=2,
            verbose=0,
            callbacks=[BackupAndRestore(str(tmp_path / "backup"), 5)],
        )
        assert len(history.history["loss"]) == 2


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"save_freq": 0}, "`save_freq` must be an integer >= 1. Received: 0"),
        ({"save_freq": "batch"}, "`save_freq` must be an integer >= 1. Received: 'batch'"),
        ({"steps_per_epoch": 2.5}, "`steps_per_epoch` must be an integer >= 1. Received: 2.5"),
    ],
)
def test_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BackupAndRestore("backup", **kwargs)


@pytest.mark.skipif(IS_KERAS_2, reason="TensorFlow restores what Keras 2 builds later")
def test_a_model_that_is_not_built_is_refused(tmp_path):
    tower = Tower()
    task = CachedRetrieval(tower, tf.io.FixedLenFeature([], tf.int64), 16)
    model = DualEncoder(Tower(), tower, task)
    model.compile("adam")
    with pytest.raises(ValueError, match="must be built before `fit`"):
        model.fit(make_data(False), verbose=0, callbacks=[BackupAndRestore(str(tmp_path))])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, as_stream=False, callbacks=[Interrupt(4, interrupt)])
    with pytest.raises(
        ValueError, match="is of another model or another number of workers, or damaged."
    ):
        fit(tmp_path, as_stream=False, dim=5)


def test_a_backup_that_was_not_finished_is_none(tmp_path):
    variable = tf.Variable(1)
    backups = backup._Backups(tf.train.Checkpoint(variable=variable), str(tmp_path / "backup"))
    backups.write(3)
    variable.assign(2)
    rename = tf.io.gfile.rename

    def rename_data(source, *args, **kwargs):
        if source.endswith(".index"):
            raise Interrupted
        rename(source, *args, **kwargs)

    with mock.patch.object(tf.io.gfile, "rename", rename_data), pytest.raises(Interrupted):
        backups.write(10)
    assert backups.numbers() == [3]
    backups.read(3)
    assert variable.numpy() == 1
    backups.write(10)
    assert backups.numbers() == [3, 10]
    backups.keep([10])
    assert backups.numbers() == [10]
    backups.remove()
    assert not (tmp_path / "backup").exists()


class TwoWorkers(backup._Workers):
    """Of two workers the first, of which the other does the same."""

    def __init__(self, strategy):
        super().__init__(strategy)
        self.count = 2

    def gather(self, values):
        return np.array([values, values])


def test_a_backup_of_another_number_of_workers_is_refused(tmp_path):
    with mock.patch.object(backup, "_Workers", TwoWorkers), pytest.raises(Interrupted):
        fit(tmp_path, as_stream=False, callbacks=[Interrupt(4, interrupt)])
    with pytest.raises(ValueError, match="is of another model or another number of workers"):
        fit(tmp_path, as_stream=False)


class Damage(keras.callbacks.Callback):
    """Makes every backup one that no training could have written."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.task.cache.num_filled.assign(-1)


@pytest.mark.parametrize("kind", [BackupAndRestore, keras.callbacks.BackupAndRestore])
def test_a_damaged_backup_is_refused(kind, tmp_path):
    kwargs = {"as_stream": False, "kind": kind}
    with pytest.raises(Interrupted):
        fit(tmp_path, before=[Damage()], callbacks=[Interrupt(4, interrupt)], **kwargs)
    with pytest.raises(ValueError, match="(?s)file is damaged: the number of filled rows"):
        fit(tmp_path, **kwargs)


if __name__ == "__main__":
    kill = Interrupt(int(sys.argv[2]), lambda: signal.raise_signal(signal.SIGKILL))
    fit(sys.argv[1], as_stream=True, callbacks=[kill])
