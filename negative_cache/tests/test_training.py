"""Tests of `fit` in its variants: they train the same model, to rounding, or say why not."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder
from negative_cache._compat import IS_KERAS_2, keras

NUM_PAIRS, BATCH = 22, 4
INT_SPEC = tf.io.FixedLenFeature([], tf.int64)


def pairs(sample_weight=False):
    """5 batches of 4 pairs and one of 2, whose sizes are unknown."""
    ids = tf.range(NUM_PAIRS, dtype=tf.int64)
    data = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(BATCH)
    if sample_weight:
        data = data.map(lambda x: (x, x["query"], tf.cast(x["query"] % 3, tf.float32)))
    assert tf.nest.flatten(data.element_spec)[0].shape == [None]
    return data


def make_model(policy="float32", optimizer=None, **compile_kwargs):
    keras.utils.set_random_seed(2)
    towers = [keras.Sequential([keras.layers.Embedding(NUM_PAIRS, 8, dtype=policy)]) for _ in "qc"]
    task = CachedRetrieval(
        towers[1], INT_SPEC, 16, temperature=0.5, in_batch_negatives=True, num_negatives=2, seed=3
    )
    model = DualEncoder(*towers, task)
    model.compile(optimizer or keras.optimizers.SGD(0.1), **compile_kwargs)
    return model


def fit(data=None, **kwargs):
    model = make_model(**kwargs)
    history = model.fit(pairs() if data is None else data, epochs=2, verbose=0)
    return model, history.history


@functools.cache
def fit_once(**kwargs):
    """`fit` on the pairs: what several tests compare with, and leave as it is."""
    return fit(**kwargs)


def moved_queries(model):
    """[NUM_PAIRS] bool, which rows of the query tower's table a training has changed."""
    initial = make_model()
    initial(next(iter(pairs())))
    tables = [either.query_network.get_weights()[0] for either in (model, initial)]
    return np.any(tables[0] != tables[1], axis=1)


def assert_same_training(left, right, rtol):
    for a, b in zip(left[0].get_weights(), right[0].get_weights()):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(left[1]["loss"], right[1]["loss"], rtol=rtol)
    np.testing.assert_array_equal(left[0].task.cache.age, right[0].task.cache.age)


@pytest.mark.parametrize(
    "kwargs",
    [{"run_eagerly": True}, {"steps_per_execution": 3}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_variants_of_fit_train_the_same_model(kwargs):
    # A batch at a time, as a graph.
    expected = fit_once(jit_compile=False)
    assert_same_training(fit(**kwargs), expected, rtol=1e-4)
    assert expected[1]["fill"] == [1.0, 1.0]
    assert expected[1]["loss"][1] != expected[1]["loss"][0]


def test_xla_trains_about_the_same_model():
    # XLA has random numbers of its own: the draws are others of the same law.
    model, history = fit(jit_compile=True)
    np.testing.assert_allclose(history["loss"], fit_once(jit_compile=False)[1]["loss"], rtol=1e-3)
    assert int(model.task.cache.num_filled) == 16


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_towers_train_about_the_same_model(policy):
    model, history = fit(policy=policy)
    assert model(next(iter(pairs())))["candidate"].dtype == policy.removeprefix("mixed_")
    assert model.task.cache.embeddings.dtype == tf.float32
    np.testing.assert_allclose(history["loss"], fit_once()[1]["loss"], rtol=2e-2)


def test_weights_of_zero_take_pairs_out_of_the_loss():
    weighted, _ = fit(pairs(sample_weight=True))
    # Queries 0, 3, 6, … have weight 0, and nothing else moves a query's row.
    np.testing.assert_array_equal(moved_queries(weighted), np.arange(NUM_PAIRS) % 3 > 0)


@pytest.mark.skipif(IS_KERAS_2, reason="an argument of Keras 3's optimizers")
def test_accumulated_gradients_are_applied_once():
    data = pairs().take(4)
    model, _ = fit(data, optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    np.testing.assert_array_equal(moved_queries(model), np.arange(NUM_PAIRS) < 4 * BATCH)
    assert int(model.optimizer.iterations) == 2


def test_xla_is_not_used_where_strings_are_cached():
    tower = keras.Sequential([keras.layers.Hashing(8), keras.layers.Embedding(8, 4)])
    task = CachedRetrieval(tower, tf.io.FixedLenFeature([], tf.string), 16)
    model = DualEncoder(tower, tower, task)
    if IS_KERAS_2:
        titles = tf.constant(["a", "b"])
        data = tf.data.Dataset.from_tensors({"query": titles, "candidate": titles})
        model.compile("adam", jit_compile=True)
        with pytest.raises(ValueError, match="XLA cannot compile the layer .*: it has strings"):
            model.fit(data, verbose=0)
    else:
        with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
            model.compile("adam", jit_compile=True)


def test_regularizers_of_the_towers_are_part_of_the_loss():
    def train(strength):
        regularizer = keras.regularizers.L2(strength)
        layers = [
            keras.layers.Embedding(NUM_PAIRS, 8, embeddings_regularizer=regularizer) for _ in "qc"
        ]
        task = CachedRetrieval(layers[1], INT_SPEC, 16, in_batch_negatives=True, seed=3)
        keras.utils.set_random_seed(2)
        model = DualEncoder(*layers, task)
        model.compile(keras.optimizers.SGD(0.0))
        history = model.fit(pairs(), verbose=0).history
        return history["loss"][0], sum(np.square(layer.get_weights()[0]).sum() for layer in layers)

    without, _ = train(0.0)
    loss, squares = train(0.5)
    np.testing.assert_allclose(loss, without + 0.5 * squares, rtol=1e-4)


class AddLoss(keras.layers.Layer):
    """A user's layer, which adds the task's loss to those of the model."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def call(self, inputs, training=None):
        queries, candidates, features = inputs
        self.add_loss(self.task(queries, candidates, features, training=training))
        return queries


class TrainStep(keras.Model):
    """A user's model, which calls the task in a train step of its own."""

    def __init__(self, query_tower, candidate_tower, task):
        super().__init__()
        self.query_tower, self.candidate_tower, self.task = query_tower, candidate_tower, task

    def call(self, ids):
        return self.query_tower(ids)

    def train_step(self, ids):
        with tf.GradientTape() as tape:
            loss = self.task(self.query_tower(ids), self.candidate_tower(ids), ids, training=True)
        variables = self.query_tower.trainable_variables + self.candidate_tower.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"loss": loss}


def towers_and_task():
    model = make_model()
    return model.query_network, model.candidate_network, model.task


def ids_only():
    return tf.data.Dataset.range(NUM_PAIRS).batch(BATCH)


def expected_tables():
    model, _ = fit_once()
    return [tower.get_weights()[0] for tower in (model.query_network, model.candidate_network)]


def test_a_functional_model_trains_by_add_loss():
    query_tower, candidate_tower, task = towers_and_task()
    ids = keras.Input([], dtype="int64")
    outputs = AddLoss(task)((query_tower(ids), candidate_tower(ids), ids))
    model = keras.Model(ids, outputs)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(ids_only().map(lambda ids: (ids,)), epochs=2, verbose=0)
    for tower, expected in zip((query_tower, candidate_tower), expected_tables()):
        np.testing.assert_allclose(tower.get_weights()[0], expected, rtol=1e-4, atol=1e-5)


def test_a_subclassed_model_trains_in_its_own_step():
    query_tower, candidate_tower, task = towers_and_task()
    model = TrainStep(query_tower, candidate_tower, task)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(ids_only(), epochs=2, verbose=0)
    for tower, expected in zip((query_tower, candidate_tower), expected_tables()):
        np.testing.assert_allclose(tower.get_weights()[0], expected, rtol=1e-4, atol=1e-5)
