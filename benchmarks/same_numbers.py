"""Does a change of the code leave every number of `CachedRetrieval` as it was, bit by bit?

    python benchmarks/same_numbers.py --record /tmp/before.npz     # on the commit before
    python benchmarks/same_numbers.py --compare /tmp/before.npz    # on the commit after

Each configuration of `negative_cache/tests/retrieval_runs/` trains for a few steps; losses,
gradients, weights, metrics, and the states of the cache, the index, the corrector and the estimator
of frequencies are compared. The keys of files are not. Run it under each Keras
(`TF_USE_LEGACY_KERAS=0` and `1`), on the same machine, with `--only index` for the configurations
whose names contain that.

One thread, and deterministic operations: otherwise sums might be taken in another order.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# The package of this checkout, whichever is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache.tests.retrieval_runs import RUNS

# Between the name of a configuration and that of an array.
_SEPARATOR = "::"
_VERSIONS = "versions"


def versions() -> dict[str, str]:
    keras_module = sys.modules[type(tf.keras.layers.Layer()).__module__.split(".")[0]]
    return {
        "tensorflow": tf.__version__,
        "keras": f"{keras_module.__name__} {keras_module.__version__}",
        "negative_cache": nc.__version__,
    }


def difference(before: np.ndarray, after: np.ndarray) -> str | None:
    """How two arrays differ; None if they are the same, NaN included."""
    if before.dtype.kind == after.dtype.kind == "S":
        # The width of strings is that of the longest.
        before, after = before.astype(object), after.astype(object)
    if before.dtype != after.dtype or before.shape != after.shape:
        return f"{before.dtype}{list(before.shape)} became {after.dtype}{list(after.shape)}"
    if before.dtype.kind == "f":
        # As bits: -0.0 is not 0.0.
        bits = f"u{before.dtype.itemsize}"
        differs = (before.view(bits) != after.view(bits)) & ~(np.isnan(before) & np.isnan(after))
    else:
        differs = before != after
    if not np.any(differs):
        return None
    text = f"{np.count_nonzero(differs)} of {before.size} entries"
    if before.dtype.kind in "fiu":
        gap = np.abs(after.astype(np.float64) - before.astype(np.float64))[differs]
        text += f", by at most {np.max(gap):.3g}"
    return text


def differences(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[str]:
    """One line for each array that differs or that only one side has."""
    lines = [f"{name}: is gone" for name in before if name not in after]
    lines += [f"{name}: is new" for name in after if name not in before]
    for name in before:
        text = difference(before[name], after[name]) if name in after else None
        if text is not None:
            lines.append(f"{name}: {text}")
    return lines


def selected(only: str):
    runs = [run for run in RUNS if only in run.name]
    if not runs:
        raise SystemExit(f"No configuration has {only!r} in its name.")
    return runs


def record(path: pathlib.Path, only: str) -> None:
    arrays = {f"{_VERSIONS}{_SEPARATOR}{key}": value for key, value in versions().items()}
    for run in selected(only):
        start = time.perf_counter()
        results = run.record()
        arrays.update({f"{run.name}{_SEPARATOR}{name}": v for name, v in results.items()})
        print(f"{run.name}: {len(results)} arrays, {time.perf_counter() - start:.1f} s", flush=True)
    np.savez_compressed(path, **arrays)
    print(f"\nwritten to {path}")


def compare(path: pathlib.Path, only: str) -> bool:
    """Prints a line for each configuration; whether all are the same."""
    recorded: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, part = key.split(_SEPARATOR)
            recorded.setdefault(name, {})[part] = arrays[key]
    then = {key: str(value) for key, value in recorded.pop(_VERSIONS).items()}
    now = versions()
    if any(then[key] != now[key] for key in ("tensorflow", "keras")):
        raise SystemExit(f"{path} was recorded with other versions: {then}. Here are: {now}.")
    names = [run.name for run in selected(only)]
    num_different = 0
    for name in recorded:
        if only in name and name not in names:
            print(f"{name}: there is no such configuration any more")
            num_different += 1
    for run in selected(only):
        if run.name not in recorded:
            print(f"{run.name}: not in the recording")
            num_different += 1
            continue
        results = run.record()
        lines = differences(recorded[run.name], results)
        if lines:
            num_different += 1
            print(f"{run.name}: {len(lines)} of {len(results)} arrays differ", flush=True)
            print("".join(f"    {line}\n" for line in lines), end="", flush=True)
        else:
            print(f"{run.name}: bit-identical, {len(results)} arrays", flush=True)
    print(f"\n{len(names)} configurations, {num_different} differ")
    return not num_different


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", type=pathlib.Path, metavar="FILE.npz")
    action.add_argument("--compare", type=pathlib.Path, metavar="FILE.npz")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of configurations' names")
    options = parser.parse_args()
    cpu = tf.config.list_physical_devices("CPU")[0]
    # For the configurations on two replicas.
    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, devices)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    # Every configuration traces functions of its own, and TensorFlow would warn of that.
    tf.get_logger().setLevel("ERROR")
    print(f"{pathlib.Path(nc.__file__).parent}, {versions()}\n")
    if options.record is not None:
        record(options.record, options.only)
    elif not compare(options.compare, options.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
