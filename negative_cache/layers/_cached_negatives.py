"""Cached candidates as negatives: what a row of the cache holds, and a training step's use of it.

Everything that lasts belongs to the layer that has the cache: variables, metrics and the state of
the sampling are handed in, and Keras and TensorFlow track them there. How a loss is made of the
result is the layer's affair too.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import _popularity, _retrieval_checks
from negative_cache.layers._scores import Scores
from negative_cache.layers.cache import Cache
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops import SoftmaxSample, contrastive, sample_softmax_with_gradient

# What a row holds besides the candidate's own features.
EMBEDDING = "embedding"
CANDIDATE_ID = "candidate_id_key"
LOG_PROBABILITY = "log_sampling_probability"
INTERNAL_KEYS = (EMBEDDING, CANDIDATE_ID, LOG_PROBABILITY)


def make_cache(
    feature_specs: Mapping[str, tf.io.FixedLenFeature],
    embedding: tf.io.FixedLenFeature,
    *,
    has_ids: bool,
    cache_size: int,
    use_lru: bool,
    saved: bool,
    index: TreeIndex | None,
) -> Cache:
    """Makes a cache whose rows are those of `make_rows`."""
    specs = {
        **feature_specs,
        EMBEDDING: embedding,
        LOG_PROBABILITY: tf.io.FixedLenFeature([], tf.float32),
    }
    if has_ids:
        specs[CANDIDATE_ID] = tf.io.FixedLenFeature([], tf.int64)
    return Cache(specs, cache_size, EMBEDDING, use_lru, saved=saved, index=index, name="cache")


def make_rows(
    features: Mapping[str, tf.Tensor],
    embeddings: tf.Tensor,
    probabilities: tf.Tensor | None,
    *,
    id_key: str | None,
    has_cache: bool,
) -> dict[str, tf.Tensor]:
    """Candidates as rows of a cache. A batch's candidates have this form without a cache too.

    Args:
      features: the candidates' own features [n, ...].
      embeddings: [n, d] float32.
      probabilities: [n] float, of a draw from the stream being each candidate, where known.
      id_key: which of the features identifies a candidate, if one does.
      has_cache: whether there is a cache, in which smaller probabilities are meant.

    Raises:
      ValueError: where the number of features or probabilities is not that of the embeddings.
    """
    for name, values in features.items():
        _retrieval_checks.check_rows(values, embeddings, f"candidate_features[{name!r}]")
    size = tf.shape(embeddings)[0]
    if probabilities is None:
        log_probability = _popularity.log_unknown_probability(size)
    else:
        probabilities = tf.cast(probabilities, tf.float32)
        name = "candidate_sampling_probability"
        _retrieval_checks.check_rows(probabilities, embeddings, name, rank=1)
        smallest = _popularity.SMALLEST_IN_CACHE if has_cache else _popularity.SMALLEST_IN_BATCH
        log_probability = _popularity.log_given_probability(probabilities, smallest)
    rows = {**features, EMBEDDING: embeddings, LOG_PROBABILITY: log_probability}
    if id_key is not None:
        rows[CANDIDATE_ID] = _fingerprint(features[id_key])
    return rows


def log_expected_occurrences(
    rows: Mapping[str, tf.Tensor],
    num_negatives: tf.Tensor,
    *,
    frequency: FrequencyEstimator | None,
    are_cached: bool,
) -> tf.Tensor:
    """[n] log of how often each of `rows` is expected among so many draws from the stream.

    Args:
      rows: candidates in the form of `make_rows`.
      num_negatives: scalar, how many draws.
      frequency: estimates their probabilities; None takes those that they came with.
      are_cached: whether the rows are those of the cache, which may be of candidates that the
        stream has not brought.
    """
    if frequency is None:
        log_probability = tf.convert_to_tensor(rows[LOG_PROBABILITY])
    else:
        ids = tf.convert_to_tensor(rows[CANDIDATE_ID])
        log_probability = _popularity.log_estimated_probability(frequency, ids, of_rows=are_cached)
    return _popularity.log_expected_occurrences(log_probability, num_negatives)


class CacheMetrics(NamedTuple):
    """What a training step reports of the cache."""

    staleness: keras.metrics.Metric
    log_partition: keras.metrics.Metric
    fill: keras.metrics.Metric
    skipped_rows: keras.metrics.Metric


class Conditions(NamedTuple):
    """Which cached candidates are negatives of a query, and what is added to their scores.

    Attributes:
      positive_ids: [B] int64, fingerprints; a candidate that has its query's is left out.
      max_scores: [B] float32; candidates that score higher are left out.
      log_weights: [C] float32, added to the scores of the cached candidates.
    """

    positive_ids: tf.Tensor | None = None
    max_scores: tf.Tensor | None = None
    log_weights: tf.Tensor | None = None


class Refreshed(NamedTuple):
    """Rows that were drawn, and their embeddings of now.

    Attributes:
      rows: [n] int64; a row may come several times.
      embeddings: [n, d] float32.
      is_drawn: [n] bool; where False, no row was there to be drawn, and nothing is to be written.
    """

    rows: tf.Tensor
    embeddings: tf.Tensor
    is_drawn: tf.Tensor


class CachedNegatives:
    """The filled rows of a cache as negatives of queries.

    With ĝ the cached embeddings and g those of now, the logit of the cache is the log partition

      log Z(x) = log Σ_y exp(score(x, ĝ(y)) + log_weight(y)),

    and its gradient is estimated from draws ŷ in proportion to exp(score(x, ĝ(ŷ)) + log_weight(ŷ)),
    which are encoded: it is that of their mean score(x, g(ŷ)), or with `exact_query_gradient` that
    of ⟨x, ∇_x log Z⟩ + mean of (score(x, g(ŷ)) - score(x, ĝ(ŷ))), with ∇_x log Z and ĝ constant.

    A cache with an index draws from that: the law is nearly the same, and log Z and its gradient
    are the index's estimates.

    It has no state of its own and may be made anew for every call. Queries [B, d] come divided by
    the temperature.

    Args:
      cache: as `make_cache` makes it.
      encode: (features [n, ...], training) -> [n, d] float32, the candidate tower of now.
      scores: how a query and a candidate are scored.
      metrics: updated by training steps only.
      num_draws: S, the number of draws per query.
      exact_query_gradient: whether the queries' gradient is computed and draws only correct it.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        encode: Callable[..., tf.Tensor],
        scores: Scores,
        metrics: CacheMetrics,
        num_draws: int,
        exact_query_gradient: bool,
    ):
        self._cache = cache
        self._encode = encode
        self._scores = scores
        self._metrics = metrics
        self._num_draws = num_draws
        self._exact_query_gradient = exact_query_gradient

    def log_partition(self, queries: tf.Tensor, conditions: Conditions) -> tf.Tensor:
        """[B] log partition of the cache, without gradient; changes nothing."""
        sample, _ = self._draw(queries, conditions, seed=0, compute_gradient=False)
        return sample.log_partition

    def sampled_log_partition(
        self,
        queries: tf.Tensor,
        items: Mapping[str, tf.Tensor],
        conditions: Conditions,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, Refreshed]:
        """The log partition with the sampled gradient, and the rows that were drawn for it.

        Args:
          queries: [B, d] float32.
          items: rows [N, ...] of the batch's candidates, the first B of which are the positives.
          conditions: which rows may be drawn, and with what weight.
          seed: [2] int64.

        Returns:
          [B] float32, and the B * S draws that `update` is to write back.
        """
        exact = self._exact_query_gradient
        sample, query_gradient = self._draw(queries, conditions, seed, compute_gradient=exact)
        is_some = tf.math.is_finite(sample.log_partition)
        self._metrics.log_partition.update_state(
            tf.where(is_some, sample.log_partition, 0.0), tf.cast(is_some, tf.float32)
        )
        is_drawn = tf.reshape(sample.indices >= 0, [-1])
        rows = tf.reshape(tf.maximum(sample.indices, 0), [-1])
        fresh = self._encode(self._features_of(rows, is_drawn, items), training=True)
        stale = tf.stop_gradient(tf.cast(tf.gather(self._cache.embeddings, rows), tf.float32))
        self._metrics.staleness.update_state(
            contrastive.relative_staleness(stale, fresh),
            sample_weight=tf.cast(is_drawn, tf.float32),
        )
        surrogate = self._scores.mean_of_draws(queries, fresh, is_drawn, self._num_draws)
        if exact:
            exact_term = tf.reduce_sum(queries * query_gradient, axis=1)
            surrogate += exact_term
            surrogate -= self._scores.mean_of_draws(queries, stale, is_drawn, self._num_draws)
        logit = contrastive.value_with_gradient(sample.log_partition, surrogate)
        return logit, Refreshed(rows, fresh, is_drawn)

    def update(self, items: Mapping[str, tf.Tensor], refreshed: Refreshed) -> None:
        """Ends a training step: writes draws back, lets a batch's `items` enter, and reports."""
        self._write(items, refreshed)
        self._metrics.fill.update_state(self._cache.num_filled / self._cache.cache_size)
        self._metrics.skipped_rows.update_state(self._cache.num_skipped)

    def add(self, items: Mapping[str, tf.Tensor]) -> None:
        """Lets `items` enter outside of a training step."""
        self._write(items)

    def _draw(
        self,
        queries: tf.Tensor,
        conditions: Conditions,
        seed: tf.Tensor | int,
        compute_gradient: bool,
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """Draws S rows a query; where `compute_gradient`, [B, d] ∇_x log Z comes with them."""
        hits = {}
        if conditions.positive_ids is not None:
            hits = {
                "candidate_ids": tf.convert_to_tensor(self._cache.data[CANDIDATE_ID]),
                "positive_ids": conditions.positive_ids,
            }
        if self._cache.index is not None:
            return self._cache.index.sample_with_gradient(
                queries,
                self._num_draws,
                score_transform=self._scores.transform,
                max_scores=conditions.max_scores,
                seed=seed,
                compute_gradient=compute_gradient,
                **hits,
            )
        return sample_softmax_with_gradient(
            queries,
            self._cache.embeddings,
            num_samples=self._num_draws,
            score_transform=self._scores.transform,
            candidate_mask=self._cache.filled,
            log_weights=conditions.log_weights,
            max_scores=conditions.max_scores,
            seed=seed,
            compute_gradient=compute_gradient,
            **hits,
        )

    def _write(self, items: Mapping[str, tf.Tensor], refreshed: Refreshed | None = None) -> None:
        """The one place where the cache changes."""
        updates = {}
        if refreshed is not None:
            updates = {
                "updated_item_data": {EMBEDDING: refreshed.embeddings},
                "updated_item_indices": refreshed.rows,
                "updated_item_mask": refreshed.is_drawn,
            }
        self._cache.update(new_items=items, **updates)

    def _features_of(self, rows, is_drawn, items):
        """The features [B * S, ...] of the drawn rows.

        A query without an admissible row has its own positive encoded instead: an unfilled row's
        empty features might be outside of what the tower knows, and give NaN.
        """
        own = tf.range(tf.size(rows)) // self._num_draws
        features = {}
        for key, variable in self._cache.data.items():
            if key in INTERNAL_KEYS:
                continue
            values = tf.gather(variable, rows)
            mask = tf.reshape(is_drawn, [-1] + [1] * (values.shape.rank - 1))
            features[key] = tf.where(mask, values, tf.gather(items[key], own))
        return features


def _fingerprint(ids: tf.Tensor) -> tf.Tensor:
    """[n] int64 that stand for `ids`: ids of every dtype compare at the price of an integer."""
    return (
        tf.strings.to_hash_bucket_fast(ids, 2**63 - 1)
        if ids.dtype == tf.string
        else tf.cast(ids, tf.int64)
    )
