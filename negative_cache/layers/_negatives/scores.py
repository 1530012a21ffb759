"""How pairs are scored: inner products, divided by a temperature and transformed."""

from collections.abc import Callable

import tensorflow as tf

from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.ops import contrastive


class Scores:
    """score(x, y) = transform(⟨x, y⟩ / temperature); None for either leaves it out."""

    def __init__(
        self,
        temperature: float | LearnedTemperature | None,
        transform: Callable[[tf.Tensor], tf.Tensor] | None,
    ):
        self._temperature = temperature
        self.transform = transform

    @property
    def temperature(self) -> float | tf.Tensor | None:
        """The number, or scalar float32, the value of now of one that is learned."""
        if isinstance(self._temperature, LearnedTemperature):
            return self._temperature.temperature
        return self._temperature

    def scale(self, queries: tf.Tensor) -> tf.Tensor:
        """Divides queries by the temperature, which is cheaper than to divide scores.

        What has a gradient by the scaled queries has one by a temperature that is learned.
        """
        return queries if self._temperature is None else queries / self.temperature

    def of_all_pairs(self, scaled_queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        """[B, N] scores of every query with every candidate [N, d]."""
        return self._apply(tf.matmul(scaled_queries, candidates, transpose_b=True))

    def of_all_pairs_as_given(self, scaled_queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        """`of_all_pairs`, whose gradient reaches the candidates and nothing else.

        Neither the queries nor, say, a temperature that the transform learns.
        """
        queries = tf.stop_gradient(scaled_queries)
        return self._apply_as_given(tf.matmul(queries, candidates, transpose_b=True))

    def of_own(self, scaled_queries: tf.Tensor, candidates: tf.Tensor) -> tf.Tensor:
        """[B, n] scores of every query with candidates [B, n, d] of its own."""
        return self._apply(tf.einsum("bd,bnd->bn", scaled_queries, candidates))

    def mean_of_draws(
        self,
        scaled_queries: tf.Tensor,
        embeddings: tf.Tensor,
        is_drawn: tf.Tensor,
        num_draws: int,
        *,
        as_given: bool = False,
    ) -> tf.Tensor:
        """[B], each query's mean score of its draws; zero where it has none.

        Their embeddings are [B * num_draws, d], and `is_drawn` [B * num_draws] says which of them
        are of a draw. No gradient reaches what a transform learns where `as_given`.
        """
        embeddings = tf.reshape(embeddings, [-1, num_draws, embeddings.shape[1]])
        is_drawn = tf.reshape(is_drawn, [-1, num_draws])
        products = tf.einsum("bd,bnd->bn", scaled_queries, embeddings)
        scores = self._apply_as_given(products) if as_given else self._apply(products)
        scores = tf.where(is_drawn, scores, 0.0)
        count = tf.math.count_nonzero(is_drawn, axis=1, dtype=tf.float32)
        return tf.reduce_sum(scores, axis=1) / tf.maximum(count, 1.0)

    def _apply_as_given(self, products: tf.Tensor) -> tf.Tensor:
        """`_apply`, whose gradient reaches the products and nothing that the transform learns."""
        if self.transform is None:
            return products
        with tf.GradientTape() as tape:
            fixed = tf.stop_gradient(products)
            tape.watch(fixed)
            scores = self.transform(fixed)
        slopes = tf.stop_gradient(tape.gradient(scores, fixed, unconnected_gradients="zero"))
        return contrastive.value_with_gradient(scores, slopes * products)

    def _apply(self, products: tf.Tensor) -> tf.Tensor:
        return products if self.transform is None else self.transform(products)
