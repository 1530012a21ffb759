"""Train against a whole corpus that is encoded once, and correct what has gone stale.

    python examples/stale_embeddings.py                      # a minute on two cores
    python examples/stale_embeddings.py --corrector nystrom
    python examples/stale_embeddings.py --corrector none --refresh-fraction 0.01

The candidates are points around cluster centres, and only one in eight of them is ever the positive
of a query: the others grow stale unless something is done. Watch `probe_staleness`, the mean of
‖ĝ - g‖² / ‖g‖² over random rows of the cache, and `probe_corrected_staleness`, the same after the
correction, against `candidates_encoded`.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import negative_cache as nc

keras = tf.keras
DIM, TEMPERATURE = 32, 0.05


def make_tower():
    """Features [n, DIM] -> unit embeddings [n, DIM], by two layers."""
    return keras.Sequential(
        [
            keras.layers.Input([DIM]),
            keras.layers.Dense(128, activation="gelu"),
            keras.layers.Dense(DIM),
            keras.layers.UnitNormalization(),
        ]
    )


class Tower(keras.layers.Layer):
    """`make_tower` for candidates, which come as features with an id."""

    def __init__(self):
        super().__init__()
        self.network = make_tower()

    def call(self, features):
        return self.network(features["point"])


def make_data(num_candidates, rng):
    """Candidate features, and queries: a noisy copy of each, in other coordinates."""
    centres = rng.normal(size=[num_candidates // 50, DIM])
    points = centres[rng.integers(len(centres), size=num_candidates)]
    points = points + 0.5 * rng.normal(size=points.shape)
    rotation, _ = np.linalg.qr(rng.normal(size=[DIM, DIM]))
    queries = (points + 0.1 * rng.normal(size=points.shape)) @ rotation
    return points.astype(np.float32), queries.astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--corrector", choices=["network", "nystrom", "none"], default="network")
    parser.add_argument("--refresh-fraction", type=float, default=0.0)
    options = parser.parse_args()

    keras.utils.set_random_seed(0)
    points, queries = make_data(options.candidates, np.random.default_rng(0))
    features = {"point": points, "id": np.arange(len(points))}
    candidates = tf.data.Dataset.from_tensor_slices(features).batch(1024)
    with_pairs = np.arange(0, len(points), 8)
    pairs = tf.data.Dataset.from_tensor_slices(
        {
            "query": queries[with_pairs],
            "candidate": {name: values[with_pairs] for name, values in features.items()},
        }
    )
    query_tower, candidate_tower = make_tower(), Tower()
    cache = nc.Cache.from_dataset(candidates, candidate_tower, candidate_id_key="id")
    corrector = {
        "network": lambda: nc.Corrector(hidden_units=128),
        "nystrom": lambda: nc.NystromCorrector(num_landmarks=512),
        "none": lambda: None,
    }[options.corrector]()
    task = nc.CachedRetrieval(
        candidate_tower,
        cache=cache,
        temperature=TEMPERATURE,
        corrector=corrector,
        refresh_fraction=options.refresh_fraction,
        probe_size=256,
        probe_every=10,
        seed=0,
    )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    validation = tf.data.Dataset.from_tensor_slices(
        {
            "query": queries[1::80],
            "candidate": {name: values[1::80] for name, values in features.items()},
        }
    ).batch(256)
    metrics = nc.CorpusMetrics(candidates, validation, k=(1, 10), candidate_id_key="id")
    model.fit(
        pairs.shuffle(len(with_pairs), seed=0).batch(64, drop_remainder=True),
        epochs=options.epochs,
        callbacks=[metrics],
        verbose=2,
    )


if __name__ == "__main__":
    main()
