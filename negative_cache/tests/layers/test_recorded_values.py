"""Tests that `CachedRetrieval` computes what it did when `recorded_values.json` was made.

The values have no truth of their own: they were made by the code, and say when a change that was to
leave numbers alone does not. Where one is meant to change them, record anew, and look at the
difference before it is committed:

    python -m negative_cache.tests.layers.test_recorded_values --record

`benchmarks/same_numbers.py` compares all runs bit by bit, on one machine.
"""

import inspect
import json
import pathlib
import sys

import numpy as np
import pytest

from negative_cache.layers import CachedRetrieval
from negative_cache.tests.retrieval_runs import NUM_QUERIES, NUM_STEPS, RUNS

_PATH = pathlib.Path(__file__).with_name("recorded_values.json")
_TESTED = [run for run in RUNS if run.in_tests]
# What every run is given by `Training`.
_OF_EVERY_RUN = {"candidate_network", "feature_specs", "cache_size", "cache", "temperature", "seed"}
_OF_EVERY_CALL = {
    "query_embeddings",
    "candidate_embeddings",
    "candidate_features",
    "training",
}


def summary(arrays):
    """A few numbers of what a run has computed: losses, norms of gradients, sums of states."""
    numbers = {}
    for name, values in arrays.items():
        values = values.astype(np.float64) if values.dtype.kind in "biuf" else np.zeros([0])
        if not values.size:
            continue
        if name.endswith("loss") or (name.startswith(f"step {NUM_STEPS - 1}/metrics/")):
            numbers[name] = float(np.sum(values))
        elif "gradient" in name:
            numbers[name] = float(np.linalg.norm(values))
        elif name.startswith("end/"):
            # Of other weights for each entry, so that their order counts.
            numbers[name] = float(np.sum(values.ravel() * np.linspace(1.0, 2.0, values.size)))
    return {name: float(f"{number:.7g}") for name, number in numbers.items()}


@pytest.mark.parametrize("run", _TESTED, ids=lambda run: run.name)
def test_numbers_are_those_recorded(run):
    recorded = json.loads(_PATH.read_text())[run.name]
    assert summary(run.record()) == pytest.approx(recorded, rel=1e-5, abs=3e-5)


def test_runs_use_every_option_and_every_argument():
    options = {name for run in RUNS for name in run.options()} | _OF_EVERY_RUN
    assert options >= set(inspect.signature(CachedRetrieval).parameters) - {"kwargs"}
    rng, ids = np.random.default_rng(0), np.arange(NUM_QUERIES)
    makers = {(make, run.kind) for run in RUNS for make in run.arguments}
    arguments = {name for make, kind in makers for name in make(rng, ids, kind)} | _OF_EVERY_CALL
    assert arguments >= set(inspect.signature(CachedRetrieval.call).parameters) - {"self"}


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        raise SystemExit(f"usage: python -m {__spec__.name} --record")
    values = {run.name: summary(run.record()) for run in _TESTED}
    _PATH.write_text(json.dumps(values, indent=0) + "\n")
