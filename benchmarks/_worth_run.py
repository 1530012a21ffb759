"""One training of `worth.py`: its steps, its clock, and what its evaluations show.

A run is given processor time, not steps: that of `num_cache_steps` steps of a cache.
How many steps of a method that makes is measured once, before its first run. Time is that of all
threads of the process while it trains: without evaluations, without the tracing of functions, and
with the filling of caches, which is taken to cost what an evaluation needs for as many candidates.
"""

import gc
import time
from collections.abc import Sequence

import _measure
import numpy as np
import tensorflow as tf
from _worth_data import Data
from _worth_methods import BATCH_SIZE, METHODS, Method, Training, make_training

import negative_cache as nc
from negative_cache._compat import keras

NUM_EVALUATIONS = 16
# Of activations and what else a step needs, beyond what is there before the first step.
MEMORY_LIMIT = {"words": 2**28, "transformer": 2**28}
MEMORY_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_UNTIMED, _CALIBRATED, _CALIBRATED_EPOCHS = 5, 25, 4


class _Clock(keras.callbacks.Callback):
    """Processor and wall seconds of the steps of each epoch, evaluations not included.

    The first steps of all trace the model, and count as much as those that follow them.
    """

    def __init__(self):
        super().__init__()
        self.num_steps, self.processor, self.wall = [], [], []
        self._steps = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.process_time(), time.perf_counter()
        self._epoch_steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self._epoch_steps += 1
        if not self.num_steps and self._epoch_steps == _UNTIMED:
            self._start = time.process_time(), time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.process_time() - self._start[0], time.perf_counter() - self._start[1]
        untimed = 0 if self.num_steps else _UNTIMED
        scale = self._epoch_steps / (self._epoch_steps - untimed)
        self.num_steps.append(self._epoch_steps)
        self.processor.append(scale * seconds[0])
        self.wall.append(scale * seconds[1])


class _Evaluation(keras.callbacks.Callback):
    """Ranks of the validation and of the test queries among all candidates, after each epoch."""

    def __init__(self, data: Data):
        super().__init__()
        self.data = data
        self.history = []
        self.encoding_seconds = []

    def on_train_begin(self, logs=None):
        model = self.model
        self.encoders = [
            nc.evaluation.Encoder(tower) for tower in (model.query_network, model.candidate_network)
        ]

    def on_epoch_end(self, epoch, logs=None):
        encode_queries, encode_candidates = self.encoders
        start = time.process_time()
        candidates = encode_candidates(self.data.candidates())
        self.encoding_seconds.append(time.process_time() - start)
        metrics = {"loss": float(logs["loss"]), **encoded_of(logs)}
        for name, pairs in (("validation", self.data.validation), ("test", self.data.test)):
            queries = encode_queries(self.data.queries(pairs[:, 0]))
            excluded = None
            if self.data.excluded is not None:
                lists = [self.data.excluded[row] for row in pairs[:, 0]]
                excluded = tf.ragged.constant(lists, dtype=tf.int64)
            ranks = nc.evaluation.positive_ranks(
                queries,
                candidates[pairs[:, 1]],
                candidates,
                positive_rows=pairs[:, 1],
                excluded_rows=excluded,
            )
            found = nc.evaluation.retrieval_metrics(ranks)
            metrics.update({f"{name}_{key}": round(value, 5) for key, value in found.items()})
        self.history.append(metrics)


def encoded_of(logs) -> dict:
    """What the sources have encoded, if they encode: {"drawn": so many}."""
    found = [value for key, value in logs.items() if key.endswith("candidates_encoded")]
    return {"counted": float(sum(found))} if found else {}


def train(
    method: Method,
    batch_size: int,
    steps: int,
    data: Data,
    tower: str,
    run: dict,
    *,
    evaluations: int = NUM_EVALUATIONS,
    observers: Sequence[keras.callbacks.Callback] = (),
) -> dict:
    """Trains and evaluates; what is known of the run, lists with an entry an evaluation.

    `observers` are callbacks that see the end of an epoch before it is evaluated.
    """
    training = make_training(
        method, batch_size, data, tower, run["temperature"], run["rate"], run["seed"]
    )
    evaluations = max(min(evaluations, steps // (2 * _UNTIMED)), 1)
    clock, evaluation = _Clock(), _Evaluation(data)
    training.model.fit(
        **_batches(training, batch_size, steps // evaluations, data, run["seed"]),
        epochs=evaluations,
        callbacks=[*training.callbacks, *observers, clock, evaluation],
        shuffle=False,
        verbose=0,
    )
    # The first encoding traces the tower.
    seconds = float(np.median(evaluation.encoding_seconds))
    filling = seconds * training.num_filled / data.num_candidates
    done = np.cumsum(clock.num_steps)
    record = {
        "batch_size": batch_size,
        "steps": done.tolist(),
        "processor_seconds": _rounded(filling + np.cumsum(clock.processor)),
        "wall_seconds": _rounded(filling + np.cumsum(clock.wall)),
        "candidates_encoded": _encoded(training, batch_size, done, evaluation.history, data),
        "ms_per_step": round(1000 * sum(clock.processor) / int(done[-1]), 3),
    }
    for key in evaluation.history[0]:
        if key != "counted":
            record[key] = [metrics[key] for metrics in evaluation.history]
    _forget()
    return record


def calibrate(method: Method, batch_size: int, data: Data, tower: str) -> float:
    """Milliseconds of processor time of a step, the least of some epochs.

    Other programs on the machine can only make it more. Batches that are ordered have an epoch a
    pass, so that the time of a step has its share of the order's.
    """
    training = make_training(method, batch_size, data, tower, 0.1, 1e-3, 0)
    clock = _Clock()
    steps = _UNTIMED + max(_CALIBRATED * BATCH_SIZE // batch_size, 5)
    if training.order is not None:
        steps = len(data.train) // batch_size
    training.model.fit(
        **_batches(training, batch_size, steps, data, 0),
        epochs=_CALIBRATED_EPOCHS,
        callbacks=[*training.callbacks, clock],
        shuffle=False,
        verbose=0,
    )
    _forget()
    # The first epoch's batches are shuffled, if others are ordered.
    return 1000 * min((np.array(clock.processor) / clock.num_steps)[1:])


def _batches(training: Training, batch_size: int, steps: int, data: Data, seed: int) -> dict:
    """What `fit` reads, in epochs of so many steps."""
    if training.order is None:
        return {"x": data.batches(batch_size, seed), "steps_per_epoch": steps}
    batches = nc.GlobalContrastiveBatches(
        training.model,
        data.pairs(),
        batch_size,
        batches_per_epoch=steps,
        drop_remainder=True,
        candidate_id_key="row",
        seed=seed,
        verbose=0,
        **training.order,
    )
    return {"x": batches}


def num_cache_steps(name: str, tower: str) -> int:
    """How many steps the cache has. A step of a factorization is short, and it needs many."""
    if tower == "transformer":
        return 1000
    return 8000 if name == "interactions" else 2000


def num_steps(method: Method, of_cache: int, milliseconds: float, cache_milliseconds: float) -> int:
    """How many steps a run of a method has, for as much time as `of_cache` steps of the cache."""
    if not method.is_timed:
        return of_cache
    steps = of_cache * cache_milliseconds / milliseconds
    return max(int(round(steps / NUM_EVALUATIONS)), 2 * _UNTIMED) * NUM_EVALUATIONS


def peak_of_step(data: Data, tower: str, batch_size: int) -> int:
    """Bytes that in-batch steps need beyond what is there before; to be called in a new process."""
    training = make_training(METHODS["in-batch"], batch_size, data, tower, 0.1, 1e-3, 0)
    batch = next(iter(data.batches(batch_size, 0)))
    # The state of the optimizer is no part of it, nor is the graph.
    small = tf.nest.map_structure(lambda values: values[:2], batch)
    training.model.fit(tf.data.Dataset.from_tensors(small), verbose=0)
    gc.collect()
    before = _measure.resident("VmRSS")
    _measure.reset_peak()
    training.model.fit(tf.data.Dataset.from_tensors(batch).repeat(3), verbose=0)
    return _measure.resident("VmHWM") - before


def _encoded(training: Training, batch_size, done, history, data):
    """Candidates encoded until each evaluation, those that fill a cache or are ordered included."""
    if "counted" not in history[0]:
        encoded = training.encoded_again * batch_size * done
        if training.order is not None:
            # The first pass is shuffled, and each later one is ordered when it begins.
            encoded += len(data.train) * ((done - 1) // (len(data.train) // batch_size))
        return encoded.tolist()
    counted = np.array([metrics["counted"] for metrics in history])
    return counted.astype(int).tolist()


def _rounded(values):
    return [round(float(value), 3) for value in values]


def _forget():
    keras.backend.clear_session()
    gc.collect()
