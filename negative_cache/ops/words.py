"""Tensors of several dtypes as one array of 32-bit words, for one collective operation.

Words of rows that are zero may be added to others without a change of a bit, so that a sum over
replicas, of which one has the row, brings it to all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class RowSpec(NamedTuple):
    """What one row of a tensor is.

    Attributes:
      shape: without the rows, known.
      dtype: no string.
    """

    shape: tuple[int, ...]
    dtype: tf.DType

    @classmethod
    def of(cls, values: tf.Tensor) -> "RowSpec":
        """The spec of the rows of `values` [n, ...]."""
        return cls(tuple(values.shape[1:].as_list()), values.dtype)

    @property
    def num_words(self) -> int:
        """How many words a row takes; numbers of less than 32 bits take one each."""
        count = tf.TensorShape(self.shape).num_elements()
        return count * max(self.dtype.size // 4, 1)


def to_words(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """[n, w] int32, the bits of tensors [n, ...] of one n; exact, NaN included."""
    return tf.concat([_words_of(values) for values in tensors], axis=1)


def from_words(words: tf.Tensor, specs: Sequence[RowSpec]) -> list[tf.Tensor]:
    """The inverse of `to_words`: tensors [n, ...] out of [n, w] int32."""
    parts = tf.split(words, [spec.num_words for spec in specs], axis=1)
    return [_from_words_of(part, spec) for part, spec in zip(parts, specs)]


def _words_of(values: tf.Tensor) -> tf.Tensor:
    spec = RowSpec.of(values)
    if values.dtype == tf.bool:
        values = tf.cast(values, tf.int32)
    elif values.dtype.size < 4:
        values = tf.cast(tf.bitcast(values, _unsigned(values.dtype)), tf.int32)
    elif values.dtype != tf.int32:
        values = tf.bitcast(values, tf.int32)
    return tf.reshape(values, [tf.shape(values)[0], spec.num_words])


def _from_words_of(words: tf.Tensor, spec: RowSpec) -> tf.Tensor:
    size = spec.dtype.size
    shape = [tf.shape(words)[0], *spec.shape]
    values = tf.reshape(words, [*shape, size // 4] if size > 4 else shape)
    if spec.dtype == tf.bool:
        return tf.not_equal(values, 0)
    if size < 4:
        return tf.bitcast(tf.cast(values, _unsigned(spec.dtype)), spec.dtype)
    return values if spec.dtype == tf.int32 else tf.bitcast(values, spec.dtype)


def _unsigned(dtype: tf.DType) -> tf.DType:
    return tf.uint8 if dtype.size == 1 else tf.uint16


def to_bytes(strings: tf.Tensor, num_words: tf.Tensor) -> tf.Tensor:
    """[n, k] int32, the bytes of `strings` [n] of at most 4k bytes, padded with zeros.

    Args:
      strings: [n] string.
      num_words: scalar int32, k.
    """
    return tf.io.decode_raw(strings, tf.int32, fixed_length=4 * num_words)


def from_bytes(words: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """[n] string, the inverse of `to_bytes`, for strings of `lengths` [n] int32."""
    codes = tf.cast(tf.bitcast(words, tf.uint8), tf.int32)
    characters = tf.gather(tf.constant([bytes([code]) for code in range(256)]), codes)
    joined = tf.strings.reduce_join(tf.reshape(characters, [tf.shape(words)[0], -1]), axis=-1)
    return tf.strings.substr(joined, tf.zeros_like(lengths), lengths)
