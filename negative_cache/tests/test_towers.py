"""Tests of how towers are called, compiled, and known again."""

import types

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import _towers, evaluation
from negative_cache._compat import keras
from negative_cache._towers import Encoder, Towers
from negative_cache.tests.batching.contrastive_pairs import make_model


class Dropping(keras.layers.Layer):
    """A tower without an argument `training` around a layer that does as its surroundings do."""

    def __init__(self):
        super().__init__()
        self.dropout = keras.layers.Dropout(0.5)

    def call(self, features):
        return self.dropout(features)


class Step(keras.layers.Layer):
    """Calls a tower inside of a layer that may be trained."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def call(self, features, tower_training, training=None):
        return _towers.embed(self.tower, features, tower_training)


@pytest.mark.parametrize("tower_training", [None, False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_tower_that_is_a_layer_is_told_whether_it_is_trained(tower_training, training):
    step = Step(Dropping())
    embeddings = step(tf.ones([100, 2]), tower_training=tower_training, training=training)
    is_trained = training if tower_training is None else tower_training
    assert bool(tf.reduce_any(embeddings == 0.0)) == is_trained


def test_functions_are_told_if_they_have_the_argument():
    features = tf.ones([3, 2])
    told = _towers.embed(lambda x, training: x if training else -x, features, False)
    np.testing.assert_array_equal(told, -features)
    np.testing.assert_array_equal(_towers.embed(tf.negative, features, False), -features)


@pytest.mark.parametrize(
    "network, received",
    [
        (lambda features: {"embedding": features}, "dict"),
        (lambda features: features[:, 0], r"\(3,\)"),
        (lambda features: features[tf.newaxis], r"\(1, 3, 2\)"),
    ],
)
def test_what_is_not_a_matrix_is_refused(network, received):
    for call in (
        lambda: _towers.embed(network, tf.ones([3, 2]), False),
        lambda: Encoder(network).embed(np.ones([3, 2], np.float32)),
    ):
        with pytest.raises(ValueError, match=rf"shape \[n, dim\]. Received .*{received}"):
            call()


def unknown_dim(features):
    return tf.numpy_function(lambda values: values, [features], tf.float32)


def test_only_encoders_take_a_dimension_that_no_trace_knows():
    features = tf.random.normal([3, 2])
    np.testing.assert_array_equal(Encoder(unknown_dim).embed(features), features)
    with pytest.raises(ValueError, match=r"shape \[n, dim\]. Received .*unknown"):
        tf.function(lambda values: _towers.embed(unknown_dim, values, False))(features)
    with pytest.raises(ValueError, match=r"shape \[n, dim\]. Received .*unknown"):
        Encoder(unknown_dim).output_dim(features)


def test_output_dim_of_an_example_is_the_only_trace():
    traces = []

    def network(features):
        traces.append(features.shape)
        return tf.ones([tf.shape(features)[0], 2])

    encoder = Encoder(network)
    assert encoder.output_dim(tf.zeros([1], tf.int64)) == 2
    assert encoder.embed(tf.range(5, dtype=tf.int64)).shape == (5, 2)
    assert encoder.embed_tensor(tf.range(3, dtype=tf.int64)).shape == (3, 2)
    assert [shape.as_list() for shape in traces] == [[None]]


def test_encoder_embeds_in_inference_mode_without_retracing():
    traces = []

    def network(features, training):
        traces.append(training)
        return tf.cast(features, tf.float16)[:, tf.newaxis] * [[1.0, 2.0]]

    encoder, seen = Encoder(network), []
    dataset = tf.data.Dataset.range(10).batch(4)
    embeddings = encoder(dataset, seen.append)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, np.arange(10)[:, None] * [[1, 2]])
    assert seen == [1, 2, 3]
    encoder(dataset)
    # One trace for batches of any size.
    assert traces == [False]


def test_encoder_refuses_an_empty_dataset():
    with pytest.raises(ValueError, match="dataset to embed is empty"):
        Encoder(lambda features, training: features)([])


def test_encoder_refuses_what_is_not_a_matrix():
    with pytest.raises(ValueError, match=r"shape \[n, dim\]. Received from 'identity': \(3,\)"):
        Encoder(tf.identity)([np.zeros([3], np.float32)])


def test_weights_of_any_shape_and_dtype():
    model = make_model()
    scalar, empty = tf.Variable(1.0), tf.Variable(tf.zeros([0, 4]))
    low = tf.Variable(tf.ones([3], tf.bfloat16))
    towers = Towers(model, 8)
    towers._networks = (types.SimpleNamespace(trainable_variables=[scalar, empty, low]),)
    weights = towers.fingerprint()
    assert not towers.have_changed(weights)
    low.assign([1.0, 1.0, 1.0078125])
    assert towers.have_changed(weights)


@pytest.mark.parametrize("model", [object(), (tf.identity,), (tf.identity, None)])
def test_what_has_not_two_towers_is_refused(model):
    for function in (_towers.networks_of, _towers.encoders_of, lambda model: Towers(model, 8)):
        with pytest.raises(ValueError, match="must have `query_network` and `candidate_network`"):
            function(model)


def test_encoders_in_a_pair_are_used_as_they_are():
    pair = Encoder(tf.identity), Encoder(tf.identity)
    assert _towers.encoders_of(pair) == pair


def test_evaluation_has_the_public_names():
    assert evaluation.Encoder is Encoder and evaluation.encoders_of is _towers.encoders_of
