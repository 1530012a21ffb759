"""Exact retrieval metrics over a whole corpus, without a top-k.

Only the rank of each query's positive is needed: the number of candidates that score higher.
Counting them block by block costs one matmul and one comparison, holds no [Q, C] matrix, and every
recall@k and the MRR follow from it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

# Where positives are not identified in the corpus, a candidate within rounding of the positive's
# score is taken for the positive itself.
_RELATIVE_TIE = 1e-6


def positive_ranks(
    query_embeddings: tf.Tensor,
    positive_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor,
    *,
    positive_rows: tf.Tensor | None = None,
    block_size: int = 8192,
) -> np.ndarray:
    """Counts, for each query, the candidates that score higher than its positive.

    Args:
      query_embeddings: [Q, d] float.
      positive_embeddings: [Q, d] float.
      candidate_embeddings: [C, d] float, the corpus.
      positive_rows: [Q] int64, the row of each positive in the corpus, which then never counts as
        higher than itself; -1 for a positive that is not in the corpus. Where None, a candidate
        whose score is within float32 rounding of the positive's is a tie, and ties do not count.
      block_size: candidates scored at a time.

    Returns:
      [Q] int64 ranks, 0 for a positive that no candidate beats.

    Raises:
      ValueError: where the shapes do not fit.
    """
    queries, positives, candidates = (
        tf.cast(tf.convert_to_tensor(values), tf.float32)
        for values in (query_embeddings, positive_embeddings, candidate_embeddings)
    )
    if (
        queries.shape != positives.shape
        or queries.shape[1:] != candidates.shape[1:]
        or queries.shape.rank != 2
    ):
        raise ValueError(
            "Queries and positives must have shape [queries, dim] and candidates [candidates, dim]."
            f" Received shapes: {queries.shape}, {positives.shape} and {candidates.shape}."
        )
    num_queries, chunk = queries.shape[0], 4096
    ranks = []
    for start in range(0, num_queries, chunk):
        rows = (
            None
            if positive_rows is None
            else tf.cast(positive_rows[start : start + chunk], tf.int64)
        )
        ranks.append(
            _count_higher(
                queries[start : start + chunk],
                positives[start : start + chunk],
                candidates,
                rows,
                block_size,
            )
        )
    return np.concatenate([count.numpy() for count in ranks]) if ranks else np.zeros([0], np.int64)


@tf.function(reduce_retracing=True)
def _count_higher(queries, positives, candidates, positive_rows, block_size):
    positive_scores = tf.reduce_sum(queries * positives, axis=1)
    threshold = positive_scores
    if positive_rows is None:
        threshold += _RELATIVE_TIE * tf.norm(queries, axis=1) * tf.norm(positives, axis=1)
    count = tf.zeros(tf.shape(queries)[:1], tf.int64)
    for start in tf.range(0, tf.shape(candidates)[0], block_size):
        scores = tf.matmul(queries, candidates[start : start + block_size], transpose_b=True)
        # All but those that do not score higher: a model of NaN has the worst ranks, not the best.
        size = tf.shape(scores, out_type=tf.int64)[1]
        count += size - tf.math.count_nonzero(scores <= threshold[:, tf.newaxis], axis=1)
        if positive_rows is not None:
            local_rows = positive_rows - tf.cast(start, tf.int64)
            is_here = (local_rows >= 0) & (local_rows < size)
            own_scores = tf.gather(scores, tf.where(is_here, local_rows, 0), batch_dims=1)
            is_counted = 1 - tf.cast(own_scores <= threshold, tf.int64)
            count -= tf.where(is_here, is_counted, 0)
    return count


def retrieval_metrics(ranks: np.ndarray, k: Sequence[int] = (1, 10, 100)) -> dict[str, float]:
    """Computes `recall_at_{k}`, the share of ranks below k, and `mrr`, the mean of 1 / (rank + 1).

    Args:
      ranks: [Q] int, 0 for the best rank.
      k: the cut-offs.
    """
    metrics = {f"recall_at_{cutoff}": float(np.mean(ranks < cutoff)) for cutoff in k}
    return {**metrics, "mrr": float(np.mean(1.0 / (ranks + 1.0)))}


class Encoder:
    """Embeds datasets with a network in inference mode, compiled once."""

    def __init__(self, network):
        self._embed = tf.function(
            lambda features: tf.cast(network(features, training=False), tf.float32),
            reduce_retracing=True,
        )

    def __call__(self, batches: Iterable, after_batch=None) -> np.ndarray:
        """Embeds all `batches` of features: [n, d] float32.

        `after_batch(i)` is called after the i-th batch, counted from 1.
        """
        embeddings = []
        for step, features in enumerate(batches):
            embeddings.append(self._embed(features).numpy())
            if after_batch is not None:
                after_batch(step + 1)
        if not embeddings:
            raise ValueError("The dataset to embed is empty.")
        return np.concatenate(embeddings)


def rows_of(ids: np.ndarray, corpus_ids: np.ndarray) -> np.ndarray:
    """Finds the row of each of `ids` [Q] in `corpus_ids` [C]: [Q] int64, -1 where there is none.

    Raises:
      ValueError: where an id stands in the corpus twice.
    """
    order = np.argsort(corpus_ids, kind="stable")
    ordered = corpus_ids[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if repeated.size:
        raise ValueError(
            f"Candidate ids must be unique in the corpus. Received twice: {ordered[repeated[0]]!r}."
        )
    positions = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    return np.where(ordered[positions] == ids, order[positions], -1).astype(np.int64)
