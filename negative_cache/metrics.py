"""Keras metrics that Keras does not have."""

import tensorflow as tf

from negative_cache._compat import RunningMean, keras


@keras.utils.register_keras_serializable("negative_cache")
class MeanIfAny(RunningMean):
    """A mean over an epoch; NaN if there was nothing to take it of.

    What only training measures must not look like a measurement of zero in an evaluation.
    """

    def result(self) -> tf.Tensor:
        mean = super().result()
        return tf.where(tf.convert_to_tensor(self.count) > 0, mean, float("nan"))


@keras.utils.register_keras_serializable("negative_cache")
class Latest(RunningMean):
    """The last value it was given, for quantities whose average over an epoch says nothing.

    It outlasts the end of an epoch, until there is a new one.
    """

    def update_state(
        self, value: float | tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> None:
        del sample_weight
        self.total.assign(tf.cast(value, self.total.dtype))
        self.count.assign(tf.cast(1, self.count.dtype))

    def reset_state(self) -> None:
        """Keeps the value."""
