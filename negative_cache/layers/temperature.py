"""`LearnedTemperature`: a temperature that the optimizer trains."""

import math
from typing import Any

import tensorflow as tf

from negative_cache._compat import keras


@keras.utils.register_keras_serializable("negative_cache")
class LearnedTemperature(keras.layers.Layer):
    """Divides scores by a temperature that is trained with the towers, as a `score_transform`.

    The weight is the logarithm of the temperature (Radford et al., arXiv 2103.00020). It is clipped
    when it is used, so the gradient is zero beyond a limit. Exclude the weight `log_temperature`
    from weight decay, which would pull the temperature to 1. The property `temperature` is the
    current value.

    Args:
      initial: the temperature at the start.
      smallest: the smallest temperature. CLIP uses 0.01.
      largest: the largest temperature.

    Raises:
      ValueError: if 0 < `smallest` <= `initial` <= `largest` does not hold.

    Example:
      >>> task = CachedRetrieval(tower, specs, 65536, score_transform=LearnedTemperature(0.07))
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
        )
        self.built = True

    @property
    def temperature(self) -> tf.Tensor:
        """Scalar float32, the current temperature."""
        log_temperature = tf.convert_to_tensor(self.log_temperature)
        return tf.exp(
            tf.clip_by_value(log_temperature, math.log(self.smallest), math.log(self.largest))
        )

    def call(self, scores: tf.Tensor) -> tf.Tensor:
        """Returns `scores` [...] divided by the temperature, float32."""
        return tf.cast(scores, tf.float32) / self.temperature

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initial": self.initial,
            "smallest": self.smallest,
            "largest": self.largest,
        }
