"""A batch as sources of negatives see it: checked, and scored once for all of them."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from negative_cache._features import are_of_one_kind, fingerprint
from negative_cache.layers._negatives.scores import Scores
from negative_cache.layers.frequency import (
    FrequencyEstimator,
    log_estimated_probability,
    log_expected_occurrences,
)
from negative_cache.ops import contrastive
from negative_cache.ops._block_scorer import is_among


@dataclasses.dataclass(frozen=True)
class LogQ:
    """The log Q correction: from the score of a draw from the training stream, log(n p) is taken.

    Attributes:
      num_draws: scalar float32, n, how many draws from the stream stand among the negatives.
      frequency: estimates p; None if candidates come with their probabilities.
    """

    num_draws: tf.Tensor
    frequency: FrequencyEstimator | None

    def log_expected(
        self, log_probability: tf.Tensor | None, ids: tf.Tensor | None, *, are_cached: bool
    ) -> tf.Tensor:
        """[n] log of how often each of n candidates is expected among the draws.

        Args:
          log_probability: [n] float32, what they came with; not needed with a `frequency`.
          ids: [n] int64 fingerprints; not needed without.
          are_cached: whether they are rows of a cache, which may hold candidates that the stream
            has not brought.
        """
        if self.frequency is not None:
            log_probability = log_estimated_probability(self.frequency, ids, of_rows=are_cached)
        return log_expected_occurrences(log_probability, self.num_draws)


class Queries(NamedTuple):
    """Queries with what of a batch belongs to each of them.

    Attributes:
      embeddings: [q, d] float32, divided by the temperature.
      left_out_ids: [q, P] int64, fingerprints of what is no negative; None for nothing.
      max_scores: [q] float32, see `Batch`; None for no limit.
    """

    embeddings: tf.Tensor
    left_out_ids: tf.Tensor | None
    max_scores: tf.Tensor | None


@dataclasses.dataclass(frozen=True)
class ExplicitNegatives:
    """Negatives that a batch lists for each of its queries.

    Attributes:
      embeddings: [B, M, d] float32.
      mask: [B, M] bool, which of them there are; None if all are.
      ids: [B, M] ids of the kind of the candidates', if they came with ids that matter.
    """

    embeddings: tf.Tensor
    mask: tf.Tensor | None = None
    ids: tf.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """B queries and N >= B candidates, of which row i is the positive of query i.

    Attributes:
      queries: [B, d] float32, divided by the temperature.
      candidates: [N, d] float32.
      features: what the candidates were embedded from, feature name -> [N, ...].
      ids: [N] int64, fingerprints of the candidates' ids; None without a `candidate_id_key`. The
        fingerprint of an integer is the integer, that of a string a hash of it.
      id_dtype: the dtype of the ids themselves; None without a `candidate_id_key`.
      log_probability: [N] float32, log of the given sampling probabilities, or marks of unknown.
      scores: how a query and a candidate are scored.
      pair_logits: [B, N] float32, the scores of all pairs, corrected by log Q if that is wanted.
      positive_logits: [B] float32, s⁺, corrected by log Q where TF-Recommenders corrects it.
      is_positive: [B, N] bool, the pairs of a query and its positive.
      not_negatives: [B, N] bool, the candidates of the batch that are no negatives of a query,
        besides its positive: masked, of a right id, or above `max_scores`.
      left_out_ids: [B, P] int64, fingerprints of candidates that are no negatives of each query,
        its positive first; None if nothing is left out by its id.
      max_scores: [B] float32; candidates that score higher are likely unlabelled positives, and no
        negatives. None without a `false_negative_margin`.
      explicit: the negatives that the batch lists, if it does.
      log_q: the correction for popularity, if there is one.

    Examples:
      >>> class Shifted(Negatives):
      ...     '''The positive of another query as each query's only negative.'''
      ...
      ...     def logits(self, batch, training):
      ...         others = tf.roll(batch.candidates[: batch.num_queries], shift=1, axis=0)
      ...         return Contribution(batch.own_logits(others[:, tf.newaxis]))
    """

    queries: tf.Tensor
    candidates: tf.Tensor
    features: Mapping[str, tf.Tensor]
    ids: tf.Tensor | None
    id_dtype: tf.DType | None
    log_probability: tf.Tensor
    scores: Scores
    pair_logits: tf.Tensor
    positive_logits: tf.Tensor
    is_positive: tf.Tensor
    not_negatives: tf.Tensor
    left_out_ids: tf.Tensor | None = None
    max_scores: tf.Tensor | None = None
    explicit: ExplicitNegatives | None = None
    log_q: LogQ | None = None

    @property
    def num_queries(self) -> tf.Tensor:
        """Scalar int32, B."""
        return tf.shape(self.queries)[0]

    @property
    def num_candidates(self) -> tf.Tensor:
        """Scalar int32, N."""
        return tf.shape(self.candidates)[0]

    def own_logits(
        self,
        embeddings: tf.Tensor,
        mask: tf.Tensor | None = None,
        ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """[B, n] float32, the scores of candidates that each query has of its own.

        Those that are no negatives are `ops.contrastive.NOT_A_CANDIDATE`. Neither log Q nor
        `max_scores` is applied.

        Args:
          embeddings: [B, n, d] float32.
          mask: [B, n] bool, which of them there are; the others are padding, whatever they are.
          ids: [B, n], their ids, of the kind of the task's `candidate_id_key`, to leave out those
            among `left_out_ids`.

        Raises:
          ValueError: if `ids` are strings and the candidates' ids are not, or the other way round.
        """
        if mask is not None:
            # Padding may be embedded as anything.
            embeddings = tf.where(mask[..., tf.newaxis], embeddings, 0.0)
        logits = self.scores.of_own(self.queries, embeddings)
        if mask is not None:
            logits = contrastive.leave_out(logits, ~mask)
        if ids is not None and self.left_out_ids is not None:
            ids = tf.convert_to_tensor(ids)
            if not are_of_one_kind(ids.dtype, self.id_dtype):
                raise ValueError(
                    f"`ids` must be of the kind of the candidates' ids, {self.id_dtype}. Received"
                    f" dtype: {ids.dtype.name}."
                )
            logits = contrastive.leave_out(logits, is_among(fingerprint(ids), self.left_out_ids))
        return logits
