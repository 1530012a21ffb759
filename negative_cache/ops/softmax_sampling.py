"""Exact sampling from a softmax over many candidates, one block of candidates at a time.

The candidates are cut into blocks, and each block into groups, of every so-many-th candidate. One
pass over the blocks takes the softmax of each, and keeps of it, for every query, the block's log
partition and the probabilities of its groups. The log partition of all candidates follows from
those of the blocks, and a draw is an inverse CDF in three steps: a block, a group of that block,
and a candidate of that group, whose few scores are computed a second time. No [B, C] array exists,
no random number or logarithm is spent per candidate, and more draws per query cost nothing but the
last step.

`merge_samples` joins samples over disjoint candidate sets, so that caches, shards and trees share
one rule.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from negative_cache.ops import _execution
from negative_cache.ops._block_scorer import (
    INADMISSIBLE,
    RESCORING_TOLERANCE,
    BlockScorer,
    is_admissible,
)
from negative_cache.ops._large_blocks import draw_from_large_blocks

TensorFn = Callable[[tf.Tensor], tf.Tensor]
Seed = int | tf.Tensor | Sequence[int] | None

# A probability whose logarithm is as exact as that of a larger one: float32 holds it in full.
_SMALLEST_PROBABILITY = 1e-30
# Sizes to plan for where they are not known when a function is traced.
_LIKELY_QUERIES, _LIKELY_CANDIDATES = 256, 2**17


class SoftmaxSample(NamedTuple):
    """Draws from a softmax over a set of candidates, with the set's log partition.

    `scores - log_partition[:, None]` is the log probability of each draw.

    Attributes:
      indices: [B, S] int64, the drawn candidates; -1 where a query has no admissible candidate, or
        one whose score is not finite.
      scores: [B, S] float32, their scores, log weights included; -inf where `indices` is -1.
      log_partition: [B] float32, log Σ exp(score) over the admissible candidates; -inf where there
        is none, NaN or inf where one's score is.
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
      row_transform: the same for what depends on which candidates they are: a function of their
        embeddings [n, d] and of their rows [n] int32. One of the two at the most.
      candidate_mask: [C] bool; candidates with False are left out.
      candidate_ids: [C] ids of any comparable dtype, used with `positive_ids`.
      positive_ids: [B] or [B, P] ids; candidates with a query's own positive id, or one of several,
        are left out for that query.
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
      log_zero: what stands for the logarithm of zero in the sample: a number below -1e29 for those
        who check that all numbers are finite.
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
    if block_size is not None and block_size < 1:
        raise ValueError(f"`block_size` must be at least 1. Received: {block_size}.")
    if isinstance(scorer.num_candidates, int) and not scorer.num_candidates:
        return _sample_of_nothing(scorer, num_samples, compute_gradient, log_zero)
    seed = seed_or_random(seed)
    like = candidate_embeddings if isinstance(candidate_embeddings, tf.Variable) else None
    is_for_accelerator = _execution.is_on_accelerator(like) and scorer.has_known_size
    draw = _draw_from_large_blocks if is_for_accelerator else _draw_from_small_blocks
    draw = functools.partial(draw, scorer, num_samples, block_size, compute_gradient)
    indices, scores, log_partition, gradient = _execution.as_constant(
        draw, seed, like=like, may_compile=scorer.has_known_size
    )
    # Not the opposite of "is admissible": what is NaN must stay NaN.
    is_empty = log_partition <= 0.5 * INADMISSIBLE
    sample = SoftmaxSample(
        tf.cast(indices, tf.int64), scores, tf.where(is_empty, log_zero, log_partition)
    )
    if compute_gradient:
        gradient = tf.where(is_empty[:, tf.newaxis], 0.0, gradient)
    return _without_draws_from_nothing(sample, log_zero), gradient


def _draw_from_large_blocks(scorer, num_samples, block_size, with_mean, seed):
    draws = draw_from_large_blocks(
        scorer,
        lambda num_blocks: _random_of_blocks(seed, num_blocks),
        num_samples=num_samples,
        block_size=block_size,
        with_mean=with_mean,
    )
    return (*draws[:3], draws.mean if with_mean else None)


def _draw_from_small_blocks(scorer, num_samples, block_size, with_mean, seed):
    """As `_large_blocks.Draws`, whose mean is None where it is not wanted."""
    block_size, group_size = _choose_sizes(scorer, num_samples, block_size)
    blocks = _scan_blocks(scorer, block_size, group_size, with_mean)
    log_partition = tf.reduce_logsumexp(blocks.log_partition, axis=1)

    random = draw_uniforms([3, scorer.num_queries, num_samples], seed)
    block = inverse_cdf(tf.nn.softmax(blocks.log_partition), random[0])
    groups_of_block = tf.gather(blocks.group_probability, block, batch_dims=1)
    group = inverse_cdf(groups_of_block, random[1][..., tf.newaxis])[..., 0]
    groups_per_block = block_size // group_size
    first = block * block_size + group
    rows = first[..., tf.newaxis] + tf.range(group_size) * groups_per_block
    log_masses = tf.gather(blocks.log_partition, block, batch_dims=1)
    log_masses += tf.math.log(
        tf.gather(groups_of_block, group[..., tf.newaxis], batch_dims=2)[..., 0]
    )
    scores = _scores_of_groups(scorer, rows, log_masses)
    pick = inverse_cdf(tf.nn.softmax(scores), random[2][..., tf.newaxis])

    return (
        tf.gather(rows, pick, batch_dims=2)[..., 0],
        tf.gather(scores, pick, batch_dims=2)[..., 0],
        log_partition,
        blocks.mean if with_mean else None,
    )


def _scores_of_groups(scorer: BlockScorer, rows: tf.Tensor, log_masses: tf.Tensor) -> tf.Tensor:
    """Scores [B, S, g] of groups `rows` [B, S, g] that have been scored before.

    A candidate whose score is that of `max_scores` may be admitted by one scoring and not by the
    other. One that was left out before may be all that its group would be drawn for: what alone has
    more than the mass [B, S] that was found for its group was not in it. Where nothing is left of a
    group, it was drawn for candidates that only this scoring leaves out.
    """
    strict, widened = scorer.score_rows(tf.reshape(rows, [scorer.num_queries, -1]))
    shape = tf.shape(rows)
    if widened is None:
        return tf.reshape(strict, shape)
    most = log_masses + RESCORING_TOLERANCE * tf.maximum(tf.abs(log_masses), 1.0)
    strict, widened = (
        tf.where(part <= most[..., tf.newaxis], part, INADMISSIBLE)
        for part in (tf.reshape(strict, shape), tf.reshape(widened, shape))
    )
    is_some = tf.reduce_any(is_admissible(strict), axis=2, keepdims=True)
    return tf.where(is_some, strict, widened)


def merge_samples(
    samples: Sequence[SoftmaxSample], *, seed: Seed = None, log_zero: float = -math.inf
) -> SoftmaxSample:
    """Merges samples over disjoint candidate sets A, B, … into one sample over their union.

    log Z = logaddexp(log Z_A, log Z_B), and A's draw is kept with probability Z_A / Z,
    independently for every query and draw. The result has the law of a sample drawn over the union
    at once, and the merge is associative.

    Args:
      samples: `SoftmaxSample`s with the same B and S, whose indices are already those of the union.
      seed: as in `sample_softmax`. Must differ from the seeds of the samples themselves.
      log_zero: as in `sample_softmax_with_gradient`, which has given it to the samples too.

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
    winners = inverse_cdf(weights, draw_uniforms(tf.shape(indices)[:2], seed))[..., tf.newaxis]
    return _without_draws_from_nothing(
        SoftmaxSample(
            tf.gather(indices, winners, batch_dims=2)[..., 0],
            tf.gather(scores, winners, batch_dims=2)[..., 0],
            overall_max + tf.math.log(tf.reduce_sum(weights, axis=1)),
        ),
        log_zero,
    )


class _Blocks(NamedTuple):
    """What one pass over the candidates keeps.

    Attributes:
      log_partition: [B, blocks].
      group_probability: [B, blocks, groups per block], the softmax over a block, summed by groups.
      mean: [B, d], Σ_y P(y|x) s' y over all candidates; zero where it is not wanted.
    """

    log_partition: tf.Tensor
    group_probability: tf.Tensor
    mean: tf.Tensor


def _scan_blocks(scorer: BlockScorer, block_size: int, group_size: int, with_mean: bool) -> _Blocks:
    groups_per_block = block_size // group_size
    num_full_blocks = scorer.num_candidates // block_size
    remainder = scorer.num_candidates - num_full_blocks * block_size
    has_remainder = tf.is_tensor(remainder) or remainder > 0
    num_blocks = num_full_blocks + int(has_remainder)

    def scan_block(block, size, log_partitions, group_probabilities, seen_partition, mean):
        embeddings = scorer.read_block(block * block_size, size)
        scores, slopes = scorer.score_block(
            embeddings, block * block_size, size, with_slopes=with_mean
        )
        if size is not block_size:
            padding = [[0, 0], [0, block_size - size]]
            scores = tf.pad(scores, padding, constant_values=INADMISSIBLE)
        # The softmax is one fused operation, faster than exp alone, and faster still where it may
        # overwrite the scores: what else needs them must come first, and be small.
        some_scores = tf.identity(scores[:, :groups_per_block])
        with tf.control_dependencies([some_scores]):
            probability = tf.nn.softmax(scores)
        # Groups are columns here: this sum is of whole rows, faster than one within short rows.
        grouped = [scorer.num_queries, group_size, groups_per_block]
        group_probability = tf.reduce_sum(tf.reshape(probability, grouped), axis=1)

        # log Z = s(y) - log P(y) for any y, here the best of some, unless its P(y) is too small.
        some_probability = tf.reduce_max(probability[:, :groups_per_block], axis=1)
        log_partition = tf.cond(
            tf.reduce_all(some_probability > _SMALLEST_PROBABILITY),
            lambda: tf.reduce_max(some_scores, axis=1) - tf.math.log(some_probability),
            lambda: tf.reduce_logsumexp(
                scorer.score_block(embeddings, block * block_size, size)[0], axis=1
            ),
        )
        if with_mean:
            weights = probability[:, :size]
            block_mean = scorer.combine(weights, slopes, embeddings, block * block_size, size)
            new_partition = tf.reduce_logsumexp([seen_partition, log_partition], axis=0)
            share = tf.exp(log_partition - new_partition)[:, tf.newaxis]
            mean += share * (block_mean - mean)
            seen_partition = new_partition
        return (
            log_partitions.write(block, log_partition),
            group_probabilities.write(block, group_probability),
            seen_partition,
            mean,
        )

    state = (
        tf.TensorArray(tf.float32, num_blocks),
        tf.TensorArray(tf.float32, num_blocks),
        tf.fill([scorer.num_queries], 2.0 * INADMISSIBLE),
        tf.zeros([scorer.num_queries, scorer.dim]),
    )
    if tf.is_tensor(num_full_blocks) or num_full_blocks > 0:
        _, *state = tf.while_loop(
            lambda block, *_: block < num_full_blocks,
            lambda block, *state: (block + 1, *scan_block(block, block_size, *state)),
            (tf.constant(0), *state),
            parallel_iterations=1,
        )
    if has_remainder:
        state = scan_block(num_full_blocks, remainder, *state)
    log_partitions, group_probabilities, _, mean = state
    return _Blocks(
        tf.transpose(log_partitions.stack()),
        tf.transpose(group_probabilities.stack(), [1, 0, 2]),
        mean,
    )


def _choose_sizes(scorer: BlockScorer, num_samples: int, block_size: int | None):
    """The block size, a multiple of the group size, and the group size, both from the shapes.

    A group is the power of two that balances the group sums, B·C/g floats, with the rows that are
    scored again, B·S·g·d floats. A block has at most 2^21 floats of embeddings, so that what one
    read brings into the processor's cache is still there when it is scored, and at most 2^21
    scores; within these limits it is as large as can be, because every block costs some operations.
    """
    num_queries = scorer.num_queries if isinstance(scorer.num_queries, int) else _LIKELY_QUERIES
    num_candidates = scorer.num_candidates
    if not isinstance(num_candidates, int):
        num_candidates = _LIKELY_CANDIDATES
    balanced = math.sqrt(max(num_candidates, 1) / (num_samples * scorer.dim))
    group_size = min(max(2 ** round(math.log2(max(balanced, 1.0))), 16), 256)
    if block_size is None:
        block_size = max(min(2**21 // scorer.dim, 2**21 // max(num_queries, 1)), group_size)
    else:
        group_size = min(group_size, block_size)
    block_size = max(min(block_size, num_candidates), 1)
    return math.ceil(block_size / group_size) * group_size, group_size


def inverse_cdf(weights: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """[..., S] int32 positions drawn in proportion to `weights` [..., n] by `uniforms` [..., S].

    A position of weight zero is never drawn, unless all are zero.
    """
    cdf = tf.cumsum(weights, axis=-1)
    positions = tf.searchsorted(cdf, uniforms * cdf[..., -1:], side="right")
    return tf.minimum(positions, tf.shape(weights)[-1] - 1)


def wide_inverse_cdf(
    weights: tf.Tensor, uniforms: tf.Tensor, more_uniforms: tf.Tensor
) -> tf.Tensor:
    """`inverse_cdf` of [B, n] for large n, first among runs of neighbours and then within one.

    It takes partial sums of a fraction of the weights only, which are slow, and one more uniform
    number for each draw.
    """
    run = 64
    num_weights = weights.shape[1]
    num_runs = math.ceil(num_weights / run)
    weights = tf.pad(weights, [[0, 0], [0, num_runs * run - num_weights]])
    runs = tf.reshape(weights, [-1, num_runs, run])
    which = inverse_cdf(tf.reduce_sum(runs, axis=2), uniforms)
    within = tf.gather(runs, which, batch_dims=1)
    position = which * run + inverse_cdf(within, more_uniforms[..., tf.newaxis])[..., 0]
    # Weights that are NaN lead into the padding.
    return tf.minimum(position, num_weights - 1)


def _sample_of_nothing(scorer: BlockScorer, num_samples: int, with_gradient: bool, log_zero: float):
    draws = [scorer.num_queries, num_samples]
    sample = SoftmaxSample(
        tf.fill(draws, tf.constant(-1, tf.int64)),
        tf.fill(draws, log_zero),
        tf.fill([scorer.num_queries], log_zero),
    )
    return sample, tf.zeros([scorer.num_queries, scorer.dim]) if with_gradient else None


def _without_draws_from_nothing(
    sample: SoftmaxSample, log_zero: float = -math.inf
) -> SoftmaxSample:
    # Nor from candidates of which one scores NaN or inf: there is no law to draw from.
    has_law = tf.math.is_finite(sample.log_partition) & is_admissible(sample.log_partition)
    has_law = has_law[:, tf.newaxis]
    return SoftmaxSample(
        tf.where(has_law, sample.indices, tf.constant(-1, tf.int64)),
        tf.where(has_law, sample.scores, log_zero),
        sample.log_partition,
    )


def draw_uniforms(shape, seed: Seed) -> tf.Tensor:
    """Uniform random numbers in [0, 1) of `shape`; the same ones for the same seed."""
    if seed is None:
        return tf.random.uniform(shape)
    if isinstance(seed, int):
        seed = [0, seed]
    # A fixed algorithm, where the default depends on the device. XLA has its own stream of it.
    return tf.random.stateless_uniform(shape, seed, alg="philox")


def _random_of_blocks(seed: Seed, num_blocks: int) -> Callable[..., tf.Tensor]:
    """(block, shape) -> uniform random numbers, of which never more than a block's exist."""
    seed = [0, seed] if isinstance(seed, int) else seed
    seeds = tf.random.stateless_uniform(
        [num_blocks, 2], seed, minval=None, maxval=None, dtype=tf.int32, alg="philox"
    )
    return lambda block, shape: draw_uniforms(shape, seeds[block])


def seed_or_random(seed: Seed) -> Seed:
    """`seed`, or where None a random one, for what XLA compiles: it has no `tf.random.set_seed`."""
    if seed is None:
        return tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    return seed


def _or_zero(maxima: tf.Tensor) -> tf.Tensor:
    """Replaces the -inf of an empty set, so that subtracting it leaves -inf and not NaN."""
    return tf.where(maxima < tf.float32.min, 0.0, maxima)
