"""Tests of files: every format, with and without the cache, and files that do not fit."""

import os

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.handlers import MultiCacheLossHandler
from negative_cache.layers import Cache
from negative_cache.losses import CacheClassificationLoss
from negative_cache.negative_cache import CacheManager
from negative_cache.tests.replicas import two_replicas

SPECS = {
    "title": tf.io.FixedLenFeature([], tf.string),
    "tags": tf.io.FixedLenFeature([2], tf.string),
    "year": tf.io.FixedLenFeature([], tf.float32),
}
TITLES = np.array([f"title {i}" for i in range(24)])


@keras.utils.register_keras_serializable("negative_cache_tests")
class Tower(keras.layers.Layer):
    """Hashed titles, and nothing else of the features."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hash = keras.layers.Hashing(16)
        self.table = keras.layers.Embedding(16, 4)

    def call(self, features):
        return self.table(self.hash(features["title"]))


@keras.utils.register_keras_serializable("negative_cache_tests")
def double(scores):
    return 2.0 * scores


def batches():
    features = {
        "title": TITLES,
        "tags": np.stack([TITLES, TITLES[::-1]], axis=1),
        "year": np.arange(24, dtype=np.float32),
    }
    return tf.data.Dataset.from_tensor_slices({"query": features, "candidate": features}).batch(8)


def make_model(specs=SPECS, cache_size=16, **kwargs):
    query_tower, candidate_tower = Tower(), Tower()
    kwargs = {
        "embedding_dtype": tf.bfloat16,
        "frequency_correction": True,
        "use_lru": False,
        **kwargs,
    }
    task = CachedRetrieval(
        candidate_tower,
        specs,
        cache_size,
        candidate_id_key="title",
        score_transform=double,
        **kwargs,
    )
    model = DualEncoder(query_tower, candidate_tower, task)
    # Three steps take less time than to trace one.
    model.compile("adam", run_eagerly=True)
    return model


def trained(**kwargs):
    model = make_model(**kwargs)
    model.fit(batches(), verbose=0)
    return model


def built(**kwargs):
    """A model that has seen a batch but never trained, and has another seed than a trained one."""
    model = make_model(**kwargs)
    model(next(iter(batches())))
    model.optimizer.build(model.trainable_variables)
    return model


def weights_of(model):
    return {f"weight {i}": weight.numpy() for i, weight in enumerate(model.trainable_variables)}


def state_of(model):
    task = model.task
    state = {name: np.asarray(tf.io.serialize_tensor(v)) for name, v in task.cache.data.items()}
    return {
        **state,
        "age": task.cache.age.numpy(),
        "filled": task.cache.filled.numpy(),
        "sampling": task.cached._state.sampling.numpy(),
        "gaps": task._frequency._state.gap.numpy(),
        **weights_of(model),
    }


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def save_keras(model, folder):
    model.save(folder / "model.keras")
    return lambda fresh: keras.models.load_model(folder / "model.keras")


def save_weights_h5(model, folder):
    model.save_weights(folder / "model.weights.h5")
    return lambda fresh: load_weights(fresh, folder / "model.weights.h5")


def save_by_callback(model, folder):
    path = folder / "by_callback.weights.h5"
    callback = keras.callbacks.ModelCheckpoint(str(path), save_weights_only=True)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0, {})
    return lambda fresh: load_weights(fresh, path)


def save_tf_weights(model, folder):
    model.save_weights(folder / "model", save_format="tf")
    return lambda fresh: load_weights(fresh, folder / "model")


def save_checkpoint(model, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "model"))

    def load(fresh):
        tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).read(path)
        return with_cache(fresh)

    return load


def load_weights(model, path):
    model.load_weights(path)
    return with_cache(model)


def with_cache(model):
    """Makes the cache, which exists once the embedding dimension is known."""
    batch = next(iter(batches()))
    embeddings = model(batch)
    features = {key: batch["candidate"][key] for key in model.task.feature_specs}
    model.task(embeddings["query"], embeddings["candidate"], features, training=False)
    return model


FORMATS = [save_keras, save_weights_h5, save_by_callback, save_checkpoint]
FORMATS += [save_tf_weights] if IS_KERAS_2 else []


@pytest.mark.parametrize("save", FORMATS)
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(save, tmp_path):
    model = trained()
    load = save(model, tmp_path)
    loaded = load(built())
    assert_same_state(state_of(loaded), state_of(model))
    # The sampling, the optimizer and the ages decide what comes next.
    for either in (model, loaded):
        either.fit(batches(), verbose=0)
    assert_same_state(state_of(loaded), state_of(model))


def test_a_keras_file_holds_the_settings(tmp_path):
    settings = {"temperature": 0.5, "num_negatives": 3, "in_batch_negatives": True, "seed": 7}
    model = trained(**settings, loss_metrics=[keras.metrics.Mean(name="mean_loss")])
    loaded = save_keras(model, tmp_path)(None)
    task = loaded.task
    assert task.candidate_network is loaded.candidate_network
    assert loaded.query_network is not loaded.candidate_network
    assert {name: getattr(task, name) for name in settings} == settings
    assert task.feature_specs == SPECS
    assert task.score_transform is double
    assert task.embedding_dtype == tf.bfloat16
    assert [metric.name for metric in task._loss_metrics] == ["mean_loss"]


def test_a_single_tensor_task_has_a_configuration():
    task = CachedRetrieval(keras.layers.Embedding(8, 4), tf.io.FixedLenFeature([], tf.int64), 4)
    again = CachedRetrieval.from_config(task.get_config())
    again.add_to_cache(tf.constant([3, 4], tf.int64))
    assert int(again.cache.num_filled) == 2


@pytest.mark.parametrize("save", FORMATS)
def test_the_cache_is_left_out_of_files_on_demand(save, tmp_path):
    model = trained(save_cache=False, embedding_dtype=tf.float32)
    model.task.cache.data["year"].assign(np.full(16, 1.25))
    loaded = save(model, tmp_path)(built(save_cache=False, embedding_dtype=tf.float32))
    if loaded.task.cache is not None:
        assert int(loaded.task.cache.num_filled) == 0
    assert_same_state(
        weights_of(loaded),
        weights_of(model),
    )
    needle = np.full(16, 1.25, np.float32).tobytes()
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert needle not in file.read(), name


@pytest.mark.parametrize("save", [save_weights_h5, save_checkpoint])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cache_size": 8}, '"cache_size": 16.* Wanted: .*"cache_size": 8'),
        ({"embedding_dtype": tf.float32}, '"embedding": .*"bfloat16".* Wanted: .*"float32"'),
        (
            {"specs": {key: SPECS[key] for key in ("title", "year")}},
            '"tags": .*"string".* Wanted: (?!.*tags)',
        ),
    ],
)
def test_a_file_with_another_cache_is_refused(save, changes, message, tmp_path):
    load = save(trained(), tmp_path)
    other = with_cache(built(**changes))
    with pytest.raises(ValueError, match=f"(?s)does not fit the layer 'cache'. .*{message}"):
        load(other)


def test_a_file_without_a_cache_is_refused_where_one_is_wanted(tmp_path):
    load = save_weights_h5(trained(save_cache=False), tmp_path)
    with pytest.raises(ValueError, match="(?s)holds no state of the layer 'cache'"):
        load(trained())


def test_saved_model_holds_the_cache(tmp_path):
    model = trained()
    tf.saved_model.save(model, str(tmp_path))
    variables = str(tmp_path / "variables" / "variables")
    found = {
        name: tf.train.load_variable(variables, name)
        for name, _ in tf.train.list_variables(variables)
        if "/data/title/" in name
    }
    assert found, tf.train.list_variables(variables)
    for titles in found.values():
        np.testing.assert_array_equal(titles, model.task.cache.data["title"].numpy())


def test_every_cache_of_a_handler_is_saved(tmp_path):
    specs = {
        "id": tf.io.FixedLenFeature([], tf.int64),
        "embedding": tf.io.FixedLenFeature([4], tf.float32),
    }

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            loss = CacheClassificationLoss("embedding", ["id"])
            managers = {"a": CacheManager(specs, 4), "b": CacheManager(specs, 6)}
            self.handler = MultiCacheLossHandler(managers, loss, "embedding", ["id"])
            self.table = keras.layers.Embedding(8, 4)
            self.table.build([None])

        def call(self, features):
            return self.table(features["id"])

    model, fresh = Model(), Model()
    ids = {"id": tf.constant([3, 5], tf.int64)}
    for either in (model, fresh):
        either(ids)
    embeddings = model(ids)
    model.handler.update_cache_and_compute_loss(model, embeddings, embeddings, ids, "b")
    model.save_weights(tmp_path / "model.weights.h5")
    fresh.load_weights(tmp_path / "model.weights.h5")
    for source in ("a", "b"):
        np.testing.assert_array_equal(
            fresh.handler.cache[source].data["id"], model.handler.cache[source].data["id"]
        )
        np.testing.assert_array_equal(
            fresh.handler.cache[source].age, model.handler.cache[source].age
        )
    # Which rows they are in depends on the rows that the loss has drawn, which are young.
    assert sorted(fresh.handler.cache["b"].data["id"].numpy()) == [0, 0, 0, 0, 3, 5]


def test_a_model_of_two_replicas_is_saved(tmp_path):
    with two_replicas().scope():
        model = trained()
        fresh = built()
    model.save_weights(tmp_path / "model.weights.h5")
    fresh.load_weights(tmp_path / "model.weights.h5")
    # The first replica's rows, and the weights.
    assert_same_state(state_of(fresh), state_of(model))


@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_the_rows_of_every_replica_are_saved(as_checkpoint, tmp_path):
    specs = {"embedding": tf.io.FixedLenFeature([1], tf.float32)}
    strategy = two_replicas()
    with strategy.scope():
        cache, fresh = Cache(specs, 2), Cache(specs, 2)

    def add():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        cache.update(new_items={"embedding": [[1.0 + tf.cast(replica, tf.float32)]]})

    strategy.run(add)
    if as_checkpoint:
        tf.train.Checkpoint(fresh).read(tf.train.Checkpoint(cache).write(str(tmp_path / "cache")))
    else:
        store = {}
        cache.save_own_variables(store)
        fresh.load_own_variables(store)
    rows = [part.numpy().tolist() for part in strategy.experimental_local_results(fresh.embeddings)]
    assert rows == [[[1.0], [0.0]], [[2.0], [0.0]]]
