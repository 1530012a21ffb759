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
* `memory`: growth of the resident set by one call, each in a fresh process.
"""

import argparse
import functools
import multiprocessing
import os
import pathlib
import resource

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import tensorflow as tf

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


def normalized(shape, seed):
    return tf.math.l2_normalize(tf.random.stateless_normal(shape, [seed, seed]), axis=-1)


def filled_cache(size, dim, dtype=tf.float32):
    """A cache whose rows are all filled, and which updates have scattered into."""
    cache = nc.Cache({"embedding": tf.io.FixedLenFeature([dim], dtype)}, size)
    cache.embeddings.assign(tf.cast(normalized([size, dim], 1), dtype))
    cache.filled.assign(tf.ones([size], tf.bool))
    for seed in range(3):
        cache.update(new_items={"embedding": normalized([16, dim], seed)})
    return cache


def bare(candidates, queries):
    return tf.reduce_max(tf.matmul(queries, candidates, transpose_b=True), axis=1)


def straightforward(candidates, queries, positives, top_k=None):
    """ŷ by Gumbel-max over all scores, and -log p⁺ by a softmax over the positive and all scores."""
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


def compare_shapes(shapes, repeats):
    rows = []
    for batch, size, dim in shapes:
        cache = filled_cache(size, dim)
        candidates = tf.Variable(cache.embeddings)
        age = tf.Variable(cache.age)
        queries = normalized([batch, dim], 2) * 20.0
        positives = normalized([batch, dim], 3)
        # (a) reads a constant tensor, which costs it no copy.
        constant = tf.constant(candidates.numpy())

        @tf.function
        def a():
            return bare(constant, queries)

        @tf.function
        def b_forward():
            return straightforward(constant, queries, positives)

        @tf.function
        def b_update():
            drawn, loss = straightforward(candidates, queries, positives)
            new_candidates, new_age = straightforward_update(candidates, age, drawn, positives)
            candidates.assign(new_candidates)
            age.assign(new_age)
            return loss

        @tf.function
        def c_forward():
            return ops.sample_softmax(queries, cache.embeddings)

        @tf.function
        def c_gradient():
            return ops.sample_softmax_with_gradient(queries, cache.embeddings)

        @tf.function
        def c_update():
            sample = ops.sample_softmax(queries, cache.embeddings)
            update(cache, sample.indices[:, 0], positives)
            return sample.log_partition

        functions = {
            "a": a,
            "b": b_forward,
            "b+update": b_update,
            "c": c_forward,
            "c+gradient": c_gradient,
            "c+update": c_update,
        }
        seconds = _measure.side_by_side(functions, repeats=repeats)
        rows.append(
            {
                "B": batch,
                "C": size,
                "d": dim,
                "a, ms": 1000 * seconds["a"],
                **{f"{name}/a": seconds[name] / seconds["a"] for name in list(functions)[1:]},
                "b/c": seconds["b"] / seconds["c"],
                "b/c with update": seconds["b+update"] / seconds["c+update"],
            }
        )
        print(_measure.table(rows[-1:]), flush=True)
    return rows


def compare_top_k(shapes, repeats):
    rows = []
    for batch, size, dim in shapes:
        cache = filled_cache(size, dim)
        constant = tf.constant(cache.embeddings.numpy())
        queries, positives = normalized([batch, dim], 2) * 20.0, normalized([batch, dim], 3)
        functions = {
            "a": tf.function(lambda: bare(constant, queries)),
            "b": tf.function(lambda: straightforward(constant, queries, positives, TOP_K)),
            "approximate": tf.function(
                lambda: ops.top_k_scores(queries, cache.embeddings, TOP_K, approximate=True)
            ),
            "exact": tf.function(lambda: ops.top_k_scores(queries, cache.embeddings, TOP_K)),
        }
        seconds = _measure.side_by_side(functions, repeats=repeats)
        rows.append(
            {
                "B": batch,
                "C": size,
                "d": dim,
                "a, ms": 1000 * seconds["a"],
                **{f"{name}/a": seconds[name] / seconds["a"] for name in list(functions)[1:]},
            }
        )
    return rows


def compare_dtypes(shapes, repeats):
    rows = []
    for batch, size, dim in shapes:
        queries = normalized([batch, dim], 2) * 20.0
        functions = {}
        for dtype in (tf.float32, tf.bfloat16, tf.float16):
            embeddings = filled_cache(size, dim, dtype).embeddings
            sample = functools.partial(ops.sample_softmax, queries, embeddings)
            functions[dtype.name] = tf.function(sample)
        seconds = _measure.side_by_side(functions, repeats=repeats)
        rows.append(
            {
                "B": batch,
                "C": size,
                "d": dim,
                "float32, ms": 1000 * seconds["float32"],
                "bfloat16/float32": seconds["bfloat16"] / seconds["float32"],
                "float16/float32": seconds["float16"] / seconds["float32"],
            }
        )
    return rows


def compare_updates(sizes, repeats):
    """Medians, and means over enough steps to contain the rare ones that refill the queue."""
    functions, means = {}, {}
    positives = normalized([UPDATE_BATCH, UPDATE_DIM], 3)
    for size in sizes:
        cache = filled_cache(size, UPDATE_DIM)

        @tf.function
        def step(cache=cache, size=size):
            drawn = tf.random.uniform([UPDATE_BATCH], maxval=size, dtype=tf.int64)
            update(cache, drawn, positives)
            return cache.num_filled

        functions[size] = step
    seconds = _measure.side_by_side(functions, repeats=20 * repeats, warmup=10)
    means = _measure.side_by_side(functions, repeats=40 * repeats, warmup=0, statistic="mean")
    smallest = min(sizes)
    return [
        {
            "C": size,
            "median, ms": 1000 * seconds[size],
            "mean, ms": 1000 * means[size],
            "median above smallest, ms": 1000 * (seconds[size] - seconds[smallest]),
            "mean above smallest, ms": 1000 * (means[size] - means[smallest]),
        }
        for size in sizes
    ]


def _peak_growth(name, queue):
    """Growth of the peak resident set by one call, in MB, after everything else is in memory."""
    batch, size, dim = MEMORY_SHAPE
    cache = filled_cache(size, dim)
    queries = normalized([batch, dim], 2) * 20.0
    functions = {
        "sample_softmax": lambda: ops.sample_softmax(queries, cache.embeddings),
        "straightforward": lambda: straightforward(cache.embeddings, queries, queries),
    }
    function = tf.function(functions[name])
    # Traces, starts thread pools and loads kernels, on a few rows.
    ops.sample_softmax(queries[:8], cache.embeddings.sparse_read(tf.range(4096)))
    concrete = function.get_concrete_function()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del before
    resident = _resident()
    tf.nest.map_structure(lambda value: value.numpy(), concrete())
    peak = _peak_resident()
    queue.put((peak - resident) / 2**20)


def _status(key):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"No {key} in /proc/self/status.")


def _resident():
    # Resets the high-water mark, so that the peak is that of the call.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_resident():
    return _status("VmHWM")


def compare_memory():
    rows = []
    context = multiprocessing.get_context("spawn")
    for name in ("sample_softmax", "straightforward"):
        queue = context.Queue()
        process = context.Process(target=_peak_growth, args=(name, queue))
        process.start()
        growth = queue.get(timeout=600)
        process.join()
        batch, size, dim = MEMORY_SHAPE
        rows.append({"B": batch, "C": size, "d": dim, "what": name, "peak growth, MB": growth})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("shapes", "top_k", "dtype", "update", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and shapes")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/sampler.json")
    )
    options = parser.parse_args()
    repeats = 3 if options.quick else 15
    shapes = SHAPES[:2] if options.quick else SHAPES
    run = {
        "shapes": lambda: compare_shapes(shapes, repeats),
        "top_k": lambda: compare_top_k(shapes, repeats),
        "dtype": lambda: compare_dtypes(DTYPE_SHAPES, repeats),
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
