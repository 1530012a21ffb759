"""The k candidates of highest score for each query, one block of candidates at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import tensorflow as tf

from negative_cache.ops import _execution
from negative_cache.ops._block_scorer import (
    INADMISSIBLE,
    BlockScorer,
    ScoringOptions,
    is_admissible,
)
from negative_cache.ops._large_blocks import choose_blocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The largest block on a CPU; see `_small_blocks` for the reasons to bound it.
_BLOCK_EMBEDDINGS, _BLOCK_SCORES = 2**21, 2**21


def top_k_scores(
    query_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor | tf.Variable,
    k: int,
    *,
    approximate: bool = False,
    block_size: int | None = None,
    **scoring: Unpack[ScoringOptions],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the candidates of highest score without an array of all scores.

    The approximate search is the one published with the negative cache (Lindgren et al., NeurIPS
    2021): the candidates are divided, in order, into k runs of equal length, and the best candidate
    of each run is kept. The best candidate of all is always among them. Among equal scores, the
    smallest index is kept.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float, a tensor or a variable; C must be known during tracing.
      k: number of candidates to find. If `approximate` is True, it must divide C.
      approximate: whether to return the best candidate of each run instead of the k best of all.
      block_size: number of candidates scored at a time; chosen from the shapes if None.
      **scoring: the arguments of `sample_softmax` from `score_transform` to `max_scores`.

    Returns:
      scores: [B, k] float32, in descending order if exact, in the order of the runs if approximate;
        -inf where there are too few admissible candidates.
      indices: [B, k] int64; -1 where the score is -inf.

    Raises:
      ValueError: if a rank, a dimension or a dtype does not fit, C is not known, or `k` is out of
        range or does not divide C as `approximate` needs.
    """
    scorer = BlockScorer(query_embeddings, candidate_embeddings, **scoring)
    num_candidates = scorer.num_candidates
    if not isinstance(num_candidates, int):
        raise ValueError("`candidate_embeddings` must have a known number of rows. Received: None.")
    if approximate and (k < 1 or num_candidates % k):
        raise ValueError(
            f"`k` must divide the number of candidates. Received: k = {k} and {num_candidates}"
            " candidates."
        )
    if not 1 <= k <= num_candidates:
        raise ValueError(
            f"`k` must lie between 1 and the number of candidates. Received: k = {k} and"
            f" {num_candidates} candidates."
        )
    like = candidate_embeddings if isinstance(candidate_embeddings, tf.Variable) else None
    if block_size is None:
        num_queries = scorer.num_queries if isinstance(scorer.num_queries, int) else 256
        block_size = min(_BLOCK_EMBEDDINGS // scorer.dim, _BLOCK_SCORES // max(num_queries, 1))
        if _execution.is_on_accelerator(like):
            block_size, _ = choose_blocks(scorer.num_queries, num_candidates, None)
    best = _best_of_runs if approximate else _best_of_all
    scores, indices = _execution.as_constant(lambda: best(scorer, k, max(block_size, 1)), like=like)
    found = is_admissible(scores)
    nothing = tf.constant(-1, tf.int64)
    return tf.where(found, scores, -math.inf), tf.where(found, indices, nothing)


def _best_of_all(scorer: BlockScorer, k: int, block_size: int) -> tuple[tf.Tensor, tf.Tensor]:
    block_size = min(max(block_size, k), scorer.num_candidates)
    num_blocks = scorer.num_candidates // block_size

    def add_block(
        start: int | tf.Tensor, size: int | tf.Tensor, scores: tf.Tensor, indices: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        block_scores, _ = scorer.score_block(scorer.read_block(start, size), start, size)
        best = tf.math.top_k(block_scores, k=min(k, size))
        both_scores = tf.concat([scores, best.values], axis=1)
        both_indices = tf.concat([indices, tf.cast(start + best.indices, tf.int64)], axis=1)
        best = tf.math.top_k(both_scores, k=k)
        return best.values, tf.gather(both_indices, best.indices, batch_dims=1)

    nothing = tf.fill([scorer.num_queries, k], 2.0 * INADMISSIBLE)
    _, scores, indices = tf.while_loop(
        lambda block, *_: block < num_blocks,
        lambda block, *best: (block + 1, *add_block(block * block_size, block_size, *best)),
        (tf.constant(0), nothing, tf.fill(tf.shape(nothing), tf.constant(-1, tf.int64))),
        parallel_iterations=1,
    )
    start = num_blocks * block_size
    if start < scorer.num_candidates:
        scores, indices = add_block(start, scorer.num_candidates - start, scores, indices)
    return scores, indices


def _best_of_runs(scorer: BlockScorer, k: int, block_size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Scores several runs at a time, or a long run in several parts.

    All parts of a long run have the same length. So the last part may overlap the one before, which
    does not change the maximum.
    """
    run_size = scorer.num_candidates // k
    part_size = min(run_size, block_size)
    parts = math.ceil(run_size / part_size)
    runs_per_block = max(block_size // run_size, 1) if parts == 1 else 1
    runs_per_block = min(runs_per_block, k)
    num_blocks = (k // runs_per_block) * parts

    def best_of_block(block: tf.Tensor, runs: int) -> tuple[tf.Tensor, tf.Tensor]:
        run, part = block // parts * runs_per_block, block % parts
        start = run * run_size + tf.minimum(part * part_size, run_size - part_size)
        size = runs * part_size
        scores, _ = scorer.score_block(scorer.read_block(start, size), start, size)
        scores = tf.reshape(scores, [scorer.num_queries, runs, part_size])
        first = tf.cast(start + tf.range(runs) * part_size, tf.int64)
        return tf.reduce_max(scores, axis=2), tf.argmax(scores, axis=2) + first

    def body(
        block: tf.Tensor, scores: tf.TensorArray, indices: tf.TensorArray
    ) -> tuple[tf.Tensor, tf.TensorArray, tf.TensorArray]:
        block_scores, block_indices = best_of_block(block, runs_per_block)
        return block + 1, scores.write(block, block_scores), indices.write(block, block_indices)

    arrays = (tf.TensorArray(tf.float32, num_blocks), tf.TensorArray(tf.int64, num_blocks))
    _, *arrays = tf.while_loop(
        lambda block, *_: block < num_blocks,
        body,
        (tf.constant(0), *arrays),
        parallel_iterations=1,
    )
    # [blocks, B, runs of a block] -> [B, runs, parts]
    shape = [scorer.num_queries, num_blocks // parts * runs_per_block, parts]
    scores, indices = (
        tf.reshape(tf.transpose(array.stack(), [1, 0, 2]), shape) for array in arrays
    )
    # Among parts with equal maxima, the first holds the smallest index.
    best_part = tf.argmax(scores, axis=2)[..., tf.newaxis]
    scores, indices = (
        tf.gather(values, best_part, batch_dims=2)[..., 0] for values in (scores, indices)
    )
    rest = k % runs_per_block
    if rest:
        rest_scores, rest_indices = best_of_block(tf.constant(num_blocks), rest)
        scores = tf.concat([scores, rest_scores], axis=1)
        indices = tf.concat([indices, rest_indices], axis=1)
    return scores, indices
