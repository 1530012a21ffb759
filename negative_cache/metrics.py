"""Metrics that Keras lacks: a mean that may be empty, and the latest value."""

import tensorflow as tf

from negative_cache._compat import RunningMean, keras


@keras.utils.register_keras_serializable("negative_cache")
class TrainingMean(RunningMean):
    """A mean over an epoch of what only training steps measure.

    Its owner says in every call whether it `is_measured`. If it is not, as in an evaluation, the
    result that is traced with the call is an empty dictionary, and Keras logs nothing. A zero, or a
    value left from training, would look like a measurement. Eagerly the result is the mean.
    """

    is_measured = True

    def result(self) -> tf.Tensor | dict:
        if not self.is_measured and not tf.executing_eagerly():
            return {}
        return super().result()


@keras.utils.register_keras_serializable("negative_cache")
class LatestValue(TrainingMean):
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
