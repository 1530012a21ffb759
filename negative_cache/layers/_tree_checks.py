"""Checks of what a caller hands to a `TreeIndex`."""

import numpy as np
import tensorflow as tf

from negative_cache import _validation

_READ_AT_ONCE = 2**16


def check_storage(index) -> None:
    """Checks that the settings of a `TreeIndex` fit each other."""
    if not index.embedding_dtype.is_floating:
        raise ValueError(
            f"`embedding_dtype` must be floating point. Received: {index.embedding_dtype.name}."
        )
    has_codes = not index.store_embeddings and index.residual_bytes
    if has_codes and index.embedding_dim % index.residual_bytes:
        raise ValueError(
            "`residual_bytes` must divide `embedding_dim`. Received: residual_bytes ="
            f" {index.residual_bytes} and embedding_dim = {index.embedding_dim}."
        )


def check_embeddings(index, embeddings, name: str) -> None:
    """Checks that `embeddings` are [rows, d] floats."""
    shape = tf.TensorShape(embeddings.shape)
    if not shape.is_compatible_with([None, index.embedding_dim]):
        raise ValueError(
            f"`{name}` must have shape [rows, {index.embedding_dim}]. Received shape: {shape}."
        )
    dtype = tf.as_dtype(embeddings.dtype)
    if not dtype.is_floating:
        raise ValueError(f"`{name}` must be floating point. Received dtype: {dtype.name}.")


def check_indices(index, indices, like, mask) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns indices [m] as int32 and their mask [m]; -1 or N for those that are out of range.

    Outside of a `tf.function` their values are checked too.
    """
    indices = _validation.check_indices(indices, like, what="indices", needed_by="embeddings")
    mask = _validation.check_mask(mask, like, what="mask")
    if tf.executing_eagerly():
        given = indices.numpy()[mask.numpy()]
        outside = given[(given < 0) | (given >= index.capacity)]
        if outside.size:
            raise ValueError(
                f"`indices` must lie in [0, {index.capacity}). Received: {outside[0]}."
            )
        numbers, counts = np.unique(given, return_counts=True)
        if np.any(counts > 1):
            raise ValueError(
                "`indices` must differ from each other. Received more than once:"
                f" {numbers[counts > 1][0]}."
            )
    return tf.cast(tf.clip_by_value(indices, -1, index.capacity), tf.int32), mask


def finite_rows(embeddings) -> tuple[np.ndarray, float]:
    """The rows [n] that are finite, and the largest norm of one; a block at a time."""
    finite, longest = [np.zeros([0], np.int64)], 0.0
    for start in range(0, len(embeddings), _READ_AT_ONCE):
        rows = np.asarray(embeddings[start : start + _READ_AT_ONCE], np.float32)
        is_finite = np.isfinite(rows).all(axis=1)
        finite.append(start + np.flatnonzero(is_finite))
        norms = np.linalg.norm(rows[is_finite], axis=1)
        longest = max(longest, float(norms.max(initial=0.0)))
    return np.concatenate(finite), longest
