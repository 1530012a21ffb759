"""`Replicas`: those among which an evaluation divides the corpus.

Batches of the corpus, their embeddings and their scores stay where they are made. What is gathered
here are counts, ids, and scores of positives.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import util
from negative_cache._features import Features
from negative_cache._towers import Encoder
from negative_cache.layers._variables import by_replica, local_replicas

_DIVIDED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


class Replicas:
    """The replicas of a strategy, each with a part of the corpus. This process has some of them.

    Batch i of the corpus belongs to replica i mod R. If the dataset of the corpus says
    `AutoShardPolicy.OFF`, each worker's own dataset is a part of the corpus, and divided among the
    replicas of that worker.

    Args:
      strategy: the strategy. Unless it is a `MirroredStrategy` or a `MultiWorkerMirroredStrategy`,
        there is one replica, which has the whole corpus.

    Attributes:
      num_local: the number of replicas of this process.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None):
        self._strategy: tf.distribute.Strategy = strategy or tf.distribute.get_strategy()
        self._count = strategy.num_replicas_in_sync if isinstance(strategy, _DIVIDED) else 1
        local = local_replicas(strategy) if isinstance(strategy, _DIVIDED) else range(1)
        self.num_local, self._first = len(local), local.start

    @property
    def is_one(self) -> bool:
        """Whether there is nothing to divide."""
        return self._count == 1

    def own(self, batches: Iterable[Features]) -> Iterator[tuple[int | None, Features]]:
        """Yields each batch, and which replica of this process has it: 0, 1 …, or None."""
        count, first = self._count, self._first
        if isinstance(batches, tf.data.Dataset):
            policy = batches.options().experimental_distribute.auto_shard_policy
            if policy == tf.data.experimental.AutoShardPolicy.OFF:
                count, first = self.num_local, 0
        for i, features in enumerate(batches):
            replica = i % count - first
            yield replica if 0 <= replica < self.num_local else None, features

    def place(self, values: Sequence[Any]) -> Any:
        """Gives each replica of this process its one of `values`, which are nests of tensors."""
        if self.is_one:
            return values[0]
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: values[context.replica_id_in_sync_group - self._first]
        )

    def on_devices(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Does what `place` does, and copies each replica's tensor to its device."""
        placed = self.place(tensors)
        return placed if self.is_one else self._strategy.run(tf.identity, (placed,))

    def embed(self, encoder: Encoder, features: Any) -> list[tf.Tensor]:
        """Embeds on all replicas of this process, each its part of `features`."""
        if self.is_one:
            return [encoder.embed_tensor(features)]
        return self._of_each(encoder.embed_on(self._strategy)(features))

    def run_and_sum(self, function: Callable[..., tf.Tensor], *args: Any) -> np.ndarray:
        """Returns the sum of what a function returns on all replicas of all processes."""
        if self.is_one:
            return function(*args).numpy()
        return _run_and_sum(self._strategy, function, args).numpy()

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the `values` [n, ...] of all processes; n may differ."""
        if self.num_local == self._count:
            return values
        # Flat, so that one trace is for all shapes. Only the first replica of a process gives some.
        flat = tf.convert_to_tensor(values.reshape(-1))
        given = self.place([flat] + [flat[:0]] * (self.num_local - 1))
        gathered = self._of_each(_gather(self._strategy, given))[0]
        return gathered.numpy().reshape([-1, *values.shape[1:]])

    def total(self, values: np.ndarray) -> np.ndarray:
        """Adds up `values`, numbers of one shape in all processes."""
        return np.sum(self.gather(values[np.newaxis]), axis=0)

    def from_first(self, values: np.ndarray) -> np.ndarray:
        """Returns the `values` [n, ...] of the first process."""
        return self.gather(values if self._first == 0 else values[:0])

    @contextlib.contextmanager
    def with_one_state(self, network: object) -> Iterator[None]:
        """Makes a context in which a tower has the same state on every replica.

        A replica may have moving averages of its own, as those of `BatchNormalization`. In the
        context all of them have the value that the strategy gives for them outside of the replicas,
        which files hold too.
        """
        layer_variables = getattr(network, "non_trainable_variables", ())
        kept = []
        if not self.is_one:
            for variable in map(_tf_variable, layer_variables):
                parts = by_replica(variable)
                if len(parts) > 1 or self.num_local < self._count:
                    kept.append((parts, [part.numpy() for part in parts]))
                    with self._strategy.scope():
                        value = self.from_first(tf.convert_to_tensor(variable).numpy()[np.newaxis])
                    for part in parts:
                        part.assign(value[0])
        try:
            yield
        finally:
            for parts, values in kept:
                for part, value in zip(parts, values):
                    part.assign(value)

    def _of_each(self, result: Any) -> list[tf.Tensor]:
        return list(self._strategy.experimental_local_results(result))


@tf.function(reduce_retracing=True)
def _run_and_sum(
    strategy: tf.distribute.Strategy, function: Callable[..., tf.Tensor], args: Any
) -> tf.Tensor:
    return strategy.reduce("SUM", strategy.run(function, args), axis=None)


@tf.function(reduce_retracing=True)
def _gather(strategy: tf.distribute.Strategy, values: Any) -> Any:
    return strategy.run(lambda part: util.cross_replica_concat(part, axis=0), (values,))


def _tf_variable(variable: Any) -> tf.Variable:
    """The variable of TensorFlow in one of Keras 3."""
    return variable if isinstance(variable, tf.Variable) else variable.value
