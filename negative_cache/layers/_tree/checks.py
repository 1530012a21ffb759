"""Checks of what a caller hands to a `TreeIndex`."""

import math

import numpy as np
import tensorflow as tf

from negative_cache import _validation

_READ_AT_ONCE = 2**16
# Of the squares of longer embeddings, sums are not finite any more.
_LONGEST_SQUARED = 1e30


def check_residual_bytes(residual_bytes: int, dim: int) -> None:
    """Checks that embeddings [d] can be divided into as many parts."""
    if residual_bytes and dim % residual_bytes:
        raise ValueError(
            "`residual_bytes` must divide `embedding_dim`. Received: residual_bytes ="
            f" {residual_bytes} and embedding_dim = {dim}."
        )


def check_dtype(dtype: str | tf.DType) -> tf.DType:
    """Returns the dtype of stored embeddings."""
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
    """Returns `embeddings` [rows, d]: floats, as an array if they are one, else as a tensor."""
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
    """Returns `queries` [B, d] as float32, divided by the temperature; no gradient comes back."""
    queries = check_embeddings(queries, dim, "query_embeddings")
    queries = tf.ensure_shape(tf.cast(queries, tf.float32), [None, dim])
    queries = tf.stop_gradient(queries)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: {temperature}.")
    return queries if temperature is None else queries / temperature


def check_corpus(embeddings: np.ndarray | tf.Tensor, capacity: int, dim: int) -> np.ndarray:
    """Returns `embeddings` [n, d] as an array of no more rows than there is room for."""
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
    """Returns indices [m] as int32 and their mask [m]; -1 or N for those that are out of range.

    Outside of a `tf.function` their values are checked too.
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
    """[n] bool, which of [n, d] are finite and not so long that their squares are not."""
    # What is NaN is not smaller either.
    return tf.reduce_sum(embeddings**2, axis=1) < _LONGEST_SQUARED


def usable_rows(embeddings: np.ndarray, dtype: tf.DType) -> tuple[np.ndarray, float]:
    """The rows [n] that are usable as `dtype` stores them, and the largest norm of one."""
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
