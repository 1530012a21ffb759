import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.filter_fns import IsInCacheFilterFn
from negative_cache.negative_cache import CacheManager, NegativeCache

pytestmark = pytest.mark.one_keras


def make_cache(**data):
    data = {key: tf.constant(value) for key, value in data.items()}
    return NegativeCache(data, tf.zeros([len(next(iter(data.values())))], tf.int32))


def test_one_key():
    cache = make_cache(id=[1, 2, 3])
    mask = IsInCacheFilterFn(["id"])(cache, {"id": tf.constant([2, 4, 3, 4])})
    # Items that are new in the batch are all kept, though two of them are equal.
    assert mask.numpy().tolist() == [False, True, False, True]


def test_one_row_must_be_equal_in_all_keys():
    cache = make_cache(id=[1, 2], title=["a", "b"])
    new_items = {"id": tf.constant([1, 1, 2]), "title": tf.constant(["a", "b", "b"])}
    # (1, b) has its id in one row and its title in another.
    mask = IsInCacheFilterFn(("id", "title"))(cache, new_items)
    assert mask.numpy().tolist() == [False, True, False]


@given(
    cache=st.lists(st.tuples(*[st.integers(0, 1)] * 4), min_size=1, max_size=6),
    items=st.lists(st.tuples(*[st.integers(0, 1)] * 4), min_size=1, max_size=6),
    dtype=st.sampled_from([tf.int32, tf.int64, tf.float32, tf.string, tf.bool]),
)
def test_features_of_several_dimensions(cache, items, dtype):
    def features(rows):
        matrix = tf.reshape(tf.constant(rows), [-1, 2, 2])
        return tf.as_string(matrix) if dtype == tf.string else tf.cast(matrix, dtype)

    new_items = {"table": features(items)}
    mask = IsInCacheFilterFn(["table"])(make_cache(table=features(cache)), new_items)
    assert mask.numpy().tolist() == [item not in cache for item in items]


def test_result_is_a_mask_of_new_items():
    manager = CacheManager({"id": tf.io.FixedLenFeature([], tf.int64)}, cache_size=4)
    keep = IsInCacheFilterFn("id")

    @tf.function
    def step(cache, items):
        return manager.update_cache(cache, new_items=items, new_items_mask=keep(cache, items))

    cache = manager.init_cache()
    for ids in ([1, 2], [2, 3], [3, 1]):
        cache = step(cache, {"id": tf.constant(ids, tf.int64)})
    np.testing.assert_array_equal(cache.data["id"], [1, 2, 3, 0])


def test_bad_input():
    with pytest.raises(ValueError, match="`keys` must name at least one"):
        IsInCacheFilterFn([])
    with pytest.raises(ValueError, match=r"`new_items` must have the features \['id'\].*\['x'\]"):
        IsInCacheFilterFn(["id"])(make_cache(id=[1]), {"x": [1]})
    with pytest.raises(ValueError, match=r"`new_items\['id'\]` must have shape \[None\].*\(1, 1\)"):
        IsInCacheFilterFn(["id"])(make_cache(id=[1]), {"id": [[1]]})
