"""`LearnedTemperature`: a temperature that the optimizer trains."""

import math
from typing import Any

import tensorflow as tf

from negative_cache._compat import keras


@keras.utils.register_keras_serializable("negative_cache")
class LearnedTemperature(keras.layers.Layer):
    """Divides scores by a temperature that is trained with the towers, as a `score_transform`.

    Its logarithm is the weight (Radford et al., arXiv 2103.00020), clipped where it is used: at a
    limit the gradient is zero. Weight decay would pull it to 1: leave `log_temperature` out of it.
    `temperature` is its value.

    Args:
      initial: the temperature at the start.
      smallest: its least value. CLIP's is 0.01.
      largest: its largest value.

    Raises:
      ValueError: where the three are not positive and in order.

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
        """Scalar float32."""
        log_temperature = tf.convert_to_tensor(self.log_temperature)
        return tf.exp(
            tf.clip_by_value(log_temperature, math.log(self.smallest), math.log(self.largest))
        )

    def call(self, scores: tf.Tensor) -> tf.Tensor:
        """Scores [...] divided by the temperature."""
        return tf.cast(scores, tf.float32) / self.temperature

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "initial": self.initial,
            "smallest": self.smallest,
            "largest": self.largest,
        }
