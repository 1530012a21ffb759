"""What exact sampling costs, next to the matrix product it cannot do without.

    python benchmarks/sampler.py            # about ten minutes on two cores; --quick for a look
    python benchmarks/sampler.py --parts shapes update

Parts, each a table; every ratio is of medians measured side by side in this run, in steady state,
after updates have run:

* `shapes`: (a) `tf.matmul` + `tf.reduce_max`; (b) the straightforward formulation, written here
  from the equations: the [B, C] scores, Gumbel noise, a softmax over [B, C + 1], and for an update
  a new copy of the cache; (c) `ops.sample_softmax`, alone and with `Cache.update`.
* `top_k`: the same with the published grouping into 64 runs.
* `dtype`: a bfloat16 and a float16 cache against a float32 one.
* `update`: `Cache.update` at 4 thousand and at 4 million rows.
* `memory`: growth of the resident set by one call, each in a fresh process; "killed" where the
  system runs out of memory.
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

SHAPES = (
    (64, 131072, 128),
    (256, 131072, 128),
    (1024, 131072, 128),
    (256, 131072, 768),
    (8, 131072, 768),
    (8, 1048576, 128),
)
TOP_K = 64
DTYPE_SHAPES = ((64, 131072, 128), (256, 131072, 128), (256, 131072, 768))
UPDATE_SIZES, UPDATE_BATCH, UPDATE_DIM = (4096, 4 * 2**20), 256, 64
MEMORY_SHAPE = (1024, 2**20, 128)
SCALE = 20.0


def filled_cache(size, dim, dtype=tf.float32):
    """A cache whose rows are all filled, and which updates have scattered into."""
    cache = nc.Cache({"embedding": tf.io.FixedLenFeature([dim], dtype)}, size)
    cache.embeddings.assign(tf.cast(normalized([size, dim], 1), dtype))
    for seed in range(3):
        cache.update(new_items={"embedding": normalized([16, dim], seed)})
    return cache


def bare(candidates, queries):
    return tf.reduce_max(tf.matmul(queries, candidates, transpose_b=True), axis=1)


def straightforward(candidates, queries, positives, top_k=None):
    """ŷ by Gumbel-max over all scores, -log p⁺ by a softmax over the positive and all scores."""
    scores = tf.matmul(queries, candidates, transpose_b=True)
    indices = None
    if top_k is not None:
        runs = tf.reshape(scores, [tf.shape(scores)[0], top_k, -1])
        indices = tf.argmax(runs, axis=2) + tf.range(top_k, dtype=tf.int64) * runs.shape[2]
        scores = tf.reduce_max(runs, axis=2)
    gumbel = -tf.math.log(-tf.math.log(tf.random.uniform(tf.shape(scores), 1e-20, 1.0)))
    drawn = tf.argmax(scores + gumbel, axis=1)
    if indices is not None:
        drawn = tf.gather(indices, drawn, batch_dims=1)
    positive_scores = tf.reduce_sum(queries * positives, axis=1, keepdims=True)
    probabilities = tf.nn.softmax(tf.concat([positive_scores, scores], axis=1))
    return drawn, -tf.math.log(probabilities[:, 0])


def straightforward_update(candidates, age, drawn, positives):
    """The cache as a value: a new [C, d] tensor, and the oldest rows by a top-k over all ages."""
    candidates = tf.tensor_scatter_nd_update(candidates, drawn[:, tf.newaxis], positives)
    age = tf.tensor_scatter_nd_update(age + 1, drawn[:, tf.newaxis], tf.zeros_like(drawn, tf.int32))
    oldest = tf.math.top_k(age, k=tf.shape(positives)[0]).indices[:, tf.newaxis]
    candidates = tf.tensor_scatter_nd_update(candidates, oldest, positives)
    return candidates, tf.tensor_scatter_nd_update(age, oldest, tf.zeros_like(oldest[:, 0]))


def update(cache, drawn, positives):
    """The drawn rows get new embeddings, the positives enter: what a training step does."""
    cache.update(
        new_items={"embedding": positives},
        updated_item_data={"embedding": positives},
        updated_item_indices=drawn,
    )


def compare_shape(batch, size, dim, repeats):
    cache = filled_cache(size, dim)
    candidates, age = tf.Variable(cache.embeddings), tf.Variable(cache.age)
    # (a) and the forward pass of (b) read a constant tensor, which costs them no copy.
    constant = tf.constant(candidates.numpy())
    queries, positives = normalized([batch, dim], 2) * SCALE, normalized([batch, dim], 3)

    def b_update():
        drawn, loss = straightforward(candidates, queries, positives)
        new_candidates, new_age = straightforward_update(candidates, age, drawn, positives)
        candidates.assign(new_candidates)
        age.assign(new_age)
        return loss

    def c_update():
        sample = ops.sample_softmax(queries, cache.embeddings)
        update(cache, sample.indices[:, 0], positives)
        return sample.log_partition

    functions = {
        "a": lambda: bare(constant, queries),
        "b": lambda: straightforward(constant, queries, positives),
        "b+update": b_update,
        "c": lambda: ops.sample_softmax(queries, cache.embeddings),
        "c+update": c_update,
        "c+gradient": lambda: ops.sample_softmax_with_gradient(queries, cache.embeddings),
    }
    functions = {name: tf.function(function) for name, function in functions.items()}
    milliseconds = _measure.medians(functions, repeats=repeats)
    return {
        **_shape(batch, size, dim),
        "a, ms": milliseconds["a"],
        **_measure.ratios(milliseconds, "a"),
        "b/c": milliseconds["b"] / milliseconds["c"],
        "(b/c)+update": milliseconds["b+update"] / milliseconds["c+update"],
    }


def compare_top_k(batch, size, dim, repeats):
    cache = filled_cache(size, dim)
    constant = tf.constant(cache.embeddings.numpy())
    queries, positives = normalized([batch, dim], 2) * SCALE, normalized([batch, dim], 3)
    top_k = functools.partial(ops.top_k_scores, queries, cache.embeddings, TOP_K)
    functions = {
        "a": lambda: bare(constant, queries),
        "b": lambda: straightforward(constant, queries, positives, TOP_K),
        "approximate": lambda: top_k(approximate=True),
        "exact": top_k,
    }
    functions = {name: tf.function(function) for name, function in functions.items()}
    milliseconds = _measure.medians(functions, repeats=repeats)
    return {
        **_shape(batch, size, dim),
        "a, ms": milliseconds["a"],
        **_measure.ratios(milliseconds, "a"),
        "b/approximate": milliseconds["b"] / milliseconds["approximate"],
    }


def compare_dtypes(batch, size, dim, repeats):
    queries = normalized([batch, dim], 2) * SCALE
    functions = {}
    for dtype in (tf.float32, tf.bfloat16, tf.float16):
        embeddings = filled_cache(size, dim, dtype).embeddings
        sample = functools.partial(ops.sample_softmax, queries, embeddings)
        functions[dtype.name] = tf.function(sample)
    milliseconds = _measure.medians(functions, repeats=repeats)
    return {
        **_shape(batch, size, dim),
        "float32, ms": milliseconds["float32"],
        **_measure.ratios(milliseconds, "float32"),
    }


def compare_updates(sizes, repeats):
    """Medians, and means over enough steps to contain the rare ones that renew the queue."""
    positives = normalized([UPDATE_BATCH, UPDATE_DIM], 3)

    def step(cache, size):
        drawn = tf.random.uniform([UPDATE_BATCH], maxval=size, dtype=tf.int64)
        update(cache, drawn, positives)
        return tf.identity(cache.num_filled)

    functions = {}
    for size in sizes:
        cache = filled_cache(size, UPDATE_DIM)
        functions[size] = tf.function(functools.partial(step, cache, size))
    seconds = _measure.side_by_side(functions, repeats=60 * repeats, warmup=10)
    smallest = seconds[min(sizes)]
    return [
        {
            "C": size,
            "median, ms": 1000 * float(np.median(seconds[size])),
            "mean, ms": 1000 * float(np.mean(seconds[size])),
            "largest, ms": 1000 * float(np.max(seconds[size])),
            "median above smallest C, ms": 1000 * float(np.median(seconds[size] - smallest)),
            "mean above smallest C, ms": 1000 * float(np.mean(seconds[size] - smallest)),
        }
        for size in sizes
    ]


def _shape(batch, size, dim):
    return {"B": batch, "C": size, "d": dim}


def _peak_growth(name):
    """Growth of the resident set's peak by one call, in MB, with all its inputs in memory."""
    batch, size, dim = MEMORY_SHAPE
    cache = filled_cache(size, dim)
    queries = normalized([batch, dim], 2) * SCALE
    functions = {
        "sample_softmax": lambda: ops.sample_softmax(queries, cache.embeddings),
        "straightforward": lambda: straightforward(cache.embeddings, queries, queries),
    }
    # Starts the thread pools and loads the kernels, on a few rows.
    ops.sample_softmax(queries[:8], tf.gather(cache.embeddings, tf.range(4096)))
    function = tf.function(functions[name]).get_concrete_function()
    _measure.reset_peak()
    resident = _measure.resident("VmRSS")
    tf.nest.map_structure(lambda value: value.numpy(), function())
    return (_measure.resident("VmHWM") - resident) / 2**20


def compare_memory():
    rows = []
    for name in ("sample_softmax", "straightforward"):
        growth = _measure.in_new_process(_peak_growth, name)
        growth = "killed" if growth is None else growth
        rows.append({**_shape(*MEMORY_SHAPE), "what": name, "peak growth, MB": growth})
    return rows


def over_shapes(compare, shapes, repeats):
    rows = []
    for shape in shapes:
        rows.append(compare(*shape, repeats))
        print(_measure.table(rows[-1:]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # Memory comes first, while this process holds little of it.
    parts = ("memory", "shapes", "top_k", "dtype", "update")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and shapes")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/sampler.json")
    )
    options = parser.parse_args()
    repeats = 3 if options.quick else 15
    shapes = SHAPES[:2] if options.quick else SHAPES
    run = {
        "shapes": lambda: over_shapes(compare_shape, shapes, repeats),
        "top_k": lambda: over_shapes(compare_top_k, shapes, repeats),
        "dtype": lambda: over_shapes(compare_dtypes, DTYPE_SHAPES, repeats),
        "update": lambda: compare_updates(UPDATE_SIZES, repeats),
        "memory": compare_memory,
    }
    record = {}
    for part in options.parts:
        record[part] = run[part]()
        print(f"\n{part}\n{_measure.table(record[part])}", flush=True)
        _measure.save(options.output, record)


if __name__ == "__main__":
    main()
