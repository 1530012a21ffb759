"""Tests of each format of files with each kind of model.

A model is loaded and trained on as one that did not stop, to the bit, or is refused when it is
saved. What a file holds beyond that is in `test_saving.py`.
"""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder
from negative_cache._compat import IS_KERAS_2, keras

NUM_IDS, DIM = 12, 3
serializable = keras.utils.register_keras_serializable("test_file_formats")
serialize, deserialize = keras.utils.serialize_keras_object, keras.utils.deserialize_keras_object


@serializable
class Tower(keras.layers.Layer):
    """A tower of a class of one's own, around a table that may be another one's too."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.table = table
        self.dense = keras.layers.Dense(DIM)

    def call(self, ids):
        return self.dense(self.table(ids))

    def get_config(self):
        return {**super().get_config(), "table": serialize(self.table)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "table": deserialize(config["table"])})


@serializable
class OwnModel(keras.Model):
    """A model of a class of one's own that has a task, as in a tutorial of Keras."""

    def __init__(self, query_network, task, **kwargs):
        super().__init__(**kwargs)
        self.query_network = query_network
        self.task = task

    def call(self, inputs):
        return self.query_network(inputs["query"]), self.task.candidate_network(inputs["candidate"])

    def train_step(self, data):
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            queries, candidates = self(inputs)
            loss = self.task(queries, candidates, inputs["candidate"])
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}

    def get_config(self):
        parts = {"query_network": serialize(self.query_network), "task": serialize(self.task)}
        return {**super().get_config(), **parts}

    @classmethod
    def from_config(cls, config):
        parts = {name: deserialize(config[name]) for name in ("query_network", "task")}
        return cls(**{**config, **parts})


def table():
    return keras.layers.Embedding(NUM_IDS, DIM)


def sequential(table):
    return keras.Sequential([table, keras.layers.Dense(DIM)])


def functional(table):
    ids = keras.Input([], dtype="int64")
    return keras.Model(ids, keras.layers.Dense(DIM)(table(ids)))


def one_tower():
    return (sequential(table()),) * 2


def sharing(tower):
    def make():
        shared = table()
        return tower(shared), tower(shared)

    return make


TOWERS = {
    "Sequential": lambda: (sequential(table()), sequential(table())),
    "functional": lambda: (functional(table()), functional(table())),
    "a layer": lambda: (table(), table()),
    "own class": lambda: (Tower(table()), Tower(table())),
    "one tower": one_tower,
    "Sequential, shared table": sharing(sequential),
    "functional, shared table": sharing(functional),
    "own class, shared table": sharing(Tower),
}
OWN = "model of an own class"
KINDS = [*TOWERS, OWN]


def batch(seed=0):
    ids = np.random.default_rng(seed).permutation(NUM_IDS)[:6]
    return {"query": tf.constant(ids), "candidate": tf.constant(ids)}


def make_model(kind, seed):
    """A model of a kind, called on a batch."""
    keras.utils.set_random_seed(seed)
    queries, candidates = TOWERS[kind if kind in TOWERS else "own class"]()
    specs = tf.io.FixedLenFeature([], tf.int64)
    task = CachedRetrieval(candidates, specs, 8, in_batch_negatives=True, seed=seed)
    model = OwnModel(queries, task) if kind == OWN else DualEncoder(queries, candidates, task)
    # Two steps take less time than to trace one.
    model.compile(keras.optimizers.Adam(0.1), run_eagerly=True)
    model(batch())
    task.build_cache(DIM)
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, steps):
    """The last loss, and all of the state that decides what comes next."""
    for _ in range(steps):
        seed = int(model.optimizer.iterations)
        logs = model.train_on_batch(batch(seed), return_dict=True)
    cache, optimizer = model.task.cache, model.optimizer.variables
    state = {
        "loss": logs["loss"],
        "age": cache.age,
        "sampling": model.task.cached._state.sampling,
        **cache.data,
    }
    weights = [*model.trainable_variables, *(optimizer() if IS_KERAS_2 else optimizer)]
    state.update((f"weight {i}", weight) for i, weight in enumerate(weights))
    return {name: np.array(tf.convert_to_tensor(values)) for name, values in state.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    """A model in the middle of its training, which tests leave as it is."""
    trained = make_model(kind, seed=1)
    train(trained, steps=1)
    return trained


@pytest.fixture(scope="module")
def expected(kind):
    """What became of the same model when its training went on."""
    return train(make_model(kind, seed=1), steps=3)


def save_keras(model, path):
    model.save(f"{path}.keras")
    return lambda fresh: keras.models.load_model(f"{path}.keras")


def save_unzipped(model, path):
    model.save(path, zipped=False)
    return lambda fresh: keras.models.load_model(path)


def weights_format(suffix, **kwargs):
    def save(model, path):
        model.save_weights(f"{path}{suffix}", **kwargs)

        def load(fresh):
            fresh.load_weights(f"{path}{suffix}")
            return fresh

        return load

    return save


def save_checkpoint(model, path):
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(path)

    def load(fresh):
        checkpoint = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer)
        checkpoint.read(path).assert_existing_objects_matched()
        return fresh

    return load


CONFIGURED = {"keras": save_keras}
LOADED = {"weights.h5": weights_format(".weights.h5"), "checkpoint": save_checkpoint}
if IS_KERAS_2:
    LOADED["TensorFlow weights"] = weights_format("", save_format="tf")
else:
    CONFIGURED["unzipped"] = save_unzipped
    LOADED["sharded"] = weights_format(".weights.json", max_shard_size=1e-6)


def assert_goes_on(loaded, expected):
    actual = train(loaded, steps=2)
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("name", LOADED)
def test_a_model_goes_on_from_weights(name, kind, model, expected, tmp_path):
    load = LOADED[name](model, str(tmp_path / "model"))
    assert_goes_on(load(make_model(kind, seed=2)), expected)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_model_goes_on_from_a_whole_file(name, kind, model, expected, tmp_path):
    save = CONFIGURED[name]
    if "shared" not in kind:
        assert_goes_on(save(model, str(tmp_path / "model"))(None), expected)
        return
    with pytest.raises(ValueError, match=r"that the towers share layers. .* share: \['embedding"):
        save(model, str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def save_by_callback(model, path):
    callback = keras.callbacks.ModelCheckpoint(path)
    callback.set_model(model)
    callback.on_epoch_end(0, {})


OLD = {
    "whole in HDF5": lambda model, path: model.save(path + ".h5"),
    "weights in HDF5": lambda model, path: model.save_weights(path + ".h5"),
    "folder": lambda model, path: model.save(path),
}
if IS_KERAS_2:
    OLD |= {
        "HDF5, by format": lambda model, path: model.save(path, save_format="h5"),
        "weights in HDF5, by format": lambda model, path: model.save_weights(
            path, save_format="h5"
        ),
        "weights in HDF5, by name": lambda model, path: model.save_weights(path + ".keras"),
        "folder, by callback": save_by_callback,
    }


@pytest.mark.parametrize("name", OLD)
def test_a_format_that_would_lose_a_part_is_refused(name, kind, model, tmp_path):
    if kind == OWN and "HDF5" in name:
        pytest.skip("Keras does not ask the task what of it goes into such a file.")
    if IS_KERAS_2 or name == "whole in HDF5":
        message = "HDF5 format of Keras holds no" if "HDF5" in name else "From a folder Keras 2"
    else:
        message = "Invalid filepath extension|must end in `.weights.h5`"
    if "shared" in kind:
        message += "|that the towers share layers"
    with pytest.raises(ValueError, match=message):
        OLD[name](model, str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_adapted", [False, True])
def test_towers_may_share_a_layer_that_its_configuration_describes(is_adapted, tmp_path):
    ids = list(range(NUM_IDS))
    lookup = keras.layers.IntegerLookup(vocabulary=None if is_adapted else ids, num_oov_indices=0)
    if is_adapted:
        lookup.adapt(ids)
    queries, candidates = (keras.Sequential([lookup, table()]) for _ in range(2))
    task = CachedRetrieval(candidates, tf.io.FixedLenFeature([], tf.int64), 8)
    model = DualEncoder(queries, candidates, task)
    before = model(batch())
    if is_adapted:
        with pytest.raises(ValueError, match=r"that share: \['integer_lookup"):
            save_keras(model, str(tmp_path / "model"))
        return
    after = save_keras(model, str(tmp_path / "model"))(None)(batch())
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("kind", ["Sequential", "own class, shared table"], indirect=True)
def test_an_export_serves_the_towers(kind, model, tmp_path):
    model.export(str(tmp_path))
    served = tf.saved_model.load(str(tmp_path))
    for name in ("query", "candidate"):
        embeddings = getattr(served, f"embed_{name}")(batch()[name])
        np.testing.assert_allclose(embeddings, model(batch())[name], rtol=1e-6)


@pytest.mark.parametrize("kind", ["functional", OWN], indirect=True)
def test_tensorflow_saves_a_model_for_serving(kind, model, tmp_path):
    tf.saved_model.save(model, str(tmp_path))
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    # Other ids for each tower, so that the order of the inputs counts.
    ids = {"candidate": tf.range(6, dtype=tf.int64), "query": tf.range(6, 12, dtype=tf.int64)}
    # Keras 3 calls them "inputs" and "inputs_1", in the order of their keys, and takes floats.
    specs = served.structured_input_signature[1]
    found = served(
        **{name: tf.cast(ids[key], specs[name].dtype) for name, key in zip(sorted(specs), ids)}
    )
    expected = tf.nest.flatten(model(ids))
    assert len(found) == len(expected) == 2
    for name, embeddings in zip(sorted(found), expected):
        np.testing.assert_allclose(found[name], embeddings, rtol=1e-6)
