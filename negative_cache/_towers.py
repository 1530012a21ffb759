"""How a tower is called, compiled, and known again after training.

A tower is a layer, a model or a function, features of n queries or candidates -> embeddings [n, d].

* `embed` calls it, in training or not.
* `compile_tower` makes a `tf.function` of it, in inference mode; `Encoder` embeds datasets with it.
* `Towers` has both towers of a model, and a checksum of their weights.
"""

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

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
    """Calls a tower, and checks that it returns embeddings [n, dim], dim known while tracing."""
    embeddings = _call(network, features, training)
    if embeddings.shape.rank is None or embeddings.shape[1] is None:
        raise _wrong_embeddings(network, embeddings.shape)
    return embeddings


def compile_tower(
    network: Tower, input_signature: Sequence[Specs] | None = None
) -> tf.types.experimental.PolymorphicFunction:
    """A tower as a `tf.function` in inference mode, features -> [n, dim]; dim may be unknown.

    Args:
      network: the tower.
      input_signature: the specs of the features, in a list; or None for any.
    """
    return tf.function(
        lambda features: _call(network, features, training=False),
        input_signature=input_signature,
        reduce_retracing=True,
    )


class Encoder:
    """Embeds datasets with a network in inference mode, compiled once."""

    def __init__(self, network: Tower):
        self._network = network
        self._compiled = compile_tower(network)
        self._is_traced = False

    def embed(self, features: Features) -> np.ndarray:
        """Embeds one batch of features: [n, d] float32."""
        return self.embed_tensor(features).numpy()

    def embed_tensor(self, features: Features) -> tf.Tensor:
        """The same as a tensor."""
        if not self._is_traced:
            self._trace(features)
        embeddings = self._compiled(features)
        if embeddings.shape.rank != 2:
            raise _wrong_embeddings(self._network, embeddings.shape)
        return tf.cast(embeddings, tf.float32)

    def output_dim(self, example: Features) -> int:
        """The embedding dimension, which `example`, a batch of features, is traced for."""
        is_unbuilt = isinstance(self._network, keras.layers.Layer) and not self._network.built
        if is_unbuilt and tf.distribute.has_strategy():
            # Variables of replicas that are first made in a graph cannot be lifted out of it.
            embed(self._network, example, training=False)
        shape = self._trace(example).output_shapes
        if shape.rank is None or shape[1] is None:
            raise _wrong_embeddings(self._network, shape)
        return shape[1]

    def _trace(self, features: Features) -> tf.types.experimental.ConcreteFunction:
        """Traces the network once for batches of any size: the last one is smaller."""
        self._is_traced = True
        return self._compiled.get_concrete_function(_features.specs_of_any_size(features))

    def __call__(
        self, batches: Iterable[Features], after_batch: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Embeds all `batches` of features: [n, d] float32.

        `after_batch(i)` is called after the i-th batch, counted from 1.
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
    """The query and the candidate network of a model, or of the pair of both."""
    if isinstance(model, (tuple, list)):
        networks = tuple(model)
    else:
        networks = tuple(getattr(model, f"{side}_network", None) for side in ("query", "candidate"))
    if len(networks) != 2 or not all(callable(network) for network in networks):
        raise ValueError(
            "A model must have `query_network` and `candidate_network`, or be the pair of both, as"
            f" `(model.query_model, model.candidate_model)` is. Received: {model!r}."
        )
    return networks


def encoders_of(model: TowerPair) -> tuple[Encoder, Encoder]:
    """The encoders of queries and of candidates, of what `networks_of` takes.

    A pair may hold encoders already, which are then compiled once for many evaluations.
    """
    query, candidate = (
        network if isinstance(network, Encoder) else Encoder(network)
        for network in networks_of(model)
    )
    return query, candidate


class Towers:
    """Query and candidate network of a model, in inference mode, compiled once.

    Args:
      model: has `query_network` and `candidate_network`, or is the pair of both; then the strategy
        is that of the scope in which this is made.
      batch_size: features embedded at a time.
    """

    def __init__(self, model: TowerPair, batch_size: int):
        self._batch_size = batch_size
        self._strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
        self._networks = networks_of(model)
        self._encoders = dict(zip(("query", "candidate"), encoders_of(model)))
        self._is_built = False

    def build(self, pairs: Mapping[str, Features]) -> None:
        """Makes the variables of towers that have seen no features yet."""
        if not self._is_built:
            with self._strategy.scope():
                for side, network in zip(("query", "candidate"), self._networks):
                    first = _features.take(pairs[side], np.zeros([1], np.int64))
                    embed(network, first, training=False)
            self._is_built = True

    def embed(
        self, pairs: Mapping[str, Features], num_pairs: int, verbose: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[N, d] float32 embeddings of the queries and of the candidates."""
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
        """A checksum of each weight that is trained."""
        return [
            zlib.crc32(tf.convert_to_tensor(weight).numpy().tobytes())
            for network in self._networks
            for weight in getattr(network, "trainable_variables", ())
        ]

    def have_changed(self, since: list[int] | None) -> bool:
        """Whether the towers are not those of an earlier `fingerprint()`; True if there is none."""
        return differ(self.fingerprint(), since)


def differ(fingerprint: list[int], other: list[int] | None) -> bool:
    """Whether `Towers.fingerprint()` of two times differ; without weights it is taken so."""
    return not fingerprint or fingerprint != other


def known_output_dim(network: Tower) -> int | None:
    """The embedding dimension of a tower whose output shape is known before it runs, else None."""
    outputs = getattr(network, "outputs", None)
    if not outputs or outputs[0].shape is None:
        return None
    if isinstance(network, keras.Sequential) and len(outputs[0].shape) != 2:
        # Keras 2 assumes that an `Embedding` which comes first is given sequences.
        return None
    if len(outputs) != 1 or len(outputs[0].shape) != 2:
        raise ValueError(
            "`candidate_network` must return one tensor of embeddings of shape [n, dim]. Received"
            f" outputs of shapes: {[tuple(output.shape) for output in outputs]}."
        )
    return outputs[0].shape[-1]


def _call(network: Tower, features: Features, training: bool | None) -> tf.Tensor:
    """What a tower returns, if it may be one tensor [n, dim]."""
    kwargs = {"training": training} if _can_be_told(network, training) else {}
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


def _can_be_told(network: Tower, training: bool | None) -> bool:
    """Whether a tower is given `training`."""
    if isinstance(network, keras.layers.Layer) and training is not None:
        # Keras hands it on to the layers inside of one that has no such argument. Otherwise they
        # would do as the layers around the tower do.
        return True
    try:
        function = network.call if isinstance(network, keras.layers.Layer) else network
        return "training" in inspect.signature(function).parameters
    except ValueError:  # Some builtins have no signature.
        return False


def _inputs_of(network: Tower, features: Features) -> Features | list[Values]:
    """What of `features` a tower takes: a functional model says what its inputs are.

    Keras 3 would flatten a dictionary of more features by their sorted names, and take the first.
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
