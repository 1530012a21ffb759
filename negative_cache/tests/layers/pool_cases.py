"""Tasks whose caches are one pool over replicas, for the cases of `shared_draw_cases`.

Where a function takes no number of replicas, it is that of the task's cache.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from negative_cache import Cache, CachedRetrieval, util
from negative_cache.layers._variables import by_replica
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, Table, make_queries
from negative_cache.tests.layers.shared_draw_cases import (
    CACHED,
    EMPTY_AT_FIRST,
    IDS,
    NUM_CANDIDATES,
    STALE,
    TABLE,
    as_variable,
    dense_loss,
    freeze,
    repeated,
)
from negative_cache.tests.replicas import four_replicas, two_replicas


class Division(NamedTuple):
    """Which of the queries, and of the cached candidates, each replica has: not equally many."""

    queries: tuple
    shards: tuple


# By the number of replicas. Of four, one has no query, and two have no rows.
DIVISIONS = {
    2: Division((range(3), range(3, 5)), (range(5), range(5, 8))),
    4: Division(
        (range(2), range(0), range(2, 3), range(3, 5)), (range(0), range(5), range(0), range(5, 8))
    ),
}


def strategy_of(num_replicas):
    return {2: two_replicas, 4: four_replicas}[num_replicas]()


def make_pooled(case, name="", num_replicas=2, **kwargs):
    """The task of a case on replicas, whose caches hold a shard each and are never changed."""
    strategy = strategy_of(num_replicas)
    with strategy.scope():
        made = {key: value() if callable(value) else value for key, value in case.task.items()}
        kwargs = {**made, "reduction": "sum", "seed": 1, **kwargs}
        tower = Table(STALE)
        if case.cached is None:
            options = {"candidate_id_key": "id", "verbose": 0, "sharded": True}
            cache = Cache.from_dataset(corpus_of(NUM_CANDIDATES), tower, **options)
            task = CachedRetrieval(tower, cache=cache, **kwargs)
        else:
            # More rows than candidates: some of each shard are empty.
            options = {"candidate_id_key": "id", "embedding_dim": DIM, "pool": "replicas"}
            task = CachedRetrieval(tower, {"id": INT_ID}, len(CACHED), **options, **kwargs)
    if case.cached is not None and name not in EMPTY_AT_FIRST:
        strategy.run(lambda: fill_own_shard(task, CACHED))
    if case.set_up is not None:
        strategy.run(lambda: case.set_up(task))
    tower.table.assign(TABLE)
    freeze(task)
    return task


def fill_own_shard(task, candidates, *more):
    """Adds this replica's part of `candidates` [8], with its part of each of `more`."""
    own = list(DIVISIONS[task.cache.num_replicas].shards[int(util.replica_id())])
    if not own:
        return
    parts = [tf.constant(values[own]) for values in more]
    task.add_to_cache({"id": tf.constant(np.asarray(candidates)[own], tf.int64)}, *parts)


def rows_of_all(task):
    """[C, d] what the sampler knows of the rows of all shards, in the order of the case's."""
    strategy = strategy_of(task.cache.num_replicas)
    if task.corrector is None:
        shards = [part.numpy() for part in by_replica(task.cache.embeddings)]
    else:
        rows = strategy.run(lambda: task.corrector(task.cache.embeddings, task.cache.age))
        shards = [part.numpy() for part in strategy.experimental_local_results(rows)]
    if task.cache.row_key is not None:
        return np.stack(shards, axis=1).reshape([-1, DIM])
    division = DIVISIONS[task.cache.num_replicas]
    return np.concatenate([shard[: len(own)] for shard, own in zip(shards, division.shards)])


class PooledSampler:
    """Gradients of training steps, summed over the replicas, of a task with frozen caches."""

    def __init__(self, case, task):
        self._case, self._task = case, task
        self._queries = make_queries(len(IDS))
        self._num_replicas = task.cache.num_replicas
        self._parts = _parts_of(case, self._queries, self._num_replicas)
        learned = [] if task.score_transform is None else task.score_transform.trainable_variables
        self.weights = [as_variable(part) for part in (task.candidate_network.table, *learned)]

    def gradients(self):
        """Of one step: a list of those of the queries, the table, and what a transform learns."""
        strategy = strategy_of(self._num_replicas)
        results = strategy.run(self._of_replica, (self._parts,))
        by_queries, *others = map(strategy.experimental_local_results, results)
        return [tf.concat(by_queries, axis=0), *map(tf.add_n, others)]

    def many(self, count):
        """[count, ...] for each weight."""
        shapes = [self._queries.shape, *(weight.shape for weight in self.weights)]
        return repeated(self.gradients, shapes, count)

    def expected(self):
        """The gradients, by all rows of all caches at once."""
        queries = tf.Variable(self._queries)
        with tf.GradientTape() as tape:
            loss = dense_loss(self._case, self._task, tf.convert_to_tensor(queries))
        parts = tape.gradient(loss, [queries, *self.weights])
        return [tf.convert_to_tensor(part).numpy() for part in parts]

    def _of_replica(self, own):
        """What this replica's queries `own`, their ids and arguments, give."""
        task, tower, more = self._task, self._task.candidate_network, dict(own["call"])
        features = {"id": own["ids"]}
        learned = [] if task.score_transform is None else task.score_transform.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(own["queries"])
            if "explicit" in own:
                flat = tower({"id": tf.reshape(own["explicit"], [-1])})
                more["negative_embeddings"] = tf.reshape(flat, [*own["explicit"].shape, DIM])
            loss = task(own["queries"], tower(features), features, training=True, **more)
        table = as_variable(tower.table)
        parts = tape.gradient(loss, [own["queries"], table, *map(as_variable, learned)])
        return [tf.convert_to_tensor(part) for part in parts]


def _parts_of(case, queries, num_replicas):
    """What each replica has of the queries of a case."""
    values = {"queries": queries, "ids": np.array(IDS), "call": dict(case.call)}
    if case.explicit is not None:
        values["explicit"] = case.explicit

    def of_replica(context):
        own = list(DIVISIONS[num_replicas].queries[context.replica_id_in_sync_group])
        return tf.nest.map_structure(lambda part: tf.constant(np.asarray(part)[own]), values)

    strategy = strategy_of(num_replicas)
    return strategy.experimental_distribute_values_from_function(of_replica)
