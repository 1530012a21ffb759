"""The statistics of a node of a tree index: count, mean, spread, radius and error.

`cut.TreeLevel` defines them. They are updated when candidates enter or leave a node, without a pass
over the candidates that stay.
"""

import tensorflow as tf

from negative_cache.ops.groups import Groups
from negative_cache.ops.tree.cut import COUNT, ERROR, RADIUS, ROUNDING, SPREAD

# Lloyd iterations of a bisection.
_ITERATIONS = 4


def change_nodes(
    means: tf.Tensor,
    stats: tf.Tensor,
    groups: Groups,
    vectors: tf.Tensor,
    signs: tf.Tensor,
    errors: tf.Tensor,
    *,
    moves: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Updates the means and statistics of nodes after candidates have entered and left.

    Let δ be the movement of the mean. The distances of the candidates that stay grow by at most
    ‖δ‖, and those of the candidates that enter are measured: the new radius is the larger bound.
    The new spread is the mean squared distance to the old mean, minus ‖δ‖².

    Args:
      means: [n, d] float32, the mean of the node of each group.
      stats: [n, 4] float32, the statistics of the node of each group.
      groups: the entries, grouped by node.
      vectors: [n, d] float32, the candidate of each entry.
      signs: [n] float32, 1 if the candidate enters, -1 if it leaves, 0 for an entry in no group.
      errors: [n] float32, bounds on the errors of `vectors`.
      moves: whether the means move. If they do not, the errors grow instead.

    Returns:
      new_means: [n, d] float32.
      new_stats: [n, 4] float32.
    """
    count, spread, radius, error = tf.unstack(stats, axis=1)
    remaining = count - groups.sum(tf.maximum(-signs, 0.0))
    new_count = remaining + groups.sum(tf.maximum(signs, 0.0))
    divisor = tf.maximum(new_count, 1.0)
    # If no candidate stays, the mean is that of the entering candidates, free of former errors.
    any_stays = remaining > 0.0
    signs = tf.where(tf.gather(any_stays, groups.group), signs, tf.maximum(signs, 0.0))
    count = tf.where(any_stays, count, 0.0)

    offsets = vectors - tf.gather(means, groups.group)
    squares = tf.reduce_sum(offsets**2, axis=1)
    shift = groups.sum(signs[:, tf.newaxis] * offsets) / divisor[:, tf.newaxis]
    missed = tf.zeros_like(divisor)
    if not moves:
        missed, shift = tf.norm(shift, axis=1), tf.zeros_like(shift)
    new_means = means + shift
    moved = tf.norm(shift, axis=1)
    # A worst-case bound on the rounding errors of the sums.
    rounding = ROUNDING * (
        4.0 * (tf.norm(new_means, axis=1) + moved)
        + (2.0 + groups.sum(tf.abs(signs))) * groups.sum(tf.sqrt(squares)) / divisor
    )
    new_error = (count * error + groups.sum(tf.abs(signs) * errors)) / divisor + rounding + missed
    distances = tf.norm(offsets - tf.gather(shift, groups.group), axis=1) + errors
    entering = groups.max(tf.where(signs > 0.0, distances, 0.0))
    staying = tf.where(any_stays, radius + moved, 0.0)
    new_radius = tf.maximum(entering, staying) * distances_round_up(means) + rounding
    new_spread = (count * spread + groups.sum(signs * squares)) / divisor - moved**2
    new_spread = tf.clip_by_value(new_spread, 0.0, new_radius**2)
    new_stats = tf.stack([new_count, new_spread, new_radius, new_error], axis=1)
    is_some = (new_count > 0.0)[:, tf.newaxis]
    if moves:
        new_means = tf.where(is_some, new_means, 0.0)
    return new_means, tf.where(is_some, new_stats, 0.0)


def combine(means: tf.Tensor, stats: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the mean and the statistics of the union of n nodes or candidates.

    Args:
      means: [..., n, d] float32.
      stats: [..., n, 4] float32; zero for empty nodes and slots.

    Returns:
      mean: [..., d] float32.
      stats: [..., 4] float32.
    """
    count = stats[..., COUNT]
    total = tf.reduce_sum(count, axis=-1)
    divisor = tf.maximum(total, 1.0)
    mean = tf.reduce_sum(count[..., tf.newaxis] * means, axis=-2) / divisor[..., tf.newaxis]
    squares = tf.reduce_sum((means - mean[..., tf.newaxis, :]) ** 2, axis=-1)
    reach = tf.sqrt(squares) + stats[..., RADIUS]
    radius = tf.reduce_max(tf.where(count > 0.0, reach, 0.0), axis=-1)
    rounding = (means.shape[-2] + 4) * ROUNDING * (tf.norm(mean, axis=-1) + radius)
    radius = radius * distances_round_up(means) + rounding
    spread = tf.reduce_sum(count * (stats[..., SPREAD] + squares), axis=-1) / divisor
    spread = tf.minimum(spread, radius**2)
    error = tf.reduce_sum(count * stats[..., ERROR], axis=-1) / divisor + rounding
    stats = tf.stack([total, spread, radius, error], axis=-1)
    return mean, tf.where((total > 0.0)[..., tf.newaxis], stats, 0.0)


def bisect(vectors: tf.Tensor, is_there: tf.Tensor, smallest_part: float) -> tf.Tensor:
    """Splits sets of vectors in two, by 2-means starting from two distant points.

    Args:
      vectors: [Q, n, d] float32, Q sets.
      is_there: [Q, n] bool, whether each vector is in its set.
      smallest_part: the smallest fraction of a set that each half gets. Each half gets at least one
        vector if the set has two.

    Returns:
      [Q, n] bool, whether each vector is in the first half of its set.
    """
    weights = tf.cast(is_there, tf.float32)[..., tf.newaxis]
    count = tf.reduce_sum(weights, axis=1)
    mean = tf.reduce_sum(weights * vectors, axis=1) / tf.maximum(count, 1.0)
    one = _farthest(vectors, is_there, mean)
    other = _farthest(vectors, is_there, one)
    for _ in range(_ITERATIONS):
        in_one = _nearer(vectors, one, other) > 0.0
        one, other = (
            _mean_or(vectors, weights * tf.cast(part, tf.float32)[..., tf.newaxis], old)
            for part, old in ((in_one, one), (~in_one, other))
        )
    nearer = tf.where(is_there, _nearer(vectors, one, other), -tf.float32.max)
    rank = tf.argsort(tf.argsort(nearer, direction="DESCENDING", stable=True))
    count = count[:, 0]
    size = tf.reduce_sum(tf.cast((nearer > 0.0) & is_there, tf.float32), axis=1)
    smallest = tf.maximum(tf.math.floor(smallest_part * count), 1.0)
    size = tf.clip_by_value(size, smallest, tf.maximum(count - smallest, smallest))
    return (tf.cast(rank, tf.float32) < size[:, tf.newaxis]) & is_there


def round_means(means: tf.Tensor, stats: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """Rounds means to `dtype` and adjusts the statistics to the rounded means.

    Args:
      means: [..., d] float32.
      stats: [..., 4] float32.
      dtype: the dtype that the means are stored in.

    Returns:
      rounded: [..., d] float32.
      stats: [..., 4] float32.
    """
    rounded = tf.cast(tf.cast(means, dtype), tf.float32)
    off = tf.norm(rounded - means, axis=-1)
    count, spread, radius, error = tf.unstack(stats, axis=-1)
    return rounded, tf.where(
        (count > 0.0)[..., tf.newaxis],
        tf.stack([count, spread + off**2, radius + off, error + off], axis=-1),
        0.0,
    )


def candidate_stats(is_there: tf.Tensor, errors: tf.Tensor) -> tf.Tensor:
    """[..., 4] statistics of single candidates; zero where `is_there` [...] is False.

    `errors` [...] are bounds on the errors of the candidates' vectors.
    """
    there = tf.cast(is_there, tf.float32)
    return tf.stack([there, tf.zeros_like(there), there * errors, there * errors], axis=-1)


def distances_round_up(vectors: tf.Tensor) -> float:
    """The factor that turns a computed distance between `vectors` [..., d] into an upper bound."""
    return 1.0 + (vectors.shape[-1] + 4) * ROUNDING


def _nearer(vectors: tf.Tensor, one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """[Q, n] float32, positive for vectors nearer to `one` [Q, d] than to `other` [Q, d]."""
    middle = 0.5 * (one + other)
    return tf.einsum("qnd,qd->qn", vectors - middle[:, tf.newaxis], one - other)


def _farthest(vectors: tf.Tensor, is_there: tf.Tensor, point: tf.Tensor) -> tf.Tensor:
    distances = tf.reduce_sum((vectors - point[:, tf.newaxis]) ** 2, axis=2)
    position = tf.argmax(tf.where(is_there, distances, -1.0), axis=1)
    return tf.gather(vectors, position, batch_dims=1)


def _mean_or(vectors: tf.Tensor, weights: tf.Tensor, default: tf.Tensor) -> tf.Tensor:
    count = tf.reduce_sum(weights, axis=1)
    mean = tf.reduce_sum(weights * vectors, axis=1) / tf.maximum(count, 1.0)
    return tf.where(count > 0.0, mean, default)
