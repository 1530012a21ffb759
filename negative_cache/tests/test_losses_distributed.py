"""The laws of `DistributedCacheClassificationLoss`: the union of the replicas' shards."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp

from negative_cache import retrieval_fns, util
from negative_cache.losses import CacheClassificationLoss, DistributedCacheClassificationLoss
from negative_cache.negative_cache import NegativeCache
from negative_cache.tests.loss_cases import (
    NUM_DRAWS,
    POSITIVES,
    QUERIES,
    TABLE,
    expected_interpretable_loss,
    look_up,
    make_cache,
    make_loss,
    see_all_scores,
)
from negative_cache.tests.replicas import run_on_two_replicas
from negative_cache.tests.statistics import assert_draws_follow

pytestmark = pytest.mark.one_keras

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
