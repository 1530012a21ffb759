"""What a cache costs on a GPU: sampling, training steps, the tree, and memory.

    python benchmarks/gpu.py                  # under five minutes; needs a GPU
    python benchmarks/gpu.py --quick          # small sizes, to see that it works; on a CPU too
    python benchmarks/gpu.py --parts sampler

Parts, each a table; every ratio is of medians measured side by side in this run:

* `sampler`: `ops.sample_softmax` and with it the exact gradient, next to `tf.matmul` and
  `tf.reduce_max` alone, as a graph or as XLA makes them, whichever is faster; with blocks of other
  sizes; and over a bfloat16 cache.
* `steps`: a training step of `DualEncoder` with caches, a corrector and an index, next to one with
  in-batch negatives; in a graph, and with `jit_compile=True`.
* `tree`: draws from a `TreeIndex` and updates of it, next to the exact sampler.
* `memory`: the peak of a cached step beside the bytes of the cache; and what an index without
  embeddings, with all else on the host, takes on the device, next to a float32 cache.
* `precision`: the error of log Z with TF32 and without; training under mixed precision.

On a machine without a GPU, `--quick` lets everything be traced as it is on one; what XLA compiles
then runs on the CPU, and its times say nothing of a GPU.
"""

import argparse
import functools
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
import tensorflow as tf
from _measure import normalized

import negative_cache as nc
from negative_cache import ops
from negative_cache._compat import keras
from negative_cache.ops import _execution, _large_blocks

SHAPES = (
    (64, 131072, 128),
    (256, 131072, 128),
    (1024, 131072, 128),
    (256, 131072, 768),
    (1024, 1048576, 128),
)
QUICK_SHAPES = ((8, 1024, 16), (8, 4096, 16))
SCALE = 20.0
# Scores in memory at a time, beside those that are chosen.
OTHER_SHARES = {"blocks of 2^21 scores": 2**21, "blocks of 2^27 scores": 2**27}
BATCH, DIM, VOCABULARY, HIDDEN = 1024, 128, 100_000, 512
CACHE_SIZES = {"131k": 131072, "1M": 1048576, "4M": 4 * 1048576}
# Steps between two looks at the clock, as a training does not wait for each.
STEPS_AT_ONCE = 5


# Sampling.


def compare_sampler(batch, size, dim, repeats):
    queries = normalized([batch, dim], 2) * SCALE
    embeddings = tf.Variable(normalized([size, dim], 1))
    short = tf.Variable(tf.cast(embeddings, tf.bfloat16))

    def bare():
        return tf.reduce_max(tf.matmul(queries, embeddings, transpose_b=True), axis=1)

    def draw(cached=embeddings, share=None):
        block_size = None if share is None else max(share // batch, 128)
        return ops.sample_softmax(queries, cached, seed=1, block_size=block_size)

    functions = {
        "bare graph": tf.function(bare),
        "bare XLA": tf.function(bare, jit_compile=True),
        "draw": tf.function(draw),
        "draw+gradient": tf.function(
            lambda: ops.sample_softmax_with_gradient(queries, embeddings, seed=1)
        ),
        "draw, bfloat16": tf.function(lambda: draw(short)),
        **{
            name: tf.function(functools.partial(draw, share=share))
            for name, share in OTHER_SHARES.items()
        },
    }
    times = _measure.medians(functions, repeats=repeats)
    least = min(times["bare graph"], times["bare XLA"])
    return {
        "B": batch,
        "C": size,
        "d": dim,
        "bare, ms": least,
        "draw, ms": times["draw"],
        **{f"{name}/bare": times[name] / least for name in ("draw", "draw+gradient")},
        "bfloat16/float32": times["draw, bfloat16"] / times["draw"],
        **{f"{name}/bare": times[name] / least for name in OTHER_SHARES},
    }


# Training steps.


class Tower(keras.layers.Layer):
    """An embedding and three dense layers, of unit length."""

    def __init__(self, sizes, **kwargs):
        super().__init__(**kwargs)
        vocabulary, hidden, dim = sizes
        self.parts = [
            keras.layers.Embedding(vocabulary, dim),
            keras.layers.Dense(hidden, activation="relu"),
            keras.layers.Dense(hidden, activation="relu"),
            keras.layers.Dense(dim),
        ]

    def call(self, features):
        values = features["id"]
        for part in self.parts:
            values = part(values)
        return tf.math.l2_normalize(tf.cast(values, tf.float32), axis=-1)


def make_model(sizes, batch, cache_size, *, with_index=False, **kwargs):
    """A compiled model, its cache full; and a batch of it."""
    vocabulary, _, dim = sizes
    tower = Tower(sizes)
    if with_index:
        kwargs["index"] = nc.TreeIndex(cache_size, dim)
    task = nc.CachedRetrieval(
        tower,
        {"id": tf.io.FixedLenFeature([], tf.int64)},
        cache_size,
        temperature=0.05,
        in_batch_negatives=True,
        embedding_dim=dim,
        seed=1,
        **kwargs,
    )
    model = nc.DualEncoder(Tower(sizes), tower, task)
    model.compile(keras.optimizers.Adam(1e-3), jit_compile=False)
    ids = {"id": tf.random.stateless_uniform([batch], [1, 1], maxval=vocabulary, dtype=tf.int64)}
    data = {"query": ids, "candidate": ids}
    model(data)
    model.optimizer.build(model.trainable_variables)
    if cache_size:
        fill(task.cache, vocabulary)
    return model, data


def fill(cache, vocabulary):
    """Fills all rows with candidates of any embedding."""
    rows = min(cache.cache_size, 2**16)
    for start in range(0, cache.cache_size, rows):
        ids = (start + tf.range(rows, dtype=tf.int64)) % vocabulary
        items = {"id": ids, "embedding": normalized([rows, cache.embeddings.shape[1]], start)}
        items["log_sampling_probability"] = tf.zeros([rows])
        index, cache.index = cache.index, None
        cache.update(new_items=items)
        cache.index = index
    if cache.index is not None:
        cache.index.index(tf.cast(cache.embeddings, tf.float32).numpy(), verbose=0)


def steps_of(model, data, jit_compile):
    step = tf.function(model.train_step, jit_compile=jit_compile)

    def run():
        for _ in range(STEPS_AT_ONCE):
            logs = step((data,))
        return logs["loss"]

    return run


def compare_steps(quick, repeats):
    sizes = (1000, 32, 16) if quick else (VOCABULARY, HIDDEN, DIM)
    batch = 16 if quick else BATCH
    caches = {name: 2048 for name in CACHE_SIZES} if quick else CACHE_SIZES
    kinds = {
        "in-batch": {"cache_size": 0},
        "cache 131k": {"cache_size": caches["131k"]},
        "cache 131k, corrector": {"cache_size": caches["131k"], "corrector": nc.Corrector()},
        "cache 131k, index": {"cache_size": caches["131k"], "with_index": True},
        "cache 1M": {"cache_size": caches["1M"]},
        "cache 4M": {"cache_size": caches["4M"]},
        "cache 4M, index": {"cache_size": caches["4M"], "with_index": True},
    }
    rows = []
    # The large ones apart: not all fit beside each other.
    for names in (list(kinds)[:5], ["in-batch", *list(kinds)[5:]]):
        models = {name: make_model(sizes, batch, **kinds[name]) for name in names}
        for jit_compile in (False, True):
            functions = {name: steps_of(*models[name], jit_compile) for name in names}
            times = _measure.medians(functions, repeats=repeats)
            rows += [
                {
                    "step": name,
                    "jit_compile": jit_compile,
                    "ms": times[name] / STEPS_AT_ONCE,
                    "of in-batch": times[name] / times["in-batch"],
                    "of the plain cache": times[name] / times.get(name.split(",")[0], np.nan),
                }
                for name in names
            ]
            print(_measure.table(rows[-len(names) :]), flush=True)
        del models, functions
    return rows


# The tree.


def compare_tree(size, dim, batch, moved, repeats):
    embeddings = normalized([size, dim], 1)
    index = nc.TreeIndex(size, dim)
    index.index(embeddings.numpy(), verbose=0)
    queries = normalized([batch, dim], 2) * SCALE
    ids = tf.constant(np.random.default_rng(0).choice(size, moved, replace=False), tf.int32)
    places = [tf.gather(embeddings, ids) + 0.05 * normalized([moved, dim], s) for s in (3, 4)]
    turn = tf.Variable(0, dtype=tf.int64)

    def update():
        turn.assign_add(1)
        index.update(ids, tf.where(turn % 2 == 0, *places))
        return index.num_candidates

    functions = {
        "exact": lambda: ops.sample_softmax(queries, index.tree.candidates.embeddings, seed=1),
        "draw": lambda: index.sample(queries, seed=1),
        "update": update,
    }
    functions = {name: tf.function(function) for name, function in functions.items()}
    times = _measure.medians(functions, repeats=repeats)
    return {
        "N": size,
        "d": dim,
        "B": batch,
        "moved": moved,
        **{f"{name}, ms": value for name, value in times.items()},
        **_measure.ratios(times, "exact"),
    }


# Memory.


def device_bytes(which):
    """Bytes of the device that are in use now ("current"), or were at the most ("peak")."""
    if not tf.config.list_logical_devices("GPU"):
        return float("nan")
    return tf.config.experimental.get_memory_info("GPU:0")[which]


def reset_peak():
    if tf.config.list_logical_devices("GPU"):
        tf.config.experimental.reset_memory_stats("GPU:0")


def compare_step_memory(quick):
    """The peak of a step beside the cache's own bytes, in units of 2^20."""
    sizes = (1000, 32, 16) if quick else (VOCABULARY, HIDDEN, DIM)
    batch, cache_size = (16, 2048) if quick else (BATCH, CACHE_SIZES["1M"])
    rows = []
    for name, size in (("in-batch", 0), ("cached", cache_size)):
        model, data = make_model(sizes, batch, size)
        run = steps_of(model, data, False)
        run()
        before = device_bytes("current")
        reset_peak()
        run().numpy()
        rows.append(
            {
                "step": name,
                "embeddings, MiB": size * sizes[-1] * 4 / 2**20,
                "held, MiB": before / 2**20,
                "peak of a step above, MiB": (device_bytes("peak") - before) / 2**20,
            }
        )
        del model, run
    return rows


def compare_placements(size, dim):
    """Bytes that candidates take on the device: as a cache, and as an index alone."""
    features = {"id": np.arange(size), "x": np.zeros([size], np.float32)}
    corpus = tf.data.Dataset.from_tensor_slices(features).batch(4096)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=[max(size // 200, 2), dim]).astype(np.float32)

    def tower(features):
        # Clustered, as embeddings are.
        noise = tf.random.stateless_normal([tf.size(features["id"]), dim], [1, 2])
        nearest = tf.gather(centres, features["id"] % len(centres))
        return tf.math.l2_normalize(nearest + 0.3 * noise, axis=1)

    rows = []
    for name in ("float32 cache", "index of 8 bytes, the rest on the host"):
        before = device_bytes("current")
        kwargs = {}
        if name != "float32 cache":
            kwargs["index"] = nc.TreeIndex(size, dim, store_embeddings=False)
            kwargs["on_host"] = ["id", "x", "embedding"]
        cache = nc.Cache.from_dataset(corpus, tower, candidate_id_key="id", verbose=0, **kwargs)
        held = device_bytes("current") - before
        computed = cache.index.num_bytes if cache.index is not None else size * dim * 4
        rows.append(
            {
                "N": size,
                "d": dim,
                "what": name,
                "on the device, MiB": held / 2**20,
                "of embeddings or index alone, MiB": computed / 2**20,
            }
        )
        del cache
    for key in ("on the device, MiB", "of embeddings or index alone, MiB"):
        for row in rows:
            row["times less: " + key.split(",")[0]] = rows[0][key] / row[key]
    return rows


# Precision.


def compare_precision(batch, size, dim):
    queries = normalized([batch, dim], 2) * SCALE
    embeddings = tf.Variable(normalized([size, dim], 1))
    scores = queries.numpy().astype(np.float64) @ embeddings.numpy().astype(np.float64).T
    largest = scores.max(axis=1)
    expected = largest + np.log(np.sum(np.exp(scores - largest[:, np.newaxis]), axis=1))
    rows = []
    for enabled in (True, False):
        tf.config.experimental.enable_tensor_float_32_execution(enabled)
        sample = tf.function(functools.partial(ops.sample_softmax, seed=1))(queries, embeddings)
        error = np.abs(sample.log_partition.numpy() - expected)
        rows.append({"TF32": enabled, "B": batch, "C": size, "d": dim})
        rows[-1]["largest error of log Z"] = float(error.max())
    tf.config.experimental.enable_tensor_float_32_execution(True)
    return rows


def train_in_mixed_precision(quick, steps=20):
    sizes = (1000, 32, 16) if quick else (VOCABULARY, HIDDEN, DIM)
    batch, cache_size = (16, 2048) if quick else (BATCH, CACHE_SIZES["131k"])
    rows = []
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        keras.mixed_precision.set_global_policy(policy)
        model, data = make_model(sizes, batch, cache_size)
        step = tf.function(model.train_step)
        losses = [float(step((data,))["loss"]) for _ in range(steps)]
        rows.append({"policy": policy, "first loss": losses[0], "mean loss so far": losses[-1]})
    keras.mixed_precision.set_global_policy("float32")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("sampler", "steps", "tree", "memory", "precision")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/gpu.json")
    )
    options = parser.parse_args()
    devices = tf.config.list_physical_devices("GPU")
    if not devices and not options.quick:
        parser.error("there is no GPU that TensorFlow finds: only --quick works")
    card = "none: traced as on a GPU, run on the CPU"
    if devices:
        card = tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU")
    else:
        _execution.device_type = lambda like=None: "GPU"
    print(f"card: {card}; {_large_blocks.SCORES_AT_ONCE} scores at a time")
    quick = options.quick
    repeats = 3 if quick else 21
    run = {
        "sampler": lambda: {
            "sampler": [
                compare_sampler(*shape, repeats) for shape in (QUICK_SHAPES if quick else SHAPES)
            ]
        },
        "steps": lambda: {"steps": compare_steps(quick, 3 if quick else 11)},
        "tree": lambda: {
            "tree": [
                compare_tree(*shape, repeats)
                for shape in ([(2000, 16, 8, 64)] if quick else [(10**6, 64, 64, 1000)])
            ]
        },
        "memory": lambda: {
            "memory of a step": compare_step_memory(quick),
            "placement": compare_placements(*((4000, 64) if quick else (500_000, 768))),
        },
        "precision": lambda: {
            "precision": compare_precision(*((8, 1024, 16) if quick else (256, 131072, 128))),
            "mixed precision": train_in_mixed_precision(quick),
        },
    }
    record = {"card": card, "scores at a time": _large_blocks.SCORES_AT_ONCE}
    for part in options.parts:
        for name, rows in run[part]().items():
            record[name] = rows
            print(f"\n{name}\n{_measure.table(rows)}", flush=True)
            # Whatever ends the run leaves what there is.
            _measure.save(options.output, record)


if __name__ == "__main__":
    main()
