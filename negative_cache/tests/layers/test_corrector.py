"""Tests of `Corrector`: what it learns, its losses and its learning rate."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import special

from negative_cache._compat import keras
from negative_cache.layers import Corrector
from negative_cache.layers.drift_corrector import cross_entropy, mean_squared_error
from negative_cache.tests.layers.drift_cases import (
    DIM,
    built,
    encoded_of,
    error_of,
    learn,
    points,
    product,
    rotation,
    trained,
)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("drift_loss", ["mse", "both"])
def test_learns_a_rotation(unit, drift_loss):
    corrector = trained(Corrector(64, drift_loss=drift_loss), unit=unit, count=500, steps=300)
    stale = points(100, seed=1, unit=unit)
    fresh = stale @ rotation()
    assert error_of(corrector(stale), fresh) < error_of(stale, fresh) / 5


def test_learns_scores_from_the_cross_entropy():
    queries, stale = points(20, seed=3), points(60)
    encoded = encoded_of(stale, stale @ rotation())
    corrector = built(Corrector(64, drift_loss="cross_entropy"))
    before = cross_entropy(stale, encoded, product(queries))
    learn(corrector, encoded, 200, keras.optimizers.Adam(0.01), queries)
    after = cross_entropy(corrector(stale), encoded, product(queries))
    assert float(after) < float(before) / 5


def test_the_squared_error_is_relative():
    stale, fresh = points(8), points(8, seed=1)
    mask = np.arange(8) < 5
    found = mean_squared_error(stale, encoded_of(stale, fresh, mask=mask))
    expected = error_of(stale[:5], fresh[:5]) / np.sum(np.square(fresh[:5]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def entropy_problem():
    """Corrected embeddings, examples of which one is none, and queries."""
    mask = np.arange(6) != 2
    return points(6), encoded_of(points(6), points(6, seed=1), mask=mask), points(3, seed=2)


def test_the_cross_entropy_is_a_mean_divergence_over_the_rows_that_are_there():
    corrected, encoded, queries = entropy_problem()
    there = encoded.mask.numpy()
    law, other = (
        special.softmax(queries @ values[there].T, axis=1)
        for values in (encoded.fresh.numpy(), corrected)
    )
    expected = np.mean(np.sum(special.rel_entr(law, other), axis=1))
    found = cross_entropy(corrected, encoded, product(queries))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_gradient_of_the_cross_entropy_is_the_difference_of_the_laws():
    corrected, encoded, queries = entropy_problem()
    corrected, there = tf.Variable(corrected), encoded.mask.numpy()
    with tf.GradientTape() as tape:
        loss = cross_entropy(corrected, encoded, product(queries))
    law, other = (
        special.softmax(np.where(there, queries @ values.numpy().T, -np.inf), axis=1)
        for values in (encoded.fresh, corrected)
    )
    expected = (other - law).T @ queries / len(queries)
    found = tape.gradient(loss, corrected).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[~there], np.zeros([1, DIM]))


def test_the_cross_entropy_is_zero_where_nothing_is_left_to_correct():
    _, encoded, queries = entropy_problem()
    corrected = tf.Variable(encoded.fresh)
    for examples in (encoded, encoded._replace(mask=tf.zeros([6], tf.bool))):
        with tf.GradientTape() as tape:
            loss = cross_entropy(corrected, examples, product(queries))
        assert float(loss) == 0.0
        np.testing.assert_allclose(tape.gradient(loss, corrected), np.zeros([6, DIM]), atol=1e-6)


def test_both_losses_are_their_sum():
    losses = {}
    stale = points(20)
    for drift_loss in ("mse", "cross_entropy", "both"):
        corrector = built(Corrector(8, drift_loss=drift_loss))
        losses[drift_loss] = float(learn(corrector, encoded_of(stale, stale @ rotation())))
    assert losses["mse"] > 0.0 and losses["cross_entropy"] > 0.0
    assert losses["both"] == pytest.approx(losses["mse"] + losses["cross_entropy"])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_multiplier_is_one_of_the_step(optimizer):
    names = ("inner", "inner_bias", "outer", "outer_bias")
    stale, rng = points(50), np.random.default_rng(0)
    shapes = {"inner": [DIM, 8], "inner_bias": [8], "outer": [8, DIM], "outer_bias": [DIM]}
    start = {name: rng.normal(size=shape) / 4 for name, shape in shapes.items()}
    steps = {}
    for multiplier in (1.0, 50.0):
        corrector = built(Corrector(8, learning_rate_multiplier=multiplier))
        # Of ages that are known, so that there is something to learn.
        learn(corrector, encoded_of(stale, stale))
        network = corrector._network
        for name in names:
            getattr(network, name).assign(start[name] / multiplier)
            np.testing.assert_allclose(network._weight(name), start[name], rtol=1e-5)
        encoded = encoded_of(stale, stale @ rotation())
        learn(corrector, encoded, 1, getattr(keras.optimizers, optimizer)(1e-3))
        steps[multiplier] = {name: network._weight(name) - start[name] for name in names}
    for name in names:
        assert np.max(np.abs(steps[1.0][name])) > 1e-5
        np.testing.assert_allclose(
            steps[50.0][name], 50.0 * steps[1.0][name], rtol=1e-2, atol=2e-5, err_msg=name
        )


def test_a_multiplier_leaves_the_initial_network_as_it_is():
    inner = []
    for multiplier in (1.0, 50.0):
        keras.utils.set_random_seed(0)
        corrector = built(Corrector(2000, learning_rate_multiplier=multiplier))
        inner.append(np.std(corrector._network._weight("inner")))
    assert inner == pytest.approx([DIM**-0.5] * 2, rel=0.05)


def test_what_is_not_old_teaches_nothing():
    corrector, stale = trained(Corrector(8), steps=5), points(20)
    encoded = encoded_of(stale, stale @ rotation(), age=0)
    weights = corrector.trainable_variables
    with tf.GradientTape() as tape:
        loss = corrector.learn(encoded, corrector.displacement_fn())
    for gradient in tape.gradient(loss, weights):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_configuration_round_trip():
    settings = {
        "hidden_units": 7,
        "drift_loss": "both",
        "learning_rate_multiplier": 3.0,
        "warmup_steps": 4,
        "content_key": "words",
    }
    copy = Corrector.from_config(Corrector(**settings).get_config())
    assert {name: getattr(copy, name) for name in settings} == settings


def test_content_comes_from_a_task():
    with pytest.raises(ValueError, match="(?s)made by the `CachedRetrieval` .*content_key='words'"):
        built(Corrector(content_key="words"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_units": 0}, "`hidden_units` must be an integer >= 1. Received: 0"),
        ({"drift_loss": "l1"}, "`drift_loss` must be one of .*'mse'.* Received: 'l1'"),
        ({"learning_rate_multiplier": 0.0}, "`learning_rate_multiplier` must be positive"),
        ({"learning_rate_multiplier": float("nan")}, "must be positive and finite. Received: nan"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Corrector(**arguments)
