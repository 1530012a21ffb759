"""Runs the Python of the README, with data as a reader would have them."""

import csv
import pathlib

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.tests.pages import blocks

README = pathlib.Path(__file__).parents[2] / "README.md"
NUM_USERS, NUM_ITEMS, NUM_TASTES = 60, 40, 4


def write_interactions(path):
    """Every user takes items of one taste, of which the first are the most popular."""
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        for time in rng.permutation(4000):
            user = rng.integers(NUM_USERS)
            rank = min(int(rng.exponential(3.0)), NUM_ITEMS // NUM_TASTES - 1)
            writer.writerow([f"user {user}", f"item {rank * NUM_TASTES + user % NUM_TASTES}", time])


@pytest.mark.end_to_end
def test_from_a_csv_to_a_retriever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_interactions("interactions.csv")
    names = {}
    train, save, serve = [code for code in blocks(README) if "class MovieModel" not in code]
    # The same calls, for fewer epochs.
    exec(train.replace("epochs=50", "epochs=10"), names)
    history = names["model"].history.history
    assert {"val_mrr", "val_recall_at_10"} <= set(history)
    exec(save, names)
    measured = nc.evaluation.evaluate(
        names["model"], names["corpus"], names["pairs"](names["testing"]).batch(64)
    )
    # Of 10 items of a taste, each once in 1 + 1/2 + … places. By chance the MRR is 0.11.
    assert measured["mrr"] > 0.25
    assert (tmp_path / "model.keras").exists()
    # As another process would, it begins with nothing.
    served = {}
    exec(serve, served)
    assert len(served["best"]) == 5
    # That of "user 1".
    assert all(int(item.split()[1]) % NUM_TASTES == 1 for item in served["best"])


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders imports under Keras 2 only.")
def test_a_model_of_tensorflow_recommenders():
    def tower():
        return keras.Sequential([keras.layers.Hashing(1000), keras.layers.Embedding(1000, 8)])

    names = {}
    (code,) = [code for code in blocks(README) if "class MovieModel" in code]
    exec(code, names)
    model = names["MovieModel"](tower(), tower())
    model.compile(optimizer="adam")
    titles = np.array([f"title {i}" for i in range(300)])
    data = tf.data.Dataset.from_tensor_slices({"user_id": titles, "movie_title": titles}).batch(64)
    history = model.fit(data, epochs=2, validation_data=data, verbose=0).history
    assert history["total_loss"][1] < history["total_loss"][0]
    # Training counts the candidates, and an evaluation does not.
    assert int(model.task.frequency._state.num_seen) == 2 * len(titles)
