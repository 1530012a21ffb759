"""How queries use the rows that a training step draws: each its own, or all of them the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from negative_cache.layers._negatives.batch import Queries
from negative_cache.layers._negatives.rows import DrawnRows
from negative_cache.layers._negatives.scores import Scores
from negative_cache.ops import _execution, shared_draws
from negative_cache.ops._block_scorer import BlockScorer

# What a score may differ by, relatively, from that of a sampler in TF32 or 16 bits.
_TOLERANCE = 1e-3


class Draws(NamedTuple):
    """With what weights the B queries use the m rows that were drawn.

    Attributes:
      weights: [B, n] float32: of all draws for each query if they are shared, n = m; else of the S
        draws of its own, m = B S.
      are_shared: whether all queries use all draws.
    """

    weights: tf.Tensor
    are_shared: bool

    @classmethod
    def own(cls, are_there: tf.Tensor) -> Draws:
        """S draws of each query for itself: the mean counts of those that `are_there` [B, S]."""
        weights = tf.cast(are_there, tf.float32)
        weights /= tf.maximum(tf.reduce_sum(weights, axis=1, keepdims=True), 1.0)
        return cls(weights, False)

    def mean_score(
        self, scores: Scores, queries: tf.Tensor, embeddings: tf.Tensor, *, as_given: bool = False
    ) -> tf.Tensor:
        """[B] float32, the weighted mean of each query's scores with the draws that it uses.

        Args:
          scores: how pairs are scored.
          queries: [B, d] float32, scaled.
          embeddings: [m, d] float32, of the drawn rows.
          as_given: no gradient reaches what a transform learns.
        """
        if self.are_shared:
            of_pairs = scores.of_all_pairs(queries, embeddings, as_given=as_given)
        else:
            own = [tf.shape(self.weights)[0], -1, embeddings.shape[1]]
            of_pairs = scores.of_own(queries, tf.reshape(embeddings, own), as_given=as_given)
        # The score of a row that is no candidate of the query may be anything.
        of_pairs = tf.where(self.weights > 0.0, of_pairs, 0.0)
        return tf.reduce_sum(self.weights * of_pairs, axis=1)


def shared_weights(
    queries: Queries,
    drawn: DrawnRows,
    log_partition: tf.Tensor,
    shares: tf.Tensor,
    score_transform: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
    """[B, n] float32, the weights with which every query uses every draw.

    Args:
      queries: B queries.
      drawn: n rows.
      log_partition: [B] float32, of the softmax that was drawn from.
      shares: [B] float32, π.
      score_transform: of inner products.
    """
    limits = queries.max_scores
    if limits is not None:
        # The sampler has scored in another product, and rounded otherwise: what it has drawn must
        # not have a weight of zero.
        limits += _TOLERANCE * tf.maximum(tf.abs(limits), 1.0)
    scorer = BlockScorer(
        queries.embeddings,
        drawn.known,
        candidate_mask=drawn.mask,
        candidate_ids=drawn.ids,
        positive_ids=queries.left_out_ids,
        log_weights=drawn.log_weights,
        max_scores=limits,
        score_transform=score_transform,
    )

    def weigh() -> tf.Tensor:
        scores, _ = scorer.score_block(drawn.known, 0, tf.size(drawn.mask))
        # What the sampler has left out by a rounding may score above its log partition.
        log_probabilities = tf.minimum(scores - log_partition[:, tf.newaxis], 0.0)
        return shared_draws.balanced_weights(log_probabilities, shares)

    return _execution.as_constant(weigh)
