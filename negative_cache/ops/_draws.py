"""Random numbers of a seed, and draws by inverse CDFs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import tensorflow as tf

Seed: TypeAlias = int | tf.Tensor | Sequence[int] | None


class Draws(NamedTuple):
    """Draws from candidates.

    Attributes:
      indices: [B, S] int32.
      scores: [B, S] float32; anything where a query has no admissible candidate.
      log_partition: [B] float32; about `INADMISSIBLE` where a query has none.
      mean: [B, d] float32, Σ_y P(y|x) s' y; zero where it is not wanted.
    """

    indices: tf.Tensor
    scores: tf.Tensor
    log_partition: tf.Tensor
    mean: tf.Tensor


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


def draw_uniforms(shape: tf.Tensor | Sequence[int | tf.Tensor], seed: Seed) -> tf.Tensor:
    """Uniform random numbers in [0, 1) of `shape`; the same ones for the same seed."""
    if seed is None:
        return tf.random.uniform(shape)
    if isinstance(seed, int):
        seed = [0, seed]
    # A fixed algorithm, where the default depends on the device. XLA has its own stream of it.
    return tf.random.stateless_uniform(shape, seed, alg="philox")


def random_of_blocks(seed: Seed, num_blocks: int) -> Callable[..., tf.Tensor]:
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
