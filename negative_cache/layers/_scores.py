"""How `CachedRetrieval` scores: inner products, divided by a temperature and transformed."""

from collections.abc import Callable

import tensorflow as tf


class Scores:
    """score(x, y) = transform(⟨x, y⟩ / temperature); None for either leaves it out."""

    def __init__(
        self,
        temperature: float | None,
        transform: Callable[[tf.Tensor], tf.Tensor] | None,
    ):
        self._temperature = temperature
        self.transform = transform

    def scale(self, queries: tf.Tensor) -> tf.Tensor:
        """Divides queries by the temperature, which is cheaper than to divide scores."""
        return queries if self._temperature is None else queries / self._temperature

    def of_all_pairs(self, scaled_queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        """[B, N] scores of every query with every candidate [N, d]."""
        return self._apply(tf.matmul(scaled_queries, candidates, transpose_b=True))

    def of_own(self, scaled_queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        """[B, n] scores of every query with candidates [B, n, d] of its own."""
        return self._apply(tf.einsum("bd,bnd->bn", scaled_queries, candidates))

    def mean_of_draws(
        self, scaled_queries: tf.Tensor, embeddings: tf.Tensor, num_draws: int
    ) -> tf.Tensor:
        """[B], each query's mean score of its draws, whose embeddings are [B * num_draws, d]."""
        embeddings = tf.reshape(embeddings, [-1, num_draws, embeddings.shape[1]])
        return tf.reduce_mean(self.of_own(scaled_queries, embeddings), axis=1)

    def _apply(self, products):
        return products if self.transform is None else self.transform(products)
