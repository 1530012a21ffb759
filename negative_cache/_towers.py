"""Towers: how they are called and compiled, and how a change of their weights is found.

A tower is a layer, a model or a function: features of n queries or candidates -> embeddings [n, d].

* `embed` calls a tower, in training or in inference mode.
* `compile_tower` makes it a `tf.function` in inference mode.
* `Encoder` embeds whole datasets with a compiled tower.
* `Towers` holds both towers of a model, and computes checksums of their weights.
"""

import contextlib
import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache import _features
from negative_cache._compat import keras
from negative_cache._features import Features, Specs, Values

# Features of n queries or candidates -> [n, dim].
Tower: TypeAlias = Callable[..., tf.Tensor]
# A model with `query_network` and `candidate_network`, or the pair of both.
TowerPair: TypeAlias = keras.Model | Sequence[Tower]


def embed(network: Tower, features: Features, training: bool | None) -> tf.Tensor:
    """Calls a tower and checks that it returns embeddings [n, dim] with a static dim."""
    embeddings = _call(network, features, training)
    if embeddings.shape.rank is None or embeddings.shape[1] is None:
        raise _wrong_embeddings(network, embeddings.shape)
    return embeddings


def compile_tower(
    network: Tower, input_signature: Sequence[Specs] | None = None
) -> tf.types.experimental.PolymorphicFunction:
    """Makes a tower a `tf.function` in inference mode.

    Args:
      network: the tower.
      input_signature: the specs of the features in a list of one. If None, the function takes any
        features.

    Returns:
      A function of features that returns embeddings [n, dim], where dim may be unknown.
    """
    return tf.function(
        lambda features: _call(network, features, training=False),
        input_signature=input_signature,
        reduce_retracing=True,
    )


class Encoder:
    """Embeds datasets with a tower in inference mode, which is compiled once.

    Attributes:
      network: the tower.
    """

    def __init__(self, network: Tower):
        self.network = network
        self._compiled = compile_tower(network)
        self._is_traced = False
        self._on_replicas: tuple[tf.distribute.Strategy, Callable] | None = None

    def embed(self, features: Features) -> np.ndarray:
        """Embeds one batch of features: [n, d] float32."""
        return self.embed_tensor(features).numpy()

    def embed_tensor(self, features: Features) -> tf.Tensor:
        """Embeds one batch of features: a tensor [n, d] float32."""
        _features.check_batched(features)
        if not self._is_traced:
            self._trace(features)
        embeddings = self._compiled(features)
        if embeddings.shape.rank != 2:
            raise _wrong_embeddings(self.network, embeddings.shape)
        return tf.cast(embeddings, tf.float32)

    def embed_on(self, strategy: tf.distribute.Strategy) -> Callable[[Any], Any]:
        """Returns what embeds a batch on each replica; compiled once, and kept by this encoder."""
        if self._on_replicas is None or self._on_replicas[0] is not strategy:
            compiled = tf.function(
                lambda features: strategy.run(self.embed_tensor, (features,)),
                reduce_retracing=True,
            )
            self._on_replicas = (strategy, compiled)
        return self._on_replicas[1]

    def build(self, example: Features) -> None:
        """Creates the variables of a tower of replicas that was not called yet.

        They cannot be lifted out of a graph that creates them.
        """
        is_unbuilt = isinstance(self.network, keras.layers.Layer) and not self.network.built
        if is_unbuilt and tf.distribute.has_strategy():
            embed(self.network, example, training=False)

    def output_dim(self, example: Features) -> int:
        """Returns the embedding dimension of the tower, traced with `example`, a batch."""
        self.build(example)
        shape = self._trace(example).output_shapes
        if shape.rank is None or shape[1] is None:
            raise _wrong_embeddings(self.network, shape)
        return shape[1]

    def _trace(self, features: Features) -> tf.types.experimental.ConcreteFunction:
        """Traces the tower for batches of any size, because the last batch may be smaller."""
        self._is_traced = True
        return self._compiled.get_concrete_function(_features.specs_of_any_size(features))

    def __call__(
        self, batches: Iterable[Features], after_batch: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Embeds all `batches` of features: [n, d] float32.

        Args:
          batches: batches of features.
          after_batch: called after each batch with the number of batches so far.

        Raises:
          ValueError: if there are no batches.
        """
        embeddings = []
        for step, features in enumerate(batches):
            embeddings.append(self.embed(features))
            if after_batch is not None:
                after_batch(step + 1)
        if not embeddings:
            raise ValueError("The dataset to embed is empty.")
        return np.concatenate(embeddings)


def networks_of(model: TowerPair) -> tuple[Tower, Tower]:
    """Returns the query network and the candidate network of a model or of a pair.

    Raises:
      ValueError: if `model` has no such networks and is no pair of functions.
    """
    if isinstance(model, (tuple, list)):
        networks = tuple(model)
    else:
        networks = tuple(getattr(model, f"{side}_network", None) for side in ("query", "candidate"))
    if len(networks) != 2 or not all(callable(network) for network in networks):
        raise ValueError(
            "A model must have `query_network` and `candidate_network`, or be a pair of networks,"
            f" such as `(model.query_model, model.candidate_model)`. Received: {model!r}."
        )
    return networks


def encoders_of(model: TowerPair) -> tuple[Encoder, Encoder]:
    """Returns the encoders of queries and of candidates of a model or of a pair.

    A pair may already hold encoders. Then they are compiled once for many evaluations.
    """
    query, candidate = (
        network if isinstance(network, Encoder) else Encoder(network)
        for network in networks_of(model)
    )
    return query, candidate


def scope_of(model: TowerPair) -> contextlib.AbstractContextManager:
    """Returns the scope of the strategy of several replicas that a model belongs to, if any."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return contextlib.nullcontext()
    return strategy.scope()


class Towers:
    """Both towers of a model in inference mode, compiled once.

    Args:
      model: a model with `query_network` and `candidate_network`, or the pair of both. A pair
        belongs to the distribution strategy in whose scope this object is created.
      batch_size: the number of rows that are embedded at a time.
    """

    def __init__(self, model: TowerPair, batch_size: int):
        self._batch_size = batch_size
        self._strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
        self._networks = networks_of(model)
        self._encoders = dict(zip(("query", "candidate"), encoders_of(model)))
        self._is_built = False

    def build(self, pairs: Mapping[str, Features]) -> None:
        """Creates the variables of towers that have not been called yet."""
        if not self._is_built:
            with self._strategy.scope():
                for side, network in zip(("query", "candidate"), self._networks):
                    first = _features.take(pairs[side], np.zeros([1], np.int64))
                    embed(network, first, training=False)
            self._is_built = True

    def embed(
        self, pairs: Mapping[str, Features], num_pairs: int, verbose: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeds all pairs.

        Args:
          pairs: features of N pairs, as "query" and "candidate".
          num_pairs: N.
          verbose: 1 shows a progress bar.

        Returns:
          [N, d] float32 embeddings of the queries, and of the candidates.
        """
        starts = range(0, num_pairs, self._batch_size)
        bar = None
        if verbose:
            bar = keras.utils.Progbar(2 * len(starts), unit_name="batch")

        def batches(side: str) -> Iterator[Features]:
            for start in starts:
                rows = np.arange(start, min(start + self._batch_size, num_pairs))
                yield _features.take(pairs[side], rows)

        with self._strategy.scope():
            queries, candidates = (
                encoder(batches(side), None if bar is None else lambda _: bar.add(1))
                for side, encoder in self._encoders.items()
            )
        return queries, candidates

    def fingerprint(self) -> list[int]:
        """Returns a checksum of each trainable weight."""
        return [
            zlib.crc32(tf.convert_to_tensor(weight).numpy().tobytes())
            for network in self._networks
            for weight in getattr(network, "trainable_variables", ())
        ]

    def have_changed(self, since: list[int] | None) -> bool:
        """Whether the weights differ from those of an earlier `fingerprint()`.

        True if `since` is None, or if the towers have no weights to compare.
        """
        return weights_differ(self.fingerprint(), since)


def weights_differ(fingerprint: list[int], other: list[int] | None) -> bool:
    """Whether two fingerprints of towers differ. Towers without weights always count as changed."""
    return not fingerprint or fingerprint != other


def known_output_dim(network: Tower) -> int | None:
    """Returns the embedding dimension if it is known before a call of the tower, else None.

    Raises:
      ValueError: if the tower does not return one tensor [n, dim].
    """
    outputs = getattr(network, "outputs", None)
    if not outputs or outputs[0].shape is None:
        return None
    if isinstance(network, keras.Sequential) and len(outputs[0].shape) != 2:
        # Keras 2 assumes that the input of a first `Embedding` layer is a sequence.
        return None
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        raise ValueError(
            "`candidate_network` must return one tensor of embeddings of shape [n, dim]. Received"
            f" outputs of shapes: {[tuple(output.shape) for output in outputs]}."
        )
    return outputs[0].shape[-1]


def _call(network: Tower, features: Features, training: bool | None) -> tf.Tensor:
    """Calls a tower and checks that its output can be one tensor [n, dim]."""
    _features.check_batched(features)
    kwargs = {"training": training} if _takes_training(network, training) else {}
    embeddings = network(_inputs_of(network, features), **kwargs)
    shape = getattr(embeddings, "shape", None)
    if shape is None or tf.TensorShape(shape).rank not in (2, None):
        raise _wrong_embeddings(network, shape if shape is not None else type(embeddings).__name__)
    return tf.convert_to_tensor(embeddings)


def _wrong_embeddings(network: Tower, received: object) -> ValueError:
    name = getattr(network, "name", None) or getattr(network, "__name__", network)
    return ValueError(
        "A tower must return one tensor of embeddings of shape [n, dim]. Received from"
        f" {name!r}: {received}."
    )


def _takes_training(network: Tower, training: bool | None) -> bool:
    """Whether a tower is called with the argument `training`."""
    if isinstance(network, keras.layers.Layer) and training is not None:
        # Keras passes it on to the layers inside, even if the tower's `call` has no such argument.
        # Without it they would take the mode of the layers around the tower.
        return True
    try:
        function = network.call if isinstance(network, keras.layers.Layer) else network
        return "training" in inspect.signature(function).parameters
    except ValueError:  # Some builtins have no signature.
        return False


def _inputs_of(network: Tower, features: Features) -> Features | list[Values]:
    """Selects the features that a tower takes, which a functional model lists as its inputs.

    Given a dictionary with more features, Keras 3 would sort them by name and take the first ones.
    """
    if not isinstance(network, keras.Model) or not isinstance(features, Mapping):
        return features
    inputs = getattr(network, "inputs", None)
    if not inputs:
        return features
    structure = network.input
    if isinstance(structure, Mapping):
        return {key: features[key] for key in structure if key in features}
    names = getattr(network, "input_names", None) or [tensor.name for tensor in inputs]
    if not set(names) <= set(features):
        return features
    found = [features[name] for name in names]
    return found if isinstance(structure, list | tuple) else found[0]
