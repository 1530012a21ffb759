"""The laws of the cache losses: value, expected gradient, and updates."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp

from negative_cache import retrieval_fns
from negative_cache.losses import (
    CacheClassificationLoss,
    CacheLoss,
    CacheLossReturn,
)
from negative_cache.negative_cache import NegativeCache
from negative_cache.tests.loss_cases import (
    NUM_DRAWS,
    POSITIVES,
    QUERIES,
    TABLE,
    both_paths,
    expected_interpretable_loss,
    gradient_samples,
    look_up,
    make_cache,
    make_loss,
    see_all_scores,
    softmax_gradient,
)
from negative_cache.tests.statistics import assert_draws_follow, assert_mean_is

pytestmark = pytest.mark.one_keras


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
