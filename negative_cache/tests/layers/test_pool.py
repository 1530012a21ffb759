"""Tests of caches that are one pool over replicas: the loss, the gradient, the law, the owners.

The reference has the rows of all replicas in one dense softmax, and knows no replicas.
"""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp

from negative_cache import (
    Cache,
    CachedRetrieval,
    CacheSpec,
    FromCache,
    InBatch,
    Retrieval,
    TreeIndex,
    util,
)
from negative_cache._compat import keras
from negative_cache.layers._variables import by_replica
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.pool_cases import (
    PooledSampler,
    fill_own_shard,
    make_pooled,
    rows_of_all,
)
from negative_cache.tests.layers.retrieval_cases import DIM, Table, call, make_queries, make_task
from negative_cache.tests.layers.shared_draw_cases import CACHED, CASES, ROW_P, STALE, TABLE
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.statistics import assert_mean_is

OWN, SHARED = {"num_negatives": 2}, {"num_draws": 2}


def add_own_shard(task):
    fill_own_shard(task, CACHED, ROW_P)


def pooled(name):
    """A case whose reference knows the rows of all replicas."""
    case = dataclasses.replace(CASES[name], known=rows_of_all)
    return dataclasses.replace(case, set_up=add_own_shard) if name == "log Q" else case


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        ("sampled", OWN),
        ("in-batch, accidental hits", OWN),
        ("known positives", OWN),
        ("margin", OWN),
        ("log Q", OWN),
        ("curve", OWN),
        ("corpus", OWN),
        ("index", OWN),
        ("explicit", OWN),
        ("default", SHARED),
        ("known positives", SHARED),
        ("margin, sampled", SHARED),
        ("log Q", SHARED),
        ("sample weights", SHARED),
        ("corpus", SHARED),
        ("corrector", OWN),
        ("Nyström, sampled", SHARED),
    ],
)
def test_every_variable_gets_the_gradient_of_the_rows_of_all_replicas(name, draws):
    case = pooled(name)
    sampler = PooledSampler(case, make_pooled(case, name, **draws))
    expected = sampler.expected()
    for part, values in zip(expected, sampler.many(500)):
        assert np.any(part != 0.0)
        assert_mean_is(values, part)


def of_replicas(value):
    return [part.numpy() for part in two_replicas().experimental_local_results(value)]


def run(function, *args):
    """What a function returns on each replica, in a graph."""
    return of_replicas(tf.function(lambda: two_replicas().run(function, args))())


class Titles(keras.layers.Layer):
    """A tower that looks candidates up by a string, and checks that all features are of one."""

    def __init__(self, table):
        super().__init__(autocast=False)
        self.table = self.add_weight(
            shape=table.shape, initializer=keras.initializers.Constant(table), name="table"
        )

    def call(self, features):
        number = tf.strings.to_number(tf.strings.substr(features["title"], 0, 2), tf.int32)
        for key, values in features_of(number).items():
            tf.debugging.assert_equal(features[key], values, key)
        return tf.gather(tf.convert_to_tensor(self.table), number)


def features_of(number):
    """Features of every kind, all by the number [n] int32 of a candidate."""
    two_digits = tf.strings.as_string(number, width=2, fill="0")
    lengths = tf.gather(tf.constant(["", "é", " and a longer end"]), number % 3)
    return {
        "title": two_digits + lengths,
        "tags": tf.stack([two_digits, lengths], axis=1),
        "small": tf.cast(number, tf.uint8),
        "half": tf.cast(tf.stack([number, -number], axis=1), tf.bfloat16),
        "flag": tf.equal(number % 2, 0),
        "large": 2**40 + tf.cast(number, tf.int64),
    }


SPECS = {
    "title": tf.io.FixedLenFeature([], tf.string),
    "tags": tf.io.FixedLenFeature([2], tf.string),
    "small": tf.io.FixedLenFeature([], tf.uint8),
    "half": tf.io.FixedLenFeature([2], tf.bfloat16),
    "flag": tf.io.FixedLenFeature([], tf.bool),
    "large": tf.io.FixedLenFeature([], tf.int64),
}


@pytest.mark.parametrize("draws", [OWN, SHARED])
def test_drawn_candidates_come_whole_and_go_home(draws):
    with two_replicas().scope():
        tower = Titles(STALE)
        source = FromCache(CacheSpec(SPECS, 4, embedding_dim=DIM), pool="replicas", seed=1, **draws)
        task = Retrieval(tower, [source], candidate_id_key="title")

    def fill():
        # The second replica has nothing.
        first = tf.range(3, 3 + 4 * (1 - util.replica_id()))
        source.add(features_of(first))

    run(lambda: fill() or tf.constant(0))
    tower.table.assign(TABLE)

    def step():
        # Nor does the first replica have a query.
        own = tf.range(util.replica_id())
        features, queries = features_of(own), tf.constant(make_queries(1))[: util.replica_id()]
        return task(queries, tower(features), features, training=True)

    losses = run(step)
    assert losses[0] == 0.0
    scores = make_queries(1).astype(np.float64) @ STALE[3:7].T
    positive = make_queries(1).astype(np.float64) @ TABLE[0]
    assert losses[1] == pytest.approx(np.logaddexp(positive, logsumexp(scores))[0] - positive[0])
    first, second = (part.numpy() for part in by_replica(source.cache.data["title"]))
    embeddings = by_replica(source.cache.embeddings)[0].numpy()
    numbers = np.array([int(title[:2]) for title in first])
    is_fresh = np.any(embeddings != STALE[numbers], axis=1)
    assert 1 <= np.sum(is_fresh) <= 2
    expected = np.where(is_fresh[:, None], TABLE[numbers], STALE[numbers])
    np.testing.assert_array_equal(embeddings, expected)
    # The candidate of the batch is in the cache of its own replica.
    assert second.tolist() == [b"00", b"", b"", b""]
    np.testing.assert_array_equal(by_replica(source.cache.embeddings)[1][0], TABLE[0])


def test_log_partitions_and_draws_with_known_positives_of_any_number():
    case = pooled("known positives")
    task = make_pooled(case, num_negatives=1, reduction="none")
    known = [tf.ragged.constant([[5], [6, 7, 8], []]), tf.ragged.constant([[9, 10], [1]])]
    queries = make_queries(5)

    def evaluate(ragged, own):
        features = {"id": own}
        candidates = task.candidate_network(features)
        own_queries = tf.gather(queries, own)
        return task(own_queries, candidates, features, known_positive_ids=ragged, training=False)

    values = iter(zip(known, (tf.constant([0, 1, 2], tf.int64), tf.constant([3, 4], tf.int64))))
    ragged, own = zip(*values)
    args = [
        two_replicas().experimental_distribute_values_from_function(
            lambda context, parts=parts: parts[context.replica_id_in_sync_group]
        )
        for parts in (ragged, own)
    ]
    losses = np.concatenate(run(evaluate, *args))
    lists = [[0, 5], [1, 6, 7, 8], [2], [3, 9, 10], [4, 1]]
    positives = np.sum(queries * TABLE[:5], axis=1).astype(np.float64)
    for query, positive, right, loss in zip(queries, positives, lists, losses):
        rows = [row for row in CACHED if row not in right]
        scores = query.astype(np.float64) @ STALE[rows].T
        assert loss == pytest.approx(np.logaddexp(positive, logsumexp(scores)) - positive, rel=1e-5)


def test_a_corpus_is_divided_and_each_row_is_written_by_its_owner():
    case = pooled("corpus")
    task = make_pooled(case, num_negatives=1)
    cache, features = task.cache, {"id": tf.constant([0, 3, 99], tf.int64)}
    ids = [part.numpy() for part in by_replica(cache.data["id"])]
    np.testing.assert_array_equal(ids, [range(0, 16, 2), range(1, 16, 2)])
    del task.cached.end_step

    def step():
        own = {"id": features["id"] + tf.cast(util.replica_id(), tf.int64)}
        candidates = 10.0 * tf.cast(own["id"], tf.float32)[:, tf.newaxis] * tf.ones([1, DIM])
        task(tf.zeros([3, DIM]), candidates, own, training=True)
        return cache.rows_of(tf.constant([4, 5], tf.int64))

    np.testing.assert_array_equal(run(step), [[2, -1], [-1, 2]])
    table = rows_of_all(task)
    # Positives of both replicas: 0, 3 and 1, 4. Others were drawn, or nothing has changed them.
    written = [0, 1, 3, 4]
    np.testing.assert_array_equal(table[written], 10.0 * np.repeat([written], DIM, axis=0).T)
    others = [row for row in range(16) if row not in written]
    is_as_it_was = np.all(table == STALE, axis=1) | np.all(table == TABLE, axis=1)
    assert np.all(is_as_it_was[others]) and not np.all(np.all(table == STALE, axis=1)[others])
    # 99 and 100 are of no replica, and each counts where it came from.
    assert [int(part) for part in by_replica(cache.num_skipped)] == [1, 1]


def test_what_cannot_be_one_pool_is_refused():
    with pytest.raises(ValueError, match='"replicas" or None'):
        FromCache(CacheSpec(SPECS, 4), pool="all")
    with pytest.raises(ValueError, match='"replicas" or None'):
        InBatch(pool=True)
    with pytest.raises(ValueError, match="a `row_key`, can be `sharded`"):
        Cache({"embedding": tf.io.FixedLenFeature([2], tf.float32)}, 4, sharded=True)
    options = {"candidate_id_key": "id", "verbose": 0}
    with two_replicas().scope():
        tower = Table(TABLE)
        with pytest.raises(ValueError, match="cannot have an `index`"):
            index = TreeIndex(8, DIM)
            Cache.from_dataset(corpus_of(16), tower, index=index, sharded=True, **options)
        whole = Cache.from_dataset(corpus_of(16), tower, **options)
        with pytest.raises(ValueError, match="make the cache with `sharded=True`"):
            CachedRetrieval(tower, cache=whole, pool="replicas")


def test_a_configuration_has_the_pool():
    source = FromCache(CacheSpec(SPECS, 4), pool="replicas")
    assert FromCache.from_config(source.get_config()).pool == "replicas"
    assert InBatch.from_config(InBatch(pool="replicas").get_config()).pool == "replicas"
    cache = Cache.from_dataset(
        corpus_of(4), Table(TABLE), candidate_id_key="id", verbose=0, sharded=True
    )
    again = Cache.from_config(cache.get_config())
    assert again.sharded and again.cache_size == 4
    tower, spec = keras.layers.Dense(2), tf.io.FixedLenFeature([2], tf.float32)
    task = CachedRetrieval(tower, spec, 4, pool="replicas", in_batch_negatives=True)
    again = CachedRetrieval.from_config(task.get_config())
    assert [again.pool, again.negatives[0].pool, again.cached.pool] == ["replicas"] * 3


def test_one_replica_is_a_pool_of_its_own():
    losses = []
    for pool in (None, "replicas"):
        task = make_task(TABLE, filled_with=[3, 4, 5], pool=pool, in_batch_negatives=True)
        losses.append(call(task, make_queries(2), [0, 1], TABLE, training=True).numpy())
    assert losses[0] == losses[1]
