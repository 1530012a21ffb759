"""Runs the Python of the README, in order, with towers and data as a reader would have them.

And that of the pages whose every block runs by itself.
"""

import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import IS_KERAS_2, keras

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
TITLES = np.array([f"title {i}" for i in range(300)])


def blocks(page=README):
    if not page.exists():
        pytest.skip("The README and its pages are not part of an installed package.")
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def block(marker):
    (found,) = [code for code in blocks() if marker in code]
    return found


class TitleTower(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.ids = keras.layers.Hashing(1000)
        self.table = keras.layers.Embedding(1000, 8)

    def call(self, inputs):
        titles = inputs["title"] if isinstance(inputs, dict) else inputs
        return self.table(self.ids(titles))


@pytest.mark.end_to_end
def test_ten_lines_and_callbacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"query": TITLES, "candidate": {"title": TITLES}}
    names = {
        "query_tower": TitleTower(),
        "candidate_tower": TitleTower(),
        "pairs": tf.data.Dataset.from_tensor_slices(data),
    }
    names["validation"] = names["pairs"].take(50)
    names["candidates"] = names["pairs"].map(lambda pair: pair["candidate"])
    # The same calls, for fewer epochs.
    exec(block("model.fit(pairs").replace("epochs=50", "epochs=5"), names)
    steps = int(names["model"].optimizer.iterations)
    assert steps in (2 * 4, 2 * 5)
    assert set(tf.saved_model.load("retriever").signatures) >= {"embed_query", "embed_candidate"}
    exec(block("nc.evaluation.evaluate("), names)
    assert {"mrr", "recall_at_100"} <= set(names["metrics"])
    history = names["model"].fit(names["pairs"].batch(64), callbacks=names["callbacks"], verbose=0)
    assert {"val_mrr", "val_recall_at_10"} <= set(history.history)
    # The same call, for fewer steps.
    exec(block("BackupAndRestore(").replace("5000", "3").replace("epochs=10", "epochs=2"), names)
    assert int(names["model"].optimizer.iterations) == steps + 5 + 2 * 3


def test_tree_index():
    import negative_cache as nc

    names = {"tf": tf, "nc": nc, "candidate_tower": TitleTower()}
    # The same calls, for fewer and smaller candidates.
    code = block("index=index,").replace("1_000_000", "300").replace("=64", "=8")
    exec(code, names)
    names["task"].add_to_cache({"title": TITLES})
    assert int(names["index"].num_candidates) == len(TITLES)
    rng = np.random.default_rng(0)
    names["embeddings"], names["queries"], names["new_embeddings"] = (
        rng.normal(size=[size, 8]).astype(np.float32) for size in (300, 2, 2)
    )
    exec(block("index.index(embeddings)"), names)
    assert np.all(names["lower"] <= names["upper"])
    assert names["scores"].shape == (2, 100)


def test_corpus_with_a_corrector():
    import negative_cache as nc

    titles = sorted(set(TITLES.tolist()))
    names = {
        "nc": nc,
        "candidate_tower": TitleTower(),
        "candidates": tf.data.Dataset.from_tensor_slices({"title": titles}),
    }
    exec(block("nc.Cache.from_dataset(").replace("256", "16"), names)
    model = nc.DualEncoder(TitleTower(), names["candidate_tower"], names["task"])
    model.compile(optimizer="adam")
    pairs = {"query": titles, "candidate": {"title": titles}}
    batches = tf.data.Dataset.from_tensor_slices(pairs).batch(16, drop_remainder=True)
    history = model.fit(batches.repeat(), steps_per_epoch=101, verbose=0).history
    assert history["probe_staleness"][0] > history["probe_corrected_staleness"][0] > 0.0


def test_batches_of_similar_pairs():
    import negative_cache as nc

    towers = TitleTower(), TitleTower()
    task = nc.CachedRetrieval(
        towers[1],
        {"title": tf.io.FixedLenFeature([], tf.string)},
        0,
        in_batch_negatives=True,
        candidate_id_key="title",
    )
    model = nc.DualEncoder(*towers, task)
    model.compile(optimizer="adam")
    names = {"nc": nc, "model": model, "queries": TITLES, "titles": TITLES}
    exec(block("nc.GlobalContrastiveBatches(").replace("=256", "=64").replace("=10", "=2"), names)
    assert int(model.optimizer.iterations) == 2 * 5


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders imports under Keras 2 only.")
def test_tfrs_model(tmp_path):
    import tensorflow_recommenders as tfrs

    import negative_cache as nc

    names = {"tf": tf, "tfrs": tfrs, "nc": nc}
    exec(block("class MovieModel"), names)
    model = names["MovieModel"](TitleTower(), TitleTower())
    model.compile(optimizer="adam")
    features = {"user_id": TITLES, "movie_title": TITLES}
    dataset = tf.data.Dataset.from_tensor_slices(features).batch(64)
    history = model.fit(
        dataset,
        validation_data=dataset,
        verbose=2,
        callbacks=[keras.callbacks.TensorBoard(tmp_path)],
    ).history
    logs = model.evaluate(dataset, verbose=1, return_dict=True)
    assert np.isfinite(history["total_loss"][0]) and np.isfinite(logs["total_loss"])
    counted = model.task.frequency._state.num_seen
    # Training counts the candidates, and an evaluation does not.
    assert int(counted) == len(TITLES)


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders imports under Keras 2 only.")
def test_tfrs_model_with_a_cache(tmp_path):
    import tensorflow_recommenders as tfrs

    import negative_cache as nc

    names = {"tf": tf, "tfrs": tfrs, "nc": nc}
    # As the text says.
    code = block("class MovieModel").replace("cache_size=0", "cache_size=16384, use_lru=False")
    exec(code, names)
    model = names["MovieModel"](TitleTower(), TitleTower())
    model.compile(optimizer="adam")
    features = {"user_id": TITLES, "movie_title": TITLES}
    dataset = tf.data.Dataset.from_tensor_slices(features).batch(64)
    history = model.fit(dataset, validation_data=dataset, verbose=2).history
    filled = int(model.task.cache.num_filled)
    assert filled == len(TITLES)
    logs = model.evaluate(dataset, verbose=1, return_dict=True)
    assert int(model.task.cache.num_filled) == filled
    assert "staleness" in history and np.isfinite(logs["total_loss"])
    for name in (metric.name for metric in model.task.training_metrics):
        assert name not in logs and f"val_{name}" not in history


def test_published_api():
    table = tf.random.normal([10, 128])
    text = tf.random.uniform([4, 64], maxval=10, dtype=tf.int32)
    names = {
        "tf": tf,
        "item_network": lambda features: tf.gather(table, features["text"][:, 0]),
        "query_embeddings": tf.random.normal([4, 128]),
        "item_embeddings": tf.gather(table, text[:, 0]),
        "text": text,
    }
    exec(block("CacheLossHandler("), names)
    assert np.isfinite(names["loss"])


@pytest.mark.end_to_end
def test_page_on_negatives():
    titles = sorted(set(TITLES.tolist()))
    pairs = {"query": titles, "candidate": {"title": titles}}
    names = {
        "query_tower": TitleTower(),
        "candidate_tower": TitleTower(),
        "other_tower": TitleTower(),
        "candidates": tf.data.Dataset.from_tensor_slices({"title": titles}),
        "titles": titles,
        "pairs": tf.data.Dataset.from_tensor_slices(pairs),
    }
    first, *others = blocks(ROOT / "docs" / "negatives.md")
    # Each block trains a model for three steps, which take less time than to trace one.
    assert 'compile(optimizer="adam")' in first
    first = first.replace('optimizer="adam"', 'optimizer="adam", run_eagerly=True')
    exec(first.replace("65536", "300"), names)
    for code in others:
        exec(code.replace("65536", "300"), names)
        logs = names["train"](names["task"])
        assert np.isfinite(logs["loss"][0])
