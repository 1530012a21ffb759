"""Tests of the pieces of the loss at magnitudes that the layers' own tests do not reach."""

import math

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.ops import contrastive


@pytest.mark.parametrize("positive", [30.0, 1000.0, -1000.0])
def test_a_small_loss_is_not_lost_beside_large_logits(positive):
    positives = tf.constant([positive])
    with tf.GradientTape() as tape:
        tape.watch(positives)
        negatives = tf.constant([[positive - 15.0, positive - 16.0, -math.inf]])
        loss = contrastive.softmax_loss(positives, negatives)
    odds = math.exp(-15.0) + math.exp(-16.0)
    # The value to the rounding of 1 + odds, the gradient to that of the odds.
    np.testing.assert_allclose(loss, [math.log1p(odds)], atol=2.0**-23)
    # -(1 - p⁺)
    np.testing.assert_allclose(tape.gradient(loss, positives), [-odds / (1.0 + odds)], rtol=1e-5)


def test_no_negative_gives_a_loss_and_gradients_of_zero():
    positives, negatives = tf.constant([3.0]), tf.constant([[-math.inf, -math.inf]])
    with tf.GradientTape() as tape:
        tape.watch([positives, negatives])
        loss = contrastive.softmax_loss(positives, negatives)
    np.testing.assert_array_equal(loss, [0.0])
    for gradient in tape.gradient(loss, [positives, negatives]):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_a_large_surrogate_leaves_the_value_alone():
    surrogate = tf.constant([1e8])
    with tf.GradientTape() as tape:
        tape.watch(surrogate)
        value = contrastive.value_with_gradient(tf.constant([1.25]), surrogate)
    np.testing.assert_array_equal(value, [1.25])
    np.testing.assert_array_equal(tape.gradient(value, surrogate), [1.0])
