"""In-batch softmax against the cache on `installed_code`, over seeds and temperatures.

    python benchmarks/negatives.py                   # over an hour on two idle cores
    python benchmarks/negatives.py --temperatures 0.05 0.1 learned learned:0.1:0.05

Trains the demo's towers for the same number of steps with each setting, and ranks the held-out
queries' functions among the whole corpus. Prints, for each setting, mean and spread over the seeds,
and the ratio of its mean MRR to that of in-batch softmax at the same temperature and at in-batch
softmax's best one. A temperature is a number, "learned", or "learned:INITIAL:SMALLEST".
"""

import argparse
import dataclasses
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np

import negative_cache as nc
from negative_cache import demo
from negative_cache.datasets import installed_code

TEMPERATURES = (0.05, 0.07, 0.1)
KINDS = {
    "in-batch": {},
    "cache, 1 draw": {"num_negatives": 1},
    "cache, 4 draws": {"num_negatives": 4},
    "cache, 64 shared draws": {"num_draws": 64},
    "cache, 32 shared draws": {"num_draws": 32},
    "cache, 16 shared draws": {"num_draws": 16},
    "cache, 8 shared draws": {"num_draws": 8},
}


def parsed_temperature(text):
    return text if text.startswith("learned") else float(text)


def made_temperature(temperature):
    """What a task takes; a layer is one of its own for each training."""
    if isinstance(temperature, float) or temperature == "learned":
        return temperature
    initial, smallest = map(float, temperature.split(":")[1:])
    return nc.LearnedTemperature(initial, smallest=smallest)


def settings_of(kind, temperature, options):
    """What a row of the table trains: the cache size and the demo's settings."""
    settings = demo.Settings(
        steps=options.steps,
        patience=None,
        temperature=made_temperature(temperature),
        **KINDS[kind],
    )
    return 0 if kind == "in-batch" else settings.cache_size, settings


def measure(data, kind, temperature, options):
    runs = []
    for seed in range(options.seeds):
        cache_size, settings = settings_of(kind, temperature, options)
        seeded = dataclasses.replace(settings, seed=seed)
        result = demo.train(f"{kind}, temperature {temperature}", data, cache_size, seeded)
        runs.append([result.final(metric) for metric in demo.METRICS])
    runs = np.array(runs)
    return {
        "negatives": kind,
        "temperature": temperature,
        **{metric: float(value) for metric, value in zip(demo.METRICS, runs.mean(axis=0))},
        "temperature at the end": result.history.get("temperature", [temperature])[-1],
        "mrr of seeds": [round(float(mrr), 4) for mrr in runs[:, 0]],
        "candidates encoded": result.candidates_encoded,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--temperatures",
        type=parsed_temperature,
        nargs="+",
        default=TEMPERATURES,
        help='numbers, "learned", or "learned:INITIAL:SMALLEST"',
    )
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/negatives.json")
    )
    options = parser.parse_args()
    data = demo.Data(installed_code.load())
    rows = [
        measure(data, kind, temperature, options)
        for kind in ("in-batch", *(kind for kind in options.kinds if kind != "in-batch"))
        for temperature in options.temperatures
    ]
    baselines = {row["temperature"]: row["mrr"] for row in rows if row["negatives"] == "in-batch"}
    for row in rows:
        row["MRR ratio, same temperature"] = row["mrr"] / baselines[row["temperature"]]
        row["MRR ratio, its best"] = row["mrr"] / max(baselines.values())
    print("\n" + _measure.table(rows))
    _measure.save(options.output, {"steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
