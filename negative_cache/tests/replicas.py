"""Two replicas on the two logical CPU devices that `conftest` makes."""

import functools

import tensorflow as tf


@functools.cache
def two_replicas() -> tf.distribute.Strategy:
    """The one strategy of this process.

    Every `MirroredStrategy` numbers its collective operations from the start, and TensorFlow
    takes those of a second strategy for those of the first: it reports a shape mismatch.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


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
