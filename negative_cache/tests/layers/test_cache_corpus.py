"""Tests of a `Cache` that covers a corpus: how it is filled, and found again."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import Cache, TreeIndex
from negative_cache.layers._cache import times
from negative_cache.layers._variables import by_replica
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, Table, make_table
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.tree_invariants import check_tree

TITLES = np.array([f"title {i}" for i in range(13)])


def from_dataset(dataset=None, network=None, **kwargs):
    dataset = corpus_of(13) if dataset is None else dataset
    network = Table(make_table(13)) if network is None else network
    kwargs = {"candidate_id_key": "id", "verbose": 0, **kwargs}
    return Cache.from_dataset(dataset, network, **kwargs)


# Made from a dataset.


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_row_i_is_candidate_i(dtype):
    cache = from_dataset(embedding_dtype=dtype)
    assert cache.row_key == "id" and cache.cache_size == 13
    assert cache.data["id"].numpy().tolist() == list(range(13))
    np.testing.assert_array_equal(cache.embeddings, tf.cast(make_table(13), dtype))
    assert np.all(cache.filled) and int(cache.num_filled) == 13
    assert not np.any(cache.age)


def test_rows_of_string_ids():
    hashing, table = keras.layers.Hashing(50), keras.layers.Embedding(50, DIM)
    features = {"title": TITLES, "year": np.arange(13)}
    dataset = tf.data.Dataset.from_tensor_slices(features).batch(4)
    cache = from_dataset(dataset, lambda f: table(hashing(f["title"])), candidate_id_key="title")
    assert cache.data["title"].numpy().tolist() == [title.encode() for title in TITLES]
    assert cache.rows_of(TITLES[::-1]).numpy().tolist() == list(range(13))[::-1]
    assert cache.rows_of(["title 5", "none", ""]).numpy().tolist() == [5, -1, -1]


def test_a_tower_of_a_single_tensor():
    ids = np.int32([70, -3, 8, 2**31 - 1])
    tower = keras.layers.Lambda(lambda values: tf.cast(values[:, tf.newaxis] // [2, 3], tf.float32))
    dataset = tf.data.Dataset.from_tensor_slices(ids).batch(3)
    cache = from_dataset(dataset, tower, candidate_id_key=None)
    assert cache.row_key == "candidate"
    np.testing.assert_array_equal(cache.data["candidate"], ids)
    np.testing.assert_array_equal(cache.embeddings, tower(tf.constant(ids)))
    assert cache.rows_of(ids[[2, 0, 3, 1]]).numpy().tolist() == [2, 0, 3, 1]
    assert cache.rows_of([71, 0]).numpy().tolist() == [-1, -1]


def test_the_largest_id_is_found_only_where_it_is():
    largest = 2**63 - 1
    ids = {"id": np.array([3, largest, 5], np.int64)}
    tower = keras.layers.Lambda(lambda f: tf.ones([tf.shape(f["id"])[0], DIM]))
    for cache, row in (
        (from_dataset([ids], tower, feature_specs={"id": INT_ID}, cache_size=5), 1),
        (from_dataset(corpus_of(3), tower, cache_size=5), -1),
    ):
        assert cache.rows_of(tf.constant([largest], tf.int64)).numpy().tolist() == [row]


def test_candidates_are_encoded_in_inference_mode():
    tower = keras.Sequential([keras.layers.Embedding(13, DIM), keras.layers.Dropout(0.9)])
    dataset = tf.data.Dataset.range(13).batch(4)
    cache = from_dataset(dataset, tower, candidate_id_key=None)
    np.testing.assert_allclose(cache.embeddings, tower(tf.range(13), training=False))


def test_specs_may_be_given_for_any_iterable():
    batches = [{"id": np.arange(6, dtype=np.int64)}, {"id": np.arange(6, 13, dtype=np.int64)}]
    cache = from_dataset(batches, feature_specs={"id": INT_ID})
    assert cache.data["id"].numpy().tolist() == list(range(13))
    once = from_dataset(iter(batches), feature_specs={"id": INT_ID}, cache_size=13)
    assert once.data["id"].numpy().tolist() == list(range(13))


def test_rows_may_be_left_unfilled(capsys):
    cache = from_dataset(cache_size=16, verbose=1)
    assert cache.filled.numpy().tolist() == [True] * 13 + [False] * 3
    assert int(cache.num_filled) == 13
    assert "13/16" in capsys.readouterr().out


def test_a_candidate_whose_embedding_is_not_finite_is_left_out():
    table = make_table(13)
    table[4, 1] = np.nan
    cache = from_dataset(network=Table(table))
    assert np.flatnonzero(~cache.filled.numpy()).tolist() == [4]
    assert int(cache.num_skipped) == 1 and int(cache.num_filled) == 12
    # It has its row still, and enters it once it can.
    items = {"id": tf.constant([4], tf.int64), "embedding": tf.ones([1, DIM])}
    cache.update(new_items=items)
    assert np.all(cache.filled) and int(cache.num_filled) == 13


def test_an_index_is_made_of_the_rows_that_are_filled():
    table = make_table(13)
    table[4] = np.nan
    index = TreeIndex(16, DIM, leaf_size=4, branching=4)
    cache = from_dataset(network=Table(table), cache_size=16, index=index)
    check_tree(cache.index, {row: table[row] for row in range(13) if row != 4})


# Filled again.


def test_filling_forgets_what_there_was():
    cache = from_dataset(cache_size=16)
    items = {"id": tf.constant([90, 80], tf.int64), "embedding": tf.ones([2, DIM])}
    cache.fill([items], verbose=0)
    assert np.flatnonzero(cache.filled).tolist() == [0, 1]
    assert int(cache.num_filled) == 2
    assert cache.rows_of(tf.constant([90, 80, 0, 1], tf.int64)).numpy().tolist() == [0, 1, -1, -1]


# Updated.


def test_new_items_go_to_the_rows_of_their_ids():
    cache = from_dataset()
    ids = tf.constant([11, 2], tf.int64)
    cache.update(new_items={"id": ids, "embedding": tf.constant([[1.0] * DIM, [2.0] * DIM])})
    expected = make_table(13)
    expected[[11, 2]] = [[1.0], [2.0]]
    np.testing.assert_array_equal(cache.embeddings, expected)
    assert cache.data["id"].numpy().tolist() == list(range(13))
    assert cache.age.numpy().tolist() == [0 if row in (2, 11) else 1 for row in range(13)]


def test_unknown_ids_are_skipped_and_counted():
    cache = from_dataset()
    before = cache.embeddings.numpy()
    items = {"id": tf.constant([99, 3, -1], tf.int64), "embedding": tf.ones([3, DIM])}
    cache.update(new_items=items, new_items_mask=[True, False, True])
    np.testing.assert_array_equal(cache.embeddings, before)
    assert int(cache.num_skipped) == 2
    # What is masked has not been refused.
    cache.update(new_items=items, new_items_mask=[False, True, False])
    assert int(cache.num_skipped) == 2
    assert cache.embeddings.numpy()[3].tolist() == [1.0] * DIM


@pytest.mark.one_keras
def test_rewriting_makes_rows_fresh_and_others_no_older():
    index = TreeIndex(13, DIM, leaf_size=4, branching=4)
    cache = from_dataset(index=index)
    cache.update(new_items={"id": tf.constant([0], tf.int64), "embedding": tf.ones([1, DIM])})
    rows = np.array([5, 1, 7])
    embeddings = np.float32([[3.0] * DIM, [4.0] * DIM, [np.nan] * DIM])
    cache.rewrite(rows, embeddings)
    assert cache.age.numpy().tolist() == [0 if row in (0, 1, 5) else 1 for row in range(13)]
    expected = make_table(13)
    expected[[0, 5, 1]] = [[1.0], [3.0], [4.0]]
    np.testing.assert_array_equal(cache.embeddings, expected)
    assert int(cache.num_skipped) == 1
    check_tree(index, dict(enumerate(expected)))


@pytest.mark.parametrize("queue_size", [4, 2**15])
def test_the_oldest_rows_are_those_touched_longest_ago(queue_size, monkeypatch):
    monkeypatch.setattr(times, "_QUEUE_SIZE", queue_size)
    cache, rng = from_dataset(), np.random.default_rng(0)
    for _ in range(20):
        ids = rng.choice(13, size=3, replace=False)
        cache.update(new_items={"id": ids, "embedding": tf.ones([3, DIM])})
        for count in (1, 3, 6):
            expected = np.argsort(-cache.age.numpy(), kind="stable")[:count]
            np.testing.assert_array_equal(cache.oldest(count), expected)


# Refused.


def of_ids(ids):
    return tf.data.Dataset.from_tensor_slices({"id": np.array(ids)}).batch(3)


def ones(features):
    return tf.ones([tf.shape(tf.nest.flatten(features)[0])[0], DIM])


@pytest.mark.parametrize(
    "dataset, arguments, message",
    [
        (lambda: of_ids([4, 9, 7, 2, 9]), {}, "id of its own.* id 9 for rows 1 and 4"),
        (
            lambda: of_ids(["a", "b", "a"]),
            {},
            "id of its own.* id b'a' for rows 0 and 2",
        ),
        (lambda: corpus_of(13), {"cache_size": 12}, "at least 13 candidates .*`cache_size` of 12"),
        (lambda: corpus_of(13).take(0), {}, "The dataset must have candidates"),
        (
            lambda: corpus_of(13).take(0),
            {"cache_size": 4},
            "candidates to fill the cache with. Received none",
        ),
        (lambda: corpus_of(13), {"candidate_id_key": None}, "needs a `candidate_id_key`"),
        (lambda: corpus_of(13), {"candidate_id_key": "title"}, "one of the features.* 'title'"),
        (
            lambda: corpus_of(13),
            {"feature_specs": {"id": INT_ID, "year": INT_ID}},
            "`dataset` must have exactly the features.*year|dataset.*'year'",
        ),
        (
            lambda: corpus_of(13),
            {"feature_specs": {"id": tf.io.FixedLenFeature([], tf.string)}},
            "(?s)dataset.*id.*string",
        ),
        (lambda: [{"id": np.arange(3)}], {}, "`feature_specs` can only be taken .* list"),
        (
            lambda: iter([{"id": np.arange(3)}]),
            {"feature_specs": {"id": INT_ID}},
            "read only once, `cache_size` must be its",
        ),
        (
            lambda: corpus_of(13).map(lambda f: {**f, "embedding": f["id"]}),
            {},
            "'embedding' is reserved for the cached embedding",
        ),
        (
            lambda: corpus_of(13).map(
                lambda f: {**f, "words": tf.RaggedTensor.from_row_splits([1], [0, 1])}
            ),
            {},
            "only the batch dimension unknown.*'words'",
        ),
        (
            lambda: corpus_of(13).map(lambda f: {"id": tf.cast(f["id"], tf.float32)}),
            {},
            "scalar integer or string",
        ),
    ],
)
def test_a_dataset_is_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_dataset(dataset(), ones, **arguments)


def test_a_network_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`candidate_network` must be a layer or a function"):
        from_dataset(network="tower")


def test_a_cache_that_streams_has_no_rows_of_ids():
    specs = {"id": INT_ID, "embedding": tf.io.FixedLenFeature([DIM], tf.float32)}
    cache = Cache(specs, 4)
    with pytest.raises(ValueError, match="`rows_of` needs a cache with a `row_key`"):
        cache.rows_of([1])
    with pytest.raises(ValueError, match="`fill` is for a cache with a `row_key`"):
        cache.fill([])
    with pytest.raises(ValueError, match="`row_key` must be one of the features in `specs`"):
        Cache(specs, 4, row_key="title")


def test_configuration_round_trip():
    cache = from_dataset(cache_size=16)
    copy = Cache.from_config(cache.get_config())
    assert copy.row_key == "id" and copy.specs == cache.specs and copy.cache_size == 16
    assert int(copy.num_filled) == 0
    assert copy.rows_of(tf.constant([0, 1], tf.int64)).numpy().tolist() == [-1, -1]


def test_a_fill_that_fails_leaves_an_empty_cache():
    table = Table(make_table(8))
    cache = Cache.from_dataset(corpus_of(8), table, candidate_id_key="id", verbose=0)
    twice = [{"id": tf.constant([5, 5], tf.int64), "embedding": tf.ones([2, DIM])}]
    with pytest.raises(ValueError, match="an id of its own"):
        cache.fill(twice, verbose=0)
    assert cache.num_filled.numpy() == np.count_nonzero(cache.filled) == 0
    np.testing.assert_array_equal(cache.rows_of(tf.constant([0, 5], tf.int64)), [-1, -1])


@pytest.mark.parametrize(
    ["call", "message"],
    [
        (lambda cache: cache.age_of([0, 13, -1]), r"between 0 and 12. Received: \[13, -1\]"),
        (lambda cache: cache.age_of([0.0]), "must be integers of shape"),
        (lambda cache: cache.age_of([[0]]), "must be integers of shape"),
        (lambda cache: cache.rewrite([13], np.ones([1, DIM])), r"Received: \[13\]"),
        (lambda cache: cache.oldest(14), "`count` must be at most 13, .* Received: 14"),
        (lambda cache: cache.oldest(-1), "`count` must be .* Received: -1"),
    ],
)
def test_rows_that_there_are_not_are_refused(call, message):
    cache = from_dataset()
    with pytest.raises(ValueError, match=message):
        call(cache)


def test_under_a_strategy_the_tower_need_not_have_been_called():
    with two_replicas().scope():
        tower = keras.Sequential([keras.layers.Embedding(13, DIM), keras.layers.Dense(DIM)])
        ids = tf.data.Dataset.range(13).batch(5)
        cache = Cache.from_dataset(ids, tower, verbose=0)
    for rows in by_replica(cache.embeddings):
        np.testing.assert_allclose(rows, tower(np.arange(13)), rtol=1e-5)


def test_a_name_on_host_that_is_none_is_refused_before_the_corpus_is_read():
    def never():
        raise AssertionError("The corpus is read.")
        yield

    spec = {"id": tf.io.FixedLenFeature([], tf.int64)}
    with pytest.raises(
        ValueError, match="features \\['id'\\], or 'embedding'. Received: \\['idd'\\]"
    ):
        Cache.from_dataset(
            never(), Table(make_table()), spec, candidate_id_key="id", on_host=["idd"]
        )
