"""Random numbers from a seed, and draws by inverse CDFs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import tensorflow as tf

Seed: TypeAlias = int | tf.Tensor | Sequence[int] | None
# From log partitions [B] to the queries [n] int32 that draws are for.
Choice: TypeAlias = Callable[[tf.Tensor], tf.Tensor]


class Draws(NamedTuple):
    """Draws from the softmax over a set of candidates.

    If queries are chosen, n of them stand for B in the shapes of `indices` and `scores`.

    Attributes:
      indices: [B, S] int32, the drawn candidates.
      scores: [B, S] float32, their scores; arbitrary if a query has no admissible candidate.
      log_partition: [B] float32; about `INADMISSIBLE` if a query has no admissible candidate.
      mean: [B, d] float32, Σ_y P(y|x) s' y; zero if it was not asked for.
      chosen: [n] int32, the chosen queries; None if draws are for all.
    """

    indices: tf.Tensor
    scores: tf.Tensor
    log_partition: tf.Tensor
    mean: tf.Tensor
    chosen: tf.Tensor | None = None


def no_draws(log_partition: tf.Tensor, mean: tf.Tensor) -> Draws:
    """`Draws` with S = 0: only the log partition [B] and the mean [B, d]."""
    nothing = tf.zeros([tf.shape(log_partition)[0], 0])
    return Draws(tf.cast(nothing, tf.int32), nothing, log_partition, mean)


def inverse_cdf(weights: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """[..., S] int32 positions drawn in proportion to `weights` [..., n] by `uniforms` [..., S].

    A position of weight zero is never drawn, unless all weights are zero.
    """
    cdf = tf.cumsum(weights, axis=-1)
    positions = tf.searchsorted(cdf, uniforms * cdf[..., -1:], side="right")
    return tf.minimum(positions, tf.shape(weights)[-1] - 1)


def wide_inverse_cdf(
    weights: tf.Tensor, uniforms: tf.Tensor, more_uniforms: tf.Tensor
) -> tf.Tensor:
    """`inverse_cdf` of weights [B, n] with large n: draws a run of 64 neighbours, then one of them.

    Partial sums are slow. This computes them over the runs and within the drawn runs only. It needs
    one more uniform number per draw.

    Args:
      weights: [B, n] float32.
      uniforms: [B, S] float32, to draw the runs.
      more_uniforms: [B, S] float32, to draw within the runs.

    Returns:
      [B, S] int32 positions.
    """
    run = 64
    num_weights = weights.shape[1]
    num_runs = math.ceil(num_weights / run)
    weights = tf.pad(weights, [[0, 0], [0, num_runs * run - num_weights]])
    runs = tf.reshape(weights, [-1, num_runs, run])
    which = inverse_cdf(tf.reduce_sum(runs, axis=2), uniforms)
    within = tf.gather(runs, which, batch_dims=1)
    position = which * run + inverse_cdf(within, more_uniforms[..., tf.newaxis])[..., 0]
    # NaN weights lead to a position in the padding.
    return tf.minimum(position, num_weights - 1)


def draw_uniforms(shape: tf.Tensor | Sequence[int | tf.Tensor], seed: Seed) -> tf.Tensor:
    """Uniform random numbers in [0, 1) of `shape`; the same ones for the same seed."""
    if seed is None:
        return tf.random.uniform(shape)
    if isinstance(seed, int):
        seed = [0, seed]
    # The default algorithm depends on the device. Within XLA, Philox has a different stream.
    return tf.random.stateless_uniform(shape, seed, alg="philox")


def random_of_blocks(seed: Seed, num_blocks: int) -> Callable[..., tf.Tensor]:
    """A function (block, shape) -> uniform random numbers, from a seed of its own for each block.

    So the random numbers of only one block are in memory at a time.
    """
    seed = [0, seed] if isinstance(seed, int) else seed
    seeds = tf.random.stateless_uniform(
        [num_blocks, 2], seed, minval=None, maxval=None, dtype=tf.int32, alg="philox"
    )
    return lambda block, shape: draw_uniforms(shape, seeds[block])


def seed_or_random(seed: Seed) -> Seed:
    """`seed`, or a random seed if it is None.

    Code that XLA compiles needs it, because `tf.random.set_seed` has no effect there.
    """
    if seed is None:
        return tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    return seed
