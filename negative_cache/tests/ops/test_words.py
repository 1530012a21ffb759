"""Tests that rows of every dtype go into words and come back to the bit."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.ops import words

NUMBERS = [
    tf.bool,
    tf.int8,
    tf.uint8,
    tf.int16,
    tf.uint16,
    tf.float16,
    tf.bfloat16,
    tf.int32,
    tf.uint32,
    tf.float32,
    tf.int64,
    tf.uint64,
    tf.float64,
]


def bits(shape, dtype, seed):
    """Random bits, which for floats are NaN, infinite and denormal too."""
    values = np.random.default_rng(seed).integers(0, 2**8, [*shape, dtype.size], dtype=np.uint8)
    if dtype == tf.bool:
        return tf.constant(values[..., 0] > 127)
    return tf.constant(values[..., 0]) if dtype == tf.uint8 else tf.bitcast(values, dtype)


def as_bytes(values):
    return np.asarray(values).tobytes()


@pytest.mark.parametrize("is_graph", [False, True])
def test_all_dtypes_at_once(is_graph):
    shapes = [(), (3,), (2, 2)]
    tensors = [bits((4, *shapes[i % 3]), dtype, i) for i, dtype in enumerate(NUMBERS)]
    specs = [words.RowSpec.of(part) for part in tensors]

    def there_and_back(*tensors):
        return words.from_words(words.to_words(tensors), specs)

    found = (tf.function(there_and_back) if is_graph else there_and_back)(*tensors)
    for values, same in zip(tensors, found):
        assert (same.dtype, same.shape) == (values.dtype, values.shape)
        assert as_bytes(same) == as_bytes(values)


def test_zero_words_change_no_bit_of_a_sum():
    values = [bits((5, 2), tf.float32, 1), bits((5,), tf.float16, 2)]
    sent = words.to_words(values)
    np.testing.assert_array_equal(sent + tf.zeros_like(sent), sent)
    # As floats, NaN and denormal numbers might change.
    assert sent.dtype == tf.int32


def test_no_rows():
    values = [tf.zeros([0, 3]), tf.zeros([0], tf.int64)]
    found = words.from_words(words.to_words(values), [words.RowSpec.of(part) for part in values])
    assert [part.shape.as_list() for part in found] == [[0, 3], [0]]


def test_strings():
    strings = tf.constant(["", "a", "négatif", bytes(range(256)), "\0x\0"])
    lengths = tf.strings.length(strings)
    sent = words.to_bytes(strings, tf.constant(65))
    assert sent.shape == [5, 65]
    np.testing.assert_array_equal(words.from_bytes(sent, lengths), strings)
