"""`InBatch`: the other candidates of the batch, or of all replicas' batches, as negatives."""

from typing import Any

import tensorflow as tf

from negative_cache import _validation, util
from negative_cache._compat import keras
from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.pool import check_pool, gather_rows
from negative_cache.ops import contrastive
from negative_cache.ops._block_scorer import is_among


@keras.utils.register_keras_serializable("negative_cache")
class InBatch(Negatives):
    """The batch's other candidates are negatives of a query, with exact gradient.

    Args:
      num_hard: keep only so many of the highest-scoring ones of each query; None keeps all.
      pool: "replicas" for the candidates of the batches of all replicas of the `tf.distribute`
        strategy: the gradient reaches the replicas that they come from. Of a `score_mask`, only the
        replica's own candidates know. None for those of the replica's own batch.
      **kwargs: of the layer.

    Raises:
      ValueError: if `num_hard` is not positive, or `pool` is something else.

    Examples:
      >>> task = Retrieval(candidate_tower, [InBatch(num_hard=10)], temperature=0.1)
      >>> loss = task(query_embeddings, candidate_embeddings, {"title": titles})
    """

    includes_positive = True

    def __init__(self, num_hard: int | None = None, pool: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.pool = check_pool(pool)
        self.supports_jit = self.pool is None or not tf.distribute.has_strategy()
        if num_hard is not None:
            num_hard = _validation.check_count(num_hard, "num_hard")
        self.num_hard = num_hard

    def logits(self, batch: Batch, training: bool) -> Contribution:
        del training
        left_out = batch.is_positive | batch.not_negatives
        logits = contrastive.leave_out(batch.pair_logits, left_out)
        if self.pool is not None and util.num_replicas() > 1:
            logits = tf.concat([logits, _logits_of_other_replicas(batch)], axis=1)
        if self.num_hard is not None:
            logits = contrastive.keep_hardest(logits, self.num_hard)
        return Contribution(logits)

    def num_stream_draws(self, num_candidates: tf.Tensor) -> tf.Tensor:
        num_candidates = tf.cast(num_candidates, tf.float32)
        return num_candidates if self.pool is None else util.cross_replica_sum(num_candidates)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_hard": self.num_hard, "pool": self.pool}


def _logits_of_other_replicas(batch: Batch) -> tf.Tensor:
    """[B, n] float32, the logits of the candidates in the batches of all other replicas."""
    replica = tf.fill([batch.num_candidates], util.replica_id())
    sent = [replica]
    if batch.left_out_ids is not None:
        sent.append(batch.ids)
    if batch.log_q is not None:
        # By the frequencies that the replica of a candidate has counted.
        log_q = batch.log_q.log_expected(batch.log_probability, batch.ids, are_cached=False)
        sent.append(log_q)
    replicas, *about = gather_rows(sent)
    is_other = tf.not_equal(replicas, util.replica_id())
    about = [tf.boolean_mask(part, is_other) for part in about]
    candidates = util.cross_replica_concat(batch.candidates, axis=0)
    candidates = tf.boolean_mask(candidates, is_other)
    logits = batch.scores.of_all_pairs(batch.queries, candidates)
    left_out = tf.zeros_like(logits, tf.bool)
    if batch.max_scores is not None:
        left_out |= logits > batch.max_scores[:, tf.newaxis]
    if batch.left_out_ids is not None:
        left_out |= is_among(about[0][tf.newaxis], batch.left_out_ids)
    if batch.log_q is not None:
        logits -= about[-1]
    return contrastive.leave_out(logits, left_out)
