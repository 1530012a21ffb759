"""State of layers that every replica of a `tf.distribute` strategy holds for itself.

It lives in raw variables: the `add_weight` of Keras can make neither per-replica variables nor,
where they must be saved, strings.
"""

from collections.abc import Callable

import tensorflow as tf


def make_state_variable(initial_value: Callable[[], tf.Tensor], name: str) -> tf.Variable:
    """Makes a non-trainable variable with an independent value on every replica."""
    with tf.init_scope():
        return tf.Variable(
            initial_value,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            name=name,
        )


def scatter_rows(variable: tf.Variable, rows: tf.Tensor, values: tf.Tensor) -> None:
    """Writes `values` [n, ...] into `rows` [n] of `variable` [C, ...] in place.

    Unlike `Variable.scatter_nd_update` it takes every dtype, and works inside a replica context.
    """
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)


def on_every_replica(function: Callable[..., None], *args) -> None:
    """Runs `function(*args)` here or, where called outside of the replicas, on each of them."""
    if tf.distribute.in_cross_replica_context():
        tf.distribute.get_strategy().run(function, args)
    else:
        function(*args)
