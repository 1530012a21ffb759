"""Tests of trainings whose temperature is learned: logs, files, replicas, XLA, precision."""

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache import DualEncoder, LearnedTemperature
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, make_queries, make_table
from negative_cache.tests.layers.source_cases import SIZE, SPECS, pairs
from negative_cache.tests.replicas import two_replicas

START = 0.5


@keras.utils.register_keras_serializable("test")
class Units(keras.layers.Layer):
    """A tower that looks unit vectors up, which a `.keras` file describes."""

    def __init__(self, size=SIZE, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.table = keras.layers.Embedding(size, DIM)
        self.table.build([None])

    def call(self, features):
        return tf.math.l2_normalize(self.table(features["id"]), axis=-1)

    def get_config(self):
        return {**super().get_config(), "size": self.size}


def make_model(optimizer=None, *, temperature=None, jit_compile=False, cache_size=6, **kwargs):
    keras.utils.set_random_seed(0)
    tower = Units()
    task = nc.CachedRetrieval(
        tower,
        SPECS,
        cache_size,
        temperature=temperature or LearnedTemperature(START),
        candidate_id_key="id",
        in_batch_negatives=True,
        embedding_dim=DIM,
        seed=1,
        **kwargs,
    )
    model = DualEncoder(Units(), tower, task)
    model.compile(optimizer or keras.optimizers.Adam(0.05), jit_compile=jit_compile)
    return model


def log_temperature(model):
    [weight] = [weight for weight in model.trainable_variables if weight.shape == ()]
    return float(weight)


def test_fit_logs_the_temperature_at_the_end_of_a_step_and_evaluate_does_not():
    model = make_model()
    history = model.fit(pairs(), epochs=3, verbose=0).history
    assert history["temperature"][-1] == pytest.approx(np.exp(log_temperature(model)), rel=1e-6)
    assert history["temperature"][-1] == float(model.task.temperature)
    assert len({START, *history["temperature"]}) == 4
    assert "temperature" not in model.evaluate(pairs(), return_dict=True, verbose=0)


def test_a_task_with_a_name_puts_it_before_the_log():
    tower = Units()
    task = nc.Retrieval(tower, [nc.InBatch()], temperature="learned", name="clicks")
    assert [metric.name for metric in task.training_metrics] == ["clicks_temperature"]
    task = nc.Retrieval(tower, [nc.InBatch()], temperature=0.05, name="clicks")
    assert not task.training_metrics


def test_summaries_have_the_temperature(tmp_path):
    model = make_model()
    model.fit(pairs(), verbose=0, callbacks=[nc.CacheSummaries(str(tmp_path))])
    [path] = tmp_path.iterdir()
    tags = {
        value.tag: tf.make_ndarray(value.tensor)
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    [tag] = [tag for tag in tags if tag.endswith("temperature")]
    assert float(tags[tag]) == float(model.task.temperature)


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders imports under Keras 2 only.")
def test_a_model_of_tf_recommenders_trains_it():
    tfrs = pytest.importorskip("tensorflow_recommenders")

    class Model(tfrs.Model):
        def __init__(self):
            super().__init__()
            self.queries, self.candidates = Units(), Units()
            specs = {"id": INT_ID}
            self.task = nc.CachedRetrieval(
                self.candidates, specs, 6, temperature=LearnedTemperature(START)
            )

        def compute_loss(self, features, training=False):
            candidates = self.candidates(features["candidate"])
            queries = self.queries(features["query"])
            return self.task(queries, candidates, features["candidate"], training=training)

        def test_step(self, data):
            return self.task.evaluation_logs(super().test_step(data))

    model = Model()
    model.compile(keras.optimizers.Adam(0.05))
    history = model.fit(pairs(), epochs=2, verbose=0).history
    assert history["temperature"][-1] == pytest.approx(np.exp(log_temperature(model)), rel=1e-6)
    assert len({START, *history["temperature"]}) == 3
    assert "temperature" not in model.evaluate(pairs(), return_dict=True, verbose=0)


# Files.


def through_keras(model, path):
    model.save(f"{path}.keras")
    return keras.models.load_model(f"{path}.keras")


def test_files_hold_it_and_a_training_goes_on_to_the_bit(tmp_path):
    model = make_model(keras.optimizers.SGD(0.1))
    model.fit(pairs(), epochs=2, verbose=0)
    weights = str(tmp_path / "model.weights.h5")
    model.save_weights(weights)
    checkpoint = tf.train.Checkpoint(model=model).save(str(tmp_path / "model"))
    from_file = through_keras(model, tmp_path / "model")
    saved = log_temperature(model)
    assert saved != np.float32(np.log(START))
    model.fit(pairs(), epochs=2, verbose=0)
    # One model for two kinds of files: it is traced once, and has moved on before each of them.
    other = make_model(keras.optimizers.SGD(0.1), temperature=LearnedTemperature(0.1))
    other.fit(pairs(), verbose=0)
    for loaded, load in (
        (from_file, lambda: None),
        (other, lambda: other.load_weights(weights)),
        (other, lambda: tf.train.Checkpoint(model=other).restore(checkpoint).expect_partial()),
    ):
        load()
        assert log_temperature(loaded) == saved
        loaded.fit(pairs(), epochs=2, verbose=0)
        assert log_temperature(loaded) == log_temperature(model) != saved
        for a, b in zip(model.get_weights(), loaded.get_weights()):
            np.testing.assert_array_equal(a, b)


def test_a_keras_file_has_bounds_and_the_state_of_the_optimizer(tmp_path):
    model = make_model(temperature=LearnedTemperature(0.2, smallest=0.19, largest=0.21))
    model.fit(pairs(), epochs=2, verbose=0)
    loaded = through_keras(model, tmp_path / "model")
    for each in (model, loaded):
        each.fit(pairs(), epochs=3, verbose=0)
    assert float(loaded.task.temperature) == float(model.task.temperature)
    assert 0.19 * (1 - 1e-6) <= float(model.task.temperature) <= 0.21 * (1 + 1e-6)


# Replicas, XLA and precision.


def test_two_replicas_learn_one_temperature_from_both_their_batches():
    strategy = two_replicas()
    table, rate = make_table(SIZE), 0.1
    with strategy.scope():
        temperature = LearnedTemperature(START, smallest=0.4, largest=0.6)
        task = nc.Retrieval(lambda features: None, [nc.InBatch()], temperature=temperature)
        optimizer = keras.optimizers.SGD(rate)
        optimizer.build(task.trainable_variables)
    queries, batches = make_queries(3), [[0, 1, 2], [3, 4, 5]]

    def gradient(ids):
        # By the formula of `test_learned_temperature`: p⁺ - Σ P p of each query.
        scores = queries.astype(np.float64) @ table[ids].T / START
        law = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        return np.mean(np.diag(scores) - np.sum(law * scores, axis=1))

    @tf.function
    def step(ids, sign):
        def of_replica(ids):
            with tf.GradientTape() as tape:
                loss = task(tf.constant(queries), tf.gather(table, ids), {"id": ids})
                loss = sign * loss / 2.0
            weights = task.trainable_variables
            values = [w if isinstance(w, tf.Variable) else w.value for w in weights]
            optimizer.apply_gradients(zip(tape.gradient(loss, values), weights))

        strategy.run(of_replica, (ids,))

    def distributed():
        values = iter(batches)
        return strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(next(values), tf.int64)
        )

    weight = temperature.log_temperature
    weight = weight if isinstance(weight, tf.Variable) else weight.value
    slope = np.mean([gradient(ids) for ids in batches])
    step(distributed(), tf.constant(0.1))
    for part in strategy.experimental_local_results(weight):
        assert float(part) == pytest.approx(np.log(START) - rate * 0.1 * slope, rel=1e-5)
    # To a bound, by the constraint, on both.
    for sign in (1000.0, -1000.0):
        step(distributed(), tf.constant(sign))
        limit = np.log(0.4 if sign * slope > 0.0 else 0.6)
        for part in strategy.experimental_local_results(weight):
            assert float(part) == np.float32(limit)


def test_fit_on_two_replicas_keeps_them_alike():
    strategy = two_replicas()
    with strategy.scope():
        model = make_model()
    dataset = pairs().unbatch().batch(6)
    history = model.fit(dataset, epochs=2, verbose=0).history
    weight = [weight for weight in model.trainable_variables if weight.shape == ()][0]
    weight = weight if isinstance(weight, tf.Variable) else weight.value
    first, second = (float(part) for part in strategy.experimental_local_results(weight))
    assert first == second != np.float32(np.log(START))
    assert history["temperature"][-1] == pytest.approx(np.exp(first), rel=1e-6)


def test_a_compiled_step_learns_what_others_do():
    values = []
    for jit_compile in (False, True):
        model = make_model(keras.optimizers.SGD(0.1), jit_compile=jit_compile, cache_size=0)
        model.fit(pairs(), epochs=2, verbose=0)
        values.append(float(model.task.temperature))
    assert values[0] == pytest.approx(values[1], rel=1e-5) != START


def test_a_compiled_step_with_a_cache_logs_it():
    model = make_model(jit_compile=True)
    history = model.fit(pairs(), epochs=2, verbose=0).history
    assert history["temperature"][-1] == float(model.task.temperature) != START


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_under_mixed_precision_it_is_learned_in_float32(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = make_model(keras.optimizers.Adam(1e-5))
        # Of the first steps, the scaled gradients may not be finite.
        model.fit(pairs(), epochs=6, verbose=0)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    weight = [weight for weight in model.trainable_variables if weight.shape == ()][0]
    assert tf.as_dtype(weight.dtype) == tf.float32
    assert model.task.temperature.dtype == tf.float32
    # 24 steps of 1e-5, which half precision does not tell apart: log 0.5 = -0.693, and numbers
    # there are 4.9e-4 apart.
    moved = abs(log_temperature(model) - np.log(START))
    assert 1e-5 < moved < 2.4e-4
