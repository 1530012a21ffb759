"""Exact sampling from a softmax on a CPU, in blocks that fit into the processor's cache.

The candidates are divided into blocks, and each block into groups. With n groups per block, a group
holds every n-th candidate of its block. One pass computes the softmax over each block. For every
query it keeps the block's log partition and the probabilities of its groups. The log partition over
all candidates follows from those of the blocks.

A draw is an inverse CDF in three steps: draw a block, a group of that block, and a candidate of
that group, after the group's few scores have been computed again. No [B, C] array exists, and there
is no random number and no logarithm per candidate. An additional draw per query costs little more
than the last step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from negative_cache.ops._block_scorer import (
    INADMISSIBLE,
    RESCORING_TOLERANCE,
    BlockScorer,
)
from negative_cache.ops._draws import Choice, Draws, Seed, draw_uniforms, inverse_cdf, no_draws

# Above this, float32 holds a probability in full precision, so that its logarithm is exact too.
_SMALLEST_PROBABILITY = 1e-30
# The sizes that are assumed if they are not known during tracing.
_LIKELY_QUERIES, _LIKELY_CANDIDATES = 256, 2**17


def draw_from_small_blocks(
    scorer: BlockScorer,
    seed: Seed,
    *,
    num_samples: int,
    block_size: int | None,
    with_mean: bool,
    choose: Choice | None = None,
) -> Draws:
    """Draws from all candidates of `scorer`.

    Args:
      scorer: scores queries [B, d] with C candidates. C may be unknown during tracing.
      seed: as in `sample_softmax`.
      num_samples: S, the number of draws per query. With 0, groups are not summed either.
      block_size: number of candidates scored at a time; chosen from the shapes if None.
      with_mean: whether to compute `Draws.mean`.
      choose: chooses the queries that draws are made for; all of them if None.

    Returns:
      The `Draws`.
    """
    block_size, group_size = _choose_sizes(scorer, num_samples, block_size)
    wanted = _Wanted(groups=num_samples > 0, mean=with_mean)
    blocks = _scan_blocks(scorer, block_size, group_size, wanted)
    log_partition = tf.reduce_logsumexp(blocks.log_partition, axis=1)
    if not num_samples:
        return no_draws(log_partition, blocks.mean)
    block_partitions, block_groups = blocks.log_partition, blocks.group_probability
    chosen = None
    if choose is not None:
        chosen = choose(log_partition)
        scorer = scorer.of_queries(chosen)
        block_partitions = tf.gather(block_partitions, chosen)
        block_groups = tf.gather(block_groups, chosen)

    random = draw_uniforms([3, scorer.num_queries, num_samples], seed)
    block = inverse_cdf(tf.nn.softmax(block_partitions), random[0])
    groups_of_block = tf.gather(block_groups, block, batch_dims=1)
    group = inverse_cdf(groups_of_block, random[1][..., tf.newaxis])[..., 0]
    groups_per_block = block_size // group_size
    first = block * block_size + group
    rows = first[..., tf.newaxis] + tf.range(group_size) * groups_per_block
    log_masses = tf.gather(block_partitions, block, batch_dims=1)
    log_masses += tf.math.log(
        tf.gather(groups_of_block, group[..., tf.newaxis], batch_dims=2)[..., 0]
    )
    scores = _scores_of_groups(scorer, rows, log_masses)
    pick = inverse_cdf(tf.nn.softmax(scores), random[2][..., tf.newaxis])

    return Draws(
        tf.gather(rows, pick, batch_dims=2)[..., 0],
        tf.gather(scores, pick, batch_dims=2)[..., 0],
        log_partition,
        blocks.mean,
        chosen,
    )


def _scores_of_groups(scorer: BlockScorer, rows: tf.Tensor, log_masses: tf.Tensor) -> tf.Tensor:
    """Scores the candidates of drawn groups again.

    The two scorings may round differently, so one of them may admit a candidate whose score is near
    `max_scores` and the other may not. What the first one did is seen from the mass of the group.
    If a candidate alone has more, it was excluded, and is excluded here. Of the scores with the
    limit as it is and with the widened one of `BlockScorer.score_rows`, which admits all that the
    first scoring may have admitted, those count whose sum is nearer to the mass.

    Args:
      scorer: scores the candidates.
      rows: [B, S, g] int32, the candidates of the drawn groups.
      log_masses: [B, S] float32, the log mass of each group in the first scoring.

    Returns:
      [B, S, g] float32, the scores.
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
    errors = [tf.abs(tf.reduce_logsumexp(part, axis=2) - log_masses) for part in (strict, widened)]
    is_strict = (errors[0] <= errors[1])[..., tf.newaxis]
    return tf.where(is_strict, strict, widened)


class _Wanted(NamedTuple):
    """What a pass over the candidates is to find besides log partitions, see `_Block`."""

    groups: bool
    mean: bool


class _Block(NamedTuple):
    """What one pass over a block finds.

    Attributes:
      log_partition: [B].
      group_probability: [B, groups per block], the softmax over the block, summed by groups; [B, 0]
        if it is not wanted.
      mean: [B, d], Σ_y P(y|x) s' y over the block; None where it is not wanted.
    """

    log_partition: tf.Tensor
    group_probability: tf.Tensor
    mean: tf.Tensor | None


class _Blocks(NamedTuple):
    """The results of one pass over the candidates.

    Attributes:
      log_partition: [B, blocks], the log partition of each block.
      group_probability: [B, blocks, groups per block], the softmax over a block, summed by groups.
      mean: [B, d], Σ_y P(y|x) s' y over all candidates; zero if it was not asked for.
    """

    log_partition: tf.Tensor
    group_probability: tf.Tensor
    mean: tf.Tensor


def _scan_blocks(scorer: BlockScorer, block_size: int, group_size: int, wanted: _Wanted) -> _Blocks:
    num_full_blocks = scorer.num_candidates // block_size
    remainder = scorer.num_candidates - num_full_blocks * block_size
    has_remainder = tf.is_tensor(remainder) or remainder > 0
    num_blocks = num_full_blocks + int(has_remainder)

    def scan_next(
        number: int | tf.Tensor,
        size: int | tf.Tensor,
        log_partitions: tf.TensorArray,
        group_probabilities: tf.TensorArray,
        seen_partition: tf.Tensor,
        seen_mean: tf.Tensor,
    ) -> tuple[tf.TensorArray, tf.TensorArray, tf.Tensor, tf.Tensor]:
        block = _scan_block(scorer, number * block_size, size, block_size, group_size, wanted)
        if block.mean is not None:
            seen_partition, seen_mean = _add_to_mean(seen_partition, seen_mean, block)
        return (
            log_partitions.write(number, block.log_partition),
            group_probabilities.write(number, block.group_probability),
            seen_partition,
            seen_mean,
        )

    state = (
        tf.TensorArray(tf.float32, num_blocks),
        tf.TensorArray(tf.float32, num_blocks),
        tf.fill([scorer.num_queries], 2.0 * INADMISSIBLE),
        tf.zeros([scorer.num_queries, scorer.dim]),
    )
    if tf.is_tensor(num_full_blocks) or num_full_blocks > 0:
        _, *state = tf.while_loop(
            lambda number, *_: number < num_full_blocks,
            lambda number, *state: (number + 1, *scan_next(number, block_size, *state)),
            (tf.constant(0), *state),
            parallel_iterations=1,
        )
    if has_remainder:
        state = scan_next(num_full_blocks, remainder, *state)
    log_partitions, group_probabilities, _, mean = state
    return _Blocks(
        tf.transpose(log_partitions.stack()),
        tf.transpose(group_probabilities.stack(), [1, 0, 2]),
        mean,
    )


def _scan_block(
    scorer: BlockScorer,
    start: int | tf.Tensor,
    size: int | tf.Tensor,
    block_size: int,
    group_size: int,
    wanted: _Wanted,
) -> _Block:
    """The softmax over the `size` candidates from `start` on, padded to `block_size`."""
    groups_per_block = block_size // group_size
    embeddings = scorer.read_block(start, size)
    scores, slopes = scorer.score_block(embeddings, start, size, with_slopes=wanted.mean)
    if size is not block_size:
        padding = [[0, 0], [0, block_size - size]]
        scores = tf.pad(scores, padding, constant_values=INADMISSIBLE)
    # The softmax is one fused operation, faster than exp alone, and faster still where it may
    # overwrite the scores: what else needs them must come first, and be small.
    some_scores = tf.identity(scores[:, :groups_per_block])
    with tf.control_dependencies([some_scores]):
        probability = tf.nn.softmax(scores)
    # Groups are columns here: this sum is of whole rows, faster than one within short rows.
    group_probability = probability[:, :0]
    if wanted.groups:
        grouped = [scorer.num_queries, group_size, groups_per_block]
        group_probability = tf.reduce_sum(tf.reshape(probability, grouped), axis=1)
    log_partition = _log_partition(
        some_scores,
        probability[:, :groups_per_block],
        lambda: scorer.score_block(embeddings, start, size)[0],
    )
    mean = None
    if wanted.mean:
        mean = scorer.combine(probability[:, :size], slopes, embeddings, start, size)
    return _Block(log_partition, group_probability, mean)


def _add_to_mean(
    seen_partition: tf.Tensor, seen_mean: tf.Tensor, block: _Block
) -> tuple[tf.Tensor, tf.Tensor]:
    """Log partition [B] and mean [B, d] of the blocks that have been seen and one more."""
    log_partition = tf.reduce_logsumexp([seen_partition, block.log_partition], axis=0)
    share = tf.exp(block.log_partition - log_partition)[:, tf.newaxis]
    return log_partition, seen_mean + share * (block.mean - seen_mean)


def _log_partition(
    some_scores: tf.Tensor, some_probabilities: tf.Tensor, score_again: Callable[[], tf.Tensor]
) -> tf.Tensor:
    """[B] float32, the log partition of a block.

    log Z = s(y) - log P(y) for every candidate y. This takes the most probable of some candidates.
    If its P(y) is too small for an exact logarithm, all scores are computed again and summed.

    Args:
      some_scores: [B, n], the scores of some of the block's candidates.
      some_probabilities: [B, n], their probabilities in the softmax over the block.
      score_again: returns the scores of all candidates of the block.
    """
    largest = tf.reduce_max(some_probabilities, axis=1)
    return tf.cond(
        tf.reduce_all(largest > _SMALLEST_PROBABILITY),
        lambda: tf.reduce_max(some_scores, axis=1) - tf.math.log(largest),
        lambda: tf.reduce_logsumexp(score_again(), axis=1),
    )


def _choose_sizes(scorer: BlockScorer, num_samples: int, block_size: int | None) -> tuple[int, int]:
    """Chooses the block size, a multiple of the group size, and the group size from the shapes.

    The group size g is a power of two that balances the group sums, B·C/g floats, with the rows
    that are scored again, B·S·g·d floats. A block has at most 2^21 floats of embeddings, so that
    they are still in the processor's cache when they are scored, and at most 2^21 scores. Within
    these limits it is as large as possible, because every block costs a few operations.
    """
    num_queries = scorer.num_queries if isinstance(scorer.num_queries, int) else _LIKELY_QUERIES
    num_candidates = scorer.num_candidates
    if not isinstance(num_candidates, int):
        num_candidates = _LIKELY_CANDIDATES
    balanced = math.sqrt(max(num_candidates, 1) / (max(num_samples, 1) * scorer.dim))
    group_size = min(max(2 ** round(math.log2(max(balanced, 1.0))), 16), 256)
    if block_size is None:
        block_size = max(min(2**21 // scorer.dim, 2**21 // max(num_queries, 1)), group_size)
    else:
        group_size = min(group_size, block_size)
    block_size = max(min(block_size, num_candidates), 1)
    return math.ceil(block_size / group_size) * group_size, group_size
