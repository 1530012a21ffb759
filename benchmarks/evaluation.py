"""What recall and MRR over a whole corpus cost, next to `tfrs.metrics.FactorizedTopK`.

    python benchmarks/evaluation.py             # about twelve minutes on two cores; --quick: two

Everyone is given the same embeddings: no tower runs. Parts, each a table; every ratio is of medians
measured side by side in this run:

* `recall`: recall at 1, 5, 10, 50 and 100 of 10,000 queries among 100,000 candidates, d = 64, by
  `positive_ranks`, by `CorpusMetrics.evaluate` from datasets with ids, and by `FactorizedTopK`.
  The latter gets queries in batches of 1,024, in a compiled step as `model.evaluate` has it, and
  candidates as what its users give it: a dataset of batches cached in memory (`Streaming`, its
  default; its tutorials have batches of 128), or one matrix (`BruteForce`). Positives are known by
  their ids, and all recalls must then be equal. Without ids, its default, it compares scores that
  were computed in two ways, so that rounding lets positives beat themselves: the last row.
* `lists`: the time of a positive where queries have several, or excluded candidates.

TF-Recommenders imports under Keras 2 only, which this script therefore selects.
"""

import argparse
import functools
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import _measure
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

import negative_cache as nc
from negative_cache import evaluation

NUM_CANDIDATES, NUM_QUERIES, DIM = 100_000, 10_000, 64
K = (1, 5, 10, 50, 100)
QUERY_BATCH = 1024
CORPUS_BATCHES, DEFAULT_BATCH = (128, 1024, 4096), 1024
LISTS = ((1, 0), (1, 200), (20, 0), (20, 200))


def problem(num_queries, num_candidates):
    """Unit candidates, and queries near one of them: positives at the head and in the tail."""
    rng = np.random.default_rng(0)
    corpus = rng.normal(size=[num_candidates, DIM])
    corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    rows = rng.integers(0, num_candidates, num_queries)
    noise = rng.normal(size=[num_queries, DIM]) * rng.uniform(0.1, 0.5, [num_queries, 1])
    return (corpus[rows] + noise).astype(np.float32), corpus.astype(np.float32), rows


def by_factorized_top_k(candidates, queries, positives, rows):
    """Recalls of `FactorizedTopK`; by score where `rows` is None."""
    metric = tfrs.metrics.FactorizedTopK(candidates, K)

    @tf.function(reduce_retracing=True)
    def step(queries, positives, rows):
        metric.update_state(queries, positives, rows)

    def run():
        metric.reset_states()
        for start in range(0, len(queries), QUERY_BATCH):
            batch = slice(start, start + QUERY_BATCH)
            step(queries[batch], positives[batch], None if rows is None else rows[batch])
        return tf.stack(metric.result())

    return run


def by_counting(queries, corpus, rows):
    ranks = evaluation.positive_ranks(queries, corpus[rows], corpus, positive_rows=rows)
    return recalls(evaluation.retrieval_metrics(ranks, K))


def by_corpus_metrics(queries, corpus, rows):
    """The callback from datasets to metrics, with towers that pass embeddings on."""

    def features(rows, embeddings):
        return {"id": rows, "embedding": embeddings}

    candidates = tf.data.Dataset.from_tensor_slices(features(np.arange(len(corpus)), corpus))
    parts = {"query": queries, "candidate": features(rows, corpus[rows])}
    metrics = nc.CorpusMetrics(
        candidates.batch(DEFAULT_BATCH).cache(),
        tf.data.Dataset.from_tensor_slices(parts).batch(QUERY_BATCH).cache(),
        k=K,
        candidate_id_key="id",
        networks=(tf.identity, lambda features: features["embedding"]),
    )
    return lambda: recalls(metrics.evaluate())


def recalls(metrics):
    return tf.constant([metrics[f"recall_at_{k}"] for k in K])


def compare_recalls(num_queries, num_candidates, repeats):
    queries, corpus, rows = problem(num_queries, num_candidates)
    positives, ids = corpus[rows], np.arange(num_candidates)
    functions = {
        "positive_ranks": functools.partial(by_counting, queries, corpus, rows),
        "CorpusMetrics": by_corpus_metrics(queries, corpus, rows),
    }
    candidates = {}
    for size in CORPUS_BATCHES:
        dataset = tf.data.Dataset.from_tensor_slices((ids, corpus)).batch(size).cache()
        candidates[f"Streaming, {size:,}"] = dataset
    brute_force = tfrs.layers.factorized_top_k.BruteForce(k=max(K))
    candidates["BruteForce"] = brute_force.index(tf.constant(corpus), tf.constant(ids))
    for name, given in candidates.items():
        functions[name] = by_factorized_top_k(given, queries, positives, rows)
    streaming = f"Streaming, {DEFAULT_BATCH:,}"
    by_score = by_factorized_top_k(candidates[streaming], queries, positives, None)
    functions[f"{streaming}, by score"] = by_score
    found = {name: function().numpy() for name, function in functions.items()}
    expected = found["positive_ranks"]
    for name, values in found.items():
        if functions[name] is not by_score:
            np.testing.assert_array_equal(values, expected, err_msg=name)
    seconds = _measure.side_by_side(functions, repeats=repeats, warmup=0)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return [
        {
            "what": name,
            "seconds": medians[name],
            "times positive_ranks": medians[name] / medians["positive_ranks"],
            "times CorpusMetrics": medians[name] / medians["CorpusMetrics"],
            **{f"recall@{k}": f"{value:.4f}" for k, value in zip(K, values)},
        }
        for name, values in found.items()
    ]


def compare_lists(num_queries, num_candidates, repeats):
    queries, corpus, _ = problem(num_queries, num_candidates)
    rng = np.random.default_rng(1)

    def run(num_positives, num_excluded):
        owners = np.repeat(np.arange(num_queries // num_positives), num_positives)
        rows = rng.integers(0, num_candidates, len(owners))
        excluded = rng.integers(0, num_candidates, [num_queries // num_positives, num_excluded])
        return lambda: tf.constant(
            evaluation.positive_ranks(
                queries[: len(excluded)],
                corpus[rows],
                corpus,
                positive_rows=rows,
                positive_queries=owners,
                excluded_rows=excluded,
            )
        )

    functions = {lists: run(*lists) for lists in LISTS}
    milliseconds = _measure.medians(functions, repeats=repeats)
    return [
        {
            "positives a query": num_positives,
            "excluded a query": num_excluded,
            "ms per 1,000 positives": 1000 * value / (num_queries // num_positives * num_positives),
            "relative": value / milliseconds[LISTS[0]],
        }
        for (num_positives, num_excluded), value in milliseconds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("recall", "lists"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a fifth of the queries, once")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/evaluation.json")
    )
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    num_queries = NUM_QUERIES // 5 if options.quick else NUM_QUERIES
    record = {"queries": num_queries, "candidates": NUM_CANDIDATES, "dim": DIM}
    for name, compare in (("recall", compare_recalls), ("lists", compare_lists)):
        if options.parts is None or name in options.parts:
            record[name] = compare(num_queries, NUM_CANDIDATES, repeats)
            print(f"\n{name}\n{_measure.table(record[name])}", flush=True)
    _measure.save(options.output, record)


if __name__ == "__main__":
    main()
