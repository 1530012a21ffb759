"""Tests of tasks whose queries share draws: arguments, files, and `fit`."""

import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, CacheSpec, DualEncoder, FromCache
from negative_cache._compat import keras
from negative_cache.tests.layers.corpus_cases import make_corpus_task
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, make_table, make_task

TABLE = make_table(20)
SPECS = {"id": INT_ID}


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: make_task(TABLE, **kwargs),
        lambda **kwargs: make_corpus_task(TABLE, **kwargs),
        lambda **kwargs: FromCache(CacheSpec(SPECS, 6), **kwargs),
    ],
)
@pytest.mark.parametrize(
    ["kwargs", "message"],
    [
        (
            {"num_draws": 4, "num_negatives": 1},
            "`num_draws` are shared .*`num_negatives` .*Received: num_draws=4, num_negatives=1",
        ),
        ({"num_draws": 0}, "`num_draws` must be an integer >= 1. Received: 0"),
        ({"num_draws": 2.5}, "`num_draws` must be an integer >= 1. Received: 2.5"),
        ({"num_negatives": 0}, "`num_negatives` must be an integer >= 1. Received: 0"),
    ],
)
def test_refuses(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@keras.utils.register_keras_serializable("test_shared_draws")
class SavedTable(keras.layers.Layer):
    """A tower that a `.keras` file describes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(len(TABLE), DIM)

    def call(self, features):
        return self.table(features["id"])


def make_model(**kwargs):
    keras.utils.set_random_seed(0)
    towers = [SavedTable(), SavedTable()]
    settings = {"temperature": 0.3, "candidate_id_key": "id", "seed": 3, "embedding_dim": DIM}
    task = CachedRetrieval(towers[1], SPECS, 9, **{**settings, **kwargs})
    model = DualEncoder(*towers, task)
    model.compile(keras.optimizers.Adam(0.05))
    return model


def pairs(batch=4):
    ids = {"id": np.arange(len(TABLE)) % 18}
    return tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(batch)


def state_of(model):
    source = model.task.cached
    parts = [*source.cache.data.values(), source.cache.age, source._state.sampling]
    parts += [tf.convert_to_tensor(weight) for weight in model.trainable_variables]
    return [np.asarray(part) for part in parts]


@pytest.mark.parametrize("kwargs", [{"num_draws": 3}, {"num_negatives": 2}])
def test_a_training_goes_on_from_a_keras_file_to_the_bit(kwargs, tmp_path):
    model = make_model(**kwargs)
    model.fit(pairs(), epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for name in ("num_draws", "num_negatives"):
        assert getattr(loaded.task, name) == kwargs.get(name)
        assert getattr(loaded.task.cached, name) == kwargs.get(name)
    for _ in range(2):
        for one, other in zip(state_of(model), state_of(loaded), strict=True):
            np.testing.assert_array_equal(one, other)
        for each in (model, loaded):
            each.fit(pairs(), verbose=0)


def without_num_draws(config):
    """A configuration as it was before shared draws: every query had its own."""
    if isinstance(config, dict):
        parts = {key: without_num_draws(value) for key, value in config.items()}
        return {key: value for key, value in parts.items() if key != "num_draws"}
    return [without_num_draws(part) for part in config] if isinstance(config, list) else config


def test_a_keras_file_of_before_shared_draws_draws_for_each_query(tmp_path):
    model = make_model(num_negatives=1)
    model.fit(pairs(), verbose=0)
    model.save(tmp_path / "new.keras")
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            if name == "config.json":
                assert b"num_draws" in content
                content = json.dumps(without_num_draws(json.loads(content))).encode()
                assert b"num_draws" not in content and b"num_negatives" in content
            old.writestr(name, content)
    loaded = keras.models.load_model(tmp_path / "old.keras")
    assert loaded.task.num_negatives == 1 and loaded.task.num_draws is None
    before = int(loaded.task.cached.num_encoded)
    for each in (model, loaded):
        each.fit(pairs(), verbose=0)
    assert int(loaded.task.cached.num_encoded) - before == len(TABLE)
    for one, other in zip(state_of(model), state_of(loaded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_configuration_of_before_shared_draws_draws_for_each_query():
    task = CachedRetrieval(SavedTable(), SPECS, 9, num_negatives=1, candidate_id_key="id")
    source = FromCache(CacheSpec(SPECS, 6), num_negatives=1)
    config, of_source = without_num_draws(task.get_config()), source.get_config()
    del of_source["num_draws"]
    for loaded in (CachedRetrieval.from_config(config), FromCache.from_config(of_source)):
        assert (loaded.num_draws, loaded.num_negatives) == (None, 1)
    config = CachedRetrieval(SavedTable(), SPECS, 9, num_draws=5).get_config()
    loaded = CachedRetrieval.from_config(config)
    assert (loaded.num_draws, loaded.num_negatives) == (5, None)


def test_a_model_learns_without_tracing_again():
    model = make_model(in_batch_negatives=True, num_draws=3)
    model.compile(keras.optimizers.Adam(0.05), jit_compile=False)
    traces = []
    encode = model.task.cached.encode

    def seeing(features, training=False):
        traces.append(None)
        return encode(features, training)

    model.task.cached.encode = seeing
    # Of 20 pairs: three batches of 6 and one of 2.
    batches = pairs(6)
    losses = model.fit(batches, epochs=1, verbose=0).history["loss"]
    num_traces = len(traces)
    history = model.fit(batches, epochs=15, verbose=0).history
    assert len(traces) == num_traces
    assert history["loss"][-1] < 0.7 * losses[0]
    assert history["candidates_encoded"][-1] == 16 * (len(TABLE) + 4 * 3)
