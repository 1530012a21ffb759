"""Products in all digits of float32, also where an accelerator rounds their factors."""

import tensorflow as tf

from negative_cache.ops import _execution

# The digits of a float32 that TF32 does not have, and a half of its last one.
_DROPPED, _HALF = 2**13 - 1, 2**12


def matmul_in_full(a: tf.Tensor, b: tf.Tensor, *, transpose_b: bool = False) -> tf.Tensor:
    """`tf.matmul` of float32 [n, d] and [d, m] whose factors are not rounded.

    Where products are those of TF32, each factor is taken apart into what TF32 holds and the rest.
    Three products then miss 2^-22 of the factors' lengths or so, as float32 itself does.
    """
    if not _execution.rounds_factors():
        return tf.matmul(a, b, transpose_b=transpose_b)
    (a_most, a_rest), (b_most, b_rest) = _in_two(a), _in_two(b)
    rest = tf.matmul(a_most, b_rest, transpose_b=transpose_b)
    rest += tf.matmul(a_rest, b_most, transpose_b=transpose_b)
    return tf.matmul(a_most, b_most, transpose_b=transpose_b) + rest


def _in_two(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    bits = tf.bitcast(values, tf.uint32) + tf.constant(_HALF, tf.uint32)
    kept = tf.constant(2**32 - 1 - _DROPPED, tf.uint32)
    most = tf.bitcast(tf.bitwise.bitwise_and(bits, kept), tf.float32)
    # What is not a number has no rest.
    most = tf.where(tf.math.is_finite(values), most, values)
    return most, tf.where(tf.math.is_finite(values), values - most, 0.0)
