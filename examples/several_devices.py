"""Train on several devices whose caches are one pool of negatives.

    python examples/several_devices.py                     # half a minute: two parts of one CPU
    python examples/several_devices.py --replicas 4
    python examples/several_devices.py --pool none         # each device with its own cache only
    python examples/several_devices.py --devices GPU:0,GPU:1

Queries and candidates are strings, so that features of any kind are seen to travel. Every device
has a quarter of the candidates as rows; with a pool a query has the rows of all as negatives.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import negative_cache as nc

keras = tf.keras
NUM_CANDIDATES, DIM, BATCH_SIZE = 4_000, 32, 64


def make_strategy(options):
    """Replicas on the named devices, or on so many parts of the CPU."""
    if options.devices:
        return tf.distribute.MirroredStrategy(options.devices.split(","))
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * options.replicas
    tf.config.set_logical_device_configuration(cpu, parts)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(options.replicas)])


class Tower(keras.layers.Layer):
    """The mean of the vectors of a text's words, of unit length: strings [n] -> [n, DIM]."""

    def __init__(self, key=None):
        super().__init__()
        self.key = key
        self.words = keras.layers.Embedding(4096, DIM)

    def call(self, inputs):
        texts = inputs if self.key is None else inputs[self.key]
        ids = tf.strings.to_hash_bucket_fast(tf.strings.split(texts), 4096)
        words = self.words(ids.to_tensor(default_value=0))
        return tf.math.l2_normalize(tf.reduce_mean(words, axis=1), axis=1)


def make_texts(rng):
    """[N] titles of four words each, and [N] queries with two of them."""
    words = np.array([f"w{i}" for i in range(800)])
    chosen = rng.choice(words, [NUM_CANDIDATES, 4])
    titles = [f"{' '.join(row)} no{i}" for i, row in enumerate(chosen)]
    return np.array(titles), np.array([f"about {row[0]} {row[1]}" for row in chosen])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2, help="parts of the CPU")
    parser.add_argument("--devices", help="names with commas between them, instead of the CPU")
    parser.add_argument("--pool", choices=["replicas", "none"], default="replicas")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    strategy = make_strategy(options)
    keras.utils.set_random_seed(0)
    titles, queries = make_texts(np.random.default_rng(0))
    candidates = tf.data.Dataset.from_tensor_slices({"title": titles}).batch(500)
    pairs = {"query": queries, "candidate": {"title": titles}}
    batches = tf.data.Dataset.from_tensor_slices(pairs).shuffle(NUM_CANDIDATES, seed=0)

    # What holds state is made in the scope: the caches, and the weights.
    with strategy.scope():
        tower = Tower("title")
        task = nc.CachedRetrieval(
            tower,
            {"title": tf.io.FixedLenFeature([], tf.string)},
            cache_size=NUM_CANDIDATES // 4,
            temperature=0.07,
            in_batch_negatives=True,
            candidate_id_key="title",
            remove_accidental_hits=True,
            embedding_dim=DIM,
            pool=None if options.pool == "none" else options.pool,
            seed=0,
        )
        model = nc.DualEncoder(Tower(), tower, task)
        model.compile(optimizer=keras.optimizers.Adam(0.01))

    model.fit(
        batches.batch(BATCH_SIZE, drop_remainder=True),
        epochs=options.epochs,
        callbacks=[nc.CacheWarmStart(candidates, verbose=0)],
        verbose=2,
    )
    test = tf.data.Dataset.from_tensor_slices(pairs).batch(500)
    found = nc.evaluation.evaluate(model, candidates, test, candidate_id_key="title")
    rows = strategy.experimental_local_results(task.cache.data["title"])
    different = len(set(np.concatenate([part.numpy() for part in rows]).tolist()))
    print(f"{len(rows)} replicas with {different:,} different candidates in their caches")
    print(f"MRR of the training queries: {found['mrr']:.3f}")


if __name__ == "__main__":
    main()
