"""A worker of a `fit` with backups, which may be killed.

`python -m negative_cache.tests.multi_worker_fit worker event count folders…` is a worker. For each
folder in turn it trains a model with backups there. It prints weights, logs and its rows as JSON,
in a list. The worker with the number `worker` kills itself when an event happens for the `count`-th
time: the end of a "batch", or a "rename" of a file. Each backup makes two of those, of its data and
then of its index.
"""

import json
import os
import signal
import sys
from unittest import mock

import numpy as np
import tensorflow as tf

from negative_cache import BackupAndRestore
from negative_cache._compat import keras
from negative_cache.tests.multi_worker_cases import WORDS, make_model

EPOCHS, STEPS, SAVE_FREQ = 3, 6, 2


class Countdown(keras.callbacks.Callback):
    """Kills this process when `event` happens for the `count`-th time."""

    def __init__(self, event, count):
        super().__init__()
        self.event = event
        self.remaining = count

    def happens(self, event):
        if event == self.event:
            self.remaining -= 1
            if self.remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, batch, logs=None):
        self.happens("batch")


def batches(words):
    """Batches of which each worker takes its own."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data = words.map(lambda word: {"query": word, "candidate": {"title": word}}).batch(4)
    return data.with_options(options)


def fit(strategy, folder, countdown):
    """Trains a model, and returns all that it then consists of."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = make_model()
    words = tf.data.Dataset.from_tensor_slices(WORDS)
    data = batches(words.shuffle(24, seed=3).repeat())
    history = model.fit(
        data,
        epochs=EPOCHS,
        steps_per_epoch=STEPS,
        verbose=0,
        callbacks=[BackupAndRestore(folder, SAVE_FREQ, steps_per_epoch=STEPS), countdown],
    )
    optimizer = [variable for variable in model.optimizer.variables if variable.dtype == tf.float32]
    cache = model.task.cache
    # The order of `data` depends on how far ahead `fit` has read.
    evaluated = model.evaluate(batches(words), steps=2, verbose=0, return_dict=True)
    return {
        "evaluated": [evaluated["loss"], float(model._loss_tracker.result())],
        "mirrored": [np.asarray(value).tolist() for value in (*model.get_weights(), *optimizer)],
        "logs": {name: values[-1] for name, values in history.history.items()},
        "titles": [title.decode() for title in cache.data["title"].numpy().tolist()],
        "own": [
            np.asarray(value).tolist()
            for value in (cache.embeddings.numpy(), cache.age, model.task.cached._state.sampling)
        ],
    }


if __name__ == "__main__":
    worker, event, count, *folders = sys.argv[1:]
    number = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    countdown = Countdown(event, int(count) if int(worker) == number else 0)
    rename = tf.io.gfile.rename

    def rename_or_die(*args, **kwargs):
        countdown.happens("rename")
        rename(*args, **kwargs)

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with mock.patch.object(tf.io.gfile, "rename", rename_or_die):
        print(json.dumps([fit(strategy, folder, countdown) for folder in folders]))
