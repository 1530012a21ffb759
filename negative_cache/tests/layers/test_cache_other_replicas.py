"""Tests of caches that are loaded on another number of replicas than they were saved on."""

import json

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.layers import Cache, TreeIndex
from negative_cache.layers._cache import times
from negative_cache.layers._negatives.pool import emptiest_first
from negative_cache.layers._variables import by_replica
from negative_cache.ops.cache_rows import is_filled, times_of
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import DIM, Table
from negative_cache.tests.replicas import run_on, scope_of

CORPUS = {
    "id": tf.io.FixedLenFeature([], tf.int64),
    "embedding": tf.io.FixedLenFeature([DIM], tf.float32),
}
SPECS = {
    "id": tf.io.FixedLenFeature([], tf.int64),
    "title": tf.io.FixedLenFeature([2], tf.string),
    "pixels": tf.io.FixedLenFeature([2], tf.uint8),
    "count": tf.io.FixedLenFeature([], tf.int32),
    "embedding": tf.io.FixedLenFeature([DIM], tf.bfloat16),
}
NUM_CANDIDATES = 13
VALUES = np.random.default_rng(5).normal(size=[NUM_CANDIDATES, DIM]).astype(np.float32)


def load_keras(saved, fresh, folder):
    """Loads into a cache what another one has, as Keras does: first the cache, then its index."""
    for theirs, ours in ((saved, fresh), (saved.index, fresh.index)):
        if theirs is not None:
            store = {}
            theirs.save_own_variables(store)
            ours.load_own_variables(store)


def load_checkpoint(saved, fresh, folder):
    """Likewise, as TensorFlow does."""
    path = tf.train.Checkpoint(saved).write(str(folder / "layer"))
    status = tf.train.Checkpoint(fresh).read(path)
    assert fresh._untracked.gathered == {}
    has_queue = [bool(cache._times.unused_queue()) for cache in (saved, fresh)]
    if fresh.num_replicas <= saved.num_replicas and has_queue[0] == has_queue[1]:
        status.assert_consumed()
    else:
        # To replicas that the checkpoint does not have, nothing in it belongs.
        status.expect_partial()


# From how many replicas to how many, and by what.
MOVES = [
    (1, 2, load_keras),
    (2, 1, load_checkpoint),
    (2, 4, load_checkpoint),
    (4, 2, load_keras),
    (4, 2, load_checkpoint),
]


def features_of(ids):
    ids = np.asarray(ids)
    return {
        "id": ids.astype(np.int64),
        "title": np.array([[f"title {i}", ""] for i in ids]).reshape([-1, 2]),
        "pixels": np.stack([ids, ids + 1], axis=1).astype(np.uint8),
        "count": -ids.astype(np.int32),
        "embedding": tf.constant(np.stack([ids + i for i in range(DIM)], 1), tf.bfloat16),
    }


def stream(num_replicas, size, num_updates=5, **kwargs):
    """A cache whose replicas have had as many rows as they have numbers, and 1, at each update."""
    with scope_of(num_replicas):
        cache = Cache(SPECS, size, **kwargs)
    for update in range(num_updates):

        def write(replica, update=update):
            ids = 100 * int(replica) + 10 * update + np.arange(int(replica) + 1)
            cache.update(new_items=features_of(ids))

        run_on(num_replicas, write)
    return cache


def shards(cache):
    """For each replica, what its filled rows are: id -> the other features and the age."""
    names = sorted(cache.specs)
    parts = [by_replica(cache.data[name]) for name in names]
    stamps, step = by_replica(cache._times.stamps), by_replica(cache.step)
    found = []
    for i, stamp in enumerate(stamps):
        rows = np.flatnonzero(is_filled(stamp.value()))
        ages = step[i].numpy() - times_of(stamp.value()).numpy()
        values = [part[i].numpy()[rows].tolist() for part in parts]
        ids = values.pop(names.index("id"))
        found.append(dict(zip(ids, zip(*values, ages[rows].tolist()))))
        assert int(by_replica(cache.num_filled)[i]) == len(rows) == len(found[-1])
    return found


def union(cache):
    return {key: value for shard in shards(cache) for key, value in shard.items()}


def skip(cache, counts):
    for variable, count in zip(by_replica(cache.num_skipped), counts):
        variable.assign(count)


@pytest.mark.parametrize("old, new, load", MOVES)
def test_all_rows_of_a_stream_are_there_and_divided_evenly(old, new, load, tmp_path, monkeypatch):
    # A cache of more rows keeps a queue: here one of the two does.
    monkeypatch.setattr(times, "_QUEUE_SIZE", 12)
    cache = stream(old, 17 if old == 1 else 9)
    skip(cache, range(1, old + 1))
    with scope_of(new):
        fresh = Cache(SPECS, 9 if old == 1 else 17)
    load(cache, fresh, tmp_path)
    assert union(fresh) == union(cache) and len(union(fresh)) >= 5
    counts = [len(shard) for shard in shards(fresh)]
    total = sum(counts)
    owners = emptiest_first(tf.zeros([new], tf.int32), total, 0).numpy()
    assert counts == np.bincount(owners, minlength=new).tolist()
    # Each shard has old ones and young ones.
    ages = [[value[-1] for value in shard.values()] for shard in shards(fresh)]
    assert max(map(np.mean, ages)) - min(map(np.mean, ages)) <= 1.0
    assert [int(step) for step in by_replica(fresh.step)] == [5] * new
    assert sum(int(part) for part in by_replica(fresh.num_skipped)) == old * (old + 1) / 2


@pytest.mark.parametrize("load", [load_keras, load_checkpoint])
def test_with_less_room_the_oldest_rows_are_dropped_with_a_warning(load, tmp_path):
    cache = stream(4, 4, num_updates=4)
    with scope_of(2):
        fresh = Cache(SPECS, 3)
    rows = union(cache)
    assert len(rows) == 16
    message = r"has 16 rows .* 3 on each of 2 .* the 10 oldest were .* of 8 would"
    with pytest.warns(UserWarning, match=message):
        load(cache, fresh, tmp_path)
    kept = union(fresh)
    assert len(kept) == 6 and all(rows[key] == value for key, value in kept.items())
    dropped = [value[-1] for key, value in rows.items() if key not in kept]
    assert min(dropped) >= max(value[-1] for value in kept.values())


def test_a_divided_cache_goes_on_by_replacing_its_oldest_rows():
    cache, fresh = stream(2, 9, num_updates=3), Cache(SPECS, 10)
    load_keras(cache, fresh, None)
    # 0, 10, 20 and 100, 101, 110, 111, 120, 121: one row is empty, and the oldest come next.
    fresh.update(new_items=features_of([7]))
    assert sorted(union(fresh)) == [0, 7, 10, 20, 100, 101, 110, 111, 120, 121]
    fresh.update(new_items=features_of([8, 9, 6]))
    assert sorted(union(fresh)) == [6, 7, 8, 9, 10, 20, 110, 111, 120, 121]
    assert [union(fresh)[key][-1] for key in (6, 7, 10, 20)] == [0, 1, 3, 2]


def empty_corpus(num_replicas, size=None):
    with scope_of(num_replicas):
        size = -(-NUM_CANDIDATES // num_replicas) if size is None else size
        return Cache(CORPUS, size, row_key="id", sharded=True)


def corpus(num_replicas, size=None):
    """A corpus over replicas, in which candidates have come to different ages."""
    cache = empty_corpus(num_replicas, size)
    # The embedding of one is not finite, and not in its row.
    rows = np.where(np.arange(NUM_CANDIDATES)[:, np.newaxis] == 6, np.nan, VALUES)
    with scope_of(num_replicas):
        cache.fill([{"id": np.arange(NUM_CANDIDATES), "embedding": rows}], verbose=0)
    for ids in ([1, 2], [12, 5, 99]):
        items = {"id": ids, "embedding": np.full([len(ids), DIM], ids[0] + 0.5, np.float32)}
        run_on(num_replicas, lambda replica: cache.update(new_items=items))  # noqa: B023
    return cache


@pytest.mark.parametrize("old, new, load", MOVES)
def test_every_candidate_of_a_corpus_goes_to_its_owner(old, new, load, tmp_path):
    cache, fresh = corpus(old), empty_corpus(new)
    load(cache, fresh, tmp_path)
    assert union(fresh) == union(cache) and len(union(fresh)) == NUM_CANDIDATES - 1
    found = []
    run_on(new, lambda replica: found.append(fresh.rows_of(tf.range(15, dtype=tf.int64)).numpy()))
    places = np.arange(15)
    for replica, rows in enumerate(found):
        is_own = (places % new == replica) & (places < NUM_CANDIDATES)
        np.testing.assert_array_equal(rows, np.where(is_own, places // new, -1))
        ids = by_replica(fresh.data["id"])[replica].numpy()
        own = [i for i in range(replica, NUM_CANDIDATES, new) if i != 6]
        assert [ids[i // new] for i in own] == own
    # What had no finite embedding has a row all the same, and comes into it.
    items = {"id": [6], "embedding": np.ones([1, DIM], np.float32)}
    run_on(new, lambda replica: fresh.update(new_items=items))
    assert sorted(union(fresh)) == list(range(NUM_CANDIDATES))


@pytest.mark.parametrize("load", [load_keras, load_checkpoint])
def test_a_corpus_that_does_not_fit_is_refused_with_the_size_that_it_needs(load, tmp_path):
    cache, small = corpus(4), empty_corpus(2, size=6)
    with pytest.raises(ValueError, match="13 candidates.* 6 on each of 2 .* at least 7"):
        load(cache, small, tmp_path)
    assert union(small) == {}


def test_a_configuration_makes_as_many_rows_as_the_corpus_needs():
    cache = corpus(2)
    again = Cache.from_config(cache.get_config())
    load_keras(cache, again, None)
    assert again.cache_size == 14 and union(again) == union(cache)
    with scope_of(4):
        again = Cache.from_config(cache.get_config())
    assert again.cache_size == 4
    # Of an earlier version, which did not say how many shards there were.
    config = {key: value for key, value in cache.get_config().items() if key != "num_shards"}
    assert Cache.from_config(config).cache_size == 7


@pytest.mark.parametrize(
    "old, new, load", [(1, 2, load_keras), (2, 1, load_checkpoint)], ids=["1 to 2", "2 to 1"]
)
def test_a_corpus_that_every_replica_has_is_copied_with_its_index(old, new, load, tmp_path):
    def make(num_replicas):
        with scope_of(num_replicas):
            index = TreeIndex(NUM_CANDIDATES, DIM, leaf_size=4)
            return Cache(CORPUS, NUM_CANDIDATES, row_key="id", index=index)

    cache, fresh = make(old), make(new)
    with scope_of(old):
        cache.fill([{"id": np.arange(NUM_CANDIDATES), "embedding": VALUES}], verbose=0)
    load(cache, fresh, tmp_path)
    for shard in shards(fresh):
        assert shard == union(cache) and len(shard) == NUM_CANDIDATES
    check_index_of(fresh, new)


@pytest.mark.parametrize(
    "old, new, load", [(1, 2, load_checkpoint), (2, 1, load_keras)], ids=["1 to 2", "2 to 1"]
)
def test_the_index_of_a_stream_is_made_of_the_rows_that_are_there(
    old, new, load, tmp_path, request
):
    def make(num_replicas):
        with scope_of(num_replicas):
            size = 12 // num_replicas
            return Cache(SPECS, size, index=TreeIndex(size, DIM, leaf_size=4))

    cache, fresh = make(old), make(new)
    # A few small steps are faster than a graph of them.
    tf.config.run_functions_eagerly(True)
    request.addfinalizer(lambda: tf.config.run_functions_eagerly(False))

    def write(replica):
        cache.update(new_items=features_of(10 * int(replica) + np.arange(5)))

    run_on(old, write)
    load(cache, fresh, tmp_path)
    assert union(fresh) == union(cache) and len(union(cache)) == 5 * old
    check_index_of(fresh, new)


def check_index_of(cache, num_replicas):
    """Checks that the index of each replica has its filled rows, at their embeddings."""
    queries = np.random.default_rng(1).normal(size=[3, DIM]).astype(np.float32)
    results = {}

    def ask(replica):
        lower, upper = cache.index.log_partition_bounds(queries, temperature=10.0)
        results[int(replica)] = [int(cache.index.num_candidates), lower, upper]

    run_on(num_replicas, ask)
    assert len(results) == num_replicas
    for replica, (count, lower, upper) in results.items():
        filled = is_filled(by_replica(cache._times.stamps)[replica].value()).numpy()
        rows = by_replica(cache.embeddings)[replica].numpy()[filled].astype(np.float64)
        assert count == len(rows) > 0
        exact = np.logaddexp.reduce(queries @ rows.T / 10.0, axis=1)
        assert np.all(lower <= exact + 1e-4) and np.all(exact <= upper + 1e-4)


def test_each_part_of_a_corpus_has_an_index_of_its_own():
    with scope_of(2):
        index = TreeIndex(7, DIM, leaf_size=4)
        options = {"candidate_id_key": "id", "sharded": True, "verbose": 0}
        cache = Cache.from_dataset(
            corpus_of(NUM_CANDIDATES, 13), Table(VALUES), index=index, **options
        )
    assert [len(shard) for shard in shards(cache)] == [7, 6]
    check_index_of(cache, 2)


def test_an_index_without_a_cache_is_refused():
    with scope_of(2):
        index, store = TreeIndex(4, DIM), {}
    index.save_own_variables(store)
    with pytest.raises(ValueError, match="cannot be divided.* of 2 replicas .* Wanted: of 1"):
        TreeIndex(4, DIM).load_own_variables(store)


def without_replicas(store):
    """What an earlier version would have written."""
    description = json.loads(store["description"].tobytes().decode())
    assert description.pop("replicas_in_file") == description.pop("num_replicas")
    text = json.dumps(description, sort_keys=True).encode()
    return {**store, "description": np.frombuffer(text, np.uint8)}


@pytest.mark.parametrize("make", [lambda n: stream(n, 9), corpus])
def test_a_file_says_how_many_replicas_it_has_and_an_old_one_is_counted(make):
    cache, store = make(2), {}
    cache.save_own_variables(store)
    description = json.loads(store["description"].tobytes().decode())
    assert description["num_replicas"] == 2 and description["cache_size"] == cache.cache_size
    for num_replicas in (2, 1):
        fresh = empty_corpus(num_replicas)
        if not cache.sharded:
            fresh = stream(num_replicas, 18 // num_replicas, num_updates=0)
        fresh.load_own_variables(without_replicas(store))
        assert union(fresh) == union(cache)


def test_an_old_checkpoint_is_restored_on_as_many_replicas(tmp_path, monkeypatch):
    cache = stream(2, 9)
    monkeypatch.setattr(cache, "_description_in_file", lambda: cache._description)
    path = tf.train.Checkpoint(cache).write(str(tmp_path / "cache"))
    fresh = stream(2, 9, num_updates=0)
    tf.train.Checkpoint(fresh).read(path).assert_consumed()
    assert shards(fresh) == shards(cache)


def test_another_size_is_refused_on_as_many_replicas():
    store = {}
    stream(2, 9).save_own_variables(store)
    with pytest.raises(ValueError, match="does not fit"):
        stream(2, 10).load_own_variables(store)


def test_a_file_of_one_of_several_workers_is_refused():
    cache, store = stream(2, 9), {}
    cache.save_own_variables(store)
    text = store["description"].tobytes().replace(b'"num_replicas": 2', b'"num_replicas": 4')
    store["description"] = np.frombuffer(text, np.uint8)
    with scope_of(4):
        fresh = Cache(SPECS, 9)
    with pytest.raises(ValueError, match="one of several workers.* of 2 of 4 replicas"):
        fresh.load_own_variables(store)


def test_a_damaged_file_of_other_replicas_is_refused_and_changes_nothing():
    cache, fresh, store = stream(2, 9), stream(1, 18, num_updates=2), {}
    cache.save_own_variables(store)
    before = union(fresh)
    numbers = {key.split("_")[0] for key in store if key != "description"}
    assert len(numbers) == 9
    # The last rows of a feature are missing, and then all of it.
    for damage in ("short", "missing"):
        for number in numbers:
            values = store[f"{number}_1"]
            if damage == "short" and not (values.ndim and len(values) == 9):
                continue
            damaged = {**store, f"{number}_1": values[:2] if damage == "short" else None}
            if damage == "missing":
                del damaged[f"{number}_1"]
            with pytest.raises(ValueError, match="The file is damaged"):
                fresh.load_own_variables(damaged)
    negative = {**store, "description": store["description"].copy()}
    text = store["description"].tobytes().replace(b'_in_file": 2', b'_in_file": 0')
    negative["description"] = np.frombuffer(text, np.uint8)
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        fresh.load_own_variables(negative)
    assert union(fresh) == before
