"""What a layer can know about a tower that it is given, and how it calls it."""

import inspect
from collections.abc import Callable, Mapping

import tensorflow as tf

from negative_cache._compat import keras


def takes_training(network: Callable[..., tf.Tensor]) -> bool:
    """Whether a layer or function has an argument `training`."""
    function = network.call if isinstance(network, keras.layers.Layer) else network
    try:
        return "training" in inspect.signature(function).parameters
    except ValueError:  # Some builtins have no signature.
        return False


def inputs_of(network: Callable[..., tf.Tensor], features):
    """What of `features` a tower takes: a functional model says what its inputs are.

    Keras 3 would flatten a dictionary of more features by their sorted names, and take the first.
    """
    inputs = getattr(network, "inputs", None) if isinstance(network, keras.Model) else None
    if not inputs or not isinstance(features, Mapping):
        return features
    structure = network.input
    if isinstance(structure, Mapping):
        return {key: features[key] for key in structure if key in features}
    names = getattr(network, "input_names", None) or [tensor.name for tensor in inputs]
    if not set(names) <= set(features):
        return features
    found = [features[name] for name in names]
    return found if isinstance(structure, list | tuple) else found[0]


def embed(network: Callable[..., tf.Tensor], features, training: bool | None) -> tf.Tensor:
    """Calls a tower, and checks that it returns embeddings [n, dim]."""
    kwargs = {"training": training} if takes_training(network) else {}
    embeddings = network(inputs_of(network, features), **kwargs)
    shape = getattr(embeddings, "shape", None)
    if shape is None or len(shape) != 2 or shape[1] is None:
        name = getattr(network, "name", None) or getattr(network, "__name__", network)
        raise ValueError(
            "A tower must return one tensor of embeddings of shape [n, dim]. Received from"
            f" {name!r}: {shape if shape is not None else type(embeddings).__name__}."
        )
    return tf.convert_to_tensor(embeddings)


def known_output_dim(network: Callable[..., tf.Tensor]) -> int | None:
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
