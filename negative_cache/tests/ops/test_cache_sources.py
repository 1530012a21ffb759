"""Tests of several caches as one list of candidates."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.ops.cache_sources import CacheSources

# In the order of names: candidates 0 and 1 are the rows of "a", 2 to 4 those of "b".
SOURCES = {
    "b": {"id": tf.constant([7, 8, 9]), "embedding": tf.constant([[3.0], [4.0], [5.0]])},
    "a": {"id": tf.constant([5, 6]), "embedding": tf.constant([[1.0], [2.0]])},
}


def test_rows_of_all_sources_are_numbered_in_the_order_of_names():
    candidates = CacheSources(SOURCES, "embedding", ["id"], 1)
    assert candidates.offsets == {"a": 0, "b": 2} and candidates.size == 5
    assert not candidates.is_one_of_known_size
    assert CacheSources({"a": SOURCES["a"]}, "embedding", ["id"], 1).is_one_of_known_size

    rows, masks = candidates.locate(tf.constant([4, -1, 1, 2], tf.int64))
    assert masks["a"].numpy().tolist() == [False, False, True, False]
    assert masks["b"].numpy().tolist() == [True, False, False, True]
    assert rows["a"].numpy().tolist() == [0, 0, 1, 0]
    assert rows["b"].numpy().tolist() == [2, 0, 0, 0]


def test_features_of_candidates():
    candidates = CacheSources(SOURCES, "embedding", ["id"], 1)
    features = candidates.gather(tf.constant([4, 1, 2], tf.int64))
    assert features["id"].numpy().tolist() == [9, 6, 7]
    np.testing.assert_array_equal(features["embedding"], [[5.0], [2.0], [3.0]])


@pytest.mark.parametrize(
    "sources, message",
    [
        ({"a": {"embedding": tf.zeros([2, 1])}}, r"'a' must have .* \['embedding', 'id'\]"),
        ({"a": {**SOURCES["a"], "embedding": tf.zeros([2, 3])}}, r"\[rows, 1\].*\(2, 3\)"),
        ({"a": {**SOURCES["a"], "embedding": tf.zeros([0, 1])}}, r"\[rows, 1\].*\(0, 1\)"),
    ],
)
def test_sources_that_do_not_fit_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        CacheSources(sources, "embedding", ["id"], 1)
