"""Tests of what `Corrector` and `NystromCorrector` share."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import Corrector, NystromCorrector
from negative_cache.layers.drift_corrector import build_corrector
from negative_cache.tests.layers.drift_cases import (
    AGE,
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

both = pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: Corrector(16, **kwargs),
        lambda **kwargs: NystromCorrector(48, **kwargs),
    ],
    ids=["network", "landmarks"],
)
ages = pytest.mark.parametrize("age", [None, 0, 7])


def ages_of(age, count):
    return None if age is None else np.full([count], age, np.int32)


@both
@ages
def test_begins_as_the_identity(make, age):
    corrector, stale = built(make()), points(20)
    np.testing.assert_array_equal(corrector(stale, ages_of(age, 20)), stale)
    # Whose length is made one again, to rounding.
    unit = points(20, unit=True)
    np.testing.assert_allclose(corrector(unit, ages_of(age, 20)), unit, atol=2e-7)


@both
@ages
def test_is_the_identity_before_it_has_proved_right(make, age):
    corrector, stale = built(make()), points(20)
    # The first step corrects with what is there before it: nothing that could be right.
    learn(corrector, encoded_of(stale, stale @ rotation()), 1, keras.optimizers.SGD(0.1))
    np.testing.assert_array_equal(corrector(stale, ages_of(age, 20)), stale)


@both
def test_what_has_unit_length_keeps_it(make):
    corrector = trained(make(), unit=True, steps=60)
    unit = points(30, seed=1, unit=True)
    corrected = corrector(unit, ages_of(9, 30)).numpy()
    assert np.min(np.linalg.norm(corrected - unit, axis=1)) > 0.05
    np.testing.assert_allclose(np.linalg.norm(corrected, axis=1), np.ones(30), atol=1e-6)
    longer = corrector(3.0 * unit, ages_of(9, 30)).numpy()
    assert np.min(np.linalg.norm(longer, axis=1)) > 2.0


@both
def test_what_was_just_written_is_left_alone(make):
    corrector, stale = trained(make(), steps=60), points(30, seed=1)
    age = np.arange(30, dtype=np.int32) % 2
    corrected = corrector(stale, age).numpy()
    np.testing.assert_array_equal(corrected[age == 0], stale[age == 0])
    assert np.all(np.any(corrected[age == 1] != stale[age == 1], axis=1))


@both
def test_older_rows_are_moved_further(make):
    corrector, stale = trained(make(), steps=60), points(30, seed=1)
    moves = {
        age: corrector(stale, ages_of(age, 30)) - stale for age in (None, 1, AGE, 2 * AGE, 500)
    }
    # Of the typical age where it is not known, and twice as far at the most.
    for age, factor in ((None, 1.0), (1, 1 / AGE), (2 * AGE, 2.0), (500, 2.0)):
        np.testing.assert_allclose(moves[age], factor * moves[AGE], rtol=1e-4, atol=1e-5)


@both
def test_the_typical_age_is_the_mean_of_late(make):
    corrector, stale = built(make()), points(20)
    age = np.arange(20, dtype=np.int32)
    mask = age < 11
    learn(corrector, encoded_of(stale, stale, age, mask))
    np.testing.assert_allclose(corrector._state.typical_age, 5.0)
    learn(corrector, encoded_of(stale, stale, 100, np.zeros(20, bool)))
    np.testing.assert_allclose(corrector._state.typical_age, 5.0)
    learn(corrector, encoded_of(stale, stale, 50), steps=200)
    np.testing.assert_allclose(corrector._state.typical_age, 50.0, rtol=1e-3)


def test_nonsense_of_the_network_does_no_harm():
    corrector = trained(Corrector(16), steps=60)
    stale = points(50, seed=1)
    fresh = stale @ rotation()
    rng = np.random.default_rng(0)
    for weight in corrector.trainable_variables:
        weight.assign(rng.normal(size=weight.shape))
    assert error_of(corrector(stale), fresh) > 2.0 * error_of(stale, fresh)
    learn(corrector, encoded_of(stale, fresh), steps=50)
    assert error_of(corrector(stale), fresh) < 1.05 * error_of(stale, fresh)


def test_a_drift_that_cannot_be_foreseen_does_no_harm():
    corrector, rng = built(NystromCorrector(40)), np.random.default_rng(0)

    def noise():
        stale = points(40, seed=rng.integers(1000))
        return stale, stale + rng.normal(size=stale.shape).astype(np.float32)

    for _ in range(30):
        learn(corrector, encoded_of(*noise()))
    stale, fresh = noise()
    assert error_of(corrector(stale), fresh) < 1.05 * error_of(stale, fresh)


@both
def test_warmup_steps_are_without_correction(make):
    corrector, stale = built(make(warmup_steps=20)), points(60)
    encoded = encoded_of(stale, stale @ rotation())
    optimizer = keras.optimizers.Adam(0.01)
    learn(corrector, encoded, 19, optimizer)
    np.testing.assert_array_equal(corrector(stale), stale)
    learn(corrector, encoded, 1)
    assert error_of(corrector(stale), encoded.fresh) < 0.95 * error_of(stale, encoded.fresh)


@both
@pytest.mark.parametrize("garbage", [100.0, np.nan])
def test_masked_entries_do_not_count(make, garbage):
    stale, age = points(30), np.arange(30, dtype=np.int32)
    fresh, there = stale @ rotation(), np.arange(30) % 3 > 0
    with_garbage = np.where(there[:, np.newaxis], fresh, np.float32(garbage))
    problems = [
        encoded_of(stale, with_garbage, np.where(there, age, 10**6).astype(np.int32), there),
        encoded_of(stale[there], fresh[there], age[there]),
    ]
    results = []
    for encoded in problems:
        keras.utils.set_random_seed(0)
        corrector = built(make())
        loss = learn(corrector, encoded, 5, keras.optimizers.SGD(0.1))
        results.append([loss, corrector(points(10, seed=1)), corrector._state.agreement])
    for found, expected in zip(*results):
        assert np.all(np.isfinite(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@both
def test_nothing_is_learned_from_no_rows(make):
    corrector, stale = trained(make(), steps=30), points(10)
    before = corrector(stale)
    encoded = encoded_of(stale, stale, mask=np.zeros(10, bool))
    learn(corrector, encoded, 3, keras.optimizers.SGD(0.1))
    np.testing.assert_allclose(corrector(stale), before, rtol=1e-5, atol=1e-6)


@both
def test_no_gradient_reaches_the_embeddings(make):
    corrector = trained(make(), steps=30)
    stale = tf.Variable(points(10))
    fresh = tf.Variable(stale @ rotation())
    age, mask = tf.fill([10], AGE), tf.ones([10], tf.bool)
    with tf.GradientTape(persistent=True) as tape:
        corrected = corrector(stale, age)
        encoded = encoded_of(stale.numpy(), fresh.numpy())._replace(
            stale=tf.identity(stale), fresh=tf.identity(fresh), age=age, mask=mask
        )
        loss = corrector.learn(encoded, corrector.displacement_fn())
    watched = [stale, fresh, *corrector.trainable_variables]
    assert all(part is None for part in tape.gradient(corrected, watched))
    if loss is not None:
        assert all(part is None for part in tape.gradient(loss, watched[:2]))


@both
def test_embeddings_of_half_precision_are_corrected_in_single(make):
    corrector, stale = trained(make(), steps=30), tf.cast(points(10), tf.bfloat16)
    corrected = corrector(stale)
    assert corrected.dtype == tf.float32
    np.testing.assert_array_equal(corrected, corrector(tf.cast(stale, tf.float32)))


@both
def test_a_corrector_is_for_embeddings_of_one_width(make):
    corrector = built(make())
    build_corrector(corrector, DIM, 0)
    with pytest.raises(ValueError, match=f"(?s)for the embeddings of the cache.*{DIM}.*Wanted: 5"):
        build_corrector(corrector, 5, 0)


@both
def test_warmup_steps_must_not_be_negative(make):
    with pytest.raises(ValueError, match="`warmup_steps` must be an integer >= 0. Received: -1"):
        make(warmup_steps=-1)


@both
def test_a_call_makes_an_unbuilt_corrector(make):
    stale = points(4)
    np.testing.assert_allclose(make()(stale), stale, atol=1e-6)


@both
def test_one_bad_moment_is_forgotten(make):
    corrector, stale = trained(make(), steps=60), points(20, seed=1)
    before = corrector(stale).numpy()
    nowhere = np.full_like(stale, np.nan)
    nothing = corrector.corrector_fn(lambda embeddings, content: tf.constant(nowhere))
    np.testing.assert_array_equal(nothing(stale), stale)
    corrector.learn(
        encoded_of(stale, stale, mask=np.zeros(20, bool)),
        lambda embeddings, content: tf.constant(nowhere),
        product(points(3)),
    )
    after = corrector(stale).numpy()
    np.testing.assert_allclose(after, before, atol=0.1)
    assert np.any(np.abs(after - stale) > 0.01)


@both
def test_lengths_are_free_where_towers_do_not_normalise(make):
    corrector = built(make())
    stale = np.float32([[0.98, 0, 0, 0], [0.995, 0, 0, 0], [1.005, 0, 0, 0], [1.02, 0, 0, 0]])
    learn(corrector, encoded_of(stale, 1.5 * stale))
    corrector._state.agreement.assign([1.0, 1.0])
    longer = corrector.corrector_fn(lambda embeddings, content: 0.5 * embeddings)(stale)
    np.testing.assert_allclose(longer, 1.5 * stale, rtol=1e-6)
