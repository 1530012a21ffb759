"""Runs the examples of docstrings, with towers and data as a reader would have them.

An example that states an output must have it. Without one its output, such as a progress bar, is
not looked at.
"""

import contextlib
import doctest
import inspect
import io

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import IS_KERAS_2
from negative_cache.layers import DriftCorrector
from negative_cache.tests.test_docs import DIM, TITLES, Tower, reader

OBJECTS = {
    name: getattr(nc, name)
    for name in nc.__all__
    if inspect.isclass(getattr(nc, name)) or inspect.isfunction(getattr(nc, name))
}
OBJECTS["evaluation.evaluate"] = nc.evaluation.evaluate
OBJECTS["CacheManager"] = nc.negative_cache.CacheManager
OBJECTS["handlers.CacheManager"] = nc.handlers.CacheManager
# The calls are the same, for fewer candidates and steps.
SMALLER = {
    'optimizer="adam")': 'optimizer="adam", run_eagerly=True)',
    "65536": "300",
    "1_000_000": "300",
    "embedding_dim=64": f"embedding_dim={DIM}",
    "NystromCorrector(1024)": "NystromCorrector(16)",
    "epochs=10, steps_per_epoch=5000": "epochs=1, steps_per_epoch=2",
    "steps_per_epoch=5000": "steps_per_epoch=2",
    "save_freq=1000": "save_freq=1",
    ", 256": ", 64",
}


def examples(public):
    text = inspect.getdoc(public) or ""
    for number, smaller in SMALLER.items():
        text = text.replace(number, smaller)
    return doctest.DocTestParser().get_examples(text)


def names_of(public, source):
    names = reader()
    names.update(
        vars(nc), nc=nc, np=np, DriftCorrector=DriftCorrector, evaluate=nc.evaluation.evaluate
    )
    names[public.__name__] = public
    names["specs"] = {"title": tf.io.FixedLenFeature([], tf.string)}
    names["tower"] = names["candidate_tower"]
    names["other_tower"] = Tower()
    names["titles"] = tf.constant(TITLES)[:32]
    names["queries"] = names["titles"]
    names["query_embeddings"] = names["query_tower"](names["titles"])
    names["candidate_embeddings"] = names["tower"](names["titles"])
    names["embeddings"] = names["tower"](tf.constant(TITLES))
    names["stale_embeddings"] = names["embeddings"]
    names["fresh_embeddings"] = names["embeddings"][:2]
    names["data"] = names["pairs"].repeat().batch(64)
    # These take seconds.
    if "cache=cache" in source or "archive" in source:
        names["cache"] = names["archive"] = nc.Cache.from_dataset(
            names["candidates"].batch(1024), names["tower"], candidate_id_key="title", verbose=0
        )
    if "model" in source:
        task = nc.CachedRetrieval(names["tower"], names["specs"], 300, temperature=0.1)
        names["model"] = nc.DualEncoder(names["query_tower"], names["tower"], task)
        names["model"].compile(optimizer="adam", run_eagerly=True)
        names["model"](next(iter(names["pairs"].batch(2))))
    return names


@pytest.mark.skipif(IS_KERAS_2, reason="To save time examples run under one Keras.")
@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = examples(OBJECTS[name])
    assert found, f"The docstring of {name} has no example."
    names = names_of(OBJECTS[name], "".join(example.source for example in found))
    checker = doctest.OutputChecker()
    for example in found:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(example.source, name, "single"), names)
        if example.want:
            got = output.getvalue()
            assert checker.check_output(example.want, got, doctest.ELLIPSIS), got
