"""Exact sampling from a softmax on an accelerator: few large blocks, all in one computation.

The arguments and the law of the draws are those of `softmax_sampling`. The costs differ from those
on a CPU. An accelerator scores a block in one matrix product, and the scores stay in its memory.
What takes time is the number of kernels, of passes over the scores, and of transfers to the host.

So each block is scored once. Its largest score is found, and the exponentials are summed by groups
of neighbours. A draw is an inverse CDF over the groups, and another one inside the drawn group, on
the same scores. No candidate is scored a second time: in TF32 a second score might differ from the
first. After each block, a draw is kept or replaced in proportion to the partitions, as in
`merge_samples`. So only a few numbers per query are kept from one block to the next.
"""

import math

import tensorflow as tf

from negative_cache.ops._block_scorer import INADMISSIBLE, BlockScorer
from negative_cache.ops._draws import Choice, Draws, Seed, random_of_blocks

# Scores in memory at a time. They take 64 MiB. Their exponentials take as much again, and so do
# their slopes with a gradient and a `score_transform`.
SCORES_AT_ONCE = 2**24
# Candidates per group.
_GROUP_SIZE = 128
# The largest number of blocks that are unrolled instead of computed in a loop.
_UNROLLED_BLOCKS = 8
# The number of queries that is assumed if it is not known during tracing.
_LIKELY_QUERIES = 1024


def draw_from_large_blocks(
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
      scorer: scores queries [B, d] with C candidates. C must be known.
      seed: as in `sample_softmax`, but not None.
      num_samples: S, the number of draws per query.
      block_size: number of candidates scored at a time; chosen from the shapes if None.
      with_mean: whether to compute `Draws.mean`.
      choose: chooses the queries that draws are made for; all of them if None. Those are scored
        again, so that no block's scores must be kept.

    Returns:
      The `Draws`.
    """
    if choose is not None:
        of_all = draw_from_large_blocks(
            scorer, seed, num_samples=0, block_size=block_size, with_mean=with_mean
        )
        chosen = choose(of_all.log_partition)
        of_chosen = draw_from_large_blocks(
            scorer.of_queries(chosen),
            seed,
            num_samples=num_samples,
            block_size=block_size,
            with_mean=False,
        )
        return Draws(of_chosen.indices, of_chosen.scores, of_all.log_partition, of_all.mean, chosen)
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
        # A loop carries no None, which `chosen` is.
        _, *found = tf.while_loop(
            lambda block, *_: block < num_blocks,
            lambda block, *found: (block + 1, *draw_more(block, Draws(*found))[:4]),
            (tf.constant(0), *draws[:4]),
            maximum_iterations=num_blocks,
            parallel_iterations=1,
        )
        return Draws(*found)
    for block in range(num_blocks):
        draws = draw_more(block, draws)
    return draws


def choose_blocks(
    num_queries: int | tf.Tensor, num_candidates: int, block_size: int | None
) -> tuple[int, int]:
    """Returns the size of the blocks, a multiple of the group size, and their number.

    The candidates are distributed evenly, because a nearly empty block costs as much as a full one.
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
    """Draws from `size` candidates beginning at `first`, or from fewer if the candidates end."""
    num_there = min(size, scorer.num_candidates)
    # The last block begins earlier than `first`, so that all blocks have the same length.
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
    """Merges draws from two sets: those of `more` win with probability Z_more / (Z + Z_more)."""
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

    A position of weight zero is never drawn, unless all weights are zero. That holds also if
    parallel sums are rounded so that the CDF is not monotone.
    """
    cdf = tf.cumsum(weights, axis=2)
    threshold = uniforms[..., tf.newaxis] * cdf[..., -1:]
    # The first position past the threshold. If rounding leaves none, the heaviest position.
    is_past = (cdf > threshold) & (weights > 0.0)
    return tf.argmax(tf.where(is_past, tf.float32.max, weights), axis=2, output_type=tf.int32)
