"""The rows of a cache as one step draws from them: those of this replica alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from negative_cache.layers._negatives.batch import Batch, Queries
from negative_cache.layers._negatives.draws import Draws, shared_weights
from negative_cache.layers._negatives.rows import DrawnRows, EncodedRows, RowCorrection
from negative_cache.layers._negatives.samplers import sampler_of
from negative_cache.ops import SoftmaxSample, contrastive, shared_draws

if TYPE_CHECKING:
    from negative_cache.layers._negatives.cached import CachedNegatives


class ShardSample(NamedTuple):
    """What a step has drawn for the B queries of a batch.

    Attributes:
      log_partition: [B] float32.
      query_gradient: [B, d] float32, ∇_x log Z; None if it is not to be exact.
      rows: the m drawn rows.
      draws: with what weights each query uses them.
    """

    log_partition: tf.Tensor
    query_gradient: tf.Tensor | None
    rows: DrawnRows
    draws: Draws


class Shard:
    """The filled rows of the cache of this replica.

    Args:
      source: has the cache and the options.
      batch: the queries.
      correction: the corrector of this step, if there is one.
    """

    def __init__(self, source: CachedNegatives, batch: Batch, correction: RowCorrection | None):
        self._source = source
        self._batch = batch
        self._correction = correction
        self._log_weights = source.log_weights(batch)
        self._queries = Queries(batch.queries, source.left_out_ids(batch), batch.max_scores)
        self._drawn_rows: tf.Tensor | None = None

    def log_partition(self) -> tf.Tensor:
        """[B] float32, without gradient; changes nothing."""
        return self._sample(0, seed=0, compute_gradient=False)[0].log_partition

    def draw(self, seed: tf.Tensor) -> ShardSample:
        """Draws S rows for each query, or n for all of them.

        Args:
          seed: [2] int64.
        """
        wanted = {"seed": seed, "compute_gradient": self._source.exact_query_gradient}
        per_query = self._source.num_negatives
        if per_query is not None:
            sample, gradient = self._sample(per_query, **wanted)
        else:
            choose = functools.partial(self._choose, seed=seed)
            sample, gradient = self._sample(1, choose_queries=choose, **wanted)
        rows = tf.reshape(tf.maximum(sample.indices, 0), [-1])
        is_drawn = tf.reshape(sample.indices >= 0, [-1])
        self._drawn_rows = rows
        found = self._look_up(rows, is_drawn)
        draws = self._weigh(sample.log_partition, sample.indices >= 0, found)
        return ShardSample(sample.log_partition, gradient, found, draws)

    def bring_home(self, embeddings: tf.Tensor, mask: tf.Tensor) -> EncodedRows:
        """The drawn rows with their embeddings of now, as what this replica is to write.

        Args:
          embeddings: [m, d] float32, without gradient, of the rows that `draw` has returned.
          mask: [m] bool, which of them there are.
        """
        return EncodedRows(self._drawn_rows, embeddings, mask)

    def _sample(
        self, num_samples: int, queries: Queries | None = None, **options: Any
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """Draws from the rows of this replica, for the queries of the batch or for others."""
        queries = queries or self._queries
        left_out = {}
        if queries.left_out_ids is not None:
            left_out = self._source.left_out_rows(queries.left_out_ids)
        if self._log_weights is not None:
            options["log_weights"] = self._log_weights
        return sampler_of(self._source.get_cache()).sample_with_gradient(
            queries.embeddings,
            num_samples,
            score_transform=self._batch.scores.transform,
            row_transform=None if self._correction is None else self._correction.correct,
            max_scores=queries.max_scores,
            log_zero=contrastive.NOT_A_CANDIDATE,
            **left_out,
            **options,
        )

    def _look_up(self, rows: tf.Tensor, mask: tf.Tensor) -> DrawnRows:
        """What is known of `rows` [m] of this replica, of which `mask` [m] says which there are."""
        source = self._source
        known = stale = source.stale(rows)
        age = None
        if self._correction is not None:
            known, age = self._correction.correct_and_age(stale, rows)
        is_weighed = source.num_draws is not None
        log_weights = ids = None
        if is_weighed and self._log_weights is not None:
            log_weights = tf.gather(self._log_weights, rows)
        if is_weighed and self._queries.left_out_ids is not None:
            ids = source.ids_at(rows)
        return DrawnRows(
            features=source.features_at(rows),
            mask=mask,
            stale=stale,
            known=known,
            age=age,
            ids=ids,
            log_weights=log_weights,
        )

    def _choose(self, log_partition: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """[n] int32, the queries of the batch that shared draws are made for."""
        # No step has a seed of negative numbers.
        other_seed = tf.bitwise.invert(seed)
        shares = self._shares(log_partition)
        return shared_draws.choose_queries(shares, self._source.num_draws, other_seed)

    def _weigh(self, log_partition: tf.Tensor, is_drawn: tf.Tensor, rows: DrawnRows) -> Draws:
        """The weights of the draws, of which `is_drawn`, [B, S] or [n, 1], says which there are."""
        if self._source.num_negatives is not None:
            return Draws.own(is_drawn)
        weights = shared_weights(
            self._queries,
            rows,
            log_partition,
            self._shares(log_partition),
            self._batch.scores.transform,
        )
        return Draws(weights, are_shared=True)

    def _shares(self, log_partition: tf.Tensor) -> tf.Tensor:
        """[B] float32, π: how much each query's negatives matter to the loss.

        The gradient of a query's loss by its log Z is at most 1 - p⁺ = Z / (exp s⁺ + Z); it is less
        if there are other sources.
        """
        log_odds = log_partition - self._batch.positive_logits
        log_weights = tf.where(
            has_negatives(log_partition),
            tf.math.log_sigmoid(log_odds),
            contrastive.NOT_A_CANDIDATE,
        )
        return tf.stop_gradient(shared_draws.mixture_shares(log_weights))


def has_negatives(log_partition: tf.Tensor) -> tf.Tensor:
    """[B] bool, whether there is a row that is a negative of each query."""
    has_some = log_partition > 0.5 * contrastive.NOT_A_CANDIDATE
    return tf.math.is_finite(log_partition) & has_some
