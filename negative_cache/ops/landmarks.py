"""Choices of a few points that stand for many, and the Nyström update that they make possible."""

import tensorflow as tf

from negative_cache.ops._draws import Seed, draw_uniforms

# Where the points are many, k-means++ looks at so many for each one that it chooses.
_POOL_PER_LANDMARK = 32


def uniform_rows(mask: tf.Tensor, count: int, seed: Seed = None) -> tf.Tensor:
    """[count] int64, different rows drawn uniformly from those with `mask` [C] True.

    Where there are fewer, rows without come last.
    """
    keys = draw_uniforms(tf.shape(mask), seed) + tf.cast(mask, tf.float32)
    return tf.cast(tf.math.top_k(keys, k=count).indices, tf.int64)


def kmeans_plus_plus_rows(
    points: tf.Tensor | tf.Variable, mask: tf.Tensor, count: int, seed: Seed = None
) -> tf.Tensor:
    """[count] int64, rows that k-means++ chooses: far from each other, and where points are.

    Each row is drawn in proportion to its squared distance to the nearest of those chosen before
    (Arthur, Vassilvitskii, SODA 2007). Beyond 32 points for each row to choose, a uniform choice of
    so many is looked at.

    Args:
      points: [C, d] float.
      mask: [C] bool, which of them there are; at least `count`.
      count: how many rows to choose.
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
        # A row is not chosen twice while others are left, if only at no distance.
        distances = tf.minimum(distances, weight * (new + 1e-12))
        distances = tf.where(tf.range(pool_size) == position, 0.0, distances)
        return i + 1, tf.tensor_scatter_nd_update(chosen, [[i]], [position]), distances

    # The first is drawn uniformly: all are infinitely far from nothing, and equally so.
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
    """[m, d] coefficients c, so that k(ĝ(y), ĝ(Z)) c is how far a candidate y has drifted.

    It is the update of Monath et al. (arXiv 2303.15311) with drifts that may be of landmarks of
    different age: c = Φ (Φ K_ZZ Φ + λ I)⁻¹ Δ, where Φ = diag(φ). That is the mean of a Gaussian
    process r of covariance k, observed as Δ_z = φ_z r(ĝ(z)) with noise of variance λ.

    Args:
      kernel_matrix: [m, m] float32, K_ZZ, the kernel between the landmarks' stale embeddings.
      drift: [m, d] float32, Δ = g(Z) - ĝ(Z).
      share: [m] float32, φ; 0 for a landmark that is not there, whatever its values are.
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
    """[c, d] coefficients w, so that ⟨features(y), w⟩ is how far a candidate y has drifted.

    What `nystrom_coefficients` gives for the kernel k(a, b) = ⟨features(a), features(b)⟩, by way of
    c equations and not m: w = (Zᵀ Φ² Z + λ I)⁻¹ Zᵀ Φ Δ.

    Args:
      features: [m, c] float32, Z, those of the landmarks' stale embeddings.
      drift: [m, d] float32, Δ.
      share: [m] float32, φ; 0 for a landmark that is not there, whatever its values are.
      ridge: λ.
    """
    column = share[:, tf.newaxis]
    weighted = tf.where(column > 0.0, column * features, 0.0)
    drift = tf.where(column > 0.0, drift, 0.0)
    matrix = tf.matmul(weighted, weighted, transpose_a=True) + ridge * tf.eye(features.shape[1])
    right = tf.matmul(weighted, drift, transpose_a=True)
    return _solve(matrix, right)


def _solve(matrix: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """The solution for a positive definite matrix; zero where rounding has made it none."""
    solution = tf.linalg.cholesky_solve(tf.linalg.cholesky(matrix), right)
    return tf.where(tf.reduce_all(tf.math.is_finite(solution)), solution, 0.0)
