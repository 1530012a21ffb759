"""Matrix products in full float32 precision, also if an accelerator rounds factors to TF32."""

import tensorflow as tf

from negative_cache.ops import _execution

# The bits of a float32 that TF32 drops, and half of the last bit that it keeps.
_DROPPED, _HALF = 2**13 - 1, 2**12


def matmul_in_full(a: tf.Tensor, b: tf.Tensor, *, transpose_b: bool = False) -> tf.Tensor:
    """`tf.matmul` of float32 [n, d] and [d, m] without rounding of the factors.

    If products use TF32, each factor is split into the part that TF32 can hold and the rest. The
    sum of three products then has an error of about 2^-22 of the product of the factors' lengths,
    which is that of float32 itself.
    """
    if not _execution.rounds_factors():
        return tf.matmul(a, b, transpose_b=transpose_b)
    (a_most, a_rest), (b_most, b_rest) = _in_two(a), _in_two(b)
    rest = tf.matmul(a_most, b_rest, transpose_b=transpose_b)
    rest += tf.matmul(a_rest, b_most, transpose_b=transpose_b)
    return tf.matmul(a_most, b_most, transpose_b=transpose_b) + rest


def _in_two(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits `values` into their TF32 part and the rest."""
    bits = tf.bitcast(values, tf.uint32) + tf.constant(_HALF, tf.uint32)
    kept = tf.constant(2**32 - 1 - _DROPPED, tf.uint32)
    most = tf.bitcast(tf.bitwise.bitwise_and(bits, kept), tf.float32)
    # The rest of inf or NaN would be NaN.
    most = tf.where(tf.math.is_finite(values), most, values)
    return most, tf.where(tf.math.is_finite(values), values - most, 0.0)
