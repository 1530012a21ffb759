"""The laws of the cache losses: value, expected gradient, updates, and the union of shards."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp

from negative_cache import retrieval_fns, util
from negative_cache.losses import (
    CacheClassificationLoss,
    CacheLoss,
    CacheLossReturn,
    DistributedCacheClassificationLoss,
)
from negative_cache.negative_cache import NegativeCache
from negative_cache.tests.replicas import run_on_two_replicas
from negative_cache.tests.statistics import assert_draws_follow, assert_mean_is

TABLE = np.array([[1, 0, 1], [0, 2, 0], [1, 1, 1], [-1, 0, 2], [0.5, 1, 0], [0, 0, -1]], np.float32)
QUERIES = np.array([[1, 0.5, -0.5], [-0.5, 0.25, 1]], np.float32)
POSITIVES = np.array([[0.5, 1, 0], [1, 0, 1]], np.float32)
NUM_DRAWS = 4000


def make_cache(rows, drift=0.0, dtype=tf.float32):
    """A cache of rows of `TABLE`; a `drift` other than 0 makes its embeddings stale."""
    rows = np.asarray(rows)
    embeddings = tf.constant(TABLE[rows] + drift, dtype)
    data = {"id": tf.constant(rows), "title": tf.as_string(rows), "embedding": embeddings}
    return NegativeCache(data, tf.zeros([len(rows)], tf.int32))


def look_up(features):
    """A doc network without weights."""
    return tf.gather(TABLE, features["id"])


def make_loss(loss_class=CacheClassificationLoss, **kwargs):
    return loss_class("embedding", ["id"], **{"reducer": None, **kwargs})


def expected_interpretable_loss(rows, transform=lambda scores: scores, drift=0.0):
    """-log p⁺ = log(exp s⁺ + Σ exp s) - s⁺."""
    positive = transform(np.sum(QUERIES * POSITIVES, axis=1))
    scores = transform(QUERIES @ (TABLE[rows] + drift).T)
    everything = np.concatenate([positive[:, np.newaxis], scores], axis=1)
    return logsumexp(everything, axis=1) - positive


def see_all_scores(scores):
    """Gumbel-max in disguise, so that the loss does not sample by blocks."""
    return retrieval_fns.GumbelMaxRetrievalFn()(scores)


def both_paths(loss):
    """The loss as it is, which samples by blocks, and as it samples from all scores."""
    yield loss
    loss._retrieval_fn = see_all_scores
    yield loss


def test_value_is_minus_log_probability_of_the_positive():
    for loss in both_paths(make_loss()):
        result = loss(look_up, QUERIES, POSITIVES, {"a": make_cache([0, 1, 2, 3], drift=0.25)})
        assert isinstance(result, CacheLossReturn)
        expected = expected_interpretable_loss([0, 1, 2, 3], drift=0.25)
        np.testing.assert_allclose(result.interpretable_loss, expected, rtol=1e-5)


def test_training_loss_of_a_known_draw():
    loss = make_loss(score_transform=lambda scores: 2.0 * scores)
    loss._retrieval_fn = lambda scores: tf.constant([[2], [1]])
    result = loss(look_up, QUERIES, POSITIVES, {"a": make_cache([3, 4, 5])})
    positive = 2 * np.sum(QUERIES * POSITIVES, axis=1)
    drawn = 2 * np.sum(QUERIES * TABLE[[5, 4]], axis=1)
    p_positive = np.exp(-expected_interpretable_loss([3, 4, 5], lambda scores: 2 * scores))
    expected = (1 - p_positive) * (drawn - positive)
    np.testing.assert_allclose(result.training_loss, expected, rtol=1e-5)
    assert result.updated_item_indices["a"].numpy().tolist() == [2, 1]
    np.testing.assert_array_equal(result.updated_item_data["a"]["embedding"], TABLE[[5, 4]])


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_retrieval_fn_sees_the_scores(dtype):
    seen = []
    loss = make_loss(score_transform=lambda scores: scores / 0.5)
    loss._retrieval_fn = lambda scores: seen.append(scores) or tf.zeros([2, 1], dtype)
    loss(look_up, QUERIES, POSITIVES, {"a": make_cache([0, 1, 2])})
    np.testing.assert_allclose(seen[0], QUERIES @ TABLE[[0, 1, 2]].T / 0.5, rtol=1e-5)


def test_patched_gumbel_noise_is_used_once():
    noise = tf.constant([[0.0, 100.0, 0.0], [100.0, 0.0, 0.0]])
    with mock.patch.object(retrieval_fns, "_sample_gumbel", return_value=noise) as sample_gumbel:
        result = make_loss()(look_up, QUERIES, POSITIVES, {"a": make_cache([0, 1, 2])})
    sample_gumbel.assert_called_once()
    assert result.updated_item_indices["a"].numpy().tolist() == [1, 0]


def softmax_gradient(queries, positives, table, rows):
    """Gradients of Σ_x -log p⁺ with respect to queries, positives and candidate table."""
    queries, positives, table = (tf.constant(values) for values in (queries, positives, table))
    with tf.GradientTape() as tape:
        tape.watch([queries, positives, table])
        positive = tf.reduce_sum(queries * positives, axis=1, keepdims=True)
        negative = tf.matmul(queries, tf.gather(table, rows), transpose_b=True)
        log_probabilities = tf.nn.log_softmax(tf.concat([positive, negative], axis=1))
        loss = -tf.reduce_sum(log_probabilities[:, 0])
    return [tf.convert_to_tensor(part) for part in tape.gradient(loss, [queries, positives, table])]


def gradient_samples(loss, sources):
    """Independent draws of the loss's gradient, laid out as `softmax_gradient`."""
    table = tf.Variable(TABLE)

    def gradients(_):
        queries, positives = tf.constant(QUERIES), tf.constant(POSITIVES)
        with tf.GradientTape() as tape:
            tape.watch([queries, positives])
            result = loss(
                lambda features: tf.gather(table, features["id"]), queries, positives, sources
            )
            value = tf.reduce_sum(result.training_loss)
        parts = tape.gradient(value, [queries, positives, table])
        return [tf.convert_to_tensor(part) for part in parts]

    @tf.function
    def sample():
        return tf.map_fn(gradients, tf.range(NUM_DRAWS), fn_output_signature=[tf.float32] * 3)

    return [part.numpy() for part in sample()]


@pytest.mark.parametrize("path", ["blocks", "scores"])
def test_expected_gradient_is_that_of_the_softmax(path):
    loss = make_loss()
    if path == "scores":
        loss._retrieval_fn = see_all_scores
    sources = {"b": make_cache([2, 3, 5]), "a": make_cache([0, 1])}
    expected = softmax_gradient(QUERIES, POSITIVES, TABLE, [0, 1, 2, 3, 5])
    for samples, gradient in zip(gradient_samples(loss, sources), expected):
        assert_mean_is(samples, gradient.numpy())


def test_draws_follow_the_softmax_of_all_sources():
    sources = {"b": make_cache([2, 3, 5]), "a": make_cache([0, 1])}
    queries = tf.repeat(QUERIES[:1], NUM_DRAWS, axis=0)
    scores = (QUERIES[:1] @ TABLE[[0, 1, 2, 3, 5]].T)[0].astype(np.float64)
    for loss in both_paths(make_loss()):
        result = loss(look_up, queries, tf.repeat(POSITIVES[:1], NUM_DRAWS, axis=0), sources)
        masks, rows = result.updated_item_mask, result.updated_item_indices
        assert np.all(masks["a"].numpy() ^ masks["b"].numpy())
        draws = np.where(masks["a"], rows["a"], rows["b"].numpy() + 2)
        assert_draws_follow(draws, np.exp(scores - logsumexp(scores)))


def test_updates_of_two_sources():
    loss = make_loss()
    # The columns are those of "a", then those of "b": 4 is the last row of "b".
    loss._retrieval_fn = lambda scores: tf.constant([[4], [1]])
    sources = {"b": make_cache([2, 3, 5], drift=0.5), "a": make_cache([0, 1], drift=0.5)}
    result = loss(look_up, QUERIES, POSITIVES, sources)
    for source in ("a", "b"):
        updated = result.updated_item_data[source]
        assert list(updated) == ["embedding"]
        np.testing.assert_array_equal(updated["embedding"], TABLE[[5, 1]])
    assert result.updated_item_mask["a"].numpy().tolist() == [False, True]
    assert result.updated_item_mask["b"].numpy().tolist() == [True, False]
    assert result.updated_item_indices["a"].numpy()[1] == 1
    assert result.updated_item_indices["b"].numpy()[0] == 2
    # ‖ĝ - g‖² = 3 · 0.5².
    expected = 0.75 / np.sum(TABLE[[5, 1]] ** 2, axis=1)
    np.testing.assert_allclose(result.staleness, expected, rtol=1e-5)


def test_doc_network_gets_the_drawn_features():
    loss = CacheClassificationLoss("embedding", ("title", "id"))
    loss._retrieval_fn = lambda scores: tf.constant([[1], [0]])
    seen = {}

    def doc_network(features):
        seen.update(features)
        return look_up(features)

    loss(doc_network, QUERIES, POSITIVES, {"a": make_cache([4, 2])})
    assert sorted(seen) == ["id", "title"]
    assert seen["title"].numpy().tolist() == [b"2", b"4"]


def test_no_gradient_into_the_cache_nor_from_the_value():
    cache = make_cache([0, 1, 2])
    cached = tf.Variable(cache.data["embedding"])
    cache.data["embedding"] = cached
    table = tf.Variable(TABLE)
    for loss in both_paths(make_loss()):
        with tf.GradientTape(persistent=True) as tape:
            result = loss(
                lambda features: tf.gather(table, features["id"]), QUERIES, POSITIVES, {"a": cache}
            )
        assert tape.gradient(result.training_loss, cached) is None
        assert tape.gradient(result.training_loss, table) is not None
        for constant in (
            result.interpretable_loss,
            result.staleness,
            result.updated_item_data["a"]["embedding"],
        ):
            assert tape.gradient(constant, [cached, table]) == [None, None]


def test_top_k_is_a_loss_over_the_kept_candidates():
    # Runs of rows: {0, 1}, {2, 3}, {4, 5}.
    scores = QUERIES @ TABLE.T
    kept = scores.reshape(2, 3, 2).max(axis=2)
    positive = np.sum(QUERIES * POSITIVES, axis=1)
    loss = make_loss(top_k=3)
    result = loss(look_up, QUERIES, POSITIVES, {"a": make_cache(range(6))})
    expected = np.logaddexp(positive, logsumexp(kept, axis=1)) - positive
    np.testing.assert_allclose(result.interpretable_loss, expected, rtol=1e-5)

    loss._retrieval_fn = lambda scores: tf.constant([[1], [2]])
    result = loss(look_up, QUERIES, POSITIVES, {"a": make_cache(range(6))})
    best = scores.reshape(2, 3, 2).argmax(axis=2) + [0, 2, 4]
    assert result.updated_item_indices["a"].numpy().tolist() == [best[0, 1], best[1, 2]]


def test_top_k_over_a_cache_whose_number_of_rows_is_known_only_when_it_runs():
    loss = make_loss(top_k=3)
    loss._retrieval_fn = retrieval_fns.MaxScoreRetrievalFn()

    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec([None], tf.int64)])
    def draw(embeddings, ids):
        cache = NegativeCache({"id": ids, "embedding": embeddings}, tf.zeros_like(ids, tf.int32))
        result = loss(look_up, QUERIES, POSITIVES, {"a": cache})
        return result.updated_item_indices["a"], result.interpretable_loss

    indices, value = draw(tf.constant(TABLE), tf.range(6, dtype=tf.int64))
    scores = QUERIES @ TABLE.T
    np.testing.assert_array_equal(indices, np.argmax(scores, axis=1))
    best = scores.reshape(2, 3, 2).max(axis=2)
    positive = np.sum(QUERIES * POSITIVES, axis=1)
    everything = np.concatenate([positive[:, np.newaxis], best], axis=1)
    np.testing.assert_allclose(value, logsumexp(everything, axis=1) - positive, rtol=1e-5)


def test_reducer():
    cache = {"a": make_cache([0, 1])}
    elementwise = make_loss()(look_up, QUERIES, POSITIVES, cache).interpretable_loss
    assert elementwise.shape == [2]
    mean = make_loss(reducer=tf.math.reduce_mean)(look_up, QUERIES, POSITIVES, cache)
    np.testing.assert_allclose(mean.interpretable_loss, np.mean(elementwise), rtol=1e-6)
    assert mean.training_loss.shape == mean.staleness.shape == []


def test_extreme_scores_stay_finite():
    for loss in both_paths(make_loss(score_transform=lambda scores: 1e4 * scores)):
        result = loss(look_up, QUERIES, POSITIVES, {"a": make_cache([0, 1])})
        for value in (result.training_loss, result.interpretable_loss, result.staleness):
            assert np.all(np.isfinite(value))


def test_zero_embeddings_have_zero_staleness():
    result = make_loss()(
        lambda features: tf.zeros([2, 3]), QUERIES, POSITIVES, {"a": make_cache([0, 1])}
    )
    assert result.staleness.numpy().tolist() == [0, 0]


def test_mixed_precision():
    result = make_loss()(
        lambda features: tf.cast(look_up(features), tf.bfloat16),
        tf.cast(QUERIES, tf.bfloat16),
        tf.cast(POSITIVES, tf.bfloat16),
        {"a": make_cache([0, 1, 2], dtype=tf.bfloat16)},
    )
    assert result.training_loss.dtype == tf.float32
    expected = expected_interpretable_loss([0, 1, 2])
    np.testing.assert_allclose(result.interpretable_loss, expected, rtol=1e-5)


def test_in_a_tf_function_without_retrace():
    num_traces = 0
    loss = make_loss()

    @tf.function
    def step(cache):
        nonlocal num_traces
        num_traces += 1
        return loss(look_up, QUERIES, POSITIVES, cache)

    for rows in ([0, 1, 2], [2, 3, 4], [5, 1, 0]):
        result = step({"a": make_cache(rows)})
        expected = expected_interpretable_loss(rows)
        np.testing.assert_allclose(result.interpretable_loss, expected, rtol=1e-5)
    assert num_traces == 1


def call(loss=None, network=look_up, queries=QUERIES, positives=POSITIVES, cache=None):
    loss = make_loss() if loss is None else loss
    return loss(network, queries, positives, {"a": make_cache([0, 1])} if cache is None else cache)


BAD_CALLS = {
    "no source": ({"cache": {}}, "`cache` must map at least one source.*Received: {}"),
    "no mapping": ({"cache": make_cache([0])}, "`cache` must map at least one source"),
    "embedding key": (
        {"loss": CacheClassificationLoss("e", ["id"])},
        r"cache 'a' must have.*\['e', 'id'\].*\['embedding', 'id', 'title'\]",
    ),
    "data key": ({"loss": CacheClassificationLoss("embedding", ["x"])}, r"\['embedding', 'x'\]"),
    "rank": ({"queries": QUERIES[0]}, r"\[batch, dim\].*\(3,\) and \(2, 3\)"),
    "pairs": ({"positives": POSITIVES[:1]}, r"same shape.*\(2, 3\) and \(1, 3\)"),
    "dim": ({"queries": QUERIES[:, :2], "positives": POSITIVES[:, :2]}, r"\[rows, 2\].*\(2, 3\)"),
    "network": ({"network": lambda features: tf.zeros([2, 4])}, r"\(2, 3\).*\(2, 4\)"),
    "top_k": ({"loss": make_loss(top_k=3)}, "`k` must divide.*k = 3 and 2 candidates"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_call(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_bad_retrieval_fn():
    loss = make_loss()
    loss._retrieval_fn = lambda scores: tf.argmax(scores, axis=1)
    with pytest.raises(ValueError, match=r"`_retrieval_fn` must return.*\[2, 1\].*shape \(2,\)"):
        call(loss)


def test_the_abstract_loss_cannot_be_made():
    with pytest.raises(TypeError):
        CacheLoss()


# The shards of two replicas: of each, the first row is the source "a" and the others are "b".
SHARDS = [[0, 1, 2], [3, 4, 5]]


def shard(drift=0.0):
    rows = tf.gather(SHARDS, util.replica_id())
    data = {
        "id": rows,
        "title": tf.as_string(rows),
        "embedding": tf.gather(TABLE, rows) + drift,
    }
    ages = tf.zeros([3], tf.int32)
    return {
        "a": NegativeCache({key: value[:1] for key, value in data.items()}, ages[:1]),
        "b": NegativeCache({key: value[1:] for key, value in data.items()}, ages[1:]),
    }


def own(values):
    """This replica's row of `values`, so that each replica has a query of its own."""
    return tf.gather(values, util.replica_id())[tf.newaxis]


@pytest.mark.parametrize("path", ["blocks", "scores"])
def test_distributed_partition_is_that_of_the_union(path):
    loss = make_loss(DistributedCacheClassificationLoss, score_transform=lambda scores: scores * 3)
    if path == "scores":
        loss._retrieval_fn = retrieval_fns.MaxScoreRetrievalFn()
    results = run_on_two_replicas(lambda: loss(look_up, own(QUERIES), own(POSITIVES), shard()))
    expected = expected_interpretable_loss(range(6), lambda scores: scores * 3)
    for replica, result in enumerate(results):
        np.testing.assert_allclose(result.interpretable_loss, expected[replica : replica + 1], 1e-5)
        np.testing.assert_allclose(result.staleness, [0], atol=1e-6)


def test_distributed_updates_go_to_the_owner():
    loss = DistributedCacheClassificationLoss("embedding", ["id", "title"], reducer=None)
    # Both queries draw from the union 0, 1, ..., 5: the first takes row 5, the second row 0.
    loss._retrieval_fn = lambda scores: tf.gather([[[5]], [[0]]], util.replica_id())

    def doc_network(features):
        return tf.gather(TABLE, tf.strings.to_number(features["title"], tf.int32))

    first, second = run_on_two_replicas(
        lambda: loss(doc_network, own(QUERIES), own(POSITIVES), shard(drift=0.5))
    )
    for result in (first, second):
        for source in ("a", "b"):
            embeddings = result.updated_item_data[source]["embedding"]
            np.testing.assert_array_equal(embeddings, TABLE[[5, 0]])
    assert first.updated_item_mask["a"].numpy().tolist() == [False, True]
    assert first.updated_item_mask["b"].numpy().tolist() == [False, False]
    assert second.updated_item_mask["a"].numpy().tolist() == [False, False]
    assert second.updated_item_mask["b"].numpy().tolist() == [True, False]
    # Row 5 is the last of the two rows of the second replica's "b".
    assert first.updated_item_indices["a"].numpy()[1] == 0
    assert second.updated_item_indices["b"].numpy()[0] == 1
    np.testing.assert_allclose(first.staleness, 0.75 / np.sum(TABLE[[5]] ** 2, axis=1), rtol=1e-5)


@pytest.mark.parametrize("path", ["blocks", "scores"])
def test_distributed_draws_come_from_all_shards(path):
    loss = make_loss(DistributedCacheClassificationLoss)
    if path == "scores":
        loss._retrieval_fn = see_all_scores

    def step():
        drawn = []

        def doc_network(features):
            drawn.append(features["id"])
            return look_up(features)

        # Batches of different sizes, as at the end of an epoch.
        size = NUM_DRAWS + 10 * util.replica_id()
        queries = tf.repeat(own(QUERIES), size, axis=0)
        loss(doc_network, queries, tf.repeat(own(POSITIVES), size, axis=0), shard())
        return drawn[0]

    for replica, draws in enumerate(run_on_two_replicas(step)):
        scores = (QUERIES[replica] @ TABLE.T).astype(np.float64)
        assert_draws_follow(draws.numpy(), np.exp(scores - logsumexp(scores)))


def test_distributed_gradients_reach_the_query_and_its_positive():
    loss = make_loss(DistributedCacheClassificationLoss)
    loss._retrieval_fn = retrieval_fns.MaxScoreRetrievalFn()

    def gradients():
        queries, positives = own(QUERIES), own(POSITIVES)
        with tf.GradientTape() as tape:
            tape.watch([queries, positives])
            result = loss(look_up, queries, positives, shard())
        return tape.gradient(result.training_loss, [queries, positives])

    # (1 - p⁺)(g(ŷ) - g(y⁺)) and -(1 - p⁺) f(x), with ŷ the highest score of the union.
    weights = 1 - np.exp(-expected_interpretable_loss(range(6)))
    highest = TABLE[np.argmax(QUERIES @ TABLE.T, axis=1)]
    for replica, (of_query, of_positive) in enumerate(run_on_two_replicas(gradients)):
        expected = weights[replica] * (highest - POSITIVES)[replica]
        np.testing.assert_allclose(of_query[0], expected, rtol=1e-4)
        np.testing.assert_allclose(of_positive[0], -weights[replica] * QUERIES[replica], rtol=1e-4)


def test_distributed_loss_of_one_replica_is_the_plain_loss():
    sources = {"b": make_cache([2, 3, 5], drift=0.1), "a": make_cache([0, 1], drift=0.1)}
    results = []
    for loss_class in (CacheClassificationLoss, DistributedCacheClassificationLoss):
        loss = make_loss(loss_class)
        loss._retrieval_fn = retrieval_fns.MaxScoreRetrievalFn()
        results.append(loss(look_up, QUERIES, POSITIVES, sources))
    tf.nest.map_structure(np.testing.assert_array_equal, *results)
    sampled = make_loss(DistributedCacheClassificationLoss)(look_up, QUERIES, POSITIVES, sources)
    np.testing.assert_allclose(sampled.interpretable_loss, results[0].interpretable_loss, rtol=1e-5)
