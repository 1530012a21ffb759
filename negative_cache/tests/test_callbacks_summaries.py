"""Tests of `CacheSummaries`: what stands in the event files."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, CacheSummaries, DualEncoder
from negative_cache._compat import keras


def make_model(cache_size=16):
    towers = [keras.Sequential([keras.layers.Embedding(12, 4)]) for _ in range(2)]
    spec = tf.io.FixedLenFeature([], tf.int64)
    task = CachedRetrieval(towers[1], spec, cache_size, in_batch_negatives=True)
    model = DualEncoder(*towers, task)
    model.compile("adam")
    return model


def pairs():
    ids = tf.range(12, dtype=tf.int64)
    return tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(4)


def read(folder):
    """Summary tag -> {step: value}."""
    found = {}
    for path in folder.glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
    return found


def test_what_is_written_every_so_many_batches(tmp_path):
    model = make_model()
    history = model.fit(
        pairs(), epochs=2, verbose=0, callbacks=[CacheSummaries(tmp_path, update_freq=3)]
    )
    found = read(tmp_path)
    assert set(found) == {
        f"cache/{name}"
        for name in (
            "age",
            "candidates_encoded",
            "fill",
            "log_partition",
            "skipped_rows",
            "staleness",
        )
    }
    for name in ("fill", "log_partition", "staleness"):
        np.testing.assert_allclose(
            [found[f"cache/{name}"][step] for step in (3, 6)], history.history[name], rtol=1e-6
        )
    # A histogram's buckets are [left, right, count]: all ages of rows that hold a candidate.
    counts = [found["cache/age"][step][:, 2].sum() for step in (3, 6)]
    assert counts == [12, 16]
    assert found["cache/age"][6][:, 1].max() <= 6


def test_once_an_epoch_by_default(tmp_path):
    make_model().fit(pairs(), epochs=2, verbose=0, callbacks=[CacheSummaries(tmp_path)])
    assert set(read(tmp_path)["cache/fill"]) == {0, 1}


def test_refuses_what_it_cannot_summarize(tmp_path):
    with pytest.raises(ValueError, match="`update_freq` must be an integer >= 1. Received: 0"):
        CacheSummaries(tmp_path, update_freq=0)
    with pytest.raises(ValueError, match="There is no cache: the model needs"):
        make_model(cache_size=0).fit(pairs(), verbose=0, callbacks=[CacheSummaries(tmp_path)])
