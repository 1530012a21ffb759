"""Tests that every trained variable gets the gradient of the dense loss, in expectation.

The dense loss has all cached candidates as logits of their own, encoded by the tower of now.
"""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import Corrector, LearnedTemperature, TreeIndex
from negative_cache._compat import keras
from negative_cache.tests.layers.corpus_cases import make_corpus_task
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Curve,
    freeze_cache,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.statistics import assert_mean_is

NUM_CANDIDATES, CACHED, IDS = 12, [5, 6, 7, 8, 9, 1], [0, 1, 2]


OPTIONS = {
    "default": {},
    "sampled": {"exact_query_gradient": False},
    "divided": {"temperature": 0.5},
    "in-batch": {"in_batch_negatives": True},
    "accidental hits": {"in_batch_negatives": True, "remove_accidental_hits": True},
    "margin": {"false_negative_margin": -0.2},
    "corrector": {"corrector": Corrector},
    "index": {"index": lambda: TreeIndex(len(CACHED), DIM)},
    "corpus": {"corpus": True},
}


def dense_loss(task, queries, table, cached, options):
    """The sum over the queries of the loss over all negatives at once."""
    queries = queries / options.get("temperature", 1.0)
    transform = task.score_transform
    positives = transform(tf.reduce_sum(queries * tf.gather(table, IDS), axis=1))
    scores = transform(queries @ tf.transpose(tf.gather(table, cached)))
    own = tf.equal(tf.constant(IDS)[:, tf.newaxis], tf.constant(cached)[tf.newaxis])
    is_left_out = own if "remove_accidental_hits" in options or "corpus" in options else own & False
    margin = options.get("false_negative_margin")
    if margin is not None:
        is_left_out |= scores > tf.stop_gradient(positives)[:, tf.newaxis] - margin
    logits = [positives[:, tf.newaxis], tf.where(is_left_out, -np.inf, scores)]
    if "in_batch_negatives" in options:
        in_batch = transform(queries @ tf.transpose(tf.gather(table, IDS)))
        logits.append(tf.where(tf.eye(len(IDS), dtype=tf.bool), -np.inf, in_batch))
    return tf.reduce_sum(tf.reduce_logsumexp(tf.concat(logits, axis=1), axis=1) - positives)


@pytest.mark.one_keras
@pytest.mark.parametrize("transform", [LearnedTemperature, Curve])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_variable_gets_the_gradient_of_the_dense_loss(name, transform):
    options = dict(OPTIONS[name])
    if "temperature" in options and transform is LearnedTemperature:
        pytest.skip("Refused: it is the temperature.")
    table = make_table(NUM_CANDIDATES)
    transform = transform(0.5) if transform is LearnedTemperature else transform()
    kwargs = {key: value() if callable(value) else value for key, value in options.items()}
    kwargs |= {"score_transform": transform, "reduction": "sum", "num_negatives": 3}
    if kwargs.pop("corpus", False):
        cached = list(range(NUM_CANDIDATES))
        task = make_corpus_task(table, **kwargs)
    else:
        cached = CACHED
        task = make_task(table, cache_size=len(cached), filled_with=cached, **kwargs)
    # Every draw is from the same law.
    freeze_cache(task)
    queries = tf.Variable(make_queries(len(IDS)))
    tower = task.candidate_network
    weights = [queries, tower.table, *transform.trainable_variables]
    # A variable of Keras 3 has one of TensorFlow.
    weights = [weight if isinstance(weight, tf.Variable) else weight.value for weight in weights]

    @tf.function
    def gradients():
        features = {"id": tf.constant(IDS, tf.int64)}
        with tf.GradientTape() as tape:
            loss = task(tf.convert_to_tensor(queries), tower(features), features)
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)]

    with tf.GradientTape() as tape:
        dense = dense_loss(
            task, tf.convert_to_tensor(queries), tf.convert_to_tensor(tower.table), cached, options
        )
    expected = [tf.convert_to_tensor(g).numpy() for g in tape.gradient(dense, weights)]
    samples = [gradients() for _ in range(400)]
    for weight, part, values in zip(weights, expected, zip(*samples)):
        assert np.any(part != 0.0), weight.name
        assert_mean_is(np.stack(values), part)


@pytest.mark.parametrize(
    "as_variable", [tf.Variable, keras.Variable if hasattr(keras, "Variable") else tf.Variable]
)
def test_a_temperature_that_would_not_be_trained_is_refused(as_variable):
    with pytest.raises(ValueError, match="must be a number.*LearnedTemperature"):
        make_task(make_table(), temperature=as_variable(0.5))


@pytest.mark.parametrize(
    ["kwargs", "message"],
    [
        (
            lambda: {"temperature": 0.05, "score_transform": LearnedTemperature()},
            "is the temperature: leave `temperature` out. Received: temperature=0.05",
        ),
        (lambda: {"score_transform": LearnedTemperature}, "must be a function or a layer"),
        (lambda: {"score_transform": 0.07}, "must be a function or a layer. Received: 0.07"),
        (lambda: {"frequency_correction": 6000}, "must be True, False or a `Freq.*: 6000"),
        (
            lambda: {
                "corrector": Corrector(),
                "index": TreeIndex(6, DIM, store_embeddings=False, residual_bytes=0),
            },
            "needs an index that stores embeddings",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_task(make_table(), **kwargs())
