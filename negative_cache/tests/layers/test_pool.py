"""Tests of caches that are one pool over replicas: the loss, the gradient, the law, the owners.

The reference has the rows of all replicas in one dense softmax, and knows no replicas.
"""

import dataclasses
import functools

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
    ops,
    util,
)
from negative_cache._compat import keras
from negative_cache.layers._negatives import samplers
from negative_cache.layers._variables import by_replica
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.pool_cases import (
    PooledSampler,
    fill_own_shard,
    make_pooled,
    rows_of_all,
)
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    Table,
    assert_same_state,
    call,
    copy_of_state,
    make_queries,
    make_task,
)
from negative_cache.tests.layers.shared_draw_cases import (
    CACHED,
    CASES,
    ROW_P,
    STALE,
    TABLE,
    as_variable,
)
from negative_cache.tests.replicas import run_on_two_replicas, two_replicas
from negative_cache.tests.statistics import assert_mean_is

OWN, SHARED = {"num_negatives": 2}, {"num_draws": 2}


def add_own_shard(task):
    fill_own_shard(task, CACHED, ROW_P)


def pooled(name):
    """A case whose reference knows the rows of all replicas."""
    case = dataclasses.replace(CASES[name], known=rows_of_all)
    return dataclasses.replace(case, set_up=add_own_shard) if name == "log Q" else case


OF_ONE_KERAS = [
    ("sampled", OWN),
    ("in-batch, accidental hits", OWN),
    ("known positives", OWN),
    ("margin", OWN),
    ("log Q", OWN),
    ("curve", OWN),
    ("corpus", OWN),
    ("index", OWN),
    ("explicit", OWN),
    ("known positives", SHARED),
    ("margin, sampled", SHARED),
    ("log Q", SHARED),
    ("sample weights", SHARED),
    ("corpus", SHARED),
    ("corrector", OWN),
    ("Nyström, sampled", SHARED),
]


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        ("default", SHARED),
        *(pytest.param(*case, marks=pytest.mark.one_keras) for case in OF_ONE_KERAS),
    ],
)
def test_every_variable_gets_the_gradient_of_the_rows_of_all_replicas(name, draws):
    case = pooled(name)
    sampler = PooledSampler(case, make_pooled(case, name, **draws))
    expected = sampler.expected()
    for part, values in zip(expected, sampler.many(500)):
        assert np.any(part != 0.0)
        assert_mean_is(values, part)


@pytest.mark.one_keras
@pytest.mark.parametrize("draws", [OWN, SHARED])
def test_the_shard_of_a_draw_and_the_row_share_no_random_number(monkeypatch, draws):
    # In one block, the sampler has no number to choose a block by.
    in_blocks = functools.partial(ops.sample_softmax_with_gradient, block_size=1)
    monkeypatch.setattr(samplers, "sample_softmax_with_gradient", in_blocks)
    case = pooled("sampled")
    sampler = PooledSampler(case, make_pooled(case, **draws))
    for part, values in zip(sampler.expected(), sampler.many(500)):
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
    # The whole corpus, and of two steps what was drawn.
    assert [int(part) for part in by_replica(task.cached._state.num_encoded)] == [16 + 3, 3]


@pytest.mark.parametrize("num_hard", [None, 2])
def test_the_batches_of_all_replicas_are_one(num_hard):
    with two_replicas().scope():
        options = {"candidate_id_key": "id", "remove_accidental_hits": True, "reduction": "none"}
        sources = [InBatch(num_hard, pool="replicas")]
        task = Retrieval(Table(TABLE), sources, false_negative_margin=-0.5, **options)
    # Candidate 0 is the positive of a query on each replica, and 3 is right for query 1 as well.
    ids, known = [[0, 1, 2], [3, 0]], [[[-1], [3], [-1]], [[-1], [-1]]]
    queries = make_queries(5)

    def evaluate():
        first = tf.equal(util.replica_id(), 0)
        own, right = parts(ids, first), parts(known, first)
        start, count = tf.where(first, 0, 3), tf.shape(own)[0]
        candidates = task.candidate_network({"id": own})
        own_queries = tf.slice(queries, [start, 0], [count, DIM])
        return task(own_queries, candidates, {"id": own}, known_positive_ids=right, training=False)

    def parts(values, is_first):
        one, other = (tf.constant(part, tf.int64) for part in values)
        return tf.cond(is_first, lambda: one, lambda: other)

    flat, lists = [0, 1, 2, 3, 0], [[0], [1, 3], [2], [3], [0]]
    scores = queries.astype(np.float64) @ TABLE[flat].T
    for i, loss in enumerate(np.concatenate(run(evaluate))):
        positive = scores[i, i]
        negatives = [
            score
            for j, score in enumerate(scores[i])
            if flat[j] not in lists[i] and score <= positive + 0.5
        ]
        negatives = sorted(negatives)[-(num_hard or 5) :]
        expected = np.logaddexp.reduce([positive, *negatives]) - positive
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_shards_are_filled_evenly_by_any_calls():
    with two_replicas().scope():
        source = FromCache(CacheSpec({"id": INT_ID}, 4, embedding_dim=DIM), pool="replicas", seed=1)
        task = Retrieval(Table(TABLE), [source])
        # One at a time, by threes, and more than a shard holds.
        for ids in ([0], [1], [2], [3, 4, 5], [6, 7]):
            source.add({"id": tf.constant(ids, tf.int64)})
        shards = [part.numpy() for part in by_replica(source.cache.data["id"])]
        assert [len(set(shard)) for shard in shards] == [4, 4]
        assert set(np.concatenate(shards)) == set(range(8))
        source.add({"id": tf.range(8, 15, dtype=tf.int64)})
        source.add({"id": tf.range(15, 16, dtype=tf.int64)})
        shards = [part.numpy() for part in by_replica(source.cache.data["id"])]
        assert set(np.concatenate(shards)) == set(range(8, 16))
        with pytest.raises(ValueError, match="9 rows"):
            source.add({"id": tf.range(9, dtype=tf.int64)})
        with pytest.raises(ValueError, match="outside of the replicas"):
            call(task, make_queries(1), [0], TABLE, training=False)
    # Nor does it take the rows of the first replica, where there is no strategy at all.
    for training in (False, True):
        with pytest.raises(ValueError, match="outside of the replicas"):
            call(task, make_queries(1), [0], TABLE, training=training)


def test_a_pool_of_strings_begins_empty():
    with two_replicas().scope():
        spec = CacheSpec({"title": tf.io.FixedLenFeature([], tf.string)}, 4, embedding_dim=DIM)
        source = FromCache(spec, pool="replicas", seed=1)

        def tower(features):
            return tf.gather(TABLE, tf.strings.length(features["title"]))

        task = Retrieval(tower, [source])

    def step(titles):
        features, count = {"title": titles}, tf.shape(titles)[0]
        queries = tf.constant(make_queries(2))[:count]
        return task(queries, tower(features), features, training=True)

    # Nothing is drawn at first, and then only empty strings are.
    first, second = run(step, tf.constant([""])), run(step, tf.constant([""]))
    assert first == [0.0, 0.0]
    scores = (make_queries(1).astype(np.float64) @ TABLE[0])[0] + np.zeros(3)
    np.testing.assert_allclose(second, np.logaddexp.reduce(scores) - scores[0], rtol=1e-5)


@pytest.mark.parametrize("draws", [OWN, SHARED])
def test_a_step_without_a_query_anywhere_changes_nothing(draws):
    with two_replicas().scope():
        tower = Titles(TABLE)
        source = FromCache(CacheSpec(SPECS, 4, embedding_dim=DIM), pool="replicas", seed=1, **draws)
        sources = [source, InBatch(pool="replicas")]
        task = Retrieval(tower, sources, candidate_id_key="title", remove_accidental_hits=True)
        source.add(features_of(tf.range(5)))

    def step():
        features = features_of(tf.range(0))
        with tf.GradientTape() as tape:
            queries = tf.zeros([0, DIM])
            loss = task(queries, tower(features), features, training=True)
        return loss, tf.convert_to_tensor(tape.gradient(loss, as_variable(tower.table)))

    before = contents_of(source.cache)
    for loss, gradient in run_on_two_replicas(step):
        assert loss == 0.0 and not np.any(gradient)
    after = contents_of(source.cache)
    for key, values in before.items():
        np.testing.assert_array_equal(after[key], values, err_msg=key)


def contents_of(cache):
    """The features and embeddings of both shards, by name and number."""
    return {
        f"{key} {i}": part.numpy()
        for key, variable in cache.data.items()
        for i, part in enumerate(by_replica(variable))
    }


def test_a_refresh_bears_a_shard_without_rows():
    with two_replicas().scope():
        tower = Titles(STALE)
        source = FromCache(CacheSpec(SPECS, 4, embedding_dim=DIM), pool="replicas", seed=1)
        Retrieval(tower, [source])
        source.add(features_of(tf.constant([5])))
        tower.table.assign(TABLE)
        source.refresh(verbose=0)
    first, second = (part.numpy() for part in by_replica(source.cache.embeddings))
    np.testing.assert_array_equal(
        np.concatenate([first, second])[[0, 4]].max(axis=0), np.maximum(TABLE[5], 0.0)
    )
    assert [int(part) for part in by_replica(source.cache.num_skipped)] == [0, 0]


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
        whole = Cache.from_dataset(corpus_of(16), tower, **options)
        with pytest.raises(ValueError, match="make the cache with `sharded=True`"):
            CachedRetrieval(tower, cache=whole, pool="replicas")
        with pytest.raises(ValueError, match='"replicas" or None'):
            CachedRetrieval(tower, {"id": INT_ID}, 0, pool="all")
    outside = Cache.from_dataset(corpus_of(16), Table(TABLE), sharded=True, **options)
    with two_replicas().scope():
        task = CachedRetrieval(Table(TABLE), cache=outside)

    def step():
        return call(task, make_queries(1), [0], TABLE, training=False)

    with pytest.raises(ValueError, match="made in the scope of their strategy"):
        run(step)


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
    states = []
    for pool in (None, "replicas"):
        task = make_task(STALE, filled_with=[3, 4, 5], pool=pool, in_batch_negatives=True)
        task.candidate_network.table.assign(TABLE)
        for ids in ([0, 1], [6, 7]):
            call(task, make_queries(2), ids, TABLE, training=True)
        states.append(copy_of_state(task))
    assert_same_state(*states)
