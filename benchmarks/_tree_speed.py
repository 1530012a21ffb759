"""Times of a `TreeIndex`: draws next to the exact sampler's, updates, and building."""

import functools
import time

import _measure
import _tree_data
import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache import ops

BATCH = 64
BEAMS = (8, 12, 32)
MOVED, SMALL_NOISE, LARGE_NOISE = 1000, 0.1, 10.0


def build(kind: str, size: int) -> dict:
    """Seconds of `index`, and the peak of the resident set; in a process of its own."""
    index = nc.TreeIndex(size, _tree_data.DIM)
    candidates = _tree_data.make(kind, size).candidates
    _measure.reset_peak()
    before = _measure.resident("VmRSS")
    start = time.perf_counter()
    index.index(candidates, verbose=0)
    return {
        "data": kind,
        "N": size,
        "seconds": time.perf_counter() - start,
        "embeddings given, GB": candidates.nbytes / 1e9,
        "variables, GB": index.num_bytes / 1e9,
        "in memory before, GB": before / 1e9,
        "peak, GB": _measure.resident("VmHWM") / 1e9,
    }


def compare(kind: str, size: int, repeats: int) -> tuple[dict, dict]:
    """Rows of the tables of draws and of updates; in a process of its own."""
    index, queries, seconds = _built(kind, size)
    draws = _compare_draws(index, queries, repeats)
    draws |= {"built in, s": seconds, "peak, GB": _measure.resident("VmHWM") / 1e9}
    updates = _compare_updates(index, queries, repeats)
    return {"data": kind, "N": size, **draws}, {"data": kind, "N": size, **updates}


def _built(kind, size):
    """The index keeps the candidates; no other copy of them is left."""
    candidates, queries = _tree_data.make(kind, size)
    index = nc.TreeIndex(size, _tree_data.DIM)
    start = time.perf_counter()
    index.index(candidates, verbose=0)
    seconds = time.perf_counter() - start
    return index, tf.constant(queries[:BATCH] * _tree_data.SCALE), seconds


def _compare_draws(index, queries, repeats):
    # The sampler reads the variable of the index: scatters have written it, as those of a cache.
    functions = {"dense": lambda: ops.sample_softmax(queries, _embeddings(index))}
    for beam in BEAMS:
        functions[f"beam {beam}"] = lambda beam=beam: index.sample(queries, beam=beam)
    functions["gradient"] = lambda: index.sample_with_gradient(queries)
    functions = {name: tf.function(function) for name, function in functions.items()}
    milliseconds = _measure.medians(functions, repeats=repeats)
    row = {f"{name}, ms": value for name, value in milliseconds.items()}
    for name in (*functions,)[1:]:
        row[f"dense/{name}"] = milliseconds["dense"] / milliseconds[name]
    exact = functions["dense"]().log_partition
    for beam in BEAMS:
        row[f"error of log Z, {beam}"] = _error(functions[f"beam {beam}"], exact)
    return row


def _compare_updates(index, queries, repeats):
    """Updates of always other candidates, and what they do to the estimate of log Z."""

    @tf.function
    def in_graph(ids, rows):
        index.update(ids, rows)
        return tf.identity(index.num_skipped)

    def eagerly(ids, rows):
        index.update(ids, rows)
        return index.num_skipped

    rng = np.random.default_rng(1)
    num_moves = 2 * (repeats + 2)
    count = min(MOVED, index.capacity // (2 * num_moves))
    ids = rng.choice(index.capacity, 2 * num_moves * count, replace=False)
    row = {"moved": count}
    for what, noise, part in zip(("small", "large"), (SMALL_NOISE, LARGE_NOISE), np.split(ids, 2)):
        moves = [tf.constant(some) for some in np.split(part, num_moves)]
        rows = [_tree_data.moved(tf.gather(_embeddings(index), some), noise, rng) for some in moves]
        pairs = iter(zip(moves, map(tf.constant, rows)))
        before = _leaves(index, part)
        functions = {
            "eager": functools.partial(_with_next, eagerly, pairs),
            "graph": functools.partial(_with_next, in_graph, pairs),
        }
        milliseconds = _measure.medians(functions, repeats=repeats)
        for name, value in milliseconds.items():
            row[f"{what}, {name}, ms"] = value
        row[f"{what}, changed leaf"] = float(np.mean(before != _leaves(index, part)))
    exact = tf.function(lambda: ops.sample_softmax(queries, _embeddings(index)))().log_partition
    row["skipped"] = int(index.num_skipped.numpy())
    row["error of log Z after"] = _error(lambda: index.sample(queries), exact)
    return row


def _with_next(function, pairs):
    return function(*next(pairs))


def _leaves(index, ids):
    position = tf.gather(index._state.position, ids).numpy()
    return position // index.leaf_size


def _embeddings(index):
    return index.tree.candidates.embeddings


def _error(sample, exact):
    return float(tf.reduce_mean(tf.abs(sample().log_partition - exact)))
