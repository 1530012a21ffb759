"""Tests that files whose values are none are refused: files are input."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import Cache, CachedRetrieval, TreeIndex
from negative_cache._compat import keras
from negative_cache.layers._cache import times
from negative_cache.layers._variables import by_replica
from negative_cache.tests.replicas import two_replicas

DIM, SIZE = 3, 40
SPECS = {
    "title": tf.io.FixedLenFeature([], tf.string),
    "id": tf.io.FixedLenFeature([], tf.int64),
    "embedding": tf.io.FixedLenFeature([DIM], tf.float32),
}


def make_cache():
    cache = Cache(SPECS, SIZE, row_key="id")
    items = {"id": np.arange(SIZE), "embedding": np.ones([SIZE, DIM], np.float32)}
    cache.fill([{**items, "title": np.array(["a title"] * SIZE)}], verbose=0)
    return cache


def make_index(**kwargs):
    index = TreeIndex(SIZE, DIM, leaf_size=4, branching=4, **kwargs)
    index.index(np.random.default_rng(0).normal(size=[SIZE, DIM]), verbose=0)
    return index


def damaged_values(layer):
    """What has limits, its state variable, and values that are out of them, of all kinds."""
    for what, variable, least, largest in layer._limits():
        values = np.array(variable.numpy())
        for wrong in (least - 1, largest + 1, np.nan):
            if values.dtype.kind in "iu":
                wrong = None if np.isnan(wrong) else wrong
            elif abs(wrong) > 1e30 or variable.dtype == tf.bfloat16:
                wrong = np.inf
            if wrong is not None:
                damaged = values.copy()
                damaged.reshape(-1)[-1:] = wrong
                yield what, variable, damaged


def load_keras(layer, folder):
    """Loads into a layer what another one has, as Keras does."""

    def load(fresh):
        store = {}
        layer.save_own_variables(store)
        fresh.load_own_variables(store)

    return load


def load_checkpoint(layer, folder):
    """Likewise, as TensorFlow does."""

    def load(fresh):
        tf.train.Checkpoint(fresh).read(tf.train.Checkpoint(layer).write(str(folder / "layer")))

    return load


@pytest.mark.parametrize("load_from", [load_keras, load_checkpoint])
@pytest.mark.parametrize(
    "make",
    [make_cache, make_index, lambda: make_index(store_embeddings=False, residual_bytes=3)],
    ids=["cache", "index", "codes"],
)
def test_every_value_that_has_limits_is_checked(make, load_from, monkeypatch, tmp_path):
    monkeypatch.setattr(times, "_QUEUE_SIZE", 8)
    layer, fresh, checked = make(), make(), 0
    load = load_from(layer, tmp_path)
    load(fresh)
    for what, variable, damaged in damaged_values(layer):
        whole = variable.numpy()
        variable.assign(damaged)
        with pytest.raises(ValueError, match=f"The file is damaged: {what} of the layer"):
            load(fresh)
        variable.assign(whole)
        checked += 1
    assert checked > 5
    # What is damaged has never reached the layer.
    for ours, theirs in zip(*(tf.nest.flatten(vars(each._state)) for each in (fresh, layer))):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_cache_that_is_made_after_its_checkpoint_was_read_is_checked(tmp_path):
    def make():
        return CachedRetrieval(
            keras.layers.Embedding(8, DIM), tf.io.FixedLenFeature([], tf.int64), SIZE
        )

    task, fresh = make(), make()
    task.add_to_cache([3, 4])
    task.cache.num_filled.assign(SIZE + 1)
    tf.train.Checkpoint(fresh).read(tf.train.Checkpoint(task).write(str(tmp_path / "task")))
    assert fresh.cache is None
    with pytest.raises(ValueError, match="The file is damaged: the number of filled rows"):
        tf.function(fresh.add_to_cache)(tf.constant([5, 6], tf.int64))


@pytest.mark.parametrize("load_from", [load_keras, load_checkpoint])
def test_the_values_of_every_replica_are_checked(load_from, tmp_path):
    with two_replicas().scope():
        cache, fresh = Cache(SPECS, SIZE), Cache(SPECS, SIZE)
    by_replica(cache.num_filled)[1].assign(-1)
    with pytest.raises(ValueError, match="The file is damaged: the number of filled rows"):
        load_from(cache, tmp_path)(fresh)


@pytest.mark.parametrize("make", [make_cache, make_index])
def test_a_file_that_lacks_an_array_is_refused(make):
    layer, store = make(), {}
    layer.save_own_variables(store)
    fresh = make()
    for name in sorted(set(store) - {"description"}):
        damaged = {key: value for key, value in store.items() if key != name}
        with pytest.raises(ValueError, match="The file is damaged: it lacks a part"):
            fresh.load_own_variables(damaged)
