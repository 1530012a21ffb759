"""Runs the Python of the pages in `docs/`: the blocks of a page in order, in one namespace.

The namespace holds towers and data as a reader would have them. Numbers are smaller than a page's:
the calls are the same, for fewer candidates and epochs.
"""

import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.tests.pages import blocks
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.worker_processes import run_workers

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
TITLES = [f"title {i}" for i in range(300)]
DIM = 8

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="Pages are not part of a package.")


class Tower(keras.layers.Layer):
    """Embeds a string, or the feature "title" of a dictionary."""

    def __init__(self):
        super().__init__()
        self.ids = keras.layers.Hashing(1000)
        self.table = keras.layers.Embedding(1000, DIM)

    def call(self, inputs):
        titles = inputs["title"] if isinstance(inputs, dict) else inputs
        return self.table(self.ids(titles))


def reader():
    """What a reader of any page has: towers, titles and pairs of them."""
    pairs = {"query": TITLES, "candidate": {"title": TITLES}}
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    return {
        "np": np,
        "tf": tf,
        "nc": nc,
        "query_tower": Tower(),
        "candidate_tower": Tower(),
        "make_towers": lambda: (Tower(), Tower()),
        "titles": tf.constant(TITLES),
        "pairs": dataset,
        "validation": dataset.take(50),
        "candidates": dataset.map(lambda pair: pair["candidate"]),
    }


def model_of(names):
    task = nc.CachedRetrieval(
        names["candidate_tower"],
        {"title": tf.io.FixedLenFeature([], tf.string)},
        0,
        in_batch_negatives=True,
        candidate_id_key="title",
    )
    model = nc.DualEncoder(names["query_tower"], names["candidate_tower"], task)
    model.compile(optimizer="adam", run_eagerly=True)
    return model


def built(names):
    names["model"] = model_of(names)
    names["model"](next(iter(names["pairs"].batch(2))))


def titled_model(names):
    """A model of titles that come alone, and are served alone."""
    names["model"] = nc.DualEncoder(
        names["query_tower"],
        names["candidate_tower"],
        nc.CachedRetrieval(
            names["candidate_tower"],
            tf.io.FixedLenFeature([], tf.string),
            0,
            in_batch_negatives=True,
        ),
    )
    titles = names["titles"][:2]
    names["model"]({"query": titles, "candidate": titles})


def movies(names):
    features = {"user_id": TITLES, "movie_title": TITLES, "user_rating": np.ones(300, np.float32)}
    names["ratings"] = tf.data.Dataset.from_tensor_slices(features)
    names["watched"] = tf.data.Dataset.from_tensor_slices({"user": TITLES, "movie": TITLES})
    for name in ("user_model", "movie_model", "user_tower", "movie_tower"):
        names[name] = Tower()


def clicks(names):
    rows = (f"user {i % 30},item {i % 20},{i}" for i in range(300))
    pathlib.Path("clicks.csv").write_text("\n".join(["user,item,timestamp", *rows]))


def texts(names):
    table = tf.random.normal([10, 128])
    text = tf.random.uniform([4, 64], maxval=10, dtype=tf.int32)
    names["text"] = text
    names["item_network"] = lambda features: tf.gather(table, features["text"][:, 0])
    names["query_embeddings"] = tf.random.normal([4, 128])
    names["item_embeddings"] = names["item_network"]({"text": text})


def ids_and_tokens(names):
    """Candidates with further features."""
    features = {"title": TITLES, "id": TITLES, "tokens": np.ones([300, 4], np.int32)}
    names["candidates"] = tf.data.Dataset.from_tensor_slices(features)


def batches_of_pairs(names):
    names["model"] = model_of(names)
    # The towers of a model of TF-Recommenders.
    names["model"].user_model, names["model"].movie_model = Tower(), Tower()
    names["model"](next(iter(names["pairs"].batch(2))))
    names["queries"] = names["user_ids"] = names["movie_titles"] = np.array(TITLES)
    names["titles"] = np.array(TITLES)
    names["dataset"], names["num_epochs_done"] = names["pairs"], 1


def vectors(names):
    rng = np.random.default_rng(0)
    for name, size in (("embeddings", 300), ("queries", 2), ("new_embeddings", 2)):
        names[name] = rng.normal(size=[size, DIM]).astype(np.float32)


def other_candidates(names):
    names["other_tower"], names["titles"] = Tower(), TITLES


def replicas(names):
    names["two_replicas"] = two_replicas
    names["batches"] = names["pairs"].batch(64, drop_remainder=True).take(1)


# Page -> what its reader has in addition. To save time each page runs under one Keras: Keras 3,
# unless its subject needs Keras 2.
PAGES = {
    "contrastive_batches.md": batches_of_pairs,
    "distributed.md": replicas,
    "evaluate.md": built,
    "from_fit.md": clicks,
    "from_keras_rs.md": movies,
    "from_loop.md": None,
    "from_tfrs.md": movies,
    "gpu.md": ids_and_tokens,
    "index.md": None,
    "is_it_working.md": None,
    "negatives.md": other_candidates,
    "published_api.md": texts,
    "saving.md": built,
    "serve.md": titled_model,
    "stale_embeddings.md": ids_and_tokens,
    "tree_index.md": vectors,
    "tune.md": None,
}
UNDER_KERAS_2 = {"from_tfrs.md"}
# The other blocks of the page need several processes: `page_of_workers.py`.
NUM_BLOCKS = {"distributed.md": 2}
# Blocks that make a task are followed by what the page's first block makes to train it with.
TRAINS = {"negatives.md": 'assert np.isfinite(train(task)["loss"][0])'}
# A few steps take less time than to trace one.
SMALLER = {
    'optimizer="adam")': 'optimizer="adam", run_eagerly=True)',
    "Adagrad(0.1))": "Adagrad(0.1), run_eagerly=True)",
    "Adam(0.002))": "Adam(0.002), run_eagerly=True)",
    "65_536": "512",
    "65536": "300",
    "16384": "512",
    "20_000_000": "300",
    "1_000_000": "300",
    "embedding_dim=64": f"embedding_dim={DIM}",
    "5000": "2",
    "save_freq=1000": "save_freq=1",
    "200_000": "300",
    "embedding_dim=768": f"embedding_dim={DIM}",
    "epochs=50": "epochs=1",
    "epochs=10": "epochs=1",
    "epochs=3": "epochs=1",
    " 256": " 64",
    # The one strategy of this process that may send something.
    "tf.distribute.MirroredStrategy()": "two_replicas()",
}


def in_small(code):
    """A block with smaller numbers."""
    for number, smaller in SMALLER.items():
        code = code.replace(number, smaller)
    return code


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "distributed.md" else [])
        for name in sorted(PAGES)
    ],
)
def test_page(name, tmp_path, monkeypatch):
    if (name in UNDER_KERAS_2) != IS_KERAS_2:
        pytest.skip("The page runs under the other Keras.")
    monkeypatch.chdir(tmp_path)
    names = reader()
    if PAGES[name] is not None:
        PAGES[name](names)
    for place, code in enumerate(blocks(DOCS / name)[: NUM_BLOCKS.get(name)]):
        if place and name in TRAINS:
            code += TRAINS[name]
        exec(compile(in_small(code), name, "exec"), names)


@pytest.mark.skipif(not IS_KERAS_2, reason="Keras 3 has no `fit` for several workers")
@pytest.mark.slow
@pytest.mark.end_to_end
def test_blocks_for_several_workers(tmp_path):
    finished = run_workers("negative_cache.tests.page_of_workers", folder=tmp_path)
    first, second = (worker.result() for worker in finished)
    assert first["loss"] == second["loss"] and np.isfinite(first["loss"])
    # The page's steps, in small.
    assert first["steps"] == second["steps"] == 2 and first["pool"] == "replicas"
    before, after = first["weights"]
    assert before != after and first["weights"] == second["weights"]
    assert first["filled"] > 0 and second["filled"] > 0


def test_every_page_with_python_is_run():
    pages = {page.name for page in DOCS.glob("**/*.md") if blocks(page)}
    assert pages == PAGES.keys()


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.md"))
    documented = set(re.findall(r"^::: negative_cache\.(\w+)", text, re.MULTILINE))
    # `layers` holds what the package itself exports; a version needs no page.
    assert set(nc.__all__) - documented == {"__version__"}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md")}
    assert pages <= set(re.findall(r"^ +- .*: (\S+\.md)$", navigation, re.MULTILINE))
