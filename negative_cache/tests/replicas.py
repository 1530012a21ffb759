"""Replicas on the logical CPU devices that `conftest` makes: nearly always two."""

import contextlib
import functools

import tensorflow as tf


@functools.cache
def two_replicas() -> tf.distribute.Strategy:
    """The one strategy of this process that may send something between replicas.

    Every `MirroredStrategy` numbers its collective operations from the start, and TensorFlow
    takes those of a second strategy for those of the first: it reports a shape mismatch.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@functools.cache
def four_replicas() -> tf.distribute.Strategy:
    """Four replicas that send nothing: see `two_replicas`."""
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)])


def scope_of(num_replicas):
    """The scope in which one (without a strategy), two or four replicas hold what is made."""
    if num_replicas == 1:
        return contextlib.nullcontext()
    return (two_replicas if num_replicas == 2 else four_replicas)().scope()


def run_on(num_replicas, function):
    """Runs a function of the number of the replica on each of them."""
    if num_replicas == 1:
        function(0)
        return
    with scope_of(num_replicas):
        tf.distribute.get_strategy().run(
            lambda: function(tf.distribute.get_replica_context().replica_id_in_sync_group)
        )


def on_two_replicas(function, *args):
    """A function that runs `function` on both replicas and returns the two results.

    It is one `tf.function`: traced once, however often it is called.
    """
    strategy = two_replicas()
    run = tf.function(lambda: strategy.run(function, args))

    def both():
        results = run()
        return [
            tf.nest.map_structure(
                lambda value: strategy.experimental_local_results(value)[replica],  # noqa: B023
                results,
            )
            for replica in range(2)
        ]

    return both


def run_on_two_replicas(function, *args):
    """Runs `function` on both replicas in one `tf.function`, and returns the two results."""
    return on_two_replicas(function, *args)()
