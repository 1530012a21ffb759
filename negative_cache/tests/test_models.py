"""Tests of `DualEncoder` through what a user of Keras calls: fit, evaluate, predict and export."""

import os

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import (
    CachedRetrieval,
    CacheRefresh,
    CacheWarmStart,
    Corrector,
    DualEncoder,
    NystromCorrector,
    TreeIndex,
    evaluation,
)
from negative_cache._compat import keras
from negative_cache.tests.replicas import two_replicas

NUM_CANDIDATES, DIM = 20, 4
INT_ID = tf.io.FixedLenFeature([], tf.int64)


class Tower(keras.layers.Layer):
    """Looks up row `features["id"]` of a table of embeddings; ids may be strings of digits."""

    def __init__(self, seed, scale=1.0):
        super().__init__()
        values = scale * np.random.default_rng(seed).normal(size=[NUM_CANDIDATES, DIM])
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features):
        ids = features["id"]
        if ids.dtype == tf.string:
            ids = tf.strings.to_number(ids, tf.int64)
        return tf.gather(tf.convert_to_tensor(self.table), ids)

    def values(self):
        return tf.convert_to_tensor(self.table).numpy()


def make_model(cache_size=8, learning_rate=0.1, spec=INT_ID, run_eagerly=True, **kwargs):
    # Eager unless the graph matters, because tracing `fit` takes seconds.
    tower = Tower(1)
    task = CachedRetrieval(tower, {"id": spec}, cache_size, **{"seed": 1, **kwargs})
    model = DualEncoder(Tower(0), tower, task)
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), run_eagerly=run_eagerly)
    return model


def batch(ids, **more):
    ids = tf.constant(ids)
    return {"query": {"id": ids}, "candidate": {"id": ids}, **more}


def pairs(batch_size=4, convert=tf.identity):
    ids = {"id": convert(tf.range(NUM_CANDIDATES, dtype=tf.int64))}
    return tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(batch_size)


def in_batch_loss(queries, candidates, ids):
    """The loss [B] of every query, by hand, when only the batch's candidates are negatives."""
    scores = queries[ids].astype(np.float64) @ candidates[ids].T.astype(np.float64)
    return np.logaddexp.reduce(scores, axis=1) - np.diag(scores)


@pytest.mark.parametrize("as_string", [False, True])
def test_fit_learns_and_evaluate_and_predict_leave_the_cache_alone(as_string):
    convert = tf.strings.as_string if as_string else tf.identity
    spec = tf.io.FixedLenFeature([], tf.string) if as_string else INT_ID
    model = make_model(spec=spec, learning_rate=2.0, run_eagerly=False, in_batch_negatives=True)
    history = model.fit(pairs(convert=convert), epochs=4, verbose=0).history
    names = {"staleness", "log_partition", "fill", "skipped_rows", "candidates_encoded"}
    assert set(history) == {"loss", *names}
    assert history["loss"][-1] < history["loss"][0]
    assert history["fill"] == [1.0] * 4
    cached = model.task.cache.embeddings.numpy(), model.task.cache.age.numpy()
    results = model.evaluate(pairs(convert=convert), verbose=0, return_dict=True)
    assert set(results) == {"loss"}
    embeddings = model.predict(pairs(convert=convert), verbose=0)
    np.testing.assert_allclose(embeddings["query"], model.query_network.values(), rtol=1e-6)
    np.testing.assert_allclose(embeddings["candidate"], model.candidate_network.values(), rtol=1e-6)
    np.testing.assert_array_equal(model.task.cache.embeddings.numpy(), cached[0])
    np.testing.assert_array_equal(model.task.cache.age, cached[1])


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_logged_loss_is_that_of_the_task(reduction, weighted):
    model = make_model(
        cache_size=0, learning_rate=0.0, in_batch_negatives=True, reduction=reduction
    )
    weight = np.linspace(0.0, 2.0, NUM_CANDIDATES).astype(np.float32)
    data = pairs(8)
    if weighted:
        weights = tf.data.Dataset.from_tensor_slices(weight).batch(8)
        data = tf.data.Dataset.zip((data, weights)).map(lambda x, w: (x, 0.0, w))
    else:
        weight[:] = 1.0
    logged = model.fit(data, epochs=1, verbose=0).history["loss"][0]
    evaluated = model.evaluate(data, verbose=0, return_dict=True)["loss"]
    towers = model.query_network.values(), model.candidate_network.values()
    sizes, losses = [], []
    for ids in (np.arange(0, 8), np.arange(8, 16), np.arange(16, 20)):
        each = weight[ids] * in_batch_loss(*towers, ids)
        losses.append(each.sum() if reduction == "sum" else each.mean())
        sizes.append(len(ids))
    # Keras weighs a batch's loss by its size.
    expected = np.average(losses, weights=sizes)
    assert logged == pytest.approx(expected, rel=1e-5)
    assert evaluated == pytest.approx(expected, rel=1e-5)


def test_a_step_of_training_descends_the_gradient_of_the_loss():
    model = make_model(cache_size=0, learning_rate=0.5, in_batch_negatives=True, reduction="sum")
    queries, candidates = model.query_network.values(), model.candidate_network.values()
    ids = np.array([3, 5, 7])
    model.fit(tf.data.Dataset.from_tensors(batch(ids)), epochs=1, verbose=0)
    scores = queries[ids] @ candidates[ids].T
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    gradient = (probabilities - np.eye(3)) @ candidates[ids]
    expected = queries.copy()
    expected[ids] -= 0.5 * gradient
    np.testing.assert_allclose(model.query_network.values(), expected, rtol=1e-4, atol=1e-6)


def test_explicit_negatives_and_sampling_probabilities_of_the_batch():
    model = make_model(cache_size=0, learning_rate=0.0, in_batch_negatives=True)
    ids, negatives = np.array([3, 5]), np.array([[7, 8, 9], [1, 2, 0]])
    probability = np.float32([0.5, 0.01])
    data = batch(
        ids,
        negative={"id": tf.constant(negatives)},
        candidate_sampling_probability=tf.constant(probability),
    )
    queries, candidates = model.query_network.values(), model.candidate_network.values()
    expected = []
    for i in range(2):
        # Two draws from the stream are in the batch; explicit negatives are not drawn from it.
        in_batch = queries[ids[i]] @ candidates[ids].T - np.log(2 * probability)
        explicit = queries[ids[i]] @ candidates[negatives[i]].T
        expected.append(np.logaddexp.reduce([*in_batch, *explicit]) - in_batch[i])
    logged = model.fit(tf.data.Dataset.from_tensors(data), epochs=1, verbose=0).history["loss"][0]
    assert logged == pytest.approx(np.mean(expected), rel=1e-5)
    embeddings = model(data)
    assert embeddings["negative"].shape == [2, 3, DIM]
    np.testing.assert_array_equal(embeddings["negative"], candidates[negatives])


def test_towers_may_be_functions_without_a_training_argument():
    tower = Tower(1)
    task = CachedRetrieval(tower, {"id": INT_ID}, 8)
    model = DualEncoder(lambda features: tower(features), tower, task)
    model.compile(optimizer="sgd", run_eagerly=True)
    model.fit(pairs().take(1), verbose=0)


@pytest.mark.parametrize("pool", [None, "replicas"])
def test_two_replicas_see_the_gradient_of_the_joint_batch(pool):
    # Explicit negatives only, so that the loss of a query does not depend on its batch; or a pool.
    rng = np.random.default_rng(5)
    data = batch(
        np.arange(8), negative={"id": tf.constant(rng.integers(0, NUM_CANDIDATES, [8, 3]))}
    )
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8)
    options = {"cache_size": 0, "in_batch_negatives": pool is not None, "pool": pool}
    for reduction in ("sum", "sum_over_batch_size"):
        results = []
        for strategy in (
            tf.distribute.get_strategy(),
            two_replicas(),
        ):
            with strategy.scope():
                model = make_model(run_eagerly=False, reduction=reduction, **options)
            logged = model.fit(dataset, epochs=1, verbose=0).history["loss"][0]
            results.append((model.query_network.values(), model.candidate_network.values(), logged))
        (queries, candidates, loss), (queries_2, candidates_2, loss_2) = results
        np.testing.assert_allclose(queries_2, queries, rtol=1e-5)
        np.testing.assert_allclose(candidates_2, candidates, rtol=1e-5)
        assert np.abs(queries - Tower(0).values()).max() > 1e-3
        assert loss_2 == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("as_string", "pool"), [(False, None), (True, None), (True, "replicas")])
def test_two_replicas_train_with_caches_of_their_own(as_string, pool):
    convert = tf.strings.as_string if as_string else tf.identity
    spec = tf.io.FixedLenFeature([], tf.string) if as_string else INT_ID
    strategy = two_replicas()
    with strategy.scope():
        model = make_model(spec=spec, cache_size=4, run_eagerly=False, pool=pool)
    ids = {"id": convert(tf.range(8, dtype=tf.int64))}
    data = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(8)
    fill = CacheWarmStart(data.map(lambda pair: pair["candidate"]), verbose=0)
    callbacks = [] if pool is None else [fill, CacheRefresh(every_steps=1, verbose=0)]
    history = model.fit(data, epochs=2, verbose=0, callbacks=callbacks).history
    assert np.all(np.isfinite(history["loss"])) and history["fill"] == [1.0, 1.0]
    first, second = [
        {int(value) for value in rows.numpy()}
        for rows in strategy.experimental_local_results(model.task.cache.data["id"])
    ]
    assert len(first) == len(second) == 4
    assert first | second == set(range(8))
    assert np.isfinite(model.evaluate(data, verbose=0))


def test_a_last_batch_that_leaves_replicas_short_or_empty_is_a_batch():
    with two_replicas().scope():
        model = make_model(cache_size=8, run_eagerly=False, in_batch_negatives=True)
    # One model, which is traced once for all of them.
    for remainder in range(1, 8):
        ids = {"id": tf.range(8 + remainder, dtype=tf.int64) % NUM_CANDIDATES}
        data = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(8)
        history = model.fit(data, epochs=2, verbose=0).history
        values = [value for values in history.values() for value in values]
        assert np.all(np.isfinite(values)), (remainder, history)
        assert history["loss"][0] > 0.0
        for tower in (model.query_network, model.candidate_network):
            assert np.all(np.isfinite(tower.values())), remainder
        assert np.isfinite(model.evaluate(data, verbose=0)), remainder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_batch_negatives": True, "num_hard_negatives": 2, "remove_accidental_hits": True},
        {"frequency_correction": True, "use_lru": False},
        {"corrector": lambda: Corrector(hidden_units=4, drift_loss="both")},
        {"corrector": lambda: NystromCorrector(2)},
        {"index": lambda: TreeIndex(8, DIM)},
        {"refresh_fraction": 0.25, "probe_size": 2, "probe_every": 1},
    ],
)
def test_an_empty_batch_teaches_nothing_and_enters_nothing(options):
    options = {key: value() if callable(value) else value for key, value in options.items()}
    model = make_model(cache_size=8, candidate_id_key="id", **options)
    model.fit(pairs(), epochs=1, verbose=0)
    cache = model.task.cache
    before = [cache.embeddings.numpy(), model.candidate_network.values()]
    empty = batch(np.zeros([0], np.int64))
    with tf.GradientTape() as tape:
        loss = model.compute_loss(empty, None, model(empty, training=True))
    assert float(loss) == 0.0
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(np.all(np.isfinite(tf.convert_to_tensor(g))) for g in gradients if g is not None)
    np.testing.assert_array_equal(before[1], model.candidate_network.values())
    if "refresh_fraction" not in options:
        np.testing.assert_array_equal(before[0], cache.embeddings)


def test_tasks_that_have_names_have_logs_of_their_own():
    class TwoTasks(keras.Model):
        def __init__(self):
            super().__init__()
            self.tower = Tower(1)
            self.tasks = [
                CachedRetrieval(self.tower, {"id": INT_ID}, size, name=name, seed=1)
                for name, size in (("clicks", 8), ("orders", 100))
            ]
            self.first, self.second = self.tasks

        def call(self, inputs):
            return self.tower(inputs)

        def train_step(self, data):
            embeddings = self.tower(data)
            for task in self.tasks:
                task(embeddings, embeddings, data)
            return {metric.name: metric.result() for metric in self.metrics}

    model = TwoTasks()
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    ids = {"id": tf.range(8, dtype=tf.int64)}
    history = model.fit(tf.data.Dataset.from_tensors(ids), epochs=1, verbose=0).history
    assert history["clicks_fill"] == [1.0] and history["orders_fill"] == pytest.approx([0.08])
    # A name that Keras gives tells nothing.
    again = CachedRetrieval(Tower(1), {"id": INT_ID}, 8, name="cached_retrieval_7")
    assert again.training_metrics[0].name == "staleness"


def folder_size(path):
    return sum(
        os.path.getsize(os.path.join(folder, file))
        for folder, _, files in os.walk(path)
        for file in files
    )


def test_export_embeds_like_the_towers_and_holds_no_cache(tmp_path):
    sizes = []
    for cache_size in (8, 100_000):
        model = make_model(cache_size=cache_size)
        model.fit(pairs(), verbose=0)
        model.export(tmp_path / str(cache_size))
        sizes.append(folder_size(tmp_path / str(cache_size)))
    # 100,000 rows of 4 floats are 1.6 MB.
    assert abs(sizes[1] - sizes[0]) < 10_000
    served = tf.saved_model.load(str(tmp_path / "100000"))
    for batch_size in (1, 3):
        ids = {"id": tf.range(batch_size, dtype=tf.int64)}
        np.testing.assert_allclose(served.embed_query(ids), model.query_network(ids))
        np.testing.assert_allclose(served.embed_candidate(ids), model.candidate_network(ids))


@pytest.mark.parametrize("form", ["dictionary", "one input", "two inputs"])
def test_a_functional_tower_gets_its_inputs_and_no_other_feature(form, tmp_path):
    # "a" comes before the inputs in the order of names.
    specs = {
        key: tf.io.FixedLenFeature([], dtype)
        for key, dtype in (("a", tf.int64), ("x", tf.int64), ("y", tf.int64))
    }
    x, y = (keras.Input([], dtype="int64", name=name) for name in ("x", "y"))
    inputs = {"dictionary": {"x": x, "y": y}, "one input": x, "two inputs": [y, x]}[form]
    table = keras.layers.Embedding(100, DIM)
    outputs = table(x) if form == "one input" else table(x) + 2.0 * table(y)
    tower = keras.Model(inputs, outputs)
    task = CachedRetrieval(tower, specs, 8, in_batch_negatives=True, candidate_id_key="a", seed=1)
    model = DualEncoder(keras.layers.Embedding(100, DIM), tower, task)
    model.compile(keras.optimizers.SGD(0.0))
    ids = np.arange(8)
    features = {"a": 90 - ids, "x": ids, "y": 10 + ids}
    data = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": features}).batch(4)
    model.fit(data, epochs=1, verbose=0)
    rows = tf.convert_to_tensor(table.embeddings).numpy()
    expected = rows[:8] if form == "one input" else rows[:8] + 2.0 * rows[10:18]
    np.testing.assert_allclose(model.predict(data, verbose=0)["candidate"], expected, rtol=1e-6)
    order = np.argsort(task.cache.data["x"].numpy())
    np.testing.assert_allclose(task.cache.embeddings.numpy()[order], expected, rtol=1e-6)
    encoder = evaluation.Encoder(tower)
    tensors = {key: tf.constant(values) for key, values in features.items()}
    np.testing.assert_allclose(encoder.embed(tensors), expected, rtol=1e-6)
    model.export(tmp_path / "model")
    served = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(served.embed_candidate(tensors), expected, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(data, verbose=0)["candidate"], expected, rtol=1e-6)


@keras.utils.register_keras_serializable("test_models")
class Bag(keras.layers.Layer):
    """The mean of the embeddings of a list of ids, ragged or sparse."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        values = np.random.default_rng(0).normal(size=[NUM_CANDIDATES, DIM])
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, inputs):
        ids = inputs["ids"]
        if isinstance(ids, tf.SparseTensor):
            ids = tf.RaggedTensor.from_sparse(ids)
        rows = tf.gather(tf.convert_to_tensor(self.table), ids.flat_values)
        return tf.reduce_mean(ids.with_flat_values(rows), axis=1)


@pytest.mark.parametrize("form", ["ragged", "sparse"])
def test_queries_of_lists_are_exported_and_saved(form, tmp_path):
    tower = keras.layers.Embedding(NUM_CANDIDATES, DIM)
    model = DualEncoder(Bag(), tower, CachedRetrieval(tower, INT_ID, 8, seed=1))
    model.compile(keras.optimizers.SGD(0.1))
    lists = tf.ragged.constant([[1], [2, 3], [4, 5, 6], [7]], tf.int64)
    lists = lists if form == "ragged" else lists.to_sparse()
    data = {"query": {"ids": lists}, "candidate": tf.range(4, dtype=tf.int64)}
    model.fit(tf.data.Dataset.from_tensor_slices(data).batch(2), epochs=1, verbose=0)
    expected = model(data)["query"].numpy()
    model.export(tmp_path / "model")
    served = tf.saved_model.load(str(tmp_path / "model"))
    np.testing.assert_allclose(served.embed_query({"ids": lists}), expected, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again(data)["query"], expected, rtol=1e-6)
    assert int(again.task.cache.num_filled) == 4


def test_exported_signatures_take_the_features_by_their_names(tmp_path):
    class Sum(keras.layers.Layer):
        def call(self, features):
            return tf.stack([features["a"], tf.cast(features["b"], tf.float32)], axis=1)

    specs = {"a": tf.io.FixedLenFeature([], tf.float32), "b": tf.io.FixedLenFeature([], tf.int64)}
    tower = Sum()
    task = CachedRetrieval(tower, specs, 4)
    single = keras.layers.Dense(2, kernel_initializer="ones")
    model = DualEncoder(single, tower, task)
    features = {"a": tf.constant([1.5, 2.5]), "b": tf.constant([3, 4], tf.int64)}
    model({"query": tf.ones([2, 3]), "candidate": features})
    model.export(tmp_path / "model")
    signatures = tf.saved_model.load(str(tmp_path / "model")).signatures
    (embedded,) = signatures["embed_candidate"](**features).values()
    np.testing.assert_allclose(embedded, [[1.5, 3.0], [2.5, 4.0]])
    inputs = signatures["embed_candidate"].structured_input_signature[1]
    assert {name: spec.dtype for name, spec in inputs.items()} == {"a": tf.float32, "b": tf.int64}
    (embedded,) = signatures["embed_query"](features=tf.ones([1, 3])).values()
    np.testing.assert_allclose(embedded, [[3.0, 3.0]])


def test_export_needs_a_model_that_has_seen_a_batch(tmp_path):
    with pytest.raises(ValueError, match="must have seen a batch before `export`"):
        make_model().export(tmp_path / "model")


@pytest.mark.parametrize(
    "data, received",
    [
        ({"query": tf.zeros([2])}, r"\['query'\]"),
        ({"user": tf.zeros([2]), "candidate": tf.zeros([2])}, r"\['candidate', 'user'\]"),
        (tf.zeros([2, 3]), "Tensor"),
    ],
)
def test_a_batch_must_have_queries_and_candidates(data, received):
    message = f'dictionary with "query" and "candidate". Received: .*{received}'
    with pytest.raises(ValueError, match=message):
        make_model()(data)


def test_a_tower_must_return_embeddings():
    tower = Tower(1)
    task = CachedRetrieval(tower, {"id": INT_ID}, 8)
    model = DualEncoder(lambda features: tf.zeros([2, 3, 4]), tower, task)
    with pytest.raises(ValueError, match=r"shape \[n, dim\]. Received from .*\(2, 3, 4\)"):
        model(batch([0, 1]))


def test_the_loss_of_the_task_must_be_a_scalar():
    with pytest.raises(ValueError, match="scalar loss. Received a task with `reduction='none'`"):
        make_model(reduction="none")


def test_global_seed_makes_two_fits_identical():
    weights = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        model = make_model(seed=None)
        model.fit(pairs().shuffle(5), epochs=2, verbose=0)
        weights.append(model.candidate_network.values())
    np.testing.assert_array_equal(*weights)
