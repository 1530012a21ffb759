"""What computing the queries' gradient exactly, and not sampling it, does to variance and to MRR.

    python benchmarks/estimator.py                   # about ten minutes on two cores

The demo's model is trained for a while; then, with its cache frozen as it is, stale rows and all,
the gradient of one batch is computed many times with other draws. The table has, for the gradient
by the query embeddings and by the word vectors (both towers share them), the relative variance:
the trace of its covariance over its squared norm, E‖∇̂ - E∇̂‖² / ‖E∇̂‖². Then models are trained for
the same number of steps with each estimator, over seeds.
"""

import argparse
import dataclasses
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
import tensorflow as tf

from negative_cache import demo
from negative_cache.datasets import installed_code

ESTIMATORS = (
    {"exact_query_gradient": False, "num_negatives": 1},
    {"exact_query_gradient": False, "num_negatives": 4},
    {"exact_query_gradient": True, "num_negatives": 1},
    {"exact_query_gradient": True, "num_negatives": 4},
)


def gradients(model, batch, estimator, draws):
    """[draws, ...] gradients by the queries and by the word vectors, from a frozen cache."""
    task = model.task
    for name, value in estimator.items():
        setattr(task, name, value)
    words = model.query_network.words.embeddings
    words = getattr(words, "value", words)

    @tf.function
    def one():
        with tf.GradientTape() as tape:
            embeddings = model(batch, training=True)
            loss = task(embeddings["query"], embeddings["candidate"], batch["candidate"])
        by_query, by_words = tape.gradient(loss, [embeddings["query"], words])
        return by_query, tf.convert_to_tensor(by_words)

    pairs = [one() for _ in range(draws)]
    return [np.stack([pair[i].numpy() for pair in pairs]) for i in range(2)]


def relative_variance(samples):
    mean = samples.mean(axis=0, dtype=np.float64)
    return float(samples.var(axis=0, dtype=np.float64).sum() / np.square(mean).sum())


def measure_variance(data, options):
    settings = demo.Settings(steps=options.steps // 4, patience=None)
    model = demo.train("for the variance", data, settings.cache_size, settings).model
    batch = next(iter(data.pairs(data.corpus.train).shuffle(10_000, seed=1).batch(64)))
    model.task.cached.end_step = lambda batch, contribution: None
    rows = []
    for estimator in ESTIMATORS:
        by_query, by_words = gradients(model, batch, estimator, options.draws)
        rows.append(
            {
                **estimator,
                "variance by queries": relative_variance(by_query),
                "variance by words": relative_variance(by_words),
            }
        )
    return rows


def measure_mrr(data, options):
    rows = []
    for estimator in ESTIMATORS:
        mrr = []
        for seed in range(options.seeds):
            settings = dataclasses.replace(
                demo.Settings(steps=options.steps, patience=None, seed=seed), **estimator
            )
            result = demo.train(f"{estimator}", data, settings.cache_size, settings)
            mrr.append(result.final("mrr"))
        rows.append(
            {**estimator, "MRR": float(np.mean(mrr)), "of seeds": np.round(mrr, 4).tolist()}
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/estimator.json")
    )
    options = parser.parse_args()
    data = demo.Data(installed_code.load())
    record = {"variance": measure_variance(data, options)}
    print("\n" + _measure.table(record["variance"]), flush=True)
    record["mrr"] = measure_mrr(data, options)
    print("\n" + _measure.table(record["mrr"]))
    _measure.save(options.output, {"steps": options.steps, **record})


if __name__ == "__main__":
    main()
