"""Metrics that Keras lacks: the latest value, and the value of now."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from negative_cache._compat import RunningMean, keras


@keras.utils.register_keras_serializable("negative_cache")
class LatestValue(RunningMean):
    """The latest value, for quantities whose mean over an epoch is meaningless.

    The value is kept across epochs, until there is a new one.
    """

    def update_state(
        self, value: float | tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> None:
        del sample_weight
        self.total.assign(tf.cast(value, self.total.dtype))
        self.count.assign(tf.cast(1, self.count.dtype))

    def reset_state(self) -> None:
        """Keeps the value."""


class CurrentValue(keras.metrics.Metric):
    """The value of now, for quantities that can be asked for: after a step, that of its end.

    Args:
      function: returns the value, a scalar.
      **kwargs: of the metric.
    """

    def __init__(self, function: Callable[[], tf.Tensor], **kwargs: Any):
        super().__init__(**kwargs)
        self._function = function

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to keep."""

    def result(self) -> tf.Tensor:
        return self._function()
