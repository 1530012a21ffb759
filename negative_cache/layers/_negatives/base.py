"""The protocol of a source of negatives: two methods, and a few facts with defaults."""

from __future__ import annotations

import dataclasses
import re
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from negative_cache import _towers
from negative_cache._compat import kept_losses, keras
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._state import StateLayer

if TYPE_CHECKING:
    from negative_cache.layers.retrieval import Retrieval


@dataclasses.dataclass(frozen=True)
class Contribution:
    """What a source adds to the softmax of a batch.

    Attributes:
      logits: [B, n] float32, one column for each negative, or one for a whole set of them: its log
        partition. `ops.contrastive.NOT_A_CANDIDATE` stands for no negative.
      pending: whatever the source wants to be given again at the end of the step.

    Raises:
      ValueError: if `logits` are something else.

    Examples:
      >>> Contribution(tf.zeros([64, 1])).pending is None
      True
    """

    logits: tf.Tensor
    pending: Any = None

    def __post_init__(self) -> None:
        logits = tf.convert_to_tensor(self.logits)
        if logits.shape.rank not in (2, None) or logits.dtype != tf.float32:
            raise ValueError(
                "The logits of a source of negatives must be float32 of shape [batch, negatives]."
                f" Received dtype {logits.dtype.name}, shape {logits.shape}."
            )


class Negatives(keras.layers.Layer):
    """A source of negatives for `Retrieval`. Subclass it to add your own.

    The loss of a query is -s⁺ + log(exp s⁺ + Σ exp s⁻), and a source brings some of the s⁻. Only
    `logits` must be written. A source that keeps something, such as a memory that a step changes,
    writes `end_step` too. Variables and metrics that it assigns to attributes are found by Keras,
    as those of every layer; `get_config` describes the source in `.keras` files.

    One object belongs to one task. Embeddings are scored in float32, whatever the policy is.

    `encode` calls the task's tower, and `Batch.own_logits` scores what it returns.
    `examples/own_negatives.py` is a source with state, a metric and a file to read.

    Args:
      **kwargs: of the layer. A `name` that is given is put before those of the source's metrics in
        the logs. Of several caches without one, the names of their classes are.

    Examples:
      >>> class Zeros(Negatives):
      ...     '''One negative that scores zero with every query.'''
      ...
      ...     def logits(self, batch, training):
      ...         return Contribution(tf.zeros([batch.num_queries, 1]))
    """

    # Whether the negatives are a sample in which the positive stands too, as it does in a batch.
    # TF-Recommenders then corrects the positive's logit by log Q as well.
    includes_positive = False
    # Whether the source has `batch.explicit` among its negatives.
    takes_explicit = False
    # Whether the source is a cache, whose logs have fixed names, and which may hold millions.
    is_cache = False
    # Whether the source encodes candidates, of which the logs then count `num_encoded`.
    encodes_candidates = False

    def __init__(self, **kwargs: Any):
        # Of another dtype, Keras 3 would let metrics count in half precision.
        super().__init__(**{"autocast": False, "dtype": "float32", **kwargs})
        # A namespace is nothing that Keras or TensorFlow track by themselves: what belongs to the
        # task must be found there only.
        self._bound = types.SimpleNamespace(task=None, prefix="")
        self.built = True

    def logits(self, batch: Batch, training: bool) -> Contribution:
        """What the source adds to the softmax.

        Args:
          batch: checked; its queries are divided by the temperature.
          training: whether this is a training step, which alone may change anything.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `logits`.")

    def end_step(self, batch: Batch, contribution: Contribution) -> tf.Tensor | None:
        """Ends a training step: writes what is to be written.

        Args:
          batch: that of `logits`.
          contribution: what `logits` has returned.

        Returns:
          A scalar loss of the source's own, whose gradient is added to that of the task's while the
          value is not; None if there is none.
        """
        del batch, contribution
        return None

    call = StateLayer.call

    def get_task(self) -> Retrieval:
        """The task that the source belongs to.

        A method, since Keras follows properties when it writes a file, and would go in a circle.
        """
        if self._bound.task is None:
            raise ValueError(f"{self.name!r} is not one of the `negatives` of a task yet.")
        return self._bound.task

    @property
    def log_prefix(self) -> str:
        """What the names of the source's logs begin with."""
        return self._bound.prefix

    def bind(self, task: Retrieval, prefix: str) -> None:
        """Makes the source one of `task`; called by the task when it is made.

        Args:
          task: has its arguments as attributes.
          prefix: what the source's logs begin with.

        Raises:
          ValueError: if the source has another task, or an option of the task does not go with it.
        """
        if self._bound.task is not None:
            raise ValueError(
                "A source of negatives belongs to one task: make another one. Received:"
                f" {self.name!r}, which is in the task {self._bound.task.name!r}."
            )
        self._bound.task = task
        self._bound.prefix = prefix

    def make_metrics(self) -> None:
        """Makes the metrics, whose names begin with `log_prefix`.

        Called by the task when all its sources are bound: of a task that cannot be made, nothing is
        to be logged.
        """

    def release(self, task: Retrieval) -> None:
        """Undoes `bind`, if it was to `task`; called by the task if it cannot be made."""
        if self._bound.task is task:
            self._bound.task = None

    def encode(self, features: Any, training: bool = False) -> tf.Tensor:
        """[n, d] float32, candidates encoded by the task's tower, with gradient.

        What the tower adds to the loss, such as an activity regularizer, counts for the batch's own
        candidates only.

        Args:
          features: of n candidates, as the tower takes them.
          training: whether the tower trains.
        """
        with kept_losses(self._tower):
            return tf.cast(_towers.embed(self._tower, features, training), tf.float32)

    @property
    def _tower(self) -> Callable[..., tf.Tensor]:
        return self.get_task().candidate_network

    def build_cache(self, embedding_dim: int) -> None:
        """Makes what needs to know d, or checks it; called before the first `logits`."""
        del embedding_dim

    def num_stream_draws(self, num_candidates: tf.Tensor) -> tf.Tensor | None:
        """Scalar float32, how many of the negatives are draws from the training stream.

        The log Q correction needs it. None if the source is no sample of the stream.

        Args:
          num_candidates: scalar int32, N, the candidates of the batch.
        """
        del num_candidates
        return None

    @property
    def is_of_stream(self) -> bool:
        """Whether the negatives are draws from the training stream, see `num_stream_draws`."""
        return type(self).num_stream_draws is not Negatives.num_stream_draws

    @property
    def training_metrics(self) -> Sequence[keras.metrics.Metric]:
        """The metrics that only training steps update."""
        return ()

    @property
    def num_encoded(self) -> tf.Tensor:
        """Scalar int64, how many candidates the source has encoded so far on a replica."""
        return tf.zeros([], tf.int64)


def given_name(layer: keras.layers.Layer) -> str:
    """What tells the logs of a layer that was given a name from those of others: "name_" or ""."""
    # Keras makes words of the class's name in a way of its own.
    letters = re.escape(_words_of(layer).replace("_", ""))
    is_automatic = re.fullmatch(rf"{letters}\d*", layer.name.replace("_", ""))
    return "" if is_automatic else f"{layer.name}_"


def log_prefixes(sources: Sequence[Negatives]) -> list[str]:
    """What the logs of each source begin with.

    That is its name if it was given one. It is nothing for the only cache without, and the name of
    the class for one of several, counted from the second of a class on.
    """
    prefixes = [given_name(source) for source in sources]
    unnamed = [i for i, source in enumerate(sources) if source.is_cache and not prefixes[i]]
    if len(unnamed) > 1:
        seen: Counter[str] = Counter()
        for i in unnamed:
            words = _words_of(sources[i])
            seen[words] += 1
            prefixes[i] = f"{words}_" if seen[words] == 1 else f"{words}_{seen[words]}_"
    return prefixes


def _words_of(layer: keras.layers.Layer) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(layer).__name__).lower()
