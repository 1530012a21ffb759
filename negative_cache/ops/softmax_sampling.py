"""Exact sampling from a softmax over many candidates, one block of candidates at a time.

The candidates are cut into blocks, and each block into groups. One pass over the blocks scores
every candidate and keeps, for every query, only the sum of exp(score) over each group. The
partition function is the sum of those sums, and a draw is an inverse CDF in three steps: a block in
proportion to its sum, a group of that block likewise, and a candidate of that group, whose few
scores are computed a second time. No [B, C] array exists, no random number or logarithm is spent
per candidate, and more draws per query cost nothing but the last step.

`merge_samples` joins samples over disjoint candidate sets, so that caches, shards and trees share
one rule.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from negative_cache.ops._block_scorer import BlockScorer

TensorFn = Callable[[tf.Tensor], tf.Tensor]
Seed = int | tf.Tensor | Sequence[int] | None

# Sizes to plan for where they are not known when a function is traced.
_LIKELY_QUERIES, _LIKELY_CANDIDATES = 256, 2**17


class SoftmaxSample(NamedTuple):
    """Draws from a softmax over a set of candidates, with the set's log partition.

    `scores - log_partition[:, None]` is the log probability of each draw.

    Attributes:
      indices: [B, S] int64, the drawn candidates; -1 where a query has no admissible candidate.
      scores: [B, S] float32, their scores, log weights included; -inf where `indices` is -1.
      log_partition: [B] float32, log Σ exp(score) over the admissible candidates; -inf where there
        is none.
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
    candidates that are admissible for x. The S draws of a query are independent. Nothing of size
    [B, C] is materialised and the candidates are never copied whole. No gradient flows through the
    result.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float32, bfloat16 or float16, a tensor or a variable.
      num_samples: S, the number of draws per query.
      score_transform: elementwise function of the inner products, of any shape, for instance a
        division by a temperature. Scores are inner products where None.
      embedding_transform: function [n, d] -> [n, d] applied to candidates before they are scored.
      candidate_mask: [C] bool; candidates with False are left out.
      candidate_ids: [C] ids of any comparable dtype, used with `positive_ids`.
      positive_ids: [B] ids; candidates with a query's own positive id are left out for that query.
      log_weights: [C] float added to the scores.
      max_scores: [B] float; candidates whose score, before `log_weights`, is higher are left out
        for that query.
      block_size: candidates scored at a time. Chosen from the shapes where None.
      seed: an int or a pair of ints for the same draws at every call; fresh draws under
        `tf.random.set_seed` where None.

    Returns:
      A `SoftmaxSample`.

    Raises:
      ValueError: where a rank, a dimension or a dtype does not fit.
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
    **scoring,
) -> tuple[SoftmaxSample, tf.Tensor | None]:
    """`sample_softmax`, and in the same pass the exact gradient of log Z by the query.

    ∇_x log Z(x) = Σ_y P(y|x) s'(⟨x, y⟩) y, where s' is the derivative of `score_transform` and
    y stands for the candidate's (transformed) embedding. It costs a second matrix product.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float, a tensor or a variable.
      num_samples: S, the number of draws per query.
      block_size: candidates scored at a time. Chosen from the shapes where None.
      seed: as in `sample_softmax`.
      compute_gradient: whether the gradient is wanted.
      **scoring: the further arguments of `sample_softmax`.

    Returns:
      The `SoftmaxSample`, and [B, d] float32, zero where a query has no admissible candidate; None
      where it is not wanted.

    Raises:
      ValueError: where a rank, a dimension or a dtype does not fit.
    """
    scorer = BlockScorer(query_embeddings, candidate_embeddings, **scoring)
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1. Received: {num_samples}.")
    block_size, group_size = _choose_sizes(scorer, num_samples, block_size)

    sums = _sum_groups(scorer, block_size, group_size, compute_gradient)
    block_sums = tf.reduce_sum(sums.groups, axis=2)
    overall_max = tf.reduce_max(sums.block_max, axis=1)
    block_weights = block_sums * tf.exp(sums.block_max - _or_zero(overall_max)[:, tf.newaxis])
    total = tf.reduce_sum(block_weights, axis=1)

    uniforms = _uniforms([3, scorer.num_queries, num_samples], seed)
    blocks = _inverse_cdf(block_weights, uniforms[0])
    drawn_block = tf.gather(sums.groups, blocks, batch_dims=1)
    groups = _inverse_cdf(drawn_block, uniforms[1][..., tf.newaxis])[..., 0]
    starts = (blocks * (block_size // group_size) + groups) * group_size
    rows = starts[..., tf.newaxis] + tf.range(group_size)
    scores = scorer.score_rows(tf.reshape(rows, [scorer.num_queries, num_samples * group_size]))
    scores = tf.reshape(scores, [scorer.num_queries, num_samples, group_size])
    weights = tf.exp(scores - _or_zero(tf.reduce_max(scores, axis=2, keepdims=True)))
    picks = _inverse_cdf(weights, uniforms[2][..., tf.newaxis])

    sample = _without_draws_from_nothing(
        SoftmaxSample(
            tf.cast(tf.gather(rows, picks, batch_dims=2)[..., 0], tf.int64),
            tf.gather(scores, picks, batch_dims=2)[..., 0],
            overall_max + tf.math.log(total),
        )
    )
    gradient = None
    if compute_gradient:
        gradient = tf.math.divide_no_nan(sums.moment, total[:, tf.newaxis])
    return sample, gradient


def merge_samples(samples: Sequence[SoftmaxSample], *, seed: Seed = None) -> SoftmaxSample:
    """Merges samples over disjoint candidate sets A, B, … into one sample over their union.

    log Z = logaddexp(log Z_A, log Z_B), and A's draw is kept with probability Z_A / Z,
    independently for every query and draw. The result has the law of a sample drawn over the union
    at once, and the merge is associative.

    Args:
      samples: `SoftmaxSample`s with the same B and S, whose indices are already those of the union.
      seed: as in `sample_softmax`. Must differ from the seeds of the samples themselves.

    Returns:
      A `SoftmaxSample` over the union.

    Raises:
      ValueError: where there is no sample.
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
    winners = _inverse_cdf(weights, _uniforms(tf.shape(indices)[:2], seed))[..., tf.newaxis]
    return _without_draws_from_nothing(
        SoftmaxSample(
            tf.gather(indices, winners, batch_dims=2)[..., 0],
            tf.gather(scores, winners, batch_dims=2)[..., 0],
            overall_max + tf.math.log(tf.reduce_sum(weights, axis=1)),
        )
    )


class _Sums(NamedTuple):
    """What one pass over the candidates keeps.

    Attributes:
      block_max: [B, blocks], the largest score of each block, -inf where none is admissible.
      groups: [B, blocks, groups per block], Σ exp(score - block_max) over each group.
      moment: [B, d], Σ exp(score - overall maximum) · slope · embedding, or zeros.
    """

    block_max: tf.Tensor
    groups: tf.Tensor
    moment: tf.Tensor


def _sum_groups(scorer: BlockScorer, block_size: int, group_size: int, with_moment: bool) -> _Sums:
    groups_per_block = block_size // group_size
    num_full_blocks = scorer.num_candidates // block_size
    remainder = scorer.num_candidates - num_full_blocks * block_size
    has_remainder = tf.is_tensor(remainder) or remainder > 0
    num_blocks = num_full_blocks + int(has_remainder)

    def add_block(block, size, maxima, groups, moment_max, moment):
        embeddings = scorer.read_block(block * block_size, size)
        scores, slopes = scorer.score_block(
            embeddings, block * block_size, size, with_slopes=with_moment
        )
        block_max = tf.reduce_max(scores, axis=1)
        weights = tf.exp(scores - _or_zero(block_max)[:, tf.newaxis])
        if with_moment:
            this_moment = tf.matmul(weights if slopes is None else weights * slopes, embeddings)
            new_max = tf.maximum(moment_max, block_max)
            moment = moment * _rescale(moment_max, new_max) + this_moment * _rescale(
                block_max, new_max
            )
            moment_max = new_max
        if size is not block_size:
            weights = tf.pad(weights, [[0, 0], [0, block_size - size]])
        sums = tf.reshape(weights, [scorer.num_queries, groups_per_block, group_size])
        sums = tf.reduce_sum(sums, axis=2)
        return maxima.write(block, block_max), groups.write(block, sums), moment_max, moment

    state = (
        tf.TensorArray(tf.float32, num_blocks),
        tf.TensorArray(tf.float32, num_blocks),
        tf.fill([scorer.num_queries], -math.inf),
        tf.zeros([scorer.num_queries, scorer.dim]),
    )
    if tf.is_tensor(num_full_blocks) or num_full_blocks > 0:
        _, *state = tf.while_loop(
            lambda block, *_: block < num_full_blocks,
            lambda block, *state: (block + 1, *add_block(block, block_size, *state)),
            (tf.constant(0), *state),
            parallel_iterations=1,
        )
    if has_remainder:
        state = add_block(num_full_blocks, remainder, *state)
    maxima, groups, _, moment = state
    return _Sums(tf.transpose(maxima.stack()), tf.transpose(groups.stack(), [1, 0, 2]), moment)


def _choose_sizes(scorer: BlockScorer, num_samples: int, block_size: int | None):
    """The block size, a multiple of the group size, and the group size, both from the shapes.

    A group is the power of two that balances the group sums, B·C/g floats, with the rows that are
    scored again, B·S·g·d floats. A block has at most 2^21 floats of embeddings, so that what one
    read brings into the processor's cache is still there when it is scored, and at most 2^22
    scores; within these limits it is as large as can be, because every block costs some operations.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"`block_size` must be at least 1. Received: {block_size}.")
    num_queries = scorer.num_queries if isinstance(scorer.num_queries, int) else _LIKELY_QUERIES
    num_candidates = scorer.num_candidates
    if not isinstance(num_candidates, int):
        num_candidates = _LIKELY_CANDIDATES
    balanced = math.sqrt(max(num_candidates, 1) / (num_samples * scorer.dim))
    group_size = min(max(2 ** round(math.log2(max(balanced, 1.0))), 16), 256)
    if block_size is None:
        block_size = max(min(2**21 // scorer.dim, 2**22 // max(num_queries, 1)), group_size)
    else:
        group_size = min(group_size, block_size)
    block_size = max(min(block_size, num_candidates), 1)
    return math.ceil(block_size / group_size) * group_size, group_size


def _inverse_cdf(weights: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """[..., S] int32 positions drawn in proportion to `weights` [..., n] by `uniforms` [..., S].

    A position of weight zero is never drawn, unless all are zero.
    """
    cdf = tf.cumsum(weights, axis=-1)
    positions = tf.searchsorted(cdf, uniforms * cdf[..., -1:], side="right")
    return tf.minimum(positions, tf.shape(weights)[-1] - 1)


def _without_draws_from_nothing(sample: SoftmaxSample) -> SoftmaxSample:
    is_empty = tf.equal(sample.log_partition, -math.inf)[:, tf.newaxis]
    return SoftmaxSample(
        tf.where(is_empty, tf.constant(-1, tf.int64), sample.indices),
        tf.where(is_empty, -math.inf, sample.scores),
        sample.log_partition,
    )


def _uniforms(shape, seed: Seed) -> tf.Tensor:
    if seed is None:
        return tf.random.uniform(shape)
    if isinstance(seed, int):
        seed = [0, seed]
    # A fixed algorithm: the default one differs between devices, and so under XLA.
    return tf.random.stateless_uniform(shape, seed, alg="philox")


def _or_zero(maxima: tf.Tensor) -> tf.Tensor:
    """Replaces the -inf of an empty set, so that subtracting it leaves -inf and not NaN."""
    return tf.where(tf.equal(maxima, -math.inf), 0.0, maxima)


def _rescale(old_max: tf.Tensor, new_max: tf.Tensor) -> tf.Tensor:
    """[B, 1] factors that turn sums relative to one maximum into sums relative to a larger one."""
    return tf.exp(old_max - _or_zero(new_max))[:, tf.newaxis]
