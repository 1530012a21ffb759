"""Tests of `CachedRetrieval` as a layer: metrics, graphs, replicas, precision, seeds, errors."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.layers import CachedRetrieval
from negative_cache.layers._state import next_seed
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    STRING_ID,
    Table,
    assert_same_state,
    call,
    copy_of_state,
    cross_entropy,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.replicas import two_replicas

# Metrics.


class Sum(keras.metrics.Metric):
    """Remembers what it was given."""

    def __init__(self, name):
        super().__init__(name=name)
        self.calls = []

    def update_state(self, *args, sample_weight=None):
        weight = None if sample_weight is None else np.asarray(sample_weight)
        self.calls.append((*[np.asarray(argument) for argument in args], weight))

    def result(self):
        return tf.constant(0.0)


def test_metrics_are_given_what_the_docstring_says():
    table, queries, ids = make_table(), make_queries(2), [0, 1, 2]
    metrics, batch_metric, loss_metric = Sum("task"), Sum("batch"), Sum("loss_value")
    task = make_task(
        table,
        in_batch_negatives=True,
        # A positive has its own id, and is no hit.
        remove_accidental_hits=True,
        metrics=metrics,
        batch_metrics=[batch_metric],
        loss_metrics=[loss_metric],
        temperature=0.5,
    )
    weight = tf.constant([1.0, 3.0])
    loss = call(task, queries, ids, table, sample_weight=weight)
    given_queries, given_positives, given_weight = metrics.calls[0]
    np.testing.assert_array_equal(given_queries, queries)
    np.testing.assert_array_equal(given_positives, table[[0, 1]])
    np.testing.assert_array_equal(given_weight, [1.0, 3.0])
    labels, scores, given_weight = batch_metric.calls[0]
    np.testing.assert_array_equal(labels, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(scores, queries @ table[ids].T / 0.5, rtol=1e-5)
    np.testing.assert_array_equal(given_weight, [1.0, 3.0])
    assert loss_metric.calls[0][0] == loss.numpy()
    call(task, queries, ids, table, compute_metrics=False, compute_batch_metrics=False)
    assert len(metrics.calls) == len(batch_metric.calls) == 1
    assert len(loss_metric.calls) == 2


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders needs Keras 2")
def test_takes_the_factorized_metrics_of_tf_recommenders():
    import tensorflow_recommenders as tfrs

    table, queries = make_table(), make_queries(2)
    corpus = tf.data.Dataset.from_tensor_slices(table).batch(4)
    metric = tfrs.metrics.FactorizedTopK(candidates=corpus, ks=[1, 12])
    task = make_task(table, metrics=metric)
    call(task, queries, [0, 1], table, sample_weight=tf.constant([1.0, 1.0]))
    # All 12 candidates contain the positive; the best one is it or not.
    top_1 = np.mean(np.argmax(queries @ table.T, axis=1) == [0, 1])
    np.testing.assert_allclose(metric.result(), [top_1, 1.0])


# Graphs, replicas, precision and seeds.


def test_does_not_retrace_in_steady_state_and_makes_its_cache_at_the_first_call():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, embedding_dim=None)
    assert task.cache is None
    traces = []

    @tf.function
    def step(queries, ids):
        traces.append(None)
        return task(queries, task.candidate_network({"id": ids}), {"id": ids}, training=True)

    for i in range(5):
        step(tf.constant(queries), tf.constant([i, i + 1], tf.int64))
    # tf.function traces twice where the first trace makes variables.
    assert len(traces) <= 2
    assert int(task.cache.num_filled) == 6


def test_call_without_training_trains():
    table = make_table()
    task = make_task(table)
    call(task, make_queries(2), [0, 1], table)
    assert int(task.cache.num_filled) == 2


def test_half_precision_embeddings_are_scored_in_float32():
    table, queries = make_table(), make_queries(2)
    task = make_task(table, filled_with=[5, 6])
    half = [tf.cast(values, tf.float16) for values in (queries, table[[0, 1]])]
    loss = task(*half, {"id": tf.constant([0, 1], tf.int64)}, training=False)
    assert loss.dtype == tf.float32
    scores = half[0].numpy().astype(np.float64) @ table.T
    own = np.sum(half[0].numpy().astype(np.float64) * half[1].numpy(), axis=1)
    each = [cross_entropy(own[i], scores[i, [5, 6]]) for i in range(2)]
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)


def test_seeds_near_the_largest_integer_do_not_overflow():
    table = make_table()
    for seed in (2**31 - 1, 2**40):
        task = make_task(table, filled_with=[5, 6], seed=seed)
        call(task, make_queries(2), [0, 1], table)
        assert next_seed(task.cached._state.sampling).numpy().tolist() == [seed, 2]


def test_no_two_replicas_of_trainings_with_neighbouring_seeds_share_their_draws():
    strategy = two_replicas()
    with strategy.scope():
        tasks = [make_task(make_table(), seed=seed) for seed in (1, 2)]
    seen = []
    for task in tasks:
        for _ in range(2):
            seeds = strategy.run(next_seed, (task.cached._state.sampling,))
            seen += [tuple(seed.numpy()) for seed in strategy.experimental_local_results(seeds)]
    assert len(set(seen)) == 8


def test_keras_does_not_compile_strings_with_xla():
    assert make_task(make_table()).supports_jit
    with_strings = CachedRetrieval(lambda features: tf.zeros([2, 3]), {"title": STRING_ID}, 4)
    assert not with_strings.supports_jit


def test_takes_a_sequential_model_that_starts_with_an_embedding():
    # Keras 2 says of such a model, before it is called, that it returns [n, words, dim].
    network = keras.Sequential([keras.layers.Embedding(8, DIM)])
    task = CachedRetrieval(network, INT_ID, 4)
    task.add_to_cache(tf.constant([5, 6], tf.int64))
    assert task.cache.embeddings.shape == [4, DIM]


@pytest.mark.parametrize("same_seed", [True, False])
def test_global_seed_makes_trainings_identical(same_seed):
    def train(seed):
        keras.utils.set_random_seed(seed)
        table, queries = make_table(), tf.Variable(make_queries(4))
        task = make_task(table, filled_with=[5, 6, 7, 8, 9, 10], seed=None)
        for _ in range(5):
            with tf.GradientTape() as tape:
                ids = tf.range(4, dtype=tf.int64)
                loss = task(queries, tf.constant(table[:4]), {"id": ids})
            queries.assign_sub(tape.gradient(loss, queries))
        return queries.numpy()

    first, second = train(1), train(1 if same_seed else 2)
    assert np.array_equal(first, second) == same_seed


def test_replicas_have_caches_and_draws_of_their_own():
    table = make_table()
    strategy = two_replicas()
    with strategy.scope():
        task = make_task(table, cache_size=2)

    @tf.function
    def step(ids):
        def replica_step(ids):
            queries = tf.zeros([2, DIM])
            task(queries, task.candidate_network({"id": ids}), {"id": ids}, training=True)
            return next_seed(task.cached._state.sampling)

        return strategy.run(replica_step, (ids,))

    values = iter([[0, 1], [2, 3]])
    ids = strategy.experimental_distribute_values_from_function(
        lambda _: tf.constant(next(values), tf.int64)
    )
    seeds = [seed.numpy() for seed in strategy.experimental_local_results(step(ids))]
    assert not np.array_equal(*seeds)
    cached = strategy.experimental_local_results(task.cache.data["id"])
    assert [rows.numpy().tolist() for rows in cached] == [[0, 1], [2, 3]]


def test_outside_of_the_replicas_candidates_reach_every_cache():
    strategy = two_replicas()
    with strategy.scope():
        task = make_task(make_table(), cache_size=3, filled_with=[5, 6])
        next_seed(task.cached._state.sampling)
    for rows in strategy.experimental_local_results(task.cache.data["id"]):
        assert rows.numpy().tolist() == [5, 6, 0]
    for state in strategy.experimental_local_results(task.cached._state.sampling):
        assert state.numpy().tolist() == [1, 1]


# Bad input.


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"reduction": "mean"}, "`reduction` must be one of .* Received: 'mean'"),
        ({"num_negatives": 0}, "`num_negatives` must be an integer >= 1. Received: 0"),
        ({"num_negatives": 1.5}, "`num_negatives` must be an integer >= 1. Received: 1.5"),
        ({"cache_size": -1}, "`cache_size` must be an integer >= 0. Received: -1"),
        ({"cache_size": 65536.0}, "`cache_size` must be an integer >= 0. Received: 65536.0"),
        ({"temperature": 0.0}, "`temperature` must be positive. Received: 0.0"),
        ({"num_hard_negatives": 2}, "needs `in_batch_negatives=True`"),
        ({"candidate_id_key": "title"}, "Received: 'title', and specs for .'id'"),
        (
            {"candidate_id_key": None, "remove_accidental_hits": True},
            "`remove_accidental_hits` needs a `candidate_id_key`",
        ),
        (
            {"candidate_id_key": None, "frequency_correction": True},
            "`frequency_correction` needs a `candidate_id_key`",
        ),
        ({"feature_specs": {"id": tf.io.FixedLenFeature([], tf.float32)}}, "scalar integer or"),
        ({"feature_specs": {"id": INT_ID, "embedding": INT_ID}}, "Received: .'embedding'"),
        ({"feature_specs": {}}, "`specs` must map at least one"),
    ],
)
def test_constructor_refuses(kwargs, message):
    kwargs = {"feature_specs": {"id": INT_ID}, "cache_size": 4, "candidate_id_key": "id", **kwargs}
    with pytest.raises(ValueError, match=message):
        CachedRetrieval(Table(make_table()), **kwargs)


def test_constructor_refuses_what_is_no_network():
    with pytest.raises(ValueError, match="must be a layer or a function. Received: 'tower'"):
        CachedRetrieval("tower", {"id": INT_ID}, 4)


def test_constructor_refuses_a_network_known_to_return_no_embeddings():
    inputs = keras.Input([4])
    network = keras.Model(inputs, keras.layers.Reshape([2, 2])(inputs))
    with pytest.raises(ValueError, match=r"shape \[n, dim\].*\(None, 2, 2\)"):
        CachedRetrieval(network, tf.io.FixedLenFeature([4], tf.float32), 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"queries": np.zeros([2, 4], np.float32)}, r"same dimension.*\(2, 4\) and \(2, 3\)"),
        ({"queries": np.zeros([2, 1, 3], np.float32)}, r"`query_embeddings`.*\(2, 1, 3\)"),
        ({"candidates": np.zeros([2, 3], np.int32)}, "`candidate_embeddings`.*int32"),
        ({"queries": np.zeros([3, 3], np.float32)}, "needs a positive"),
        ({"features": {"title": tf.constant([1, 2])}}, "exactly the keys .'id'.*'title'"),
        ({"features": {"id": tf.constant(["a", "b"])}}, "int64.*Received: dtype string"),
        ({"features": {"id": tf.constant([[0], [1]], tf.int64)}}, r"shape \(2, 1\)"),
        (
            {"features": {"id": tf.constant([0, 1, 2], tf.int64)}},
            r"`candidate_features.'id'.`.*\(3,\)",
        ),
        ({"negative_embeddings": tf.zeros([2, 3])}, r"`negative_embeddings`.*\(2, 3\)"),
        ({"negative_embeddings": tf.zeros([2, 5, 4])}, r"`negative_embeddings`.*\(2, 5, 4\)"),
        ({"negative_embeddings": tf.zeros([3, 5, 3])}, r"`negative_embeddings`.*\(3, 5, 3\)"),
        ({"sample_weight": tf.zeros([3])}, r"`sample_weight`.*\(3,\)"),
        ({"score_mask": tf.fill([2, 3], True)}, r"`score_mask`.*\(2, 3\)"),
        ({"score_mask": tf.ones([2, 2])}, "`score_mask`.*float32"),
        (
            {"candidate_sampling_probability": tf.zeros([3])},
            r"`candidate_sampling_probability`.*\(3,\)",
        ),
    ],
)
def test_call_refuses_and_leaves_the_cache_alone(changes, message):
    table = make_table()
    task = make_task(table, filled_with=[5, 6])
    before = copy_of_state(task)
    arguments = {
        "queries": make_queries(2),
        "candidates": table[[0, 1]],
        "features": {"id": tf.constant([0, 1], tf.int64)},
        **changes,
    }
    queries, candidates, features = (
        arguments.pop(name) for name in ("queries", "candidates", "features")
    )
    with pytest.raises(ValueError, match=message):
        task(tf.constant(queries), tf.constant(candidates), features, **arguments)
    assert_same_state(copy_of_state(task), before)


def test_training_refuses_a_batch_larger_than_the_cache_and_inference_does_not():
    table = make_table()
    task = make_task(table, cache_size=2, filled_with=[5])
    before = copy_of_state(task)
    with pytest.raises(ValueError, match="fit into the cache.*3 rows for a `cache_size` of 2"):
        call(task, make_queries(3), [0, 1, 2], table)
    assert_same_state(copy_of_state(task), before)
    assert call(task, make_queries(3), [0, 1, 2], table, training=False) > 0


def test_training_refuses_a_batch_larger_than_the_cache_of_unknown_size_until_it_runs():
    table = make_table()
    task = make_task(table, cache_size=2)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def step(ids):
        candidates = task.candidate_network({"id": ids})
        return task(candidates, candidates, {"id": ids}, training=True)

    step(tf.constant([0, 1], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="fit into the cache"):
        step(tf.constant([0, 1, 2], tf.int64))


def test_call_refuses_to_compare_with_nothing():
    table = make_table()
    with pytest.raises(ValueError, match="nothing to tell a positive from"):
        call(make_task(table, cache_size=0), make_queries(2), [0, 1], table)


@pytest.mark.parametrize("shape", [[2], [2, 3, 1]])
def test_network_that_returns_no_embeddings_is_refused(shape):
    task = CachedRetrieval(lambda features: tf.zeros(shape), {"id": INT_ID}, 4)
    with pytest.raises(ValueError, match=r"shape \[n, dim\]. Received from"):
        task.add_to_cache({"id": tf.constant([0, 1], tf.int64)})


def test_network_of_another_dimension_than_the_candidates_is_refused():
    task = CachedRetrieval(lambda features: tf.zeros([2, 5]), {"id": INT_ID}, 4)
    features = {"id": tf.constant([0, 1], tf.int64)}
    with pytest.raises(ValueError, match="embeddings of dimension 3. Received embeddings of 5"):
        task(tf.zeros([2, 3]), tf.zeros([2, 3]), features)


def test_candidates_without_a_finite_embedding_do_not_enter():
    table = make_table()
    table[1] = np.inf
    task = make_task(table)
    task.add_to_cache({"id": tf.constant([5, 1, 6], tf.int64)})
    assert task.cache.data["id"].numpy()[:3].tolist() == [5, 6, 0]
    assert int(task.cache.num_filled) == 2
    assert int(task.cache.num_skipped) == 1
