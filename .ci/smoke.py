"""Tries an installed package: trains, saves, loads, exports and evaluates a small model.

With `--archives FOLDER` it looks at what is in the sdist and the wheel instead.
"""

import argparse
import importlib.util
import pathlib
import tarfile
import zipfile


def check_archives(folder):
    """Checks what is in the sdist and the wheel of `folder`, and what is not."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    assert not [name for name in names if "/tests/" in name], "There are tests in the wheel."
    for name in ("negative_cache/py.typed", "negative_cache/ops/tree/", "licenses/LICENSE"):
        assert any(name in found for found in names), f"{name} is not in the wheel."
    with tarfile.open(sdist) as archive:
        files = archive.getnames()
    for name in ("/negative_cache/tests/conftest.py", "/CITATION.cff", "/LICENSE", "/Makefile"):
        assert any(found.endswith(name) for found in files), f"{name} is not in the sdist."
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(files)} files")


def try_package(keras):
    """Trains a small model under a Keras, and uses it in every way that a file or a server does."""
    import numpy as np
    import tensorflow as tf

    import negative_cache as nc

    assert "site-packages" in nc.__file__, nc.__file__
    assert tf.keras.layers.Layer.__module__.startswith("tf_keras") == (keras == 2)
    for name in ("tf_keras", "tensorflow_recommenders"):
        assert (importlib.util.find_spec(name) is not None) == (keras == 2), name
    ids = np.array([f"item {i}" for i in range(200)])

    def tower():
        lookup = tf.keras.layers.StringLookup(vocabulary=ids.tolist())
        return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(201, 8)])

    candidate_tower = tower()
    task = nc.CachedRetrieval(
        candidate_tower,
        tf.io.FixedLenFeature([], tf.string),
        cache_size=100,
        in_batch_negatives=True,
        candidate_id_key="candidate",
        remove_accidental_hits=True,
        frequency_correction=False,
    )
    model = nc.DualEncoder(tower(), candidate_tower, task)
    model.compile(optimizer=tf.keras.optimizers.Adam(0.05))
    pairs = tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(20)
    corpus = tf.data.Dataset.from_tensor_slices(ids).batch(64)
    losses = model.fit(pairs, epochs=10, verbose=0).history["loss"]
    measured = nc.evaluation.evaluate(model, corpus, pairs)
    assert losses[-1] < losses[1] and measured["mrr"] > 0.5, (losses, measured)
    model.save("model.keras")
    again = tf.keras.models.load_model("model.keras")
    assert nc.evaluation.evaluate(again, corpus, pairs) == measured
    model.export("exported")
    served = tf.saved_model.load("exported")
    np.testing.assert_allclose(
        served.embed_query(tf.constant(ids)), model.query_network(tf.constant(ids)), rtol=1e-5
    )
    if keras == 2:
        import tensorflow_recommenders  # noqa: F401
    print(
        f"negative-cache {nc.__version__}, TensorFlow {tf.__version__}, Keras {keras}: MRR"
        f" {measured['mrr']:.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archives", type=pathlib.Path)
    parser.add_argument("--keras", type=int, default=3)
    args = parser.parse_args()
    if args.archives:
        check_archives(args.archives)
    else:
        try_package(args.keras)
