"""Cached candidates as negatives: what a row of the cache holds, and a training step's use of it.

Everything that lasts belongs to the layer that has the cache: variables, metrics and the state of
the sampling are handed in, and Keras and TensorFlow track them there. How a loss is made of the
result is the layer's affair too.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import _retrieval_checks
from negative_cache.layers import frequency as _popularity
from negative_cache.layers._corpus import EMBEDDING, fingerprint
from negative_cache.layers._scores import Scores
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector, Encoded
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops import (
    SoftmaxSample,
    _execution,
    contrastive,
    sample_softmax_with_gradient,
)
from negative_cache.ops.cache_rows import take_rows

# What a row holds besides the candidate's own features.
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
        rows[CANDIDATE_ID] = fingerprint(features[id_key])
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
      num_negatives: scalar float32, how many draws.
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


class Schedule(NamedTuple):
    """What a training step writes to the cache beside new candidates.

    Attributes:
      write_back: whether draws and, where the cache covers a corpus, positives are written.
      refresh_fraction: ρ, the share of the rows that are encoded anew at each step, oldest first.
    """

    write_back: bool = True
    refresh_fraction: float = 0.0


class Conditions(NamedTuple):
    """Which cached candidates are negatives of a query, and what is added to their scores.

    Attributes:
      positive_ids: [B, P] int64, fingerprints; a candidate that has one of its query's is left out.
        Not None where the cache covers a corpus.
      max_scores: [B] float32; candidates that score higher are left out.
      log_weights: [C] float32, added to the scores of the cached candidates.
    """

    positive_ids: tf.Tensor | None = None
    max_scores: tf.Tensor | None = None
    log_weights: tf.Tensor | None = None


class Refreshed(NamedTuple):
    """Rows that were encoded, and their embeddings of now.

    Attributes:
      rows: [n] int64; a row may come several times.
      embeddings: [n, d] float32.
      mask: [n] bool; where False, there is no such row, and nothing is to be written.
    """

    rows: tf.Tensor
    embeddings: tf.Tensor
    mask: tf.Tensor

    def and_those(self, other: "Refreshed") -> "Refreshed":
        """Both together."""
        return Refreshed(*(tf.concat(parts, axis=0) for parts in zip(self, other)))


class Step(NamedTuple):
    """What the cache is in a training step.

    Attributes:
      log_partition: [B] float32, with the gradient of draws.
      refreshed: what `update` is to write.
      drift_loss: scalar whose gradient trains the corrector; None where nothing is trained.
    """

    log_partition: tf.Tensor
    refreshed: Refreshed
    drift_loss: tf.Tensor | None


class CachedNegatives:
    """The filled rows of a cache as negatives of queries.

    With ĝ the cached embeddings and g those of now, the logit of the cache is the log partition

      log Z(x) = log Σ_y exp(score(x, ĝ(y)) + log_weight(y)),

    and its gradient is estimated from draws ŷ in proportion to exp(score(x, ĝ(ŷ)) + log_weight(ŷ)),
    which are encoded: it is that of their mean score(x, g(ŷ)), or with `exact_query_gradient` that
    of ⟨x, ∇_x log Z⟩ + mean of (score(x, g(ŷ)) - score(x, ĝ(ŷ))), with ∇_x log Z and ĝ constant.

    A cache with an index draws from that: the law is nearly the same, and log Z and its gradient
    are the index's estimates. With a corrector h, every ĝ above is h(ĝ).

    It has no state of its own and may be made anew for every call. Queries [B, d] come divided by
    the temperature.

    Args:
      cache: as `make_cache` makes it, or one that covers a corpus.
      encode: (features [n, ...], training) -> [n, d] float32, the candidate tower of now.
      scores: how a query and a candidate are scored.
      metrics: updated by training steps only.
      num_draws: S, the number of draws per query.
      exact_query_gradient: whether the queries' gradient is computed and draws only correct it.
      schedule: what is written.
      corrector: h.
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
        schedule: Schedule,
        corrector: DriftCorrector | None,
    ):
        self._cache = cache
        self._encode = encode
        self._scores = scores
        self._metrics = metrics
        self._num_draws = num_draws
        self._exact_query_gradient = exact_query_gradient
        self._schedule = schedule
        self._corrector = corrector

    def log_partition(
        self, queries: tf.Tensor, items: Mapping[str, tf.Tensor], conditions: Conditions
    ) -> tf.Tensor:
        """[B] log partition of the cache, without gradient; changes nothing."""
        correction = self._correction()
        sample, _ = self._draw(
            queries, items, conditions, correction, seed=0, compute_gradient=False
        )
        return sample.log_partition

    def sampled_log_partition(
        self,
        queries: tf.Tensor,
        items: Mapping[str, tf.Tensor],
        conditions: Conditions,
        seed: tf.Tensor,
    ) -> Step:
        """The log partition with the sampled gradient, and what a training step does beside it.

        Args:
          queries: [B, d] float32.
          items: rows [N, ...] of the batch's candidates, the first B of which are the positives.
          conditions: which rows may be drawn, and with what weight.
          seed: [2] int64.
        """
        exact = self._exact_query_gradient
        correction = self._correction()
        sample, query_gradient = self._draw(
            queries, items, conditions, correction, seed, compute_gradient=exact
        )
        is_some = tf.math.is_finite(sample.log_partition)
        is_some &= sample.log_partition > 0.5 * contrastive.NOT_A_CANDIDATE
        self._metrics.log_partition.update_state(
            tf.where(is_some, sample.log_partition, 0.0), tf.cast(is_some, tf.float32)
        )
        is_drawn = tf.reshape(sample.indices >= 0, [-1])
        rows = tf.reshape(tf.maximum(sample.indices, 0), [-1])
        # A query without an admissible row has its own positive encoded instead.
        own = tf.range(tf.size(rows)) // self._num_draws
        fresh = self._encode(self._features_of(rows, is_drawn, items, own), training=True)
        stale = self._stale(rows)
        self._metrics.staleness.update_state(
            contrastive.relative_staleness(stale, fresh),
            sample_weight=tf.cast(is_drawn, tf.float32),
        )
        surrogate = self._scores.mean_of_draws(queries, fresh, is_drawn, self._num_draws)
        if exact:
            exact_term = tf.reduce_sum(queries * query_gradient, axis=1)
            surrogate += exact_term
            known = stale if correction is None else correction.correct(stale, rows)
            # What the transform learns has its gradient from the draws alone, as they were drawn.
            surrogate -= self._scores.mean_of_draws(
                queries, known, is_drawn, self._num_draws, as_given=True
            )
        logit = contrastive.value_with_gradient(sample.log_partition, surrogate)
        drawn = Refreshed(rows, tf.stop_gradient(fresh), is_drawn)
        oldest = self._encode_oldest(items)
        drift_loss = None
        if correction is not None:
            drift_loss = self._learn(correction, queries, items, drawn, oldest, seed)
        refreshed = drawn if self._schedule.write_back else None
        if oldest is not None:
            refreshed = oldest if refreshed is None else refreshed.and_those(oldest)
        return Step(logit, refreshed, drift_loss)

    def update(self, items: Mapping[str, tf.Tensor], refreshed: Refreshed | None) -> None:
        """Ends a training step: writes draws back, lets a batch's `items` enter, and reports."""
        self._write(items, refreshed)
        self._metrics.fill.update_state(
            tf.cast(self._cache.num_filled, tf.float32) / self._cache.cache_size
        )
        self._metrics.skipped_rows.update_state(self._cache.num_skipped)

    def add(self, items: Mapping[str, tf.Tensor]) -> None:
        """Lets `items` enter outside of a training step."""
        self._write(items)

    def reencode(self, rows: tf.Tensor) -> None:
        """Encodes filled `rows` [n], all different, outside of a training step."""
        embeddings = self._encode(self._features_at(rows), training=False)
        self._cache.rewrite(rows, embeddings)

    def staleness(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[n] staleness of filled `rows` [n], as they are and as corrected, by encoding them."""
        fresh = self._encode(self._features_at(rows), training=False)
        stale = known = self._stale(rows)
        correction = self._correction()
        if correction is not None:
            known = correction.correct(stale, rows)
        return tuple(contrastive.relative_staleness(values, fresh) for values in (stale, known))

    def _correction(self) -> "_Correction | None":
        if self._corrector is None:
            return None
        return _Correction(self._corrector, self._cache)

    def _draw(
        self,
        queries: tf.Tensor,
        items: Mapping[str, tf.Tensor],
        conditions: Conditions,
        correction: "_Correction | None",
        seed: tf.Tensor | int,
        compute_gradient: bool,
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """Draws S rows a query; where `compute_gradient`, [B, d] ∇_x log Z comes with them."""
        options = {
            "score_transform": self._scores.transform,
            "row_transform": None if correction is None else correction.correct,
            "max_scores": conditions.max_scores,
            "seed": seed,
            "compute_gradient": compute_gradient,
            "log_zero": contrastive.NOT_A_CANDIDATE,
        }
        if self._cache.row_key is not None:
            # The positives' own rows. A fingerprint is its own.
            ids = conditions.positive_ids
            if self._cache.index is None:
                options["candidate_ids"] = tf.range(self._cache.cache_size, dtype=tf.int64)
            options["positive_ids"] = tf.reshape(
                self._cache.rows_of(tf.reshape(ids, [-1])), tf.shape(ids)
            )
        elif conditions.positive_ids is not None:
            options["candidate_ids"] = tf.convert_to_tensor(self._cache.data[CANDIDATE_ID])
            options["positive_ids"] = conditions.positive_ids
        if self._cache.index is not None:
            return self._cache.index.sample_with_gradient(queries, self._num_draws, **options)
        return sample_softmax_with_gradient(
            queries,
            self._cache.embeddings,
            num_samples=self._num_draws,
            candidate_mask=self._cache.filled,
            # Nothing else ever enters the cache.
            masked_rows_are_finite=True,
            log_weights=conditions.log_weights,
            **options,
        )

    def _learn(self, correction, queries, items, drawn, oldest, seed):
        """Lets the corrector learn from all rows that were encoded; its loss."""
        examples = drawn
        if self._cache.row_key is not None:
            rows = self._rows_of(items)
            is_known = (rows >= 0) & self._cache.is_filled(tf.maximum(rows, 0))
            positives = Refreshed(tf.maximum(rows, 0), items[EMBEDDING], is_known)
            examples = examples.and_those(positives)
        if oldest is not None:
            examples = examples.and_those(oldest)
        finite = tf.reduce_all(tf.math.is_finite(examples.embeddings), axis=1)
        examples = Refreshed(
            examples.rows,
            tf.where(finite[:, tf.newaxis], examples.embeddings, 0.0),
            examples.mask & finite,
        )
        to_encode = self._corrector.rows_to_encode(self._cache.embeddings, self._cache.filled, seed)
        if to_encode is not None:
            landmarks, are_there = to_encode
            are_there &= self._cache.is_filled(landmarks)
            own = tf.zeros_like(landmarks)
            features = self._features_of(landmarks, are_there, items, own)
            fresh = tf.stop_gradient(self._encode(features, training=False))
            are_there &= tf.reduce_all(tf.math.is_finite(fresh), axis=1)
            _execution.compiled(
                self._corrector.learn_landmarks,
                correction.encoded(Refreshed(landmarks, fresh, are_there), self._stale(landmarks)),
                like=self._corrector.state_variable,
            )
        return _execution.compiled(
            lambda encoded: self._corrector.learn(
                encoded,
                correction.displacement,
                lambda embeddings: self._scores.of_all_pairs_as_given(queries, embeddings),
            ),
            correction.encoded(examples, self._stale(examples.rows)),
            like=self._corrector.state_variable,
        )

    def _encode_oldest(self, items) -> Refreshed | None:
        """The oldest rows, encoded; None where the schedule has none.

        ρC rows at each step, rounded; where that is less than a half, one every 1 / ρC steps.
        """
        per_step = self._schedule.refresh_fraction * self._cache.cache_size
        if not per_step:
            return None
        count = max(round(per_step), 1)
        rows = self._cache.oldest(count)
        filled = self._cache.is_filled(rows)

        def encode():
            own = tf.zeros_like(rows)
            features = self._features_of(rows, filled, items, own)
            return tf.stop_gradient(self._encode(features, training=False))

        if per_step >= 0.5:
            return Refreshed(rows, encode(), filled)
        is_due = tf.equal(self._cache.step % round(1.0 / per_step), 0)
        dim = self._cache.embeddings.shape[1]
        embeddings = tf.cond(is_due, encode, lambda: tf.zeros([count, dim]))
        return Refreshed(rows, embeddings, filled & is_due)

    def _write(self, items: Mapping[str, tf.Tensor], refreshed: Refreshed | None = None) -> None:
        """The one place where the cache changes in a step."""
        updates = {}
        if refreshed is not None:
            updates = {
                "updated_item_data": {EMBEDDING: refreshed.embeddings},
                "updated_item_indices": refreshed.rows,
                "updated_item_mask": refreshed.mask,
            }
        mask = None
        if self._cache.row_key is not None and not self._schedule.write_back:
            mask = tf.zeros(tf.shape(items[EMBEDDING])[:1], tf.bool)
        items = {key: items[key] for key in self._cache.specs}
        self._cache.update(new_items=items, new_items_mask=mask, **updates)

    def _rows_of(self, items):
        """[N] int64, the rows of a batch's candidates in a corpus, -1 for others."""
        return self._cache.rows_of(items[self._cache.row_key])

    def _stale(self, rows):
        return tf.stop_gradient(tf.cast(tf.gather(self._cache.embeddings, rows), tf.float32))

    def _features_at(self, rows):
        """The features [n, ...] of `rows` [n], as the tower takes them."""
        return {
            key: tf.gather(variable, rows)
            for key, variable in self._cache.data.items()
            if key not in INTERNAL_KEYS
        }

    def _features_of(self, rows, is_there, items, substitutes):
        """`_features_at(rows)` where `is_there`, and else those of `items` at `substitutes`.

        An unfilled row's empty features might be outside of what the tower knows, and give NaN.
        """
        features = {}
        for key, values in self._features_at(rows).items():
            mask = tf.reshape(is_there, [-1] + [1] * (values.shape.rank - 1))
            # A batch may be empty, and have no row to stand in.
            nothing = tf.zeros([1, *values.shape[1:]], values.dtype)
            known = tf.concat([items[key], nothing], axis=0)
            features[key] = tf.where(mask, values, take_rows(known, substitutes))
        return features


class _Correction:
    """A corrector in one step: as a function of rows of the cache."""

    def __init__(self, corrector: DriftCorrector, cache: Cache):
        self._cache, self._content_key = cache, corrector.content_key
        self.displacement = corrector.displacement_fn()
        self._correct = corrector.corrector_fn(self.displacement)

    def correct(self, embeddings: tf.Tensor, rows: tf.Tensor | None) -> tf.Tensor:
        """Corrects embeddings [n, d] of `rows` [n]; of no row where None, but of means of many."""
        if rows is None:
            return self._correct(embeddings)
        return self._correct(embeddings, self._cache.age_of(rows), self._content(rows))

    def encoded(self, refreshed: Refreshed, stale: tf.Tensor) -> Encoded:
        """`refreshed` rows as examples."""
        rows = refreshed.rows
        age = self._cache.age_of(rows)
        return Encoded(stale, refreshed.embeddings, age, refreshed.mask, self._content(rows))

    def _content(self, rows):
        if self._content_key is None:
            return None
        return tf.cast(tf.gather(self._cache.data[self._content_key], rows), tf.float32)
