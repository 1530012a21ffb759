"""What a run can be made of: arguments of a call, what comes before a step, and options."""

import tempfile

import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.tests.retrieval_runs.inputs import DIM, NUM_CANDIDATES, NUM_QUERIES, as_ids

# Arguments of a call: functions of a random generator, the batch's ids and the kind of features.


def sample_weight(rng, ids, kind):
    return {"sample_weight": tf.constant(rng.uniform(0.5, 1.5, NUM_QUERIES), tf.float32)}


def probabilities(rng, ids, kind):
    values = tf.constant(rng.uniform(0.01, 0.2, len(ids)), tf.float32)
    return {"candidate_sampling_probability": values}


def score_mask(rng, ids, kind):
    return {"score_mask": tf.constant(rng.random([NUM_QUERIES, len(ids)]) < 0.7)}


def explicit(rng, ids, kind):
    values = tf.constant(rng.normal(size=[NUM_QUERIES, 3, DIM]), tf.float32)
    return {"negative_embeddings": values}


def explicit_with_mask(rng, ids, kind):
    """Short ones, in half precision."""
    values = tf.constant(rng.normal(size=[NUM_QUERIES, 2, DIM]), tf.float16)
    mask = tf.constant(rng.random([NUM_QUERIES, 2]) < 0.7)
    return {"negative_embeddings": values, "negative_mask": mask}


def explicit_with_ids(rng, ids, kind):
    negative_ids = rng.integers(0, NUM_CANDIDATES, [NUM_QUERIES, 3])
    negative_ids[0, 0] = ids[0]
    mask = rng.random([NUM_QUERIES, 3]) < 0.7
    return {
        **explicit(rng, ids, kind),
        "negative_ids": as_ids(kind, negative_ids),
        "negative_mask": tf.constant(mask),
    }


def known_padded(rng, ids, kind):
    known = rng.integers(-2, NUM_CANDIDATES, [NUM_QUERIES, 5])
    known[1, 0] = ids[2]
    return {"known_positive_ids": as_ids(kind, np.maximum(known, -1))}


def known_ragged(rng, ids, kind):
    lengths = rng.integers(0, 5, NUM_QUERIES)
    known = as_ids(kind, rng.integers(0, NUM_CANDIDATES, lengths.sum()))
    return {"known_positive_ids": tf.RaggedTensor.from_row_lengths(known, lengths)}


def default_training(rng, ids, kind):
    return {"training": None}


def no_metrics(rng, ids, kind):
    return {"compute_metrics": False}


def no_batch_metrics(rng, ids, kind):
    return {"compute_batch_metrics": False}


# What is done with a task before each of its steps.


def warm_start(training, step):
    if step == 0 and training.run.corpus is None:
        training.task.add_to_cache(training.features([3, 5, 7, 9, 11]))


def drift(training, step):
    """Moves all embeddings alike, which is what a corrector can learn."""
    warm_start(training, step)
    turn = np.random.default_rng(6).normal(size=[DIM, DIM])
    table = tf.convert_to_tensor(training.current_tower.table)
    training.current_tower.table.assign(
        table + 0.1 * table @ tf.constant(turn - turn.T, tf.float32) + 0.05
    )


def warm_start_with_probabilities(training, step):
    if step == 0:
        probability = tf.constant([0.1, 0.05, 0.2, 0.3], tf.float32)
        training.task.add_to_cache(training.features([3, 5, 7, 9]), probability)


def add_a_broken_one(training, step):
    if step in (1, 3):
        training.task.add_to_cache(training.features([2, NUM_CANDIDATES - 1, 6]))


def refresh(training, step):
    if step in (2, 4):
        training.task.refresh_cache(batch_size=4, verbose=0)


def fill_again(training, step):
    if step == 3:
        ids = np.arange(NUM_CANDIDATES)
        batches = [training.features(ids[start : start + 7]) for start in range(0, len(ids), 7)]
        training.task.fill_cache(batches, verbose=0)


def restore(training, step):
    """Goes on with a new task that a checkpoint is read into."""
    if step != 3:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(task=training.task).write(f"{folder}/checkpoint")
        training.make_task()
        tf.train.Checkpoint(task=training.task).read(path).expect_partial()


def from_own_configuration(training, step):
    if step == 0:
        training.task = nc.CachedRetrieval.from_config(training.task.get_config())


# Options of a task.


def make_index(**options):
    """A tree of several levels, small as it is."""
    options = {"leaf_size": 4, "branching": 4, "beam": 2, **options}
    return nc.TreeIndex(options.pop("capacity", NUM_CANDIDATES), DIM, **options)


def make_metrics():
    return {
        "metrics": [
            keras.metrics.MeanSquaredError(name="squared"),
            keras.metrics.CosineSimilarity(),
        ],
        "batch_metrics": [keras.metrics.TopKCategoricalAccuracy(k=2, name="top_2")],
        "loss_metrics": [keras.metrics.Mean(name="mean_loss")],
    }


IN_BATCH = {"in_batch_negatives": True}
BY_ID = {"candidate_id_key": "id", "remove_accidental_hits": True}
