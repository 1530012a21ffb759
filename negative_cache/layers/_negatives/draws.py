"""How queries use the rows that a training step draws: each its own, or all of them the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from negative_cache.layers._negatives.rows import EncodedRows
from negative_cache.layers._negatives.scores import Scores
from negative_cache.ops import SoftmaxSample, _execution, shared_draws
from negative_cache.ops._block_scorer import BlockScorer

# Options of a sampler with an entry for each query, and with one for each row.
_OF_QUERIES = ("positive_ids", "max_scores")
_OF_ROWS = ("candidate_ids", "log_weights")
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
    def own(cls, sample: SoftmaxSample) -> Draws:
        """S draws of each query for itself: their mean counts."""
        weights = tf.cast(sample.indices >= 0, tf.float32)
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
    queries: tf.Tensor,
    drawn: EncodedRows,
    log_partition: tf.Tensor,
    shares: tf.Tensor,
    options: Mapping[str, Any],
) -> tf.Tensor:
    """[B, n] float32, the weights with which every query uses every draw.

    Args:
      queries: [B, d] float32, scaled.
      drawn: n rows, with their embeddings as the sampler knows them.
      log_partition: [B] float32, of the softmax that was drawn from.
      shares: [B] float32, π.
      options: of the sampler.
    """
    of_pairs: dict[str, Any] = {
        name: options.get(name) for name in (*_OF_QUERIES, "score_transform")
    }
    for name in _OF_ROWS:
        if options.get(name) is not None:
            of_pairs[name] = tf.gather(options[name], drawn.rows)
    if of_pairs["positive_ids"] is not None and "candidate_ids" not in of_pairs:
        of_pairs["candidate_ids"] = drawn.rows
    if of_pairs["max_scores"] is not None:
        # The sampler has scored in another product, and rounded otherwise: what it has drawn must
        # not have a weight of zero.
        limits = of_pairs["max_scores"]
        of_pairs["max_scores"] = limits + _TOLERANCE * tf.maximum(tf.abs(limits), 1.0)
    scorer = BlockScorer(queries, drawn.embeddings, candidate_mask=drawn.mask, **of_pairs)

    def weigh() -> tf.Tensor:
        scores, _ = scorer.score_block(drawn.embeddings, 0, tf.size(drawn.rows))
        # What the sampler has left out by a rounding may score above its log partition.
        log_probabilities = tf.minimum(scores - log_partition[:, tf.newaxis], 0.0)
        return shared_draws.balanced_weights(log_probabilities, shares)

    return _execution.as_constant(weigh)
