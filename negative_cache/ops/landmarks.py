"""Selection of a few landmarks among many points, and the Nyström update that uses them."""

import tensorflow as tf

from negative_cache.ops._draws import Seed, draw_uniforms

# k-means++ chooses from a random pool of at most this many points per landmark.
_POOL_PER_LANDMARK = 32


def uniform_rows(mask: tf.Tensor, count: int, seed: Seed = None) -> tf.Tensor:
    """[count] int64, distinct rows drawn uniformly from those with True in `mask` [C].

    If there are fewer than `count`, rows with False follow.
    """
    keys = draw_uniforms(tf.shape(mask), seed) + tf.cast(mask, tf.float32)
    return tf.cast(tf.math.top_k(keys, k=count).indices, tf.int64)


def kmeans_plus_plus_rows(
    points: tf.Tensor | tf.Variable, mask: tf.Tensor, count: int, seed: Seed = None
) -> tf.Tensor:
    """[count] int64, rows chosen by k-means++, which are spread over the points.

    Each row is drawn in proportion to its squared distance to the nearest row chosen before
    (Arthur, Vassilvitskii, SODA 2007). If there are more than 32 points per row to choose, the rows
    are chosen from a uniform sample of 32 · count points.

    Args:
      points: [C, d] float.
      mask: [C] bool, whether each point may be chosen; True for at least `count` points.
      count: number of rows to choose.
      seed: as in `sample_softmax`.
    """
    pool_size = min(_POOL_PER_LANDMARK * count, mask.shape[0])
    seeds = tf.cast(draw_uniforms([2], seed) * 2.0**24, tf.int64)
    pool = uniform_rows(mask, pool_size, tf.stack([seeds[0], seeds[1]]))
    weight = tf.cast(tf.gather(mask, pool), tf.float32)
    vectors = tf.cast(tf.gather(points, pool), tf.float32)
    uniforms = draw_uniforms([count], tf.stack([seeds[1], seeds[0]]))

    def choose(
        i: tf.Tensor, chosen: tf.Tensor, distances: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        cdf = tf.cumsum(distances)
        position = tf.searchsorted(cdf, uniforms[i : i + 1] * cdf[-1], side="right")[0]
        position = tf.minimum(position, pool_size - 1)
        new = tf.reduce_sum(tf.math.squared_difference(vectors, vectors[position]), axis=1)
        # The small term keeps other points at distance zero eligible, so that no row is chosen
        # twice before all are used.
        distances = tf.minimum(distances, weight * (new + 1e-12))
        distances = tf.where(tf.range(pool_size) == position, 0.0, distances)
        return i + 1, tf.tensor_scatter_nd_update(chosen, [[i]], [position]), distances

    # The first row is drawn uniformly: all points start at the same large distance.
    start = (tf.constant(0), tf.zeros([count], tf.int32), weight * 1e12)
    _, chosen, _ = tf.while_loop(
        lambda i, *_: i < count, choose, start, parallel_iterations=1, maximum_iterations=count
    )
    return tf.gather(pool, chosen)


def rbf_kernel(a: tf.Tensor, b: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """[n, m] values exp(-‖a - b‖² / 2 scale²) between points [n, d] and [m, d]."""
    squares_a = tf.reduce_sum(tf.square(a), axis=1, keepdims=True)
    squares_b = tf.reduce_sum(tf.square(b), axis=1)
    distances = squares_a + squares_b - 2.0 * tf.matmul(a, b, transpose_b=True)
    return tf.exp(-0.5 * tf.maximum(distances, 0.0) / tf.square(scale))


def nystrom_coefficients(
    kernel_matrix: tf.Tensor, drift: tf.Tensor, share: tf.Tensor, ridge: float
) -> tf.Tensor:
    """[m, d] coefficients c for which k(ĝ(y), ĝ(Z)) c estimates the drift of a candidate y.

    This is the update of Monath et al. (arXiv 2303.15311), extended to landmarks of different ages:
    c = Φ (Φ K_ZZ Φ + λ I)⁻¹ Δ, with Φ = diag(φ). It gives the posterior mean of a Gaussian process
    r with covariance k, observed as Δ_z = φ_z r(ĝ(z)) with noise of variance λ.

    Args:
      kernel_matrix: [m, m] float32, K_ZZ, the kernel between the landmarks' stale embeddings.
      drift: [m, d] float32, Δ = g(Z) - ĝ(Z).
      share: [m] float32, φ; 0 for an unused landmark, whose values are ignored.
      ridge: λ.
    """
    column = share[:, tf.newaxis]
    is_there = column > 0.0
    both = is_there & (share > 0.0)
    matrix = tf.where(both, kernel_matrix * column * share, 0.0)
    matrix += ridge * tf.eye(kernel_matrix.shape[0])
    drift = tf.where(is_there, drift, 0.0)
    return column * _solve(matrix, drift)


def linear_coefficients(
    features: tf.Tensor, drift: tf.Tensor, share: tf.Tensor, ridge: float
) -> tf.Tensor:
    """[c, d] coefficients w for which ⟨features(y), w⟩ estimates the drift of a candidate y.

    The estimate is that of `nystrom_coefficients` with the kernel
    k(a, b) = ⟨features(a), features(b)⟩, but it solves c equations instead of m:
    w = (Zᵀ Φ² Z + λ I)⁻¹ Zᵀ Φ Δ.

    Args:
      features: [m, c] float32, Z, the features of the landmarks' stale embeddings.
      drift: [m, d] float32, Δ = g - ĝ of the landmarks.
      share: [m] float32, φ; 0 for an unused landmark, whose values are ignored.
      ridge: λ.
    """
    column = share[:, tf.newaxis]
    weighted = tf.where(column > 0.0, column * features, 0.0)
    drift = tf.where(column > 0.0, drift, 0.0)
    matrix = tf.matmul(weighted, weighted, transpose_a=True) + ridge * tf.eye(features.shape[1])
    right = tf.matmul(weighted, drift, transpose_a=True)
    return _solve(matrix, right)


def _solve(matrix: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Solves matrix · x = right for a positive definite matrix; zero if rounding makes it fail."""
    solution = tf.linalg.cholesky_solve(tf.linalg.cholesky(matrix), right)
    return tf.where(tf.reduce_all(tf.math.is_finite(solution)), solution, 0.0)
