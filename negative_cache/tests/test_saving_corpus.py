"""Tests of files of models with a cache of a corpus and a corrector."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, CacheWarmStart, DualEncoder
from negative_cache._compat import keras
from negative_cache.layers import Cache, Corrector, NystromCorrector

SIZE, DIM = 12, 4
WORDS = np.random.default_rng(3).normal(size=[SIZE, 3]).astype(np.float32)


@keras.utils.register_keras_serializable("negative_cache_tests")
class CorpusTower(keras.layers.Layer):
    """Looks up {"id"}, and nothing else of the features."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = keras.layers.Embedding(SIZE, DIM)
        self.table.build([None])

    def call(self, features):
        return self.table(features["id"])


def features():
    return {"id": np.arange(SIZE), "words": WORDS}


def candidates():
    return tf.data.Dataset.from_tensor_slices(features()).batch(5)


def batches():
    return tf.data.Dataset.from_tensor_slices({"query": features(), "candidate": features()}).batch(
        4
    )


def make_model(corrector, seed=0, saved=True):
    keras.utils.set_random_seed(seed)
    query_tower, candidate_tower = CorpusTower(), CorpusTower()
    cache = Cache.from_dataset(
        candidates(), candidate_tower, candidate_id_key="id", saved=saved, verbose=0
    )
    task = CachedRetrieval(
        candidate_tower,
        cache=cache,
        corrector=corrector,
        num_negatives=2,
        refresh_fraction=0.1,
        probe_size=3,
        probe_every=1,
        seed=seed,
    )
    model = DualEncoder(query_tower, candidate_tower, task)
    model.compile(keras.optimizers.Adam(0.05), run_eagerly=True)
    return model


def trained(corrector, **kwargs):
    model = make_model(corrector, **kwargs)
    model.fit(batches(), epochs=2, shuffle=False, verbose=0)
    # So few rows teach nothing that is right; trusted all the same, it shows.
    corrector._state.agreement.assign([1.0, 1.0])
    return model


def built(corrector):
    """A model of other weights, rows and seed."""
    model = make_model(corrector, seed=5)
    model(next(iter(batches())))
    model.optimizer.build(model.trainable_variables)
    return model


def state_of(model):
    task = model.task
    state = {name: np.asarray(v) for name, v in task.cache.data.items()}
    own = tf.nest.flatten(vars(task.corrector._state))
    return {
        **state,
        "age": task.cache.age.numpy(),
        "sampling": task.cached._state.sampling.numpy(),
        "encoded": task._state.num_encoded.numpy() + task.cached.num_encoded.numpy(),
        **{f"corrector {i}": variable.numpy() for i, variable in enumerate(own)},
        **{f"weight {i}": weight.numpy() for i, weight in enumerate(model.trainable_variables)},
        "corrected": task.corrector(task.cache.embeddings, task.cache.age, WORDS).numpy(),
        "rows": task.cache.rows_of(tf.range(-1, SIZE + 1, dtype=tf.int64)).numpy(),
    }


def assert_same_state(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def as_keras(model, make, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def as_weights(model, make, folder):
    model.save_weights(folder / "model.weights.h5")
    fresh = built(make())
    fresh.load_weights(folder / "model.weights.h5")
    return fresh


def as_checkpoint(model, make, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "model"))
    fresh = built(make())
    tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).read(path)
    return fresh


@pytest.mark.parametrize("save", [as_keras, as_weights, as_checkpoint])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Corrector(6, learning_rate_multiplier=2.0),
        lambda: Corrector(6, content_key="words"),
        lambda: NystromCorrector(8),
        lambda: NystromCorrector(6, landmarks="k-means++", num_encoded=2),
    ],
    ids=["network", "content", "encoded landmarks", "chosen landmarks"],
)
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(save, make, tmp_path):
    model = trained(make())
    assert np.any(state_of(model)["corrected"] != model.task.cache.embeddings.numpy())
    loaded = save(model, make, tmp_path)
    assert_same_state(state_of(loaded), state_of(model))
    results = []
    for either in (model, loaded):
        before = either.evaluate(batches(), verbose=0, return_dict=True)["loss"]
        logs = either.fit(batches(), shuffle=False, verbose=0).history
        results.append([before, logs["loss"], logs["probe_corrected_staleness"]])
    assert results[0] == results[1]
    assert_same_state(state_of(loaded), state_of(model))


def test_a_file_with_a_corrector_of_another_kind_is_refused(tmp_path):
    trained(NystromCorrector(8)).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError):
        built(Corrector(6)).load_weights(tmp_path / "model.weights.h5")


def test_the_configuration_of_a_task_round_trips():
    task = make_model(Corrector(6, drift_loss="both"), saved=False).task
    copy = CachedRetrieval.from_config(task.get_config())
    for name in ("refresh_fraction", "write_back", "probe_size", "probe_every", "cache_size"):
        assert getattr(copy, name) == getattr(task, name)
    assert copy.corrector.drift_loss == "both" and copy.corrector.hidden_units == 6
    assert copy.cache.row_key == "id" and copy.candidate_id_key == "id"
    assert copy.feature_specs == task.feature_specs
    assert not copy.save_cache and not copy.cache.saved


class LookAtBegin(keras.callbacks.Callback):
    """Looks at the cache before the first step."""

    def on_train_begin(self, logs=None):
        cache = self.model.task.cache
        self.rows = cache.embeddings.numpy()
        self.found = cache.rows_of(tf.range(SIZE, dtype=tf.int64)).numpy()


def test_a_corpus_that_is_not_in_files_is_filled_by_a_warm_start(tmp_path):
    model = trained(Corrector(6), saved=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert int(loaded.task.cache.num_filled) == 0
    expected = model.candidate_network(features()).numpy()
    look = LookAtBegin()
    loaded.fit(batches(), verbose=0, callbacks=[CacheWarmStart(candidates(), verbose=0), look])
    np.testing.assert_array_equal(look.rows, expected)
    assert look.found.tolist() == list(range(SIZE))


def test_a_warm_start_leaves_a_corpus_alone_that_is_there():
    model, look = make_model(Corrector(6)), LookAtBegin()
    model.candidate_network.table.embeddings.assign(np.ones([SIZE, DIM]))
    before = model.task.cache.embeddings.numpy()
    model.fit(batches(), verbose=0, callbacks=[CacheWarmStart(candidates(), verbose=0), look])
    np.testing.assert_array_equal(look.rows, before)
