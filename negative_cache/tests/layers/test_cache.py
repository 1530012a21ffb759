"""Tests of `Cache`. That it means what `CacheManager` means is tested beside that class."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache._compat import keras
from negative_cache.layers import Cache
from negative_cache.layers._cache import times
from negative_cache.layers._variables import by_replica
from negative_cache.negative_cache import CacheManager
from negative_cache.ops import OldestRows
from negative_cache.tests.replicas import two_replicas

SPECS = {
    "id": tf.io.FixedLenFeature([], tf.int64),
    "title": tf.io.FixedLenFeature([], tf.string),
    "tokens": tf.io.FixedLenFeature([2, 2], tf.int32),
    "embedding": tf.io.FixedLenFeature([2], tf.float32),
}


def items(*ids):
    """Candidates whose every feature says which id they are."""
    ids = np.array(ids, np.int64)
    return {
        "id": tf.constant(ids, tf.int64),
        "title": tf.constant([f"title {i}" for i in ids], tf.string, shape=[len(ids)]),
        "tokens": tf.constant(np.tile(ids[:, None, None], [1, 2, 2]), tf.int32),
        "embedding": tf.constant(np.stack([ids, -ids], axis=1), tf.float32),
    }


def assert_rows(cache, ids):
    """Asserts which candidates the rows hold, in every feature; None for a row never filled."""
    empty = [i is None for i in ids]
    np.testing.assert_array_equal(cache.filled, np.logical_not(empty))
    assert int(cache.num_filled) == len(ids) - sum(empty)
    expected = {key: value.numpy() for key, value in items(*[i or 0 for i in ids]).items()}
    expected["title"][empty] = b""
    for key, values in expected.items():
        np.testing.assert_array_equal(cache.data[key].numpy(), values)


def test_new_items_fill_the_smallest_rows_first_then_replace_the_oldest():
    cache = Cache(SPECS, 4)
    assert_rows(cache, [None] * 4)
    cache.update(new_items=items(1, 2))
    assert_rows(cache, [1, 2, None, None])
    # Ages after one update: the touched rows 0, the others 1.
    np.testing.assert_array_equal(cache.age, [0, 0, 1, 1])
    cache.update(new_items=items(3))
    assert_rows(cache, [1, 2, 3, None])
    cache.update(new_items=items(4, 5))
    assert_rows(cache, [5, 2, 3, 4])
    np.testing.assert_array_equal(cache.age, [0, 2, 1, 0])


@pytest.mark.parametrize("use_lru, expected", [(True, [1, 9]), (False, [9, 2])])
def test_a_used_row_stays_longer_with_lru_only(use_lru, expected):
    cache = Cache(SPECS, 2, use_lru=use_lru)
    cache.update(new_items=items(1))
    cache.update(new_items=items(2))
    cache.update(new_items=items(), updated_item_data=items(1), updated_item_indices=[0])
    # Age of row 0: used now with LRU, else inserted two updates ago.
    np.testing.assert_array_equal(cache.age, [0, 1] if use_lru else [2, 1])
    cache.update(new_items=items(9))
    assert_rows(cache, expected)


def test_updates_come_first_and_the_rows_they_touch_are_kept():
    cache = Cache(SPECS, 3)
    cache.update(new_items=items(1, 2, 3))
    cache.update(
        new_items=items(8, 9), updated_item_data=items(7), updated_item_indices=tf.constant([1])
    )
    assert_rows(cache, [8, 7, 9])


def test_an_update_may_have_some_of_the_features():
    cache = Cache(SPECS, 2)
    cache.update(new_items=items(1, 2))
    cache.update(
        new_items=items(),
        updated_item_data={"embedding": [[5.0, 6.0]]},
        updated_item_indices=[1],
    )
    np.testing.assert_array_equal(cache.embeddings.numpy(), [[1, -1], [5, 6]])
    np.testing.assert_array_equal(cache.data["id"], [1, 2])


def test_masked_entries_change_nothing():
    cache = Cache(SPECS, 4)
    cache.update(new_items=items(1, 2, 3), new_items_mask=[True, False, True])
    assert_rows(cache, [1, 3, None, None])
    cache.update(
        new_items=items(4, 5),
        new_items_mask=[False, False],
        updated_item_data=items(6, 7, 8),
        updated_item_indices=[0, 1, -5],
        updated_item_mask=[False, True, False],
    )
    assert_rows(cache, [1, 7, None, None])
    np.testing.assert_array_equal(cache.age, [1, 0, 2, 2])


@pytest.mark.parametrize("use_function", [False, True])
def test_writes_only_touched_rows_of_the_same_variables(use_function):
    cache = Cache(SPECS, 1000)
    cache.update(new_items=items(*range(1, 1001)))
    variables = dict(cache.data)
    # Rows poisoned behind the cache's back stay poisoned unless they are written.
    cache.embeddings.assign(np.full([1000, 2], np.nan))
    update = tf.function(cache.update) if use_function else cache.update
    update(
        new_items=items(5000), updated_item_data=items(77), updated_item_indices=tf.constant([500])
    )
    assert all(cache.data[key] is variable for key, variable in variables.items())
    written = np.flatnonzero(np.isfinite(cache.embeddings.numpy()).all(axis=1))
    assert written.tolist() == [0, 500]
    np.testing.assert_array_equal(cache.embeddings.numpy()[[0, 500]], [[5000, -5000], [77, -77]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_finite_embedding_is_skipped_and_counted(bad):
    cache = Cache(SPECS, 3)
    new_items = items(1, 2, 3)
    new_items["embedding"] = tf.constant([[1.0, -1.0], [2.0, bad], [3.0, -3.0]])
    cache.update(new_items=new_items)
    assert_rows(cache, [1, 3, None])
    assert int(cache.num_skipped) == 1
    updates = items(5, 6)
    updates["embedding"] = tf.constant([[5.0, -5.0], [bad, 0.0]])
    cache.update(new_items=items(), updated_item_data=updates, updated_item_indices=[0, 1])
    assert_rows(cache, [5, 3, None])
    assert int(cache.num_skipped) == 2
    # An entry that is masked anyway is not counted.
    cache.update(new_items=new_items, new_items_mask=[False, False, False])
    assert int(cache.num_skipped) == 2


def test_no_gradient_flows_into_the_rows():
    cache = Cache(SPECS, 2)
    embedding = tf.Variable([[1.0, 2.0]])
    with tf.GradientTape() as tape:
        tape.watch(cache.embeddings.handle)
        cache.update(new_items={**items(1), "embedding": 2.0 * embedding})
        total = tf.reduce_sum(tf.gather(cache.embeddings, [0]))
    assert tape.gradient(total, embedding) is None
    assert total.numpy() == 6.0


def test_does_not_retrace():
    cache, traces = Cache(SPECS, 4), []

    @tf.function
    def update(new_items, mask):
        traces.append(None)
        cache.update(new_items=new_items, new_items_mask=mask)

    for i in range(1, 6):
        update(items(i, i + 10), tf.constant([True, i % 2 == 0]))
    assert len(traces) == 1
    # Inserted in order: 1 | 2 12 | 3 | 4 14 | 5, the last four of which remain beside none older.
    assert sorted(cache.data["id"].numpy().tolist()) == [3, 4, 5, 14]


def test_two_replicas_have_rows_of_their_own():
    strategy = two_replicas()
    with strategy.scope():
        cache = Cache(SPECS, 2)
    first, second = items(1, 2), items(3, 4)

    @tf.function
    def step():
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            chosen = {
                key: tf.where(
                    tf.reshape(tf.equal(replica, 0), [1] * first[key].shape.rank),
                    first[key],
                    second[key],
                )
                for key in first
            }
            cache.update(new_items=chosen)
            return cache.age, tf.identity(cache.filled)

        return strategy.run(replica_step)

    ages, filled = step()
    for key in SPECS:
        rows = by_replica(cache.data[key])
        np.testing.assert_array_equal(rows[0].numpy(), first[key])
        np.testing.assert_array_equal(rows[1].numpy(), second[key])
    for age, is_filled in zip(
        strategy.experimental_local_results(ages), strategy.experimental_local_results(filled)
    ):
        np.testing.assert_array_equal(age, [0, 0])
        np.testing.assert_array_equal(is_filled, [True, True])


@pytest.mark.parametrize("use_function", [False, True])
def test_an_update_outside_of_the_replicas_reaches_each_of_them(use_function):
    strategy = two_replicas()
    with strategy.scope():
        cache = Cache(SPECS, 2)
        update = tf.function(cache.update) if use_function else cache.update
        update(new_items=items(7))
    for key in SPECS:
        for rows in strategy.experimental_local_results(cache.data[key]):
            np.testing.assert_array_equal(rows.numpy()[:1], items(7)[key])


def test_config_round_trip():
    cache = Cache(SPECS, 5, use_lru=False, name="rows")
    copy = Cache.from_config(cache.get_config())
    assert (copy.cache_size, copy.use_lru, copy.embedding_key, copy.name) == (
        5,
        False,
        "embedding",
        "rows",
    )
    copy.update(new_items=items(3))
    assert_rows(copy, [3] + [None] * 4)
    # What Keras writes to disk is JSON.
    again = keras.layers.deserialize(keras.layers.serialize(cache), custom_objects={"Cache": Cache})
    assert again.get_config()["specs"] == cache.get_config()["specs"]


def test_a_checkpoint_holds_every_row_and_its_age(tmp_path):
    cache = Cache(SPECS, 3)
    cache.update(new_items=items(1, 2))
    path = tf.train.Checkpoint(cache=cache).save(str(tmp_path / "checkpoint"))
    restored = Cache(SPECS, 3)
    tf.train.Checkpoint(cache=restored).restore(path).assert_consumed()
    assert_rows(restored, [1, 2, None])
    np.testing.assert_array_equal(restored.age, [0, 0, 1])


def test_as_negative_cache_shares_the_rows():
    cache = Cache(SPECS, 2)
    view = cache.as_negative_cache()
    cache.update(new_items=items(1))
    assert view.data["embedding"] is cache.embeddings
    np.testing.assert_array_equal(view.age, [0, 0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cache_size": 0}, "`cache_size` must be an integer >= 1. Received: 0"),
        ({"embedding_key": "vector"}, "Received: 'vector', and specs for .'embedding', 'id'"),
        ({"embedding_key": "tokens"}, r"floating point of shape \[dim\]"),
        ({"embedding_key": "title"}, r"floating point of shape \[dim\]"),
        ({"specs": {}}, "`specs` must map at least one feature name"),
        ({"specs": {"embedding": tf.float32}}, "FixedLenFeature.*Received for 'embedding'"),
    ],
)
def test_constructor_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Cache(**{"specs": SPECS, "cache_size": 4, **changes})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"new_items": items(1, 2, 3)}, "fit into the cache.*3 rows for a `cache_size` of 2"),
        ({"new_items": {"id": [1]}}, "`new_items` must have exactly the keys.*Received.*.'id'"),
        ({"new_items": {**items(1), "age": [1]}}, "`new_items` must have exactly the keys"),
        ({"new_items": {**items(1), "title": tf.constant([1])}}, "dtype string.*dtype int32"),
        ({"new_items": {**items(1), "tokens": tf.zeros([1, 2], tf.int32)}}, r"shape \(1, 2\)"),
        ({"new_items": {**items(1), "id": tf.constant([1, 2], tf.int64)}}, "same number of items"),
        ({"new_items_mask": [True, False]}, r"`new_items_mask` must be boolean of shape \(1,\)"),
        ({"new_items_mask": [1]}, "`new_items_mask` must be boolean"),
        ({"updated_item_data": items(1)}, "needs `updated_item_indices`. Received None"),
        (
            {"updated_item_data": {"age": [1]}, "updated_item_indices": [0]},
            "`updated_item_data` must have some of the keys",
        ),
        (
            {"updated_item_data": items(1), "updated_item_indices": [0, 1]},
            r"`updated_item_indices` must be integers of shape \(1,\)",
        ),
        (
            {
                "updated_item_data": items(1),
                "updated_item_indices": [0],
                "updated_item_mask": [True, True],
            },
            r"`updated_item_mask` must be boolean of shape \(1,\)",
        ),
    ],
)
def test_update_refuses_and_changes_nothing(arguments, message):
    cache = Cache(SPECS, 2)
    cache.update(new_items=items(1))
    with pytest.raises(ValueError, match=message):
        cache.update(**{"new_items": items(5), **arguments})
    assert_rows(cache, [1, None])
    np.testing.assert_array_equal(cache.age, [0, 1])


@st.composite
def histories(draw):
    """A cache size, LRU or not, and the new and updated rows of some updates, with masks."""
    size = draw(st.integers(2, 12))
    masks = lambda n: st.lists(st.booleans(), min_size=n, max_size=n)  # noqa: E731
    updates = []
    for _ in range(draw(st.integers(1, 12))):
        new_mask = draw(masks(draw(st.integers(0, size))))
        rows = draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size))
        updates.append((new_mask, rows, draw(masks(len(rows)))))
    return size, draw(st.booleans()), updates


@pytest.mark.one_keras
@given(histories(), st.integers(1, 5))
def test_a_queue_of_the_oldest_rows_changes_nothing(history, queue_size):
    size, use_lru, updates = history
    specs = {"embedding": tf.io.FixedLenFeature([1], tf.float32)}
    manager = CacheManager(specs, size, use_lru=use_lru)
    expected = manager.init_cache()
    with mock.patch.object(times, "_QUEUE_SIZE", queue_size):
        cache = Cache(specs, size, use_lru=use_lru)
        assert bool(cache._times.variables["queue"]) == (size > queue_size)
        for step, (new_mask, rows, mask) in enumerate(updates):
            update = {
                "new_items": {"embedding": 100.0 * step + np.arange(len(new_mask))[:, None]},
                "new_items_mask": np.array(new_mask, bool),
                "updated_item_data": {"embedding": -100.0 * step - np.array(rows, "f")[:, None]},
                "updated_item_indices": np.array(rows, np.int64),
                "updated_item_mask": np.array(mask, bool),
            }
            cache.update(**update)
            expected = manager.update_cache(expected, **update)
            np.testing.assert_array_equal(cache.embeddings, expected.data["embedding"])
            np.testing.assert_array_equal(cache.age, expected.age)
            assert int(cache.num_filled) == np.count_nonzero(cache.filled)


def test_a_queue_does_not_prefer_rows_that_were_touched_in_the_update_that_made_it():
    specs = {"embedding": tf.io.FixedLenFeature([1], tf.float32)}
    one = {"new_items": {"embedding": [[5.0]]}}
    with mock.patch.object(times, "_QUEUE_SIZE", 3):
        cache = Cache(specs, 4)
        # Rows 2 and 3 are refreshed, and the queue is 0, 1, 2 as row 0 is replaced.
        cache.update(
            **one,
            updated_item_data={"embedding": [[2.0], [3.0]]},
            updated_item_indices=[2, 3],
        )
        cache.update(**one)
        np.testing.assert_array_equal(cache.age, [1, 0, 1, 1])
        # Rows 0, 2 and 3 are as old as each other, and row 0 is not in the queue any more.
        cache.update(**one)
    np.testing.assert_array_equal(cache.age, [0, 1, 2, 2])


@pytest.mark.parametrize("rows", [8, None])
def test_a_batch_larger_than_the_queue_compiles(rows):
    specs = {"embedding": tf.io.FixedLenFeature([1], tf.float32)}
    with mock.patch.object(times, "_QUEUE_SIZE", 6):
        cache = Cache(specs, 20)

        @tf.function(input_signature=[tf.TensorSpec([rows, 1])])
        def step(embeddings):
            cache.update(new_items={"embedding": embeddings})

        for number in range(3):
            step(tf.fill([8, 1], float(number)))
    # 16 rows are filled in order; of the last 8 items 4 go to the last rows, 4 to the oldest.
    expected = [2.0] * 4 + [0.0] * 4 + [1.0] * 8 + [2.0] * 4
    np.testing.assert_array_equal(cache.embeddings[:, 0], expected)


def test_a_queue_is_used_and_made_anew_as_it_runs_out():
    specs = {"embedding": tf.io.FixedLenFeature([1], tf.float32)}
    with mock.patch.object(times, "_QUEUE_SIZE", 6):
        cache = Cache(specs, 20)
        with mock.patch.object(OldestRows, "of", wraps=OldestRows.of) as made:
            for step in range(9):
                cache.update(new_items={"embedding": np.full([2, 1], float(step), "f")})
    # Each queue of 6 serves 3 updates of 2.
    assert made.call_count == 3
