"""A metric that Keras lacks: the latest value."""

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
