"""Tests of features that are one tensor or a dictionary."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import Cache, CachedRetrieval, GlobalContrastiveBatches, _features, evaluation


def test_a_single_tensor_has_the_name_of_its_side():
    ids, by_name = tf.range(3), {"id": tf.range(3), "title": tf.constant(["a", "b", "c"])}
    assert _features.as_dict(ids)["candidate"] is ids
    assert _features.as_dict(ids, "query")["query"] is ids
    assert _features.as_dict(by_name) is by_name
    assert _features.id_feature(ids, None) is ids
    assert _features.id_feature(ids, "candidate") is ids
    assert _features.id_feature(ids, "query", "query") is ids
    assert _features.id_feature(by_name, "title") is by_name["title"]


@pytest.mark.parametrize(
    "features, key, side, message",
    [
        ([0], "id", "candidate", r"`candidate_id_key` .* \['candidate'\], .* 'id'"),
        ([0], "candidate", "query", r"`query_id_key` .* a query, \['query'\], .* 'candidate'"),
        ({"id": [0]}, "candidate", "candidate", r"a candidate, \['id'\]. Received: 'candidate'"),
        ({"id": [0]}, None, "candidate", r"a candidate, \['id'\]. Received: None"),
    ],
)
def test_ids_that_are_no_feature_are_refused(features, key, side, message):
    with pytest.raises(ValueError, match=message):
        _features.id_feature(features, key, side)


def test_candidate_is_the_id_key_of_a_single_tensor_everywhere():
    ids = tf.range(6, dtype=tf.int64)
    table = tf.random.normal([6, 3])
    towers = (lambda features: tf.gather(table, features),) * 2
    corpus = tf.data.Dataset.from_tensor_slices(ids).batch(4)
    pairs = {"query": ids, "candidate": ids}
    single_pairs = tf.data.Dataset.from_tensor_slices(pairs)

    metrics = evaluation.evaluate(
        towers, corpus, single_pairs.batch(4), candidate_id_key="candidate"
    )
    assert 0.0 < metrics["mrr"] <= 1.0
    kwargs = {"candidate_id_key": "candidate", "query_id_key": "query", "verbose": 0}
    assert len(GlobalContrastiveBatches(towers, pairs, 2, **kwargs)[0]["candidate"]) == 2
    batches = GlobalContrastiveBatches.from_dataset(towers, single_pairs, 2, **kwargs)
    assert len(next(iter(batches))["candidate"]) == 2
    cache = Cache.from_dataset(corpus, towers[1], candidate_id_key="candidate", verbose=0)
    assert cache.row_key == "candidate"
    spec = tf.io.FixedLenFeature([], tf.int64)
    task = CachedRetrieval(towers[1], spec, 6, candidate_id_key="candidate")
    assert task.candidate_id_key == "candidate"


def test_specs_of_rows():
    batches = tf.data.Dataset.from_tensor_slices({"a": np.zeros([4, 2]), "b": ["x"] * 4}).batch(2)
    specs = _features.specs_of_rows(batches)
    assert specs == {
        "a": tf.io.FixedLenFeature([2], tf.float64),
        "b": tf.io.FixedLenFeature([], tf.string),
    }
    assert _features.specs_of_rows(batches.map(lambda row: row["a"])) == specs["a"]
    with pytest.raises(ValueError, match="can only be taken from a `tf.data.Dataset`.*list"):
        _features.specs_of_rows([np.zeros([2])])
    with pytest.raises(ValueError, match=r"batch dimension unknown. Received for 'candidate': "):
        _features.specs_of_rows(tf.data.Dataset.range(3))


def test_specs_of_any_size():
    ragged = tf.ragged.constant([[1, 2], [3]])
    array = np.zeros([2])
    specs = _features.specs_of_any_size(
        {
            "dense": tf.zeros([2, 3]),
            "ragged": ragged,
            "sparse": tf.sparse.from_dense([[0, 1], [2, 0]]),
            "array": array,
        }
    )
    assert specs["dense"] == tf.TensorSpec([None, 3], tf.float32)
    assert specs["ragged"] == tf.RaggedTensorSpec([None, None], tf.int32)
    assert specs["sparse"] == tf.SparseTensorSpec([None, 2], tf.int32)
    assert specs["array"] is array


@pytest.mark.parametrize(
    "features", [np.arange(4), tf.range(4), {"a": tf.ragged.constant([[1]] * 4)}]
)
def test_rows(features):
    assert _features.num_rows(features) == 4
    assert _features.num_rows(_features.first_rows(features, 3)) == 3
    taken = _features.take(features, np.array([3, 1]))
    assert _features.num_rows(taken) == 2 and tf.is_tensor(tf.nest.flatten(taken)[0])


def test_concatenate():
    parts = [{"a": np.arange(2), "b": np.array([b"x", b"y"])}, {"a": [5], "b": [b"z"]}]
    parts[1] = {name: np.array(values) for name, values in parts[1].items()}
    joined = _features.concatenate(parts)
    np.testing.assert_array_equal(joined["a"], [0, 1, 5])
    np.testing.assert_array_equal(joined["b"], [b"x", b"y", b"z"])


def test_fingerprints():
    np.testing.assert_array_equal(_features.fingerprint(tf.constant([3, -1])), [3, -1])
    first, other, same = _features.fingerprint(tf.constant(["a", "b", "a"])).numpy()
    assert first == same != other
