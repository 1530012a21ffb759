"""Tests under `tf.debugging.enable_check_numerics()`, which raises for numbers that are none."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.tests.kerases import under_both
from negative_cache.tests.training_steps import (
    BATCH,
    NUM_ROWS,
    TASKS,
    TASKS_WITH_BRANCHES,
    batch_of,
    model_of,
    published_step,
)

ALL = {**TASKS, **TASKS_WITH_BRANCHES}
HEALTHY = [
    "in-batch",
    "frequency",
    "corrector, cross-entropy",
    "Nyström",
    "index, corrector",
    "corpus, refreshed and corrected",
    "corpus, coded index",
    "probed",
]


@pytest.fixture
def checked():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


def random_batch(rng):
    return batch_of(rng.choice(NUM_ROWS, BATCH, replace=False))


@pytest.mark.parametrize("name", under_both(["in-batch", "probed"], HEALTHY))
def test_a_healthy_model_trains(name, checked):
    # From a cache without a row on.
    model = model_of(ALL[name]())
    train, test = tf.function(model.train_step), tf.function(model.test_step)
    rng = np.random.default_rng(0)
    test((random_batch(rng),))
    for _ in range(3):
        train((random_batch(rng),))
    test((random_batch(rng),))
    if not model.task.cache.host_keys and model.task.cache.row_key is None:
        assert int(model.task.cache.num_filled) > BATCH


def test_the_published_handler_trains(checked):
    step = tf.function(published_step())
    rng = np.random.default_rng(0)
    for _ in range(3):
        step(random_batch(rng)["candidate"])


def test_an_embedding_that_is_not_finite_raises(checked):
    model = model_of(TASKS["default"]())
    step = tf.function(model.train_step)
    rng = np.random.default_rng(0)
    step((random_batch(rng),))
    kernel = model.candidate_network.dense.kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
        step((random_batch(rng),))
