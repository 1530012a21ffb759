"""From the arguments of a call to a `Batch`: checks, scores, and what is no negative of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from negative_cache import _features
from negative_cache._features import fingerprint
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.base import Negatives
from negative_cache.layers._negatives.batch import Batch, ExplicitNegatives, LogQ
from negative_cache.layers._negatives.scores import Scores
from negative_cache.layers.frequency import (
    SMALLEST_IN_BATCH,
    SMALLEST_IN_CACHE,
    FrequencyEstimator,
    log_given_probability,
    log_unknown_probability,
)
from negative_cache.ops import _execution
from negative_cache.ops._block_scorer import is_among


class BatchReader:
    """Makes a `Batch` of the arguments of `Retrieval.call`.

    Args:
      scores: how a query and a candidate are scored.
      sources: the sources of negatives; what the correction for popularity is about.
      id_key: the argument `candidate_id_key`.
      leaves_out_ids: the argument `remove_accidental_hits`.
      margin: the argument `false_negative_margin`.
      frequency: estimates the candidates' frequencies, if that is wanted.
    """

    def __init__(
        self,
        scores: Scores,
        sources: Sequence[Negatives],
        *,
        id_key: str | None,
        leaves_out_ids: bool,
        margin: float | None,
        frequency: FrequencyEstimator | None,
    ):
        self._scores = scores
        self._sources = tuple(sources)
        self._id_key = id_key
        self._leaves_out_ids = leaves_out_ids
        self._margin = margin
        self._frequency = frequency

    def read(
        self,
        queries: tf.Tensor,
        candidates: tf.Tensor,
        features: Mapping[str, tf.Tensor],
        *,
        probabilities: tf.Tensor | None,
        explicit: tuple[tf.Tensor | None, tf.Tensor | None, tf.Tensor | None],
        score_mask: tf.Tensor | None,
        known_positive_ids: tf.Tensor | tf.RaggedTensor | None,
        training: bool,
    ) -> Batch:
        """The batch; a training step counts its candidates.

        Args:
          queries: [B, d] float32, checked.
          candidates: [N, d] float32, checked.
          features: feature name -> [N, ...].
          probabilities: the argument `candidate_sampling_probability`.
          explicit: the arguments `negative_embeddings`, `negative_mask` and `negative_ids`.
          score_mask: the argument of that name.
          known_positive_ids: the argument of that name.
          training: whether this is a training step.
        """
        ids, log_probability = self.about_candidates(features, candidates, probabilities)
        if self._frequency is not None and training:
            self._frequency.update(ids)
        scaled_queries = self._scores.scale(queries)
        pair_scores = self._scores.of_all_pairs(scaled_queries, candidates)
        positive_scores = tf.linalg.diag_part(pair_scores)
        max_scores = None
        if self._margin is not None:
            max_scores = tf.stop_gradient(positive_scores) - self._margin
        left_out_ids = self._left_out_ids(ids, features, queries, known_positive_ids)
        is_positive = tf.eye(tf.shape(queries)[0], tf.shape(candidates)[0], dtype=tf.bool)
        not_negatives = self._not_negatives(pair_scores, ids, left_out_ids, max_scores, score_mask)
        log_q = self._log_q(tf.shape(candidates)[0], are_given=probabilities is not None)
        pair_logits, positive_logits = pair_scores, positive_scores
        if log_q is not None:
            log_expected = log_q.log_expected(log_probability, ids, are_cached=False)
            pair_logits -= log_expected
            includes_positive = any(source.includes_positive for source in self._sources)
            if probabilities is not None and includes_positive:
                positive_logits -= log_expected[: tf.shape(queries)[0]]
        return Batch(
            queries=scaled_queries,
            candidates=candidates,
            features=features,
            ids=ids,
            id_dtype=self._id_dtype(features),
            log_probability=log_probability,
            scores=self._scores,
            pair_logits=pair_logits,
            positive_logits=positive_logits,
            is_positive=is_positive,
            not_negatives=not_negatives & ~is_positive,
            left_out_ids=left_out_ids,
            max_scores=max_scores,
            explicit=self._explicit(queries, features, *explicit, left_out_ids is not None),
            log_q=log_q,
        )

    def about_candidates(
        self,
        features: Mapping[str, tf.Tensor],
        embeddings: tf.Tensor,
        probabilities: tf.Tensor | None,
    ) -> tuple[tf.Tensor | None, tf.Tensor]:
        """[n] fingerprints of candidates' ids, if they have some, and [n] log probabilities."""
        for name, values in features.items():
            checks.check_rows(values, embeddings, f"candidate_features[{name!r}]")
        if probabilities is None:
            log_probability = log_unknown_probability(tf.shape(embeddings)[0])
        else:
            probabilities = tf.cast(probabilities, tf.float32)
            name = "candidate_sampling_probability"
            checks.check_rows(probabilities, embeddings, name, rank=1)
            # Among millions of cached candidates smaller probabilities are meant.
            has_cache = any(source.is_cache for source in self._sources)
            smallest = SMALLEST_IN_CACHE if has_cache else SMALLEST_IN_BATCH
            log_probability = log_given_probability(probabilities, smallest)
        if self._id_key is None:
            return None, log_probability
        ids = self._ids(features)
        if ids.dtype == tf.string and _execution.is_in_xla():
            raise ValueError(
                f"XLA knows no strings, which the ids {self._id_key!r} are. Compile without"
                " `jit_compile=True`, or look strings up before they enter the model."
            )
        return fingerprint(ids), log_probability

    def _left_out_ids(
        self,
        ids: tf.Tensor | None,
        features: Mapping[str, tf.Tensor],
        queries: tf.Tensor,
        known_positive_ids: tf.Tensor | tf.RaggedTensor | None,
    ) -> tf.Tensor | None:
        if known_positive_ids is None and not self._leaves_out_ids:
            return None
        if ids is None:
            raise ValueError("`known_positive_ids` needs a `candidate_id_key`. Received: None.")
        own = ids[: tf.shape(queries)[0], tf.newaxis]
        if known_positive_ids is None:
            return own
        known, is_there = checks.check_known_positives(known_positive_ids, queries)
        checks.check_id_kind(known, self._id_dtype(features), "known_positive_ids", self._id_key)
        return tf.concat([own, tf.where(is_there, fingerprint(known), own)], axis=1)

    def _id_dtype(self, features: Mapping[str, tf.Tensor]) -> tf.DType | None:
        return None if self._id_key is None else self._ids(features).dtype

    def _ids(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        ids: Any = _features.id_feature(features, self._id_key)
        return ids

    def _not_negatives(
        self,
        pair_scores: tf.Tensor,
        ids: tf.Tensor | None,
        left_out_ids: tf.Tensor | None,
        max_scores: tf.Tensor | None,
        score_mask: tf.Tensor | None,
    ) -> tf.Tensor:
        """[B, N] bool, the candidates that are no negatives of a query; or are its positive."""
        found = tf.zeros_like(pair_scores, tf.bool)
        if ids is not None and left_out_ids is not None:
            found |= is_among(ids[tf.newaxis], left_out_ids)
        if max_scores is not None:
            found |= pair_scores > max_scores[:, tf.newaxis]
        if score_mask is not None:
            found |= ~checks.check_score_mask(score_mask, pair_scores)
        return found

    def _log_q(self, num_candidates: tf.Tensor, *, are_given: bool) -> LogQ | None:
        if not are_given and self._frequency is None:
            return None
        num_draws = tf.constant(0.0)
        for source in self._sources:
            draws = source.num_stream_draws(num_candidates)
            if draws is not None:
                num_draws += draws
        return LogQ(num_draws, None if are_given else self._frequency)

    def _explicit(
        self,
        queries: tf.Tensor,
        features: Mapping[str, tf.Tensor],
        embeddings: tf.Tensor | None,
        mask: tf.Tensor | None,
        ids: tf.Tensor | None,
        leaves_out: bool,
    ) -> ExplicitNegatives | None:
        if embeddings is None:
            return None
        embeddings = checks.check_negatives(embeddings, queries)
        if mask is not None:
            mask = checks.check_negative_mask(mask, embeddings)
        if ids is None or not leaves_out:
            return ExplicitNegatives(embeddings, mask)
        ids = tf.convert_to_tensor(ids)
        checks.check_id_kind(ids, self._id_dtype(features), "negative_ids", self._id_key)
        checks.check_negative_ids(ids, embeddings)
        return ExplicitNegatives(embeddings, mask, ids)
