"""Tests of the files of `Retrieval`: they hold every source of negatives."""

import json

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache import CacheSpec, DualEncoder, Explicit, FromCache, InBatch, Retrieval
from negative_cache._compat import keras
from negative_cache.tests.layers.retrieval_cases import DIM, Table, make_table
from negative_cache.tests.layers.source_cases import (
    SIZE,
    SPECS,
    Anchors,
    corpus,
    make_model,
    pairs,
)


def state_of(model):
    task = model.task
    _, *caches, anchors = task.negatives
    parts = [tf.convert_to_tensor(anchors.anchors), tf.convert_to_tensor(anchors.num_steps)]
    for source in caches:
        parts += [*source.cache.data.values(), source.cache.age, source._state.sampling]
    parts += [tf.convert_to_tensor(weight) for weight in model.trainable_variables]
    return [np.asarray(part).copy() for part in parts]


def states_of_two_epochs(model):
    """The state now, after one more epoch, and after two."""
    states = [state_of(model)]
    for _ in range(2):
        model.fit(pairs(), verbose=0)
        states.append(state_of(model))
    return states


def test_files_hold_every_source(tmp_path):
    model = make_model()
    model.fit(pairs(), epochs=2, verbose=0)
    weights = str(tmp_path / "all.weights.h5")
    model.save_weights(weights)
    checkpoint = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    expected = states_of_two_epochs(model)
    other = make_model(seed=1)
    other(next(iter(pairs())))
    # One model for both kinds of files: it is traced once, and has moved on before the second.
    for load in (
        lambda: other.load_weights(weights),
        lambda: tf.train.Checkpoint(model=other).restore(checkpoint).expect_partial(),
    ):
        assert any(np.any(a != b) for a, b in zip(state_of(other), expected[0]))
        load()
        found = states_of_two_epochs(other)
        for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
            np.testing.assert_array_equal(a, b)


@keras.utils.register_keras_serializable("test")
class SavedTable(keras.layers.Layer):
    """A tower that a `.keras` file describes."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(size, DIM)
        self.size = size

    def call(self, features):
        return self.table(features["id"])

    def get_config(self):
        return {**super().get_config(), "size": self.size}


def test_a_keras_file_holds_every_source(tmp_path):
    keras.utils.set_random_seed(0)
    query_tower, tower, other = (SavedTable(SIZE) for _ in range(3))
    sources = [
        InBatch(num_hard=2),
        Explicit(),
        FromCache(CacheSpec(SPECS, 6), seed=1, num_negatives=2, name="stream"),
        FromCache(CacheSpec(SPECS, 6), seed=3, candidate_network=other, name="other"),
        FromCache(CacheSpec(SPECS, 6), seed=4, candidate_network=other, name="same"),
        corpus(tower, corrector=nc.Corrector(hidden_units=4), probe_size=3, name="corpus"),
        Anchors(2, penalty=0.1),
    ]
    task = Retrieval(
        tower,
        sources,
        temperature=0.5,
        candidate_id_key="id",
        remove_accidental_hits=True,
        false_negative_margin=0.1,
        loss_metrics=[keras.metrics.Mean(name="mean_loss")],
    )
    model = DualEncoder(query_tower, tower, task)
    # To trace it takes longer than all its steps, and the file says that it is not traced.
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    model.fit(pairs(), epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(source) for source in loaded.task.negatives] == [type(part) for part in sources]
    others = [source.candidate_network for source in loaded.task.cached_negatives[1:3]]
    assert others[0] is others[1]
    assert loaded.task.get_config()["false_negative_margin"] == 0.1
    for each in (model, loaded):
        each.fit(pairs(), verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.task.cached_negatives, loaded.task.cached_negatives):
        np.testing.assert_array_equal(a.cache.embeddings, b.cache.embeddings)


def test_a_checkpoint_from_before_sources_had_their_state_is_refused(tmp_path):
    task, again = (
        Retrieval(Table(make_table(SIZE)), [InBatch()], candidate_id_key="id") for _ in range(2)
    )
    task._description = json.dumps({"candidate_id_key": "id"})
    where = tf.train.Checkpoint(task=task).save(str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match="by an earlier version of negative_cache"):
        tf.train.Checkpoint(task=again).restore(where)


def test_a_tower_of_a_source_that_is_the_query_tower_is_refused_when_saved(tmp_path):
    query_tower, tower = SavedTable(SIZE), SavedTable(SIZE)
    sources = [FromCache(CacheSpec(SPECS, 6), candidate_network=query_tower)]
    model = DualEncoder(query_tower, tower, Retrieval(tower, sources))
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(pairs(), verbose=0)
    with pytest.raises(ValueError, match="cannot say that the towers share layers"):
        model.save(tmp_path / "model.keras")


def test_weights_of_sources_in_another_order_are_refused(tmp_path):
    def model(names):
        tower = SavedTable(SIZE)
        sources = [FromCache(CacheSpec(SPECS, 6), seed=1, name=name) for name in names]
        model = DualEncoder(SavedTable(SIZE), tower, Retrieval(tower, sources))
        model(next(iter(pairs())))
        return model

    path = str(tmp_path / "model.weights.h5")
    model(["one", "two"]).save_weights(path)
    with pytest.raises(ValueError, match="The state in the file does not fit the layer"):
        model(["two", "one"]).load_weights(path)
