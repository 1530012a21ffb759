"""Exact sampling from a softmax over many candidates, one block of candidates at a time.

There are two implementations of the same law: `_small_blocks` for a CPU and `_large_blocks` for an
accelerator. Neither holds an array of all scores.

`merge_samples` merges samples over disjoint candidate sets. Blocks, caches and the shards of a pool
follow its rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from negative_cache.ops import _execution
from negative_cache.ops._block_scorer import (
    INADMISSIBLE,
    BlockScorer,
    ScoringOptions,
    is_admissible,
)
from negative_cache.ops._draws import Choice, Seed, draw_uniforms, inverse_cdf, seed_or_random
from negative_cache.ops._large_blocks import draw_from_large_blocks
from negative_cache.ops._small_blocks import draw_from_small_blocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

TensorFn = Callable[[tf.Tensor], tf.Tensor]


class SoftmaxSample(NamedTuple):
    """Draws from a softmax over a set of candidates, with the set's log partition.

    `scores - log_partition[:, None]` is the log probability of each draw.

    Attributes:
      indices: [B, S] int64, the drawn candidates; -1 if a query has no admissible candidate, or if
        the score of an admissible candidate is NaN or inf.
      scores: [B, S] float32, their scores, log weights included; -inf where `indices` is -1.
      log_partition: [B] float32, log Σ exp(score) over the admissible candidates; -inf if there are
        none, NaN or inf if the score of one is.
    """

    indices: tf.Tensor
    scores: tf.Tensor
    log_partition: tf.Tensor


def sample_softmax(
    query_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor | tf.Variable,
    *,
    num_samples: int = 1,
    score_transform: TensorFn | None = None,
    embedding_transform: TensorFn | None = None,
    row_transform: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
    candidate_mask: tf.Tensor | None = None,
    candidate_ids: tf.Tensor | None = None,
    positive_ids: tf.Tensor | None = None,
    log_weights: tf.Tensor | None = None,
    max_scores: tf.Tensor | None = None,
    block_size: int | None = None,
    seed: Seed = None,
) -> SoftmaxSample:
    """Draws candidates y with probability exp s(x, y) / Z(x), exactly, and computes log Z(x).

    The score is s(x, y) = transform(⟨x, y⟩) + log_weight(y), and Z(x) = Σ_y exp s(x, y) over the
    candidates that are admissible for x. The S draws of a query are independent. No array of shape
    [B, C] exists, and the candidates are never copied as a whole. No gradient flows through the
    result.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float32, bfloat16 or float16, a tensor or a variable.
      num_samples: S, the number of draws per query. 0 only computes the log partition.
      score_transform: elementwise function of the inner products, of any shape, for instance a
        division by a temperature. If None, scores are inner products.
      embedding_transform: function [n, d] -> [n, d] applied to candidates before they are scored.
      row_transform: like `embedding_transform`, for a transform that depends on the candidate: a
        function of the embeddings [n, d] and the candidates' indices [n] int32. The two cannot be
        used together.
      candidate_mask: [C] bool; candidates with False are excluded.
      candidate_ids: [C] ids of any comparable dtype, used with `positive_ids`.
      positive_ids: [B] or [B, P] ids; candidates with a positive id of the query are excluded for
        that query.
      log_weights: [C] float, added to the scores.
      max_scores: [B] float; candidates with a higher score, before `log_weights` are added, are
        excluded for that query.
      block_size: number of candidates scored at a time; chosen from the shapes if None.
      seed: an int or a pair of ints gives the same draws at every call. None gives new draws at
        every call, which follow `tf.random.set_seed`.

    Returns:
      A `SoftmaxSample`.

    Raises:
      ValueError: if a rank, a dimension or a dtype does not fit, `num_samples` is negative,
        `block_size` is not positive, or two arguments exclude each other.
    """
    sample, _ = sample_softmax_with_gradient(
        query_embeddings,
        candidate_embeddings,
        num_samples=num_samples,
        block_size=block_size,
        seed=seed,
        compute_gradient=False,
        score_transform=score_transform,
        embedding_transform=embedding_transform,
        row_transform=row_transform,
        candidate_mask=candidate_mask,
        candidate_ids=candidate_ids,
        positive_ids=positive_ids,
        log_weights=log_weights,
        max_scores=max_scores,
    )
    return sample


def sample_softmax_with_gradient(
    query_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor | tf.Variable,
    *,
    num_samples: int = 1,
    block_size: int | None = None,
    seed: Seed = None,
    compute_gradient: bool = True,
    log_zero: float = -math.inf,
    choose_queries: Choice | None = None,
    **scoring: Unpack[ScoringOptions],
) -> tuple[SoftmaxSample, tf.Tensor | None]:
    """`sample_softmax`, and in the same pass the exact gradient of log Z with respect to the query.

    ∇_x log Z(x) = Σ_y P(y|x) s'(⟨x, y⟩) y, where s' is the derivative of `score_transform` and
    y is the candidate's (transformed) embedding. The gradient costs a second matrix product.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float, a tensor or a variable.
      num_samples: S, the number of draws per query; 0 for none.
      block_size: number of candidates scored at a time; chosen from the shapes if None.
      seed: as in `sample_softmax`.
      compute_gradient: whether to compute the gradient.
      log_zero: used in the sample as the logarithm of zero. A number below -1e29 keeps all values
        finite, for `tf.debugging.enable_check_numerics`.
      choose_queries: a function from the log partitions [B] to queries [n] int32. Draws are made
        for those only, so that the `indices` and `scores` of the sample are [n, S].
      **scoring: the arguments of `sample_softmax` from `score_transform` to `max_scores`.

    Returns:
      sample: a `SoftmaxSample`.
      gradient: [B, d] float32, zero if a query has no admissible candidate. None if
        `compute_gradient` is False.

    Raises:
      ValueError: if a rank, a dimension or a dtype does not fit, `num_samples` is negative,
        `block_size` is not positive, or two arguments exclude each other.
    """
    scorer = BlockScorer(query_embeddings, candidate_embeddings, **scoring)
    if num_samples < 0:
        raise ValueError(f"`num_samples` must not be negative. Received: {num_samples}.")
    if choose_queries is not None and not num_samples:
        raise ValueError("`choose_queries` needs draws. Received: num_samples=0.")
    if block_size is not None and block_size < 1:
        raise ValueError(f"`block_size` must be at least 1. Received: {block_size}.")
    if isinstance(scorer.num_candidates, int) and not scorer.num_candidates:
        return _sample_of_nothing(scorer, num_samples, compute_gradient, log_zero, choose_queries)
    seed = seed_or_random(seed)
    like = candidate_embeddings if isinstance(candidate_embeddings, tf.Variable) else None
    is_for_accelerator = _execution.is_on_accelerator(like) and scorer.has_known_size
    draw = functools.partial(
        draw_from_large_blocks if is_for_accelerator else draw_from_small_blocks,
        scorer,
        num_samples=num_samples,
        block_size=block_size,
        with_mean=compute_gradient,
        choose=choose_queries,
    )
    indices, scores, log_partition, gradient, chosen = _execution.as_constant(
        draw, seed, like=like, may_compile=scorer.has_known_size
    )
    # Not `~is_admissible(log_partition)`: NaN must stay NaN.
    is_empty = log_partition <= 0.5 * INADMISSIBLE
    sample = SoftmaxSample(
        tf.cast(indices, tf.int64), scores, tf.where(is_empty, log_zero, log_partition)
    )
    gradient = tf.where(is_empty[:, tf.newaxis], 0.0, gradient) if compute_gradient else None
    return _without_draws_from_nothing(sample, log_zero, chosen), gradient


def merge_samples(
    samples: Sequence[SoftmaxSample], *, seed: Seed = None, log_zero: float = -math.inf
) -> SoftmaxSample:
    """Merges samples over disjoint candidate sets A, B, … into one sample over their union.

    log Z = logaddexp(log Z_A, log Z_B), and A's draw is kept with probability Z_A / Z,
    independently for every query and draw. The result has the same law as a sample drawn from the
    union directly. The merge is associative.

    Args:
      samples: `SoftmaxSample`s with the same B and S. Their indices must be those of the union.
      seed: as in `sample_softmax`. It must differ from the seeds of the samples.
      log_zero: as in `sample_softmax_with_gradient`. It must be the same as in the samples.

    Returns:
      A `SoftmaxSample` over the union.

    Raises:
      ValueError: if `samples` is empty.
    """
    samples = list(samples)
    if not samples:
        raise ValueError("`merge_samples` needs at least one sample. Received none.")
    if len(samples) == 1:
        return samples[0]
    log_partitions = tf.stack([sample.log_partition for sample in samples], axis=1)
    overall_max = tf.reduce_max(log_partitions, axis=1)
    weights = tf.exp(log_partitions - _or_zero(overall_max)[:, tf.newaxis])
    indices = tf.stack([sample.indices for sample in samples], axis=2)
    scores = tf.stack([sample.scores for sample in samples], axis=2)
    winners = inverse_cdf(weights, draw_uniforms(tf.shape(indices)[:2], seed))[..., tf.newaxis]
    return _without_draws_from_nothing(
        SoftmaxSample(
            tf.gather(indices, winners, batch_dims=2)[..., 0],
            tf.gather(scores, winners, batch_dims=2)[..., 0],
            overall_max + tf.math.log(tf.reduce_sum(weights, axis=1)),
        ),
        log_zero,
    )


def _sample_of_nothing(
    scorer: BlockScorer,
    num_samples: int,
    with_gradient: bool,
    log_zero: float,
    choose: Choice | None,
) -> tuple[SoftmaxSample, tf.Tensor | None]:
    log_partition = tf.fill([scorer.num_queries], log_zero)
    num_drawn = scorer.num_queries if choose is None else tf.size(choose(log_partition))
    draws = [num_drawn, num_samples]
    sample = SoftmaxSample(
        tf.fill(draws, tf.constant(-1, tf.int64)), tf.fill(draws, log_zero), log_partition
    )
    return sample, tf.zeros([scorer.num_queries, scorer.dim]) if with_gradient else None


def _without_draws_from_nothing(
    sample: SoftmaxSample, log_zero: float = -math.inf, chosen: tf.Tensor | None = None
) -> SoftmaxSample:
    # There is no law to draw from if there is no candidate, or if a score is NaN or inf.
    has_law = tf.math.is_finite(sample.log_partition) & is_admissible(sample.log_partition)
    has_law = (has_law if chosen is None else tf.gather(has_law, chosen))[:, tf.newaxis]
    return SoftmaxSample(
        tf.where(has_law, sample.indices, tf.constant(-1, tf.int64)),
        tf.where(has_law, sample.scores, log_zero),
        sample.log_partition,
    )


def _or_zero(maxima: tf.Tensor) -> tf.Tensor:
    """Replaces the -inf of an empty set by 0: -inf - (-inf) would be NaN."""
    return tf.where(maxima < tf.float32.min, 0.0, maxima)
