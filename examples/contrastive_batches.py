"""Train a retriever with batches of similar pairs, which are hard, and with shuffled ones.

    python examples/contrastive_batches.py                 # half a minute
    python examples/contrastive_batches.py --pairs 20000

The candidates are points around cluster centres, and a query is a noisy copy of its candidate in
other coordinates. In a shuffled batch hardly two candidates are of one cluster, so that telling
clusters apart is all that it teaches. Model, loss and number of steps are the same.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import negative_cache as nc

DIM = 32


class Tower(tf.keras.layers.Layer):
    """Features [n, d] -> unit embeddings [n, d], one matrix to learn."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=[DIM, DIM], initializer="glorot_uniform", name="matrix")

    def call(self, inputs):
        features = inputs["features"] if isinstance(inputs, dict) else inputs
        return tf.math.l2_normalize(tf.matmul(features, self.matrix), axis=1)


def make_pairs(num_pairs, rng):
    """Features of queries and of candidates, which have an id."""
    centres = rng.normal(size=[num_pairs // 40, DIM])
    features = centres[rng.integers(len(centres), size=num_pairs)]
    features = features + 0.3 * rng.normal(size=features.shape)
    rotation, _ = np.linalg.qr(rng.normal(size=[DIM, DIM]))
    queries = (features + 0.1 * rng.normal(size=features.shape)) @ rotation
    return {
        "query": queries.astype(np.float32),
        "candidate": {"id": np.arange(num_pairs), "features": features.astype(np.float32)},
    }


def make_model():
    tf.keras.utils.set_random_seed(0)
    candidate_tower = Tower()
    specs = {
        "id": tf.io.FixedLenFeature([], tf.int64),
        "features": tf.io.FixedLenFeature([DIM], tf.float32),
    }
    task = nc.CachedRetrieval(
        candidate_tower, specs, 0, temperature=0.05, in_batch_negatives=True, candidate_id_key="id"
    )
    model = nc.DualEncoder(Tower(), candidate_tower, task)
    model.compile(optimizer=tf.keras.optimizers.Adam(5e-3))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    pairs = make_pairs(options.pairs, np.random.default_rng(0))
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    corpus = dataset.map(lambda pair: pair["candidate"]).batch(1024)

    def batches_in_memory(model):
        return nc.GlobalContrastiveBatches(
            model, pairs, options.batch_size, candidate_id_key="id", verbose=0
        )

    def batches_of_shards(model):
        # Only a shard is in memory: for pairs that come from files.
        return nc.GlobalContrastiveBatches.from_dataset(
            model,
            dataset,
            options.batch_size,
            shard_size=max(options.pairs // 2, options.batch_size),
            candidate_id_key="id",
            verbose=0,
        )

    sources = {
        "shuffled": lambda model: dataset.shuffle(options.pairs, seed=0).batch(options.batch_size),
        "contrastive": batches_in_memory,
        "contrastive, of shards": batches_of_shards,
    }
    for name, make_batches in sources.items():
        model = make_model()
        history = model.fit(
            make_batches(model), epochs=options.epochs, shuffle=False, verbose=0
        ).history
        metrics = nc.evaluation.evaluate(model, corpus, dataset.batch(1024), candidate_id_key="id")
        print(f"{name}: loss {history['loss'][-1]:.2f}, MRR {metrics['mrr']:.3f}")


if __name__ == "__main__":
    main()
