"""Tests of where a `Cache` keeps its rows: some of its features may stay on the host."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import Cache, CachedRetrieval, Corrector, NystromCorrector, TreeIndex
from negative_cache.ops import _execution
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import DIM, Table, make_queries, make_table
from negative_cache.tests.replicas import two_replicas

SPECS = {
    "title": tf.io.FixedLenFeature([], tf.string),
    "tokens": tf.io.FixedLenFeature([4], tf.int32),
    "id": tf.io.FixedLenFeature([], tf.int64),
    "embedding": tf.io.FixedLenFeature([DIM], tf.float32),
}


def items_of(ids):
    ids = np.asarray(ids)
    return {
        "title": np.array([f"title {i}" for i in ids]),
        "tokens": np.stack([ids, -ids, ids % 3, ids], axis=1).astype(np.int32),
        "id": ids.astype(np.int64),
        "embedding": np.repeat(ids[:, np.newaxis], DIM, axis=1).astype(np.float32),
    }


def test_rows_are_where_the_cache_is_made_but_for_what_is_asked_for_on_the_host():
    # The second of two CPUs stands for an accelerator.
    with tf.device("CPU:1"):
        cache = Cache(SPECS, 6, on_host=["tokens"])
        covering = Cache(SPECS, 6, on_host=["id"], row_key="id")
    variables = {**cache.data, "step": cache.step, "num_filled": cache.num_filled}
    places = {key: tf.DeviceSpec.from_string(v.device) for key, v in variables.items()}
    assert {key: place.device_index for key, place in places.items()} == {
        **dict.fromkeys(variables, 1),
        "tokens": 0,
    }
    lookup = covering._state.rows_by_id.values()
    assert {tf.DeviceSpec.from_string(v.device).device_index for v in lookup} == {0}


def test_what_is_on_the_host_is_written_with_the_rest(monkeypatch):
    monkeypatch.setattr(_execution, "device_type", lambda like=None: "GPU")
    cache = Cache(SPECS, 6, on_host=["tokens"])
    assert cache.host_keys == {"title", "tokens"} and not cache.supports_jit
    update = tf.function(lambda items, mask: cache.update(new_items=items, new_items_mask=mask))
    update(items_of([1, 2, 3]), tf.constant([True, False, True]))
    update(items_of([4, 5, 6]), tf.constant([True, True, True]))
    expected = items_of([1, 3, 4, 5, 6])
    for key in SPECS:
        values = cache.data[key].numpy()[:5]
        values = values.astype(str) if key == "title" else values
        np.testing.assert_array_equal(values, expected[key], err_msg=key)
    assert cache.filled.numpy().tolist() == [True] * 5 + [False]
    again = Cache.from_config(cache.get_config())
    assert again.on_host == ("tokens",) and again.host_keys == cache.host_keys


def test_a_cache_without_anything_on_the_host_may_be_compiled():
    specs = {key: spec for key, spec in SPECS.items() if key != "title"}
    assert Cache(specs, 6).supports_jit and not Cache(specs, 6).host_keys


@pytest.mark.one_keras
def test_a_task_trains_with_all_of_a_corpus_on_the_host():
    table, tower = make_table(40), Table(make_table(40))
    index = TreeIndex(40, DIM, store_embeddings=False, residual_bytes=DIM, leaf_size=8, beam=8)
    cache = Cache.from_dataset(
        corpus_of(40),
        tower,
        candidate_id_key="id",
        index=index,
        on_host=["id", "embedding"],
        verbose=0,
    )
    assert int(index.num_candidates) == 40
    queries = tf.constant(make_queries(3))
    expected = np.log(np.sum(np.exp(queries @ table.T / 0.5), axis=1))
    log_partition = index.sample(queries, temperature=0.5).log_partition
    np.testing.assert_allclose(log_partition, expected, atol=0.05)
    task = CachedRetrieval(tower, cache=cache, temperature=0.5, num_negatives=20, seed=1)
    assert not task.supports_jit
    ids = np.array([3, 14, 15])

    @tf.function
    def step():
        features = {"id": tf.constant(ids, tf.int64)}
        return task(queries, tower(features), features, training=True)

    tower.table.assign(2.0 * table)
    for _ in range(5):
        assert np.isfinite(step())
    # What was drawn, and the positives, are written back.
    written = np.flatnonzero(np.all(cache.embeddings.numpy() == 2.0 * table, axis=1))
    assert set(ids) <= set(written) and len(written) > 5


@pytest.mark.parametrize(
    ["kwargs", "message"],
    [
        ({"on_host": ["titel"]}, "must contain names of features .*titel"),
        ({"on_host": "tokens"}, "must contain names of features .*'tokens'"),
        ({"on_host": ["embedding"]}, "Without an `index`, every step reads all embeddings"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Cache(SPECS, 6, **kwargs)


def test_a_corrector_refuses_a_content_that_is_on_the_host():
    features = {"id": np.arange(8), "bag": np.ones([8, 2], np.float32)}
    corpus = tf.data.Dataset.from_tensor_slices(features).batch(4)
    tower = Table(make_table(8))
    cache = Cache.from_dataset(corpus, tower, candidate_id_key="id", on_host=["bag"], verbose=0)
    with pytest.raises(ValueError, match="cannot be `on_host`. Received: 'bag'"):
        CachedRetrieval(tower, cache=cache, corrector=Corrector(content_key="bag"))


@pytest.mark.parametrize(
    "strategy", [two_replicas, lambda: tf.distribute.OneDeviceStrategy("CPU:1")]
)
def test_refuses_replicas(strategy):
    with strategy().scope(), pytest.raises(ValueError, match="each replica keeps its rows"):
        Cache(SPECS, 6, on_host=["tokens"])


def test_a_streaming_cache_refuses_an_index_that_cannot_grow():
    index = TreeIndex(6, DIM, store_embeddings=False, residual_bytes=0)
    with pytest.raises(ValueError, match="cache that streams must store embeddings"):
        Cache(SPECS, 6, index=index)


class TestFilesOfEarlierVersions:
    """Their caches kept ages and counts in int32, and which rows are filled in a variable."""

    def test_keras_files_are_refused_and_say_why(self):
        cache, store = Cache(SPECS, 6), {}
        cache._description = cache._description.replace('"layout": 2, ', "")
        assert "layout" not in cache._description
        cache.save_own_variables(store)
        with pytest.raises(ValueError, match="written by an earlier version of negative_cache"):
            Cache(SPECS, 6).load_own_variables(store)

    def test_those_of_a_nystrom_corrector_too(self):
        corrector, store = NystromCorrector(4), {}
        corrector.make(DIM)
        corrector._description = corrector._description.replace('"layout": 2', '"was": 1')
        corrector.save_own_variables(store)
        again = NystromCorrector(4)
        again.make(DIM)
        with pytest.raises(ValueError, match="written by an earlier version of negative_cache"):
            again.load_own_variables(store)

    def test_checkpoints_are_refused_and_say_why(self, tmp_path):
        cache = Cache(SPECS, 6)
        cache._description = cache._description.replace('"layout": 2, ', "")
        path = tf.train.Checkpoint(cache=cache).save(str(tmp_path / "checkpoint"))
        with pytest.raises(ValueError, match="written by an earlier version of negative_cache"):
            tf.train.Checkpoint(cache=Cache(SPECS, 6)).restore(path)
