"""Exact sampling from a softmax on an accelerator: few large blocks, all inside of one computation.

The law is that of `softmax_sampling`, and so is every argument. What differs is what is cheap. An
accelerator scores a block in one matrix product, whose scores stay in its memory; what costs is
each kernel, each pass over the scores and each word to the host. So a block is scored once: its
largest score is found, the exponentials are summed by groups of neighbours, and a draw is an
inverse CDF over the groups and another one inside of a group, of those very scores. Nothing is
scored a second time, which with the shorter products of TF32 might give other scores than the
first. From block to block a draw is kept or replaced in proportion to the partitions, as
`merge_samples` does, so that nothing but a few numbers a query outlives its block.
"""

import math

import tensorflow as tf

from negative_cache.ops._block_scorer import INADMISSIBLE, BlockScorer
from negative_cache.ops._draws import Draws, Seed, random_of_blocks

# Scores in memory at a time: 64 MiB, and as much again for each of their exponentials and, with a
# gradient and a `score_transform`, their slopes.
SCORES_AT_ONCE = 2**24
# The candidates of a group.
_GROUP_SIZE = 128
# More blocks are a loop.
_UNROLLED_BLOCKS = 8
# The queries to plan for where their number is not known when a function is traced.
_LIKELY_QUERIES = 1024


def draw_from_large_blocks(
    scorer: BlockScorer, seed: Seed, *, num_samples: int, block_size: int | None, with_mean: bool
) -> Draws:
    """Draws from all candidates of `scorer`, whose number is known.

    Args:
      scorer: of queries [B, d] and C candidates.
      seed: as in `sample_softmax`, but not None.
      num_samples: S.
      block_size: candidates scored at a time; chosen from the shapes where None.
      with_mean: whether the mean is wanted.
    """
    size, num_blocks = choose_blocks(scorer.num_queries, scorer.num_candidates, block_size)
    random = random_of_blocks(seed, num_blocks)

    def draw_more(block: int | tf.Tensor, draws: Draws) -> Draws:
        uniforms = random(block, [3, scorer.num_queries, num_samples])
        more = _draw_from_block(scorer, block * size, size, uniforms, with_mean)
        return _merge(draws, more, uniforms[2])

    draws = Draws(
        tf.zeros([scorer.num_queries, num_samples], tf.int32),
        tf.fill([scorer.num_queries, num_samples], INADMISSIBLE),
        tf.fill([scorer.num_queries], 2.0 * INADMISSIBLE),
        tf.zeros([scorer.num_queries, scorer.dim]),
    )
    if num_blocks > _UNROLLED_BLOCKS:
        return tf.while_loop(
            lambda block, _: block < num_blocks,
            lambda block, draws: (block + 1, draw_more(block, draws)),
            (tf.constant(0), draws),
            maximum_iterations=num_blocks,
            parallel_iterations=1,
        )[1]
    for block in range(num_blocks):
        draws = draw_more(block, draws)
    return draws


def choose_blocks(
    num_queries: int | tf.Tensor, num_candidates: int, block_size: int | None
) -> tuple[int, int]:
    """The size of blocks, a multiple of the group size, and their number.

    Blocks are as equal as can be: one that is hardly filled costs as much as a full one.
    """
    if block_size is None:
        likely = num_queries if isinstance(num_queries, int) else _LIKELY_QUERIES
        block_size = SCORES_AT_ONCE // max(likely, 1)
    num_blocks = math.ceil(num_candidates / max(block_size, _GROUP_SIZE))
    num_groups = math.ceil(math.ceil(num_candidates / num_blocks) / _GROUP_SIZE)
    size = num_groups * _GROUP_SIZE
    return size, math.ceil(num_candidates / size)


def _draw_from_block(
    scorer: BlockScorer, first: int | tf.Tensor, size: int, uniforms: tf.Tensor, with_mean: bool
) -> Draws:
    """Draws from the candidates from `first` on, `size` of them or as many as there are."""
    num_there = min(size, scorer.num_candidates)
    # The last block begins earlier, so as to be as long as the others.
    start = tf.minimum(first, scorer.num_candidates - num_there)
    block = scorer.read_block(start, num_there, as_kept=True)
    scores, slopes = scorer.score_block(block, start, num_there, with_slopes=with_mean)
    is_new = start + tf.range(num_there) >= first
    scores = tf.where(is_new, scores, INADMISSIBLE)
    padding = [[0, 0], [0, size - num_there]]
    padded = tf.pad(scores, padding, constant_values=INADMISSIBLE)
    grouped = tf.reshape(padded, [scorer.num_queries, size // _GROUP_SIZE, _GROUP_SIZE])

    largest = tf.reduce_max(scores, axis=1)
    group_weights = tf.reduce_sum(tf.exp(grouped - largest[:, tf.newaxis, tf.newaxis]), axis=2)
    group = _pick(group_weights[:, tf.newaxis], uniforms[0])
    candidates = tf.gather(grouped, group, batch_dims=1)
    weights = tf.exp(candidates - largest[:, tf.newaxis, tf.newaxis])
    within = _pick(weights, uniforms[1])
    total = tf.reduce_sum(group_weights, axis=1)
    mean = tf.zeros([scorer.num_queries, scorer.dim])
    if with_mean:
        weights = tf.exp(scores - largest[:, tf.newaxis])
        mean = scorer.combine(weights, slopes, block, start, num_there) / total[:, tf.newaxis]
    return Draws(
        start + group * _GROUP_SIZE + within,
        tf.gather(candidates, within, batch_dims=2),
        largest + tf.math.log(total),
        mean,
    )


def _merge(draws: Draws, more: Draws, uniforms: tf.Tensor) -> Draws:
    """Draws from both: of `more` with the probability that its partition has in that of both."""
    both = tf.stack([draws.log_partition, more.log_partition])
    log_partition = tf.reduce_logsumexp(both, axis=0)
    share = tf.exp(more.log_partition - log_partition)[:, tf.newaxis]
    is_replaced = uniforms < share
    return Draws(
        tf.where(is_replaced, more.indices, draws.indices),
        tf.where(is_replaced, more.scores, draws.scores),
        log_partition,
        draws.mean + share * (more.mean - draws.mean),
    )


def _pick(weights: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """[B, S] int32 positions drawn in proportion to weights [B, S or 1, n] by `uniforms` [B, S].

    A position of weight zero is never drawn, unless all are zero, however sums may be rounded where
    they are computed in parallel.
    """
    cdf = tf.cumsum(weights, axis=2)
    threshold = uniforms[..., tf.newaxis] * cdf[..., -1:]
    # The first that is past the threshold, or where rounding leaves none, the heaviest.
    is_past = (cdf > threshold) & (weights > 0.0)
    return tf.argmax(tf.where(is_past, tf.float32.max, weights), axis=2, output_type=tf.int32)
