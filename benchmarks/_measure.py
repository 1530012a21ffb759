"""What the benchmarks share: side-by-side timing, tables, and the record of a run."""

import argparse
import concurrent.futures.process
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf


def normalized(shape, seed):
    """Rows of unit length, the same for the same seed."""
    return tf.math.l2_normalize(tf.random.stateless_normal(shape, [seed, seed]), axis=-1)


def side_by_side(
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 11, warmup: int = 2
) -> dict[str, np.ndarray]:
    """[repeats] seconds of each function, called in turn so that all see the same machine.

    A call counts until its results are in host memory.
    """
    seconds = {name: [] for name in functions}
    for repeat in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            tf.nest.map_structure(lambda value: value.numpy(), function())
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def medians(
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 11
) -> dict[str, float]:
    """Median milliseconds of each function, side by side."""
    seconds = side_by_side(functions, repeats=repeats)
    return {name: 1000 * float(np.median(values)) for name, values in seconds.items()}


def ratios(milliseconds: Mapping[str, float], baseline: str) -> dict[str, float]:
    """`{name}/{baseline}` of every other function."""
    return {
        f"{name}/{baseline}": value / milliseconds[baseline]
        for name, value in milliseconds.items()
        if name != baseline
    }


def resident(key: str) -> int:
    """Bytes of this process that are in memory now ("VmRSS"), or were at the most ("VmHWM")."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"No {key} in /proc/self/status: figures of memory need Linux.")


def reset_peak() -> None:
    """Sets "VmHWM" back to what is in memory now, so that the peak is that of what follows."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def in_new_process(function: Callable, *arguments):
    """Its result, from a process that holds nothing of this one; None where that was killed."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except concurrent.futures.process.BrokenProcessPool:
            return None


def restrict(
    known: dict[str, tuple[str, ...]], given: Sequence[str], parser: argparse.ArgumentParser
) -> None:
    """Leaves in `known`, key -> names, what is `given` for `--only`: "key=name,name" each."""
    for each in given:
        key, _, names = each.partition("=")
        unknown = set(names.split(",")) - set(known.get(key, ()))
        if unknown:
            parser.error(f"--only {each}: unknown {sorted(unknown)}")
        known[key] = tuple(names.split(","))


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Lines of a table whose columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [columns, *([_text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def save(path: pathlib.Path, record: Mapping[str, object]) -> None:
    """Writes a run as JSON, with what it ran on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"machine": machine(), "commit": commit()}
    path.write_text(json.dumps({**described, **record}, indent=1) + "\n")
    print(f"\nwritten to {path}")


def machine() -> dict[str, object]:
    """What a run runs on."""
    return {
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": _cores(),
    }


def commit() -> str:
    """The commit of the checkout, with a "+" if its code has been changed since; "" without git."""
    found = git("rev-parse", "--short=10", "HEAD").strip()
    is_changed = git("status", "--porcelain", "--", "negative_cache", "benchmarks/*.py")
    return found + "+" * bool(is_changed)


def git(*arguments: str) -> str:
    """What git prints on the checkout that this file is in; "" if it fails."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
