"""Multiplicative hashing of ids (Knuth)."""

import tensorflow as tf

# 2^64 over the golden ratio, as a signed number.
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64


def mixed(keys: tf.Tensor) -> tf.Tensor:
    """[n] int64 whose upper bits depend on all bits of `keys` [n] int64.

    Ids are often multiples of a round number, and their lower bits are then all alike.
    """
    # With overflow.
    return keys * tf.constant(_MULTIPLIER, tf.int64)
