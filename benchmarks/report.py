"""Reruns the comparison behind the package's claims, and writes `benchmarks/RESULTS.md`.

    python benchmarks/report.py                      # under an hour on two cores
    python benchmarks/report.py --full               # the budgets of `worth.py`, two to three hours
    python benchmarks/report.py --only tower=words method=in-batch,corpus seed=0
    python benchmarks/report.py --again              # measures again what changed code has measured
    python benchmarks/report.py --write              # only formats what there is

Data, towers, methods and training are those of `worth.py`; `_report_plan.py` says which methods at
which temperatures and budgets. Every run has a process and a thread of its own, two at a time. A
run is a line of `results/report/DATA-TOWER.jsonl` with the commit and the machine it ran on. It is
not repeated if it is there, so that the report can be stopped and started again.
"""

import argparse
import concurrent.futures
import os
import pathlib
import threading
import time
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import _report_plan
import _report_write
import _worth_data
import _worth_report
import _worth_run
import tensorflow as tf
from _report_plan import BUDGETS, DATA, METHODS_OF
from _worth_methods import METHODS, REFERENCE
from worth import RATE, Results

from negative_cache._compat import keras

FOLDER = pathlib.Path("benchmarks/results/report")
OUTPUT = pathlib.Path("benchmarks/RESULTS.md")


class Peak(keras.callbacks.Callback):
    """The most memory that the process has while it trains, evaluations not included."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def on_epoch_begin(self, epoch, logs=None):
        _measure.reset_peak()

    def on_epoch_end(self, epoch, logs=None):
        self.bytes = max(self.bytes, _measure.resident("VmHWM"))


def calibrate(method, data, tower):
    """Milliseconds of a step; to be called in a process of its own."""
    _use_one_thread()
    return _worth_run.calibrate(METHODS[method], METHODS[method].batch_size, data, tower)


def train(run, steps, data):
    """A run; to be called in a process of its own."""
    _use_one_thread()
    method, peak = METHODS[run["method"]], Peak()
    record = _worth_run.train(
        method,
        method.batch_size,
        steps,
        data,
        run["tower"],
        run,
        evaluations=_report_plan.EVALUATIONS[run["tower"]],
        observers=[peak],
    )
    return {**record, "peak_bytes": peak.bytes}


def _use_one_thread():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


class Report:
    """The runs of a budget that are still to be done, and how far they are."""

    def __init__(self, name: str, folder: pathlib.Path, only: dict, options):
        self.name, self.budget, self.only = name, BUDGETS[name], only
        self.again, self.workers = options.again, options.workers
        self.data = {tower: _worth_data.make(DATA, tower) for tower in only["tower"]}
        self.results = {tower: Results(folder, DATA, tower) for tower in only["tower"]}
        self.origin = {"commit": _measure.commit(), "machine": _measure.machine()}
        self._lock = threading.Lock()
        self._start, self._seconds, self._left = time.monotonic(), {}, {}
        for tower, data in self.data.items():
            print(f"{DATA}, {tower}: {data.describe()}", flush=True)

    def measure(self) -> None:
        """Seed 0 of every method, which chooses temperatures, and then the other seeds."""
        seeds = [seed for seed in self.only["seed"] if seed < self.budget.seeds]
        tasks = [
            (tower, method)
            for tower in self.only["tower"]
            for method in METHODS_OF[tower]
            if method in self.only["method"]
        ]
        self._left = {(tower, method): self._to_do(tower, method, seeds) for tower, method in tasks}
        for tower in self.only["tower"]:
            if any(left for (of, _), left in self._left.items() if of == tower):
                self._milliseconds(tower, REFERENCE)
        failed = []
        for seed in seeds:
            with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
                futures = {pool.submit(self._measure, *task, seed): task for task in tasks}
                try:
                    for future in concurrent.futures.as_completed(futures):
                        if future.exception() is not None:
                            tasks.remove(futures[future])
                            failed.append(futures[future])
                            traceback.print_exception(future.exception())
                except KeyboardInterrupt:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        if failed:
            raise RuntimeError(f"These failed, as printed above: {failed}. All others are there.")

    def _temperatures(self, tower, method, seed):
        """Those to try with seed 0; for the others, the best one of it."""
        tried = _report_plan.temperatures(method, tower, self.budget)
        if seed == 0 or len(tried) == 1:
            return tried
        runs = [self._find(self._run(tower, method, of, 0)) for of in tried]
        missing = [of for of, run in zip(tried, runs) if run is None]
        if missing:
            raise ValueError(
                f"{tower}, {method}: seed 0 chooses the temperature of the other seeds, and has not"
                f" been run at {missing}. Give seed=0 too."
            )
        return (max(runs, key=_worth_report.best_validation)["temperature"],)

    def _run(self, tower, method, temperature, seed):
        """What identifies a run."""
        return {
            "kind": "run",
            "data": DATA,
            "tower": tower,
            "budget": self.name,
            "method": method,
            "options": METHODS[method].described(),
            "temperature": temperature,
            "rate": RATE[tower],
            "seed": seed,
        }

    def _find(self, wanted):
        """The recorded line, if it counts."""
        found = self.results[wanted["tower"]].find(**wanted)
        if found is None or not self.again or found["commit"] == self.origin["commit"]:
            return found
        return None if _report_write.is_older(found) else found

    def _to_do(self, tower, method, seeds):
        """How many runs a method lacks; with temperatures to choose, as many as it can be."""
        tried = _report_plan.temperatures(method, tower, self.budget)
        count = 0
        for seed in seeds:
            runs = [self._run(tower, method, of, seed) for of in tried]
            lacking = sum(self._find(run) is None for run in runs)
            count += lacking if seed == 0 else int(lacking == len(tried))
        return count

    def _measure(self, tower, method, seed):
        for temperature in self._temperatures(tower, method, seed):
            run = self._run(tower, method, temperature, seed)
            if self._find(run) is not None:
                continue
            start = time.monotonic()
            steps = _worth_run.num_steps(
                METHODS[method],
                self.budget.cache_steps[tower],
                self._milliseconds(tower, method),
                self._milliseconds(tower, REFERENCE),
            )
            record = _measure.in_new_process(train, run, steps, self.data[tower])
            if record is None:
                raise RuntimeError(f"The process of {run} was killed. Is there memory for it?")
            seconds = round(time.monotonic() - start, 1)
            line = {**run, **self.origin, **record, "seconds_in_all": seconds}
            with self._lock:
                self.results[tower].add(line)
                self._show(line)

    def _milliseconds(self, tower, method):
        wanted = {
            "kind": "step",
            "tower": tower,
            "method": method,
            "options": METHODS[method].described(),
        }
        found = self._find(wanted)
        if found is None:
            own = _measure.in_new_process(calibrate, method, self.data[tower], tower)
            if own is None:
                raise RuntimeError(f"The process of {wanted} was killed. Is there memory for it?")
            with self._lock:
                found = self.results[tower].add({**wanted, **self.origin, "ms": round(own, 2)})
                print(f"{tower}, {method}: {own:.1f} ms a step", flush=True)
        return found["ms"]

    def _show(self, line):
        """A line of progress, with the time that the runs which are left would take."""
        tower, key = line["tower"], (line["tower"], line["method"])
        self._left[key] = max(self._left[key] - 1, 0)
        self._seconds.setdefault(tower, []).append(line["seconds_in_all"])
        left, seconds = 0, 0.0
        for (of, _), count in self._left.items():
            # Until a kind of towers has a run, its runs are taken to be as long as the others.
            known = self._seconds.get(of) or self._seconds[tower]
            left, seconds = left + count, seconds + count * sum(known) / len(known)
        minutes = (time.monotonic() - self._start) / 60
        print(
            f"[{minutes:.0f} min; {left} runs left, about {seconds / self.workers / 60:.0f} min]"
            f" {_worth_report.one_line(line)}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="longer budgets, more temperatures")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, one seed")
    parser.add_argument("--again", action="store_true", help="repeat the runs of older code")
    parser.add_argument("--write", action="store_true", help="only format what there is")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (2)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="tower=…|method=…|seed=…",
        help="names with commas between them; all if not given",
    )
    options = parser.parse_args()
    if options.full and options.quick:
        parser.error("--full and --quick contradict each other")
    budget = "full" if options.full else "quick" if options.quick else "hour"
    methods = tuple(dict.fromkeys(name for names in METHODS_OF.values() for name in names))
    seeds = tuple(map(str, range(BUDGETS[budget].seeds)))
    only = {"tower": tuple(METHODS_OF), "method": methods, "seed": seeds}
    _measure.restrict(only, options.only, parser)
    only["seed"] = tuple(map(int, only["seed"]))
    folder, output = FOLDER, OUTPUT
    if options.quick:
        folder = FOLDER / "quick"
        output = folder / "RESULTS.md"
    try:
        if not options.write:
            Report(budget, folder, only, options).measure()
    finally:
        _report_write.write(folder, output)


if __name__ == "__main__":
    main()
