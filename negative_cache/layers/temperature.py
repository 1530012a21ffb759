"""`LearnedTemperature`: a temperature that the optimizer trains."""

import math
from typing import Any

import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.ops import contrastive


@keras.utils.register_keras_serializable("negative_cache")
class LearnedTemperature(keras.layers.Layer):
    """A temperature that is trained with the towers, between two bounds.

    It is the `temperature` of a `Retrieval` or `CachedRetrieval`. Scores are inner products of
    candidates with u = x / T, so a loss L has dL / d log T = -⟨u, ∂L/∂u⟩, whatever the sources of
    negatives are. Of a cache it is as good as the queries' gradient: with `exact_query_gradient`
    it is computed, d log Z / d log T = -Σ_y P̂(y|x) s' ⟨u, ĝ(y)⟩, with s' the derivative of a
    `score_transform`, and the draws only correct it for staleness.

    The layer also works as a `score_transform`, which divides scores. A cache then estimates the
    gradient by its draws alone, and the temperature is not in the logs.

    The temperature with the lowest training loss is lower than the one that retrieves best, so
    expect a training to end at `smallest`: choose that with care. docs/negatives.md has figures.

    The weight is log T (Radford et al., arXiv 2103.00020). Optimizers keep it between the bounds,
    by its constraint. If something else has moved it out, the nearest bound is used, with the
    gradient there, so that it can return. Adam moves log T by about the learning rate a step.

    Weight decay pulls the temperature to 1. Exclude the weight before the optimizer is built, by
    `optimizer.exclude_from_weight_decay(var_names=["log_temperature"])`.

    Args:
      initial: the temperature at the start.
      smallest: the smallest temperature.
      largest: the largest temperature.
      **kwargs: of the layer.

    Raises:
      ValueError: if 0 < `smallest` <= `initial` <= `largest` does not hold.

    Examples:
      >>> temperature = LearnedTemperature(0.1, smallest=0.05)
      >>> task = CachedRetrieval(tower, specs, 65536, temperature=temperature)
    """

    def __init__(
        self, initial: float = 0.05, *, smallest: float = 0.01, largest: float = 1.0, **kwargs: Any
    ):
        super().__init__(**{"autocast": False, "dtype": "float32", **kwargs})
        if not 0.0 < smallest <= initial <= largest:
            raise ValueError(
                "0 < `smallest` <= `initial` <= `largest` must hold. Received:"
                f" smallest={smallest}, initial={initial}, largest={largest}."
            )
        self.initial, self.smallest, self.largest = initial, smallest, largest
        self.log_temperature = self.add_weight(
            name="log_temperature",
            shape=[],
            initializer=keras.initializers.Constant(math.log(initial)),
            dtype="float32",
            constraint=self._clip,
        )
        self.built = True

    @property
    def temperature(self) -> tf.Tensor:
        """Scalar float32, the current temperature."""
        log_temperature = tf.convert_to_tensor(self.log_temperature)
        # The gradient of a clip is zero beyond a bound: a weight there would never return. One that
        # pushes outwards is not left out here, since a sum over replicas or uses may push inwards.
        return tf.exp(contrastive.value_with_gradient(self._clip(log_temperature), log_temperature))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns `inputs` [...], queries or scores, divided by the temperature, float32."""
        return tf.cast(inputs, tf.float32) / self.temperature

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initial": self.initial,
            "smallest": self.smallest,
            "largest": self.largest,
        }

    def _clip(self, log_temperature: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(
            tf.convert_to_tensor(log_temperature), math.log(self.smallest), math.log(self.largest)
        )
