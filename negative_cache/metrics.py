"""Keras metrics that Keras does not have."""

import tensorflow as tf

from negative_cache._compat import keras


@keras.utils.register_keras_serializable("negative_cache")
class RunningMean(keras.metrics.Mean):
    """A mean over an epoch that no Keras file holds: the next epoch begins it anew.

    Keras 2 could not read it back under a strategy with several replicas.
    """

    def save_own_variables(self, store):
        """Writes nothing."""

    def load_own_variables(self, store):
        """Reads nothing."""


@keras.utils.register_keras_serializable("negative_cache")
class Latest(RunningMean):
    """The last value it was given, for quantities whose average over an epoch says nothing."""

    def update_state(self, value, sample_weight=None):
        del sample_weight
        self.total.assign(tf.cast(value, self.total.dtype))
        self.count.assign(tf.cast(1, self.count.dtype))
