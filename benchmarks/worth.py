"""Is a cache better than a larger batch in the same time? Every method at its own best settings.

    python benchmarks/worth.py --only tower=words data=code method=in-batch,cache
    python benchmarks/worth.py --quick               # a few steps of everything
    python benchmarks/worth.py --report              # tables and curves of what there is

Three data sets (`_worth_data.py`), cheap towers and transformers, and the methods of
`_worth_methods.py`. Each method is given the same processor time, on one thread: that of 2,000
steps of a cache ("own draws") with cheap towers, 8,000 for interactions, and 1,000 with
transformers (`_worth_run.py`).

Each is trained at temperatures out of `TEMPERATURES`, and beyond them while the best one is the
first or the last, with seed 0; the best on validation MRR is then trained with two more seeds.
`--rates` also tries half and twice the learning rate at that temperature. What is reported is the
test MRR at the evaluation with the best validation MRR.

A run is a line of `results/worth/DATA-TOWER.jsonl`, and is not repeated if it is there.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import _worth_data
import _worth_report
import _worth_run
import tensorflow as tf
from _worth_methods import METHODS, REFERENCE

TEMPERATURES = (0.03, 0.05, 0.07, 0.1, 0.15)
FURTHER = (0.01, 0.02, *TEMPERATURES, 0.2, 0.3, 0.5, 0.7, 1.0)
RATE = {"words": 2e-3, "transformer": 1e-3}
SEEDS = 3
RESULTS = pathlib.Path("benchmarks/results/worth")


class Results:
    """The runs and the measured step times of one data set with one kind of towers, in a file."""

    def __init__(self, folder: pathlib.Path, data: str, tower: str):
        self.path = folder / f"{data}-{tower}.jsonl"
        self.lines = _worth_report.read(self.path)

    def find(self, **wanted):
        """The last line with these values, or None."""
        for line in reversed(self.lines):
            if all(line.get(key) == value for key, value in wanted.items()):
                return line
        return None

    def add(self, line: dict) -> dict:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


class Sweep:
    """All runs of a data set with one kind of towers."""

    def __init__(self, name: str, tower: str, folder: pathlib.Path, options):
        self.name, self.tower, self.options = name, tower, options
        self.data = _worth_data.make(name, tower)
        self.results = Results(folder, name, tower)
        self.origin = {"commit": _measure.commit(), "machine": _measure.machine()}
        print(f"\n{name}, {tower}: {self.data.describe()}", flush=True)

    def measure(self, method: str) -> None:
        """The runs of a method that are still to be done."""
        best = self._best(method, RATE[self.tower])
        if self.options.rates:
            rates = [RATE[self.tower] * factor for factor in (0.5, 1, 2)]
            runs = [self._run(method, best["temperature"], rate, 0) for rate in rates]
            best = max(runs, key=_worth_report.best_validation)
        for seed in range(1, self.options.seeds):
            self._run(method, best["temperature"], best["rate"], seed)

    def _best(self, method, rate):
        """The run of seed 0 at the best temperature."""
        tried = list(self.options.temperatures)
        while True:
            runs = [self._run(method, temperature, rate, 0) for temperature in tried]
            best = max(runs, key=_worth_report.best_validation)
            place = FURTHER.index(best["temperature"])
            near = [FURTHER[i] for i in (place - 1, place + 1) if 0 <= i < len(FURTHER)]
            missing = [temperature for temperature in near if temperature not in tried]
            if not missing or self.options.quick:
                return best
            tried += missing

    def _run(self, method, temperature, rate, seed):
        described = METHODS[method]
        run = {
            "kind": "run",
            "data": self.name,
            "tower": self.tower,
            "method": method,
            "options": described.described(),
            "temperature": temperature,
            "rate": rate,
            "seed": seed,
        }
        found = self.results.find(**run)
        if found is None:
            batch_size, steps = self._size(method)
            record = _worth_run.train(described, batch_size, steps, self.data, self.tower, run)
            found = self.results.add({**run, **self.origin, **record})
            print(_worth_report.one_line(found), flush=True)
        return found

    def _size(self, method):
        """(B, steps) of the runs of a method."""
        described, batch_size = METHODS[method], METHODS[method].batch_size
        if batch_size == "memory":
            batch_size = self._largest_batch()
        steps = _worth_run.num_steps(
            described,
            _worth_run.num_cache_steps(self.name, self.tower),
            self._milliseconds(method, batch_size),
            self._milliseconds(REFERENCE, METHODS[REFERENCE].batch_size),
        )
        return batch_size, steps // self.options.shorter

    def _milliseconds(self, method, batch_size):
        wanted = {
            "kind": "step",
            "method": method,
            "options": METHODS[method].described(),
            "batch_size": batch_size,
        }
        found = self.results.find(**wanted)
        if found is None:
            own = _worth_run.calibrate(METHODS[method], batch_size, self.data, self.tower)
            found = self.results.add({**wanted, "ms": round(own, 2)})
            print(f"{method}: {own:.1f} ms a step", flush=True)
        return found["ms"]

    def _largest_batch(self):
        """The largest batch whose steps stay below the memory limit."""
        limit = _worth_run.MEMORY_LIMIT[self.tower]
        found = self.results.find(kind="memory", limit=limit)
        if found is None:
            bytes_of = {}
            for size in _worth_run.MEMORY_SIZES:
                arguments = self.data, self.tower, size
                bytes_of[size] = _measure.in_new_process(_worth_run.peak_of_step, *arguments)
                if bytes_of[size] is None or bytes_of[size] > limit:
                    break
            found = self.results.add({"kind": "memory", "limit": limit, "bytes": bytes_of})
            print(f"bytes of an in-batch step: {bytes_of}", flush=True)
        sizes = [int(size) for size, peak in found["bytes"].items() if (peak or limit + 1) <= limit]
        return max(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="data=…|tower=…|method=…",
        help="names with commas between them, in the order to measure them in; all if not given",
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rates", action="store_true", help="also tune the learning rate")
    parser.add_argument("--quick", action="store_true", help="a 20th of the steps, one seed")
    parser.add_argument("--report", action="store_true", help="print tables, draw curves, and end")
    parser.add_argument("--results", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    only = {"data": _worth_data.NAMES, "tower": _worth_data.TOWERS, "method": tuple(METHODS)}
    _measure.restrict(only, options.only, parser)
    options.shorter = 20 if options.quick else 1
    if options.quick:
        options.seeds, options.temperatures = 1, options.temperatures[-1:]
    folder = options.results or (RESULTS / "quick" if options.quick else RESULTS)
    if options.report:
        _worth_report.report(folder, only)
        return
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for tower in only["tower"]:
        for name in only["data"]:
            sweep = Sweep(name, tower, folder, options)
            for method in only["method"]:
                sweep.measure(method)


if __name__ == "__main__":
    main()
