"""The values of state variables as arrays that HDF5 can hold: it knows no strings of any bytes."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from negative_cache.layers._variables import StateVariable

# At the end of the name of an array of the lengths of strings, which stand together in another.
LENGTHS = "_lengths"


def to_arrays(variable: StateVariable) -> dict[str, np.ndarray]:
    """Suffix of a name -> an array that HDF5 can hold."""
    value = variable.numpy()
    if variable.dtype == tf.bfloat16:
        return {"": value.view(np.uint16)}
    if variable.dtype == tf.string:
        flat = value.ravel().tolist()
        lengths = np.array([len(text) for text in flat], np.int64)
        return {"": to_bytes(b"".join(flat)), LENGTHS: lengths}
    return {"": value}


def from_arrays(arrays: Mapping[str, np.ndarray], like: StateVariable) -> np.ndarray | tf.Tensor:
    """The inverse of `to_arrays`."""
    value = arrays[""]
    if like.dtype == tf.bfloat16:
        return value.view(tf.bfloat16.as_numpy_dtype)
    if like.dtype == tf.string:
        blob, ends = value.tobytes(), np.cumsum(arrays[LENGTHS])
        texts = [blob[end - size : end] for end, size in zip(ends, arrays[LENGTHS])]
        shape = [-1, *like.shape[1:]] if like.shape.rank else []
        return tf.reshape(tf.constant(texts, tf.string), shape)
    return value


def to_bytes(value: bytes) -> np.ndarray:
    return np.frombuffer(value, np.uint8)
