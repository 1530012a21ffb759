"""Tests of evaluations whose corpus is divided among two replicas. One device is the reference."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache._towers import encoders_of
from negative_cache.evaluation import corpus, evaluate
from negative_cache.evaluation import ranks as ranks_module
from negative_cache.evaluation.replicas import Replicas
from negative_cache.layers._variables import by_replica
from negative_cache.tests.evaluation.rank_problems import (
    corpus_batches,
    lookup,
    padded,
    ragged,
    real_problem,
    validation_batches,
)
from negative_cache.tests.replicas import two_replicas


def ranks_of(monkeypatch, *args, **kwargs):
    """The metrics of `evaluate`, and the ranks that they are computed from."""
    ranks, original = [], ranks_module.retrieval_metrics
    with monkeypatch.context() as patch:
        patch.setattr(
            ranks_module,
            "retrieval_metrics",
            lambda values, *rest: ranks.append(values) or original(values, *rest),
        )
        metrics = evaluate(*args, **kwargs)
    return metrics, ranks[0]


class Spy:
    """A tower that records the rows that each replica encodes."""

    def __init__(self, table):
        self.table = table
        self.seen = []

    def __call__(self, features):
        context = tf.distribute.get_replica_context()
        replica = -1 if context is None else context.replica_id_in_sync_group
        tf.py_function(self._record, [replica, features["row"]], [])
        return tf.ensure_shape(tf.gather(self.table, features["row"]), [None, 3])

    def _record(self, replica, rows):
        self.seen.append((int(replica), rows.numpy().tolist()))

    def rows_of(self, replica):
        return {row for number, rows in self.seen if number == replica for row in rows}


def name_of(row):
    return tf.strings.join(["movie ", tf.strings.as_string(row)])


# Query i has the positives and the excluded candidates of these rows of 40, which both replicas
# have some of.
POSITIVES = [[0], [1, 2, 30], [39], [5, 5], [12, 3], [8], [20, 21], [38], [14, 0, 7]]
EXCLUDED = [[1, 2], [], [0, 4, 8], [39], [12, 13, 99], list(range(20)), [7], [], [6, 6]]


@pytest.mark.parametrize("batch", [3, 7, 40])
@pytest.mark.parametrize("case", ["rows", "one each", "lists", "padded", "strings", "shuffled"])
def test_ranks_are_those_of_one_device(case, batch, monkeypatch):
    queries, table, rows = real_problem()
    parts = {"query": np.arange(len(queries))}
    key, as_id = "id", tf.identity
    if case in ("rows", "one each"):
        key = None if case == "rows" else "id"
        parts["candidate"] = {"row": rows, "id": rows}
    elif case == "padded":
        parts.update(positives=padded(POSITIVES), excluded=padded(EXCLUDED))
        parts["candidate"] = {"row": rows, "id": rows}
    elif case == "strings":
        as_id = name_of
        names = [
            [[f"movie {row}" for row in own] for own in part] for part in (POSITIVES, EXCLUDED)
        ]
        parts.update(
            positives=ragged(names[0], dtype=tf.string), excluded=ragged(names[1], dtype=tf.string)
        )
    else:
        parts.update(positives=ragged(POSITIVES), excluded=ragged(EXCLUDED))
    received = []
    for scope in (tf.distribute.get_strategy().scope(), two_replicas().scope()):
        spy = Spy(table)
        candidates = corpus_batches(40, batch, as_id, shuffle=case == "shuffled")
        model = (lookup(queries), spy)
        with scope:
            received.append(
                ranks_of(
                    monkeypatch,
                    model,
                    candidates,
                    validation_batches(parts, batch=4),
                    candidate_id_key=key,
                )
            )
    (wanted, wanted_ranks), (metrics, ranks) = received
    if case == "shuffled":
        # Rows have other numbers, by which the positives of a query are in order.
        ranks, wanted_ranks = np.sort(ranks), np.sort(wanted_ranks)
    np.testing.assert_array_equal(ranks, wanted_ranks)
    assert metrics == wanted and len(set(wanted_ranks)) > 3
    if case != "shuffled":
        # Of one batch the second replica has nothing to keep, and repeats it.
        by_batch = [range(40)[start : start + batch] for start in range(0, 40, batch)]
        for replica in range(2 if len(by_batch) > 1 else 1):
            own = {row for part in by_batch[replica::2] for row in part}
            assert own <= spy.rows_of(replica)
            assert len(by_batch) % 2 or own == spy.rows_of(replica)


def test_a_replica_compares_its_own_candidates_only(monkeypatch):
    queries, table, rows = real_problem()
    sizes, original = [], ranks_module._count_higher

    def counted(queries, thresholds, candidates, *rest):
        tf.py_function(lambda count: sizes.append(int(count)), [tf.shape(candidates)[0]], [])
        return original(queries, thresholds, candidates, *rest)

    monkeypatch.setattr(ranks_module, "_count_higher", counted)
    parts = {"query": np.arange(len(queries)), "candidate": {"row": rows}}
    with two_replicas().scope():
        evaluate((lookup(queries), lookup(table)), corpus_batches(40, 8), validation_batches(parts))
    # Of five batches of 8.
    assert sorted(sizes) == [16, 24]


def test_later_evaluations_trace_nothing():
    queries, table, rows = real_problem()
    traces, counts = [], []

    def tower(features):
        traces.append(1)
        return tf.gather(table, features["row"])

    parts = {"query": np.arange(len(queries)), "candidate": {"row": rows}}
    with two_replicas().scope():
        encoders = encoders_of((lookup(queries), tower))
        for _ in range(3):
            evaluate(encoders, corpus_batches(40, 7), validation_batches(parts))
            counts.append(len(traces))
    assert counts[0] <= counts[1] == counts[2]


def test_nothing_keeps_a_tower_after_its_evaluation():
    queries, table, rows = real_problem()
    parts = {"query": np.arange(len(queries)), "candidate": {"row": rows}}

    def tower(features):
        return tf.gather(table, features["row"])

    with two_replicas().scope():
        evaluate((lookup(queries), tower), corpus_batches(40, 7), validation_batches(parts))
    left = weakref.ref(tower)
    del tower
    gc.collect()
    assert left() is None


class Normalized(keras.layers.Layer):
    """A tower with moving averages."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.norm = keras.layers.BatchNormalization()

    def call(self, features, training=False):
        return self.norm(tf.gather(self.table, features["row"]), training=training)


def test_moving_averages_of_the_replicas_are_one_and_stay_as_they_are():
    queries, table, rows = real_problem()
    with two_replicas().scope():
        tower = Normalized(table)
        tower({"row": tf.constant([0])})
    mean = tower.norm.moving_mean
    parts = by_replica(mean if isinstance(mean, tf.Variable) else mean.value)
    own = [np.float32([replica, 2.0 * replica, -5.0 * replica]) for replica in range(2)]
    for part, values in zip(parts, own):
        part.assign(values)
    # Outside of the replicas Keras 2 has the mean over them, and Keras 3 the first one's.
    with two_replicas().scope():
        alone = tower({"row": tf.range(40)}).numpy()
    validation = [{"query": np.arange(9), "positives": rows[:, np.newaxis]}]
    options = {"candidate_id_key": "id"}
    wanted = evaluate((lookup(queries), lookup(alone)), corpus_batches(40), validation, **options)
    with two_replicas().scope():
        found = evaluate((lookup(queries), tower), corpus_batches(40), validation, **options)
    assert found == wanted
    for part, values in zip(parts, own):
        np.testing.assert_array_equal(part, values)
    # It matters: the other replica's would give other metrics.
    other = table - own[1]
    assert wanted != evaluate(
        (lookup(queries), lookup(np.where(np.arange(40)[:, np.newaxis] // 3 % 2, other, table))),
        corpus_batches(40),
        validation,
        **options,
    )


def test_a_tower_that_was_not_called_yet_is_built():
    queries, table, rows = real_problem()
    with two_replicas().scope():
        tower = Normalized(table)
        validation = [{"query": np.arange(9), "positives": rows[:, np.newaxis]}]
        metrics = evaluate(
            (lookup(queries), tower), corpus_batches(40), validation, candidate_id_key="id"
        )
    assert tower.built and 0.0 < metrics["mrr"] <= 1.0


class TestWorkers:
    """What a worker of two does, by itself."""

    def worker(self, first):
        replicas = Replicas(None)
        replicas._count, replicas._first = 2, first
        return replicas

    @pytest.mark.parametrize("policy", ["AUTO", "OFF"])
    def test_a_dataset_that_is_not_to_be_divided_is_a_worker_s_own(self, policy):
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = getattr(
            tf.data.experimental.AutoShardPolicy, policy
        )
        batches = tf.data.Dataset.range(5).with_options(options)
        own = [
            [int(batch) for replica, batch in self.worker(first).own(batches) if replica == 0]
            for first in range(2)
        ]
        assert own == ([[0, 2, 4], [1, 3]] if policy == "AUTO" else [[0, 1, 2, 3, 4]] * 2)

    def test_candidates_that_change_are_refused_by_all_workers(self, monkeypatch):
        worker = self.worker(0)
        # The other one has found what it had before.
        other = {1: [2], 4: [0, 0, 1, 1]}
        monkeypatch.setattr(worker, "total", lambda values: values + other[len(values)])
        for ids, missing, repeated in (([10, 99], 1, 0), ([10, 10], 1, 1), ([10, 12], 1, 1)):
            message = f"Received 4 and then 4, in which {missing} .* missing and {repeated} repeat"
            with pytest.raises(ValueError, match=message):
                corpus._places([np.array(ids)], np.array([10, 11, 12, 13]), worker)
        (places,) = corpus._places([np.array([11, 10])], np.array([10, 11, 12, 13]), worker)
        assert places.tolist() == [1, 0, -1, -1]

    def test_one_worker_without_candidates_stops_all(self, monkeypatch):
        worker = self.worker(0)
        monkeypatch.setattr(worker, "gather", lambda values: np.concatenate([values, [0]]))
        with pytest.raises(ValueError, match=r"no batches. Received batches by worker: \[3, 0\]"):
            corpus._check_not_empty(3, worker)
