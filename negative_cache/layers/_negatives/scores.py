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

    def of_all_pairs(
        self, scaled_queries: tf.Tensor, candidates: tf.Tensor, *, as_given: bool = False
    ) -> tf.Tensor:
        """[B, N] scores of every query with every candidate [N, d].

        No gradient reaches what the transform learns if `as_given`.
        """
        products = tf.matmul(scaled_queries, candidates, transpose_b=True)
        return self._apply_as_given(products) if as_given else self._apply(products)

    def of_own(
        self, scaled_queries: tf.Tensor, candidates: tf.Tensor, *, as_given: bool = False
    ) -> tf.Tensor:
        """[B, n] scores of every query with candidates [B, n, d] of its own; see `of_all_pairs`."""
        products = tf.einsum("bd,bnd->bn", scaled_queries, candidates)
        return self._apply_as_given(products) if as_given else self._apply(products)

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
