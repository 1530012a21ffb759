"""What a training step costs: with a cache, and with in-batch negatives only.

    python benchmarks/step.py            # half a minute
    python benchmarks/step.py --help     # other sizes

Towers are bags of words (a mean of word vectors and a dense layer), so that the cost of the task
shows. Steps of both models run in turn, in one process, so that both see the same machine. To
compare two commits, run the script in a checkout of each, in turn: the package is that of the
checkout.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf
from _measure import medians, ratios, table

import negative_cache as nc
from negative_cache._compat import keras

VOCABULARY, WORDS, NUM_BATCHES, STEPS_A_CALL = 50_000, 16, 20, 20


class BagOfWords(keras.layers.Layer):
    """{"words": [n, WORDS] int64} -> [n, dim]."""

    def __init__(self, dim):
        super().__init__()
        self.table = keras.layers.Embedding(VOCABULARY, dim)
        self.dense = keras.layers.Dense(dim)

    def call(self, features):
        return self.dense(tf.reduce_mean(self.table(features["words"]), axis=1))


def make_batches(batch_size):
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(NUM_BATCHES):
        words = {"words": tf.constant(rng.integers(0, VOCABULARY, [batch_size, WORDS]))}
        ids = tf.constant(rng.integers(0, VOCABULARY, batch_size))
        batches.append({"query": words, "candidate": {"id": ids, **words}})
    return batches


def make_steps(cache_size, batches, dim):
    """A function that trains `STEPS_A_CALL` steps and returns a loss; and the size of its graph."""
    query_tower, candidate_tower = BagOfWords(dim), BagOfWords(dim)
    task = nc.CachedRetrieval(
        candidate_tower,
        {
            "id": tf.io.FixedLenFeature([], tf.int64),
            "words": tf.io.FixedLenFeature([WORDS], tf.int64),
        },
        cache_size,
        temperature=0.1,
        in_batch_negatives=True,
        candidate_id_key="id",
        remove_accidental_hits=True,
        seed=1,
    )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model(batches[0])
    variables = model.trainable_variables
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(variables)

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            embeddings = model(batch, training=True)
            loss = model.compute_loss(batch, None, embeddings, training=True)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    def steps():
        for i in range(STEPS_A_CALL):
            loss = step(batches[i % NUM_BATCHES])
        return loss

    while cache_size and int(task.cache.num_filled) < cache_size:
        steps()
    graph = step.get_concrete_function(batches[0]).graph.as_graph_def()
    size = len(graph.node) + sum(len(part.node_def) for part in graph.library.function)
    return steps, size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cache-size", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=41, help="calls of 20 steps each")
    options = parser.parse_args()
    batches = make_batches(options.batch_size)
    print(pathlib.Path(nc.__file__).parent)
    steps, sizes = {}, {}
    for name, cache_size in (("in-batch", 0), ("cache", options.cache_size)):
        steps[name], sizes[name] = make_steps(cache_size, batches, options.dim)
    milliseconds = medians(steps, repeats=options.repeats)
    print(
        table(
            [
                {
                    "negatives": name,
                    "ms a step": milliseconds[name] / STEPS_A_CALL,
                    "operations in the graph": sizes[name],
                }
                for name in steps
            ]
        )
    )
    print(f"cache / in-batch: {ratios(milliseconds, 'in-batch')['cache/in-batch']:.2f}")


if __name__ == "__main__":
    main()
