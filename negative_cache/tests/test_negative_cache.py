"""`CacheManager`, and the law that it shares with `layers.Cache`."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from negative_cache import util
from negative_cache.layers.cache import Cache
from negative_cache.negative_cache import CacheManager, NegativeCache
from negative_cache.tests.replicas import run_on_two_replicas

pytestmark = pytest.mark.one_keras

SPECS = {
    "embedding": tf.io.FixedLenFeature([2], tf.float32),
    "id": tf.io.FixedLenFeature([], tf.int32),
    "title": tf.io.FixedLenFeature([], tf.string),
    "table": tf.io.FixedLenFeature([2, 3], tf.int64),
}


def make_items(keys, numbers):
    """Items whose features all tell the item's number."""
    numbers = np.asarray(numbers, np.int64)
    items = {
        "embedding": np.stack([numbers + 0.5, -numbers], axis=1).astype(np.float32),
        "id": numbers.astype(np.int32),
        "title": np.array([b"item %d" % number for number in numbers], object),
        "table": numbers[:, np.newaxis, np.newaxis] * 10 + np.arange(6).reshape(2, 3),
    }
    return {key: tf.constant(items[key], SPECS[key].dtype) for key in keys}


class ModelCache:
    """What a cache must be, written with lists: one dict a row, one age a row."""

    def __init__(self, cache_size, use_lru):
        self.rows = [
            {"embedding": [0, 0], "id": 0, "title": b"", "table": [[0] * 3] * 2}
            for _ in range(cache_size)
        ]
        self.ages = [0] * cache_size
        self.use_lru = use_lru

    def update(self, new_items, new_mask, data, indices, mask):
        self.ages = [age + 1 for age in self.ages]
        for entry, (row, is_updated) in enumerate(zip(indices, mask)):
            if is_updated:
                self.rows[row].update({key: data[key][entry] for key in data})
                if self.use_lru:
                    self.ages[row] = 0
        # Python's sort is stable, so that among equals the smallest row stays first.
        oldest = sorted(range(len(self.ages)), key=lambda row: -self.ages[row])
        kept = [entry for entry, is_new in enumerate(new_mask) if is_new]
        for row, entry in zip(oldest, kept):
            self.rows[row] = {key: new_items[key][entry] for key in new_items}
            self.ages[row] = 0


class CachesAgree(RuleBasedStateMachine):
    """`CacheManager`, `layers.Cache` and `ModelCache` under the same random updates."""

    @initialize(cache_size=st.integers(1, 7), use_lru=st.booleans())
    def start(self, cache_size, use_lru):
        self.manager = CacheManager(SPECS, cache_size, use_lru)
        self.cache = self.manager.init_cache()
        self.layer = Cache(SPECS, cache_size, use_lru=use_lru)
        self.model = ModelCache(cache_size, use_lru)
        self.next_item = 1

    @rule(data=st.data())
    def update(self, data):
        cache_size = len(self.model.rows)
        new_mask = data.draw(st.lists(st.booleans(), min_size=1, max_size=cache_size))
        rows = data.draw(st.lists(st.integers(0, cache_size - 1), unique=True))
        mask = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
        keys = data.draw(st.lists(st.sampled_from(sorted(SPECS)), min_size=1, unique=True))
        new_items = make_items(SPECS, self._number(len(new_mask)))
        updates = make_items(keys, self._number(len(rows)))
        # The row of an entry that is masked may be anything.
        received_rows = [row if used else -7 for row, used in zip(rows, mask)]
        arguments = {
            "new_items": new_items,
            "new_items_mask": None if all(new_mask) else tf.constant(new_mask),
            "updated_item_data": updates,
            "updated_item_indices": tf.constant(received_rows, tf.int64),
            "updated_item_mask": None if all(mask) else tf.constant(mask),
        }
        self.cache = self.manager.update_cache(self.cache, **arguments)
        self.layer.update(**arguments)
        as_numpy = [
            {key: value.numpy() for key, value in items.items()} for items in (new_items, updates)
        ]
        self.model.update(as_numpy[0], new_mask, as_numpy[1], rows, mask)

    @rule(count=st.integers(1, 7))
    def insert(self, count):
        new_items = make_items(SPECS, self._number(min(count, len(self.model.rows))))
        self.cache = self.manager.update_cache(self.cache, new_items=new_items)
        self.layer.update(new_items=new_items)
        as_numpy = {key: value.numpy() for key, value in new_items.items()}
        self.model.update(as_numpy, [True] * len(as_numpy["id"]), {}, [], [])

    @invariant()
    def agree(self):
        for cache in (self.cache, self.layer.as_negative_cache()):
            np.testing.assert_array_equal(cache.age.numpy(), self.model.ages)
            for key in SPECS:
                expected = np.array([row[key] for row in self.model.rows])
                received = np.array(cache.data[key].numpy().tolist())
                np.testing.assert_array_equal(received, expected)

    def _number(self, count):
        self.next_item += count
        return range(self.next_item - count, self.next_item)


TestCachesAgree = CachesAgree.TestCase
TestCachesAgree.settings = settings(max_examples=25, stateful_step_count=20)


def ids_and_ages(cache):
    return cache.data["id"].numpy().tolist(), cache.age.numpy().tolist()


@pytest.fixture
def manager():
    return CacheManager({"id": tf.io.FixedLenFeature([], tf.int32)}, cache_size=4)


def update(manager, cache, new, updated=None, rows=None):
    return manager.update_cache(
        cache,
        new_items={"id": tf.constant(new, tf.int32)},
        updated_item_data=None if updated is None else {"id": tf.constant(updated, tf.int32)},
        updated_item_indices=None if rows is None else tf.constant(rows, tf.int32),
    )


@pytest.mark.parametrize(("use_lru", "expected"), [(True, [1, 8, 3, 4]), (False, [8, 2, 3, 4])])
def test_lru_spares_an_updated_row(use_lru, expected):
    manager = CacheManager({"id": tf.io.FixedLenFeature([], tf.int32)}, 4, use_lru=use_lru)
    cache = manager.init_cache()
    for item in (1, 2, 3, 4):
        cache = update(manager, cache, [item])
    assert ids_and_ages(cache) == ([1, 2, 3, 4], [3, 2, 1, 0])
    # Row 0 is the oldest. With LRU the update makes it young, and row 1 is replaced.
    cache = update(manager, cache, [8], updated=[1], rows=[0])
    assert ids_and_ages(cache) == (expected, [0, 0, 2, 1] if use_lru else [0, 3, 2, 1])


def test_is_a_pure_function(manager):
    cache = update(manager, manager.init_cache(), [1, 2])
    update(manager, cache, [3, 4, 5], updated=[9], rows=[0])
    assert ids_and_ages(cache) == ([1, 2, 0, 0], [0, 0, 1, 1])


def test_new_items_by_position(manager):
    cache = manager.update_cache(manager.init_cache(), new_items={"id": [5]})
    assert ids_and_ages(cache) == ([5, 0, 0, 0], [0, 1, 1, 1])


def test_empty_batches_change_ages_only(manager):
    cache = update(manager, manager.init_cache(), [1, 2])
    cache = update(manager, cache, [], updated=[], rows=[])
    assert ids_and_ages(cache) == ([1, 2, 0, 0], [1, 1, 2, 2])


def test_data_of_another_floating_dtype_are_cast():
    manager = CacheManager({"e": tf.io.FixedLenFeature([2], tf.bfloat16)}, 2)
    cache = manager.update_cache(manager.init_cache(), new_items={"e": tf.ones([1, 2])})
    assert cache.data["e"].dtype == tf.bfloat16


def test_no_gradient_enters():
    manager = CacheManager({"e": tf.io.FixedLenFeature([2], tf.float32)}, 2)
    embeddings = tf.Variable(tf.ones([1, 2]))
    with tf.GradientTape() as tape:
        cache = manager.update_cache(manager.init_cache(), new_items={"e": embeddings})
        value = tf.reduce_sum(cache.data["e"])
    assert tape.gradient(value, embeddings) is None


def test_in_a_tf_function_without_retrace(manager):
    num_traces = 0

    @tf.function
    def step(cache, items, rows):
        nonlocal num_traces
        num_traces += 1
        return manager.update_cache(
            cache,
            new_items={"id": items},
            updated_item_data={"id": items},
            updated_item_indices=rows,
        )

    cache = manager.init_cache()
    for item in range(1, 5):
        cache = step(cache, tf.constant([item]), tf.constant([item - 1]))
        assert isinstance(cache, NegativeCache)
    eager = manager.init_cache()
    for item in range(1, 5):
        eager = update(manager, eager, [item], updated=[item], rows=[item - 1])
    assert ids_and_ages(cache) == ids_and_ages(eager)
    assert num_traces == 1


def test_under_two_replicas(manager):
    def step():
        cache = manager.init_cache()
        for _ in range(2):
            items = tf.reshape(util.replica_id() + 10, [1])
            cache = manager.update_cache(cache, new_items={"id": items})
        return cache

    for replica, cache in enumerate(run_on_two_replicas(step)):
        assert isinstance(cache, NegativeCache)
        assert ids_and_ages(cache) == ([10 + replica, 10 + replica, 0, 0], [1, 0, 2, 2])


GOOD = {"id": tf.constant([1], tf.int32)}
BAD_UPDATES = {
    "an unknown key": ({"new_items": {"id": [1], "name": [2]}}, r"\['id'\].*\['id', 'name'\]"),
    "a missing key": ({"new_items": {}}, r"exactly the keys \['id'\].*Received keys: \[\]"),
    "dtype": ({"new_items": {"id": tf.constant([1], tf.int64)}}, r"int32.*Received: dtype int64"),
    "float": ({"new_items": {"id": [0.5]}}, r"`new_items\['id'\]` must have dtype int32"),
    "rank": ({"new_items": {"id": tf.constant([[1]])}}, r"\(None,\).*shape \(1, 1\)"),
    "a large batch": ({"new_items": {"id": [1] * 5}}, r"of 5 rows for a `cache_size` of 4"),
    "mask shape": ({"new_items": GOOD, "new_items_mask": [True, False]}, r"shape \(1,\).*\(2,\)"),
    "mask dtype": ({"new_items": GOOD, "new_items_mask": [1]}, r"boolean.*dtype int32"),
    "no indices": ({"new_items": GOOD, "updated_item_data": GOOD}, r"needs `updated_item_indices`"),
    "an unknown updated key": (
        {"new_items": GOOD, "updated_item_data": {"x": [1]}, "updated_item_indices": [0]},
        r"some of the keys \['id'\].*\['x'\]",
    ),
    "indices": (
        {"new_items": GOOD, "updated_item_data": GOOD, "updated_item_indices": [0.5]},
        r"`updated_item_indices` must be integers.*dtype float32",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_UPDATES.values(), ids=BAD_UPDATES.keys())
def test_bad_update(manager, arguments, message):
    with pytest.raises(ValueError, match=message):
        manager.update_cache(manager.init_cache(), **arguments)


def test_different_numbers_of_items():
    manager = CacheManager({key: SPECS[key] for key in ("id", "title")}, 4)
    with pytest.raises(ValueError, match="same number of items.*'id': 2, 'title': 1"):
        manager.update_cache(manager.init_cache(), new_items={"id": [1, 2], "title": ["a"]})


@pytest.mark.parametrize(
    ("specs", "cache_size", "message"),
    [
        ({}, 4, "`specs`.*Received: {}"),
        ({"id": tf.int32}, 4, "FixedLenFeature.*'id'"),
        ({"id": SPECS["id"]}, 0, "`cache_size` must be an integer >= 1. Received: 0"),
    ],
)
def test_bad_manager(specs, cache_size, message):
    with pytest.raises(ValueError, match=message):
        CacheManager(specs, cache_size)
