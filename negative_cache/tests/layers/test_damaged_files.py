"""Tests that files whose values are none are refused: files are input."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import Cache, TreeIndex
from negative_cache.layers._cache import times

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


def names_of(layer):
    """State variable -> its name in a file."""
    found = {}
    for i, variable in enumerate(tf.nest.flatten(vars(layer._state))):
        found[id(variable)] = f"{i}_0"
    return found


@pytest.mark.parametrize(
    "make", [make_cache, make_index, lambda: make_index(store_embeddings=False, residual_bytes=3)]
)
def test_every_value_that_has_limits_is_checked(make, monkeypatch):
    monkeypatch.setattr(times, "_QUEUE_SIZE", 8)
    layer, store = make(), {}
    layer.save_own_variables(store)
    fresh = make()
    fresh.load_own_variables(dict(store))
    names, checked = names_of(layer), 0
    for what, variable, least, largest in layer._limits():
        name = names[id(variable)]
        for wrong in (least - 1, largest + 1, np.nan):
            values = np.array(store[name])
            if values.dtype.kind in "iu" and not np.isfinite(wrong):
                continue
            if values.dtype == np.uint16:
                # Bits of a bfloat16.
                wrong, values = 0, np.full_like(values, 0x7FC0)
            elif abs(wrong) > 1e30:
                wrong = np.inf
            damaged = values.reshape(-1).copy()
            damaged[-1:] = damaged[-1:] if values.dtype == np.uint16 else wrong
            with pytest.raises(ValueError, match=f"The file is damaged: {what} of the layer"):
                fresh.load_own_variables({**store, name: damaged.reshape(values.shape)})
            checked += 1
    assert checked > 5
    # What is whole loads after all that.
    fresh.load_own_variables(dict(store))


@pytest.mark.parametrize("make", [make_cache, make_index])
def test_a_file_that_lacks_an_array_is_refused(make):
    layer, store = make(), {}
    layer.save_own_variables(store)
    fresh = make()
    for name in sorted(set(store) - {"description"}):
        damaged = {key: value for key, value in store.items() if key != name}
        with pytest.raises(ValueError, match="The file is damaged: it lacks a part"):
            fresh.load_own_variables(damaged)
