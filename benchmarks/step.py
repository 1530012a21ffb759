"""What a training step costs: with a cache, and with in-batch negatives only.

    python benchmarks/step.py            # half a minute
    python benchmarks/step.py --optimizer adam
    python benchmarks/step.py --towers transformer --draws 8 16 32
    python benchmarks/step.py --help     # other sizes

Towers are bags of words (a mean of word vectors and a dense layer), so that the cost of the task
shows, or transformers of two blocks over 32 words of a query and 64 of a candidate. Steps of all
models run in turn, in one process, so that all see the same machine. To compare two commits, run
the script in a checkout of each, in turn: the package is that of the checkout.
"""

import argparse
import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf
from _measure import medians, ratios, table
from _towers import TransformerTower

import negative_cache as nc
from negative_cache._compat import keras

VOCABULARY, NUM_BATCHES = 50_000, 20
# Words of a query and of a candidate, and steps a call.
LENGTHS = {"words": (16, 16), "transformer": (32, 64)}
STEPS_A_CALL = {"words": 20, "transformer": 2}


class BagOfWords(keras.layers.Layer):
    """{"ids": [n, words] int64} -> [n, dim]."""

    def __init__(self, dim):
        super().__init__()
        self.table = keras.layers.Embedding(VOCABULARY, dim)
        self.dense = keras.layers.Dense(dim)

    def call(self, features):
        return self.dense(tf.reduce_mean(self.table(features["ids"]), axis=1))


class FusedAdam:
    """Adam of one fused operation a variable; gradients of tables are made dense."""

    def __init__(self, learning_rate):
        self.learning_rate = learning_rate

    def build(self, variables):
        self.step = tf.Variable(0.0)
        self.slots = [
            [tf.Variable(tf.zeros(variable.shape)) for _ in range(2)] for variable in variables
        ]

    def apply_gradients(self, pairs):
        self.step.assign_add(1.0)
        for (gradient, variable), (mean, variance) in zip(pairs, self.slots):
            tf.raw_ops.ResourceApplyAdam(
                var=getattr(variable, "value", variable).handle,
                m=mean.handle,
                v=variance.handle,
                beta1_power=0.9**self.step,
                beta2_power=0.999**self.step,
                lr=self.learning_rate,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-7,
                grad=tf.convert_to_tensor(gradient),
            )


OPTIMIZERS = {
    "sgd": keras.optimizers.SGD,
    "adam": keras.optimizers.Adam,
    "fused-adam": FusedAdam,
}


def make_batches(batch_size, lengths):
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(NUM_BATCHES):
        query, candidate = (
            tf.constant(rng.integers(1, VOCABULARY, [batch_size, length])) for length in lengths
        )
        row = tf.constant(rng.integers(0, VOCABULARY, batch_size))
        batches.append({"query": {"ids": query}, "candidate": {"row": row, "ids": candidate}})
    return batches


def make_tower(kind, length, dim):
    if kind == "words":
        return BagOfWords(dim)
    return TransformerTower(keras.layers.Embedding(VOCABULARY, dim), length, dim)


def make_steps(cache_size, batches, options, **draws):
    """A function that trains some steps and returns a loss; and the size of its graph."""
    lengths = LENGTHS[options.towers]
    query_tower, candidate_tower = (
        make_tower(options.towers, length, options.dim) for length in lengths
    )
    task = nc.CachedRetrieval(
        candidate_tower,
        {
            "row": tf.io.FixedLenFeature([], tf.int64),
            "ids": tf.io.FixedLenFeature([lengths[1]], tf.int64),
        },
        cache_size,
        temperature=0.1,
        in_batch_negatives=True,
        candidate_id_key="row",
        remove_accidental_hits=True,
        seed=1,
        **draws,
    )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model(batches[0])
    if cache_size:
        rows = np.arange(cache_size)
        rng = np.random.default_rng(1)
        ids = rng.integers(1, VOCABULARY, [cache_size, lengths[1]])
        for part in np.array_split(rows, math.ceil(cache_size / 1024)):
            task.add_to_cache({"row": part, "ids": ids[part]})
    variables = model.trainable_variables
    optimizer = OPTIMIZERS[options.optimizer](0.001)
    optimizer.build(variables)

    @tf.function
    def step(batch):
        with tf.GradientTape() as tape:
            embeddings = model(batch, training=True)
            loss = model.compute_loss(batch, None, embeddings, training=True)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    def steps():
        for i in range(STEPS_A_CALL[options.towers]):
            loss = step(batches[i % NUM_BATCHES])
        return loss

    graph = step.get_concrete_function(batches[0]).graph.as_graph_def()
    size = len(graph.node) + sum(len(part.node_def) for part in graph.library.function)
    return steps, size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cache-size", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=41, help="calls of 20 steps each, or 2")
    parser.add_argument("--towers", choices=sorted(LENGTHS), default="words")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="sgd")
    parser.add_argument("--draws", type=int, nargs="*", default=[], help="other values of n too")
    options = parser.parse_args()
    batches = make_batches(options.batch_size, LENGTHS[options.towers])
    print(pathlib.Path(nc.__file__).parent)
    models = {"in-batch": (0, {}), "cache": (options.cache_size, {})}
    for count in options.draws:
        models[f"cache, {count} draws"] = options.cache_size, {"num_draws": count}
    steps, sizes = {}, {}
    for name, (cache_size, draws) in models.items():
        steps[name], sizes[name] = make_steps(cache_size, batches, options, **draws)
    milliseconds = medians(steps, repeats=options.repeats)
    print(
        table(
            [
                {
                    "negatives": name,
                    "ms a step": milliseconds[name] / STEPS_A_CALL[options.towers],
                    "operations in the graph": sizes[name],
                }
                for name in steps
            ]
        )
    )
    for name, ratio in ratios(milliseconds, "in-batch").items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
