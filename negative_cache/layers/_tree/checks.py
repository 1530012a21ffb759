"""Checks of the arguments of a `TreeIndex`."""

import math

import numpy as np
import tensorflow as tf

from negative_cache import _validation

_READ_AT_ONCE = 2**16
# The largest squared length of an embedding: sums of larger squares overflow float32.
_LONGEST_SQUARED = 1e30


def check_residual_bytes(residual_bytes: int, dim: int) -> None:
    """Checks that `residual_bytes` divides `dim`, so that there is one byte per part."""
    if residual_bytes and dim % residual_bytes:
        raise ValueError(
            "`residual_bytes` must divide `embedding_dim`. Received: residual_bytes ="
            f" {residual_bytes} and embedding_dim = {dim}."
        )


def check_dtype(dtype: str | tf.DType) -> tf.DType:
    """Checks the dtype of stored embeddings, and returns it."""
    try:
        received = tf.as_dtype(dtype)
    except TypeError:
        received = None
    if received not in (tf.float32, tf.bfloat16, tf.float16):
        raise ValueError(
            f"`embedding_dtype` must be float32, bfloat16 or float16. Received: {dtype!r}."
        )
    return received


def check_embeddings(
    embeddings: np.ndarray | tf.Tensor, dim: int, name: str
) -> np.ndarray | tf.Tensor:
    """Checks `embeddings` [rows, d] float. Returns an array as it is, anything else as a tensor."""
    if not isinstance(embeddings, np.ndarray):
        embeddings = tf.convert_to_tensor(embeddings)
    shape = tf.TensorShape(embeddings.shape)
    if not shape.is_compatible_with([None, dim]):
        raise ValueError(f"`{name}` must have shape [rows, {dim}]. Received shape: {shape}.")
    dtype = tf.as_dtype(embeddings.dtype)
    if not dtype.is_floating:
        raise ValueError(f"`{name}` must be floating point. Received dtype: {dtype.name}.")
    return embeddings


def scaled_queries(
    queries: tf.Tensor, temperature: float | tf.Tensor | None, dim: int
) -> tf.Tensor:
    """Returns `queries` [B, d] as float32, divided by the temperature, without gradient."""
    queries = check_embeddings(queries, dim, "query_embeddings")
    queries = tf.ensure_shape(tf.cast(queries, tf.float32), [None, dim])
    queries = tf.stop_gradient(queries)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: {temperature}.")
    return queries if temperature is None else queries / temperature


def check_corpus(embeddings: np.ndarray | tf.Tensor, capacity: int, dim: int) -> np.ndarray:
    """Checks `embeddings` [n, d] with n <= `capacity`, and returns them as an array."""
    if not isinstance(embeddings, np.ndarray):
        embeddings = tf.convert_to_tensor(embeddings).numpy()
    embeddings = check_embeddings(embeddings, dim, "embeddings")
    if len(embeddings) > capacity:
        raise ValueError(
            "`embeddings` must have no more rows than `capacity`. Received:"
            f" {len(embeddings)} rows for a capacity of {capacity}."
        )
    return embeddings


def check_indices(
    indices: tf.Tensor, like: tf.Tensor, mask: tf.Tensor | None, capacity: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Checks the indices of an update. Outside a `tf.function` it checks their values too.

    Args:
      indices: [m] int, the candidates.
      like: [m, ...], the tensor that they belong to.
      mask: [m] bool, or None.
      capacity: N.

    Returns:
      indices: [m] int32; -1 or N if out of range.
      mask: [m] bool.
    """
    indices = _validation.check_indices(indices, like, what="indices", needed_by="embeddings")
    mask = _validation.check_mask(mask, like, what="mask")
    if tf.executing_eagerly():
        given = indices.numpy()[mask.numpy()]
        outside = given[(given < 0) | (given >= capacity)]
        if outside.size:
            raise ValueError(f"`indices` must lie in [0, {capacity}). Received: {outside[0]}.")
        numbers, counts = np.unique(given, return_counts=True)
        if np.any(counts > 1):
            raise ValueError(
                "`indices` must differ from each other. Received more than once:"
                f" {numbers[counts > 1][0]}."
            )
    return tf.cast(tf.clip_by_value(indices, -1, capacity), tf.int32), mask


def is_usable(embeddings: tf.Tensor) -> tf.Tensor:
    """[n] bool, whether each of `embeddings` [n, d] is finite and not too long."""
    # False for NaN.
    return tf.reduce_sum(embeddings**2, axis=1) < _LONGEST_SQUARED


def usable_rows(embeddings: np.ndarray, dtype: tf.DType) -> tuple[np.ndarray, float]:
    """The rows of `embeddings` that are finite and not too long when they are stored as `dtype`.

    Returns:
      The numbers of the rows, int64, and the largest norm of these rows.
    """
    usable, longest = [np.zeros([0], np.int64)], 0.0
    for start in range(0, len(embeddings), _READ_AT_ONCE):
        rows = np.asarray(embeddings[start : start + _READ_AT_ONCE], np.float32)
        with np.errstate(all="ignore"):
            rows = rows.astype(dtype.as_numpy_dtype).astype(np.float32)
            squares = np.einsum("nd,nd->n", rows, rows)
            is_some = squares < _LONGEST_SQUARED
        usable.append(start + np.flatnonzero(is_some))
        longest = max(longest, float(squares[is_some].max(initial=0.0)))
    return np.concatenate(usable), math.sqrt(longest) * (1.0 + 1e-5)
