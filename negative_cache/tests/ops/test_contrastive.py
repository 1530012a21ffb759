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


def test_losses_of_one_draw_by_hand():
    # log Ẑ = 1 and s⁺ = 0: p⁺ = 1 / (1 + e); the second query's scores would overflow an exp.
    positives, negatives = tf.constant([0.0, 1000.0]), tf.constant([0.5, 500.0])
    with tf.GradientTape() as tape:
        tape.watch(positives)
        training, interpretable = contrastive.losses_of_one_draw(
            positives, negatives, tf.constant([1.0, 500.0])
        )
    probability = 1.0 / (1.0 + math.e)
    np.testing.assert_allclose(training, [(1.0 - probability) * 0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(interpretable, [-math.log(probability), 0.0], rtol=1e-6)
    # p⁺ is held constant.
    np.testing.assert_allclose(
        tape.gradient(training, positives), [probability - 1.0, 0.0], rtol=1e-6
    )


def test_a_loss_of_no_queries_is_zero_however_it_is_reduced():
    nothing = tf.zeros([0])
    assert contrastive.reduce_or_zero(nothing, tf.math.reduce_mean).numpy() == 0.0
    assert contrastive.reduce_or_zero(nothing, None).shape == [0]
    assert contrastive.reduce_or_zero(tf.constant([1.0, 3.0]), tf.math.reduce_mean).numpy() == 2.0
