"""How near correctors of stale embeddings come to the best possible, where the drift is known.

    python benchmarks/drift.py                       # a quarter of an hour on two cores

N unit embeddings drift by a known map, which grows linearly over the steps, plus noise of each
row's own, which nothing can foresee. At each step 128 rows are revealed to the corrector as
examples; its error is that of rows that never are,

  Σ ‖h(ĝ) - g‖² / Σ ‖g‖².

The best possible is the map itself without the noise. A least-squares linear map on all rows, with
the age as a factor of a second one, is a further reference. See `DRIFTS` for the maps.

Correctors without weights forget: all that they hold stems from the last steps. So they are run
only in the 40 steps before an evaluation, those that choose their landmarks only before the last
one, and those of more than 512 landmarks in the last 20 steps.
"""

import argparse
import collections
import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
import tensorflow as tf
from _drifts import DIM, DRIFTS, HELD_OUT, PER_STEP, STEPS, orthogonal, points, unit

from negative_cache._compat import keras
from negative_cache.layers import Corrector, NystromCorrector
from negative_cache.layers.drift_corrector import Encoded

EVALUATIONS = (30, 100, 300)
WINDOW, SHORT_WINDOW = 40, 20
NUM_QUERIES, SCALE = 64, 20.0
LEARNING_RATE = 1e-3
AGE_BINS = ((0.0, 0.25), (0.25, 1.0), (1.0, 2.0), (2.0, np.inf))


class OtherAge:
    """A corrector with φ = min((age / τ)^power, limit); the package has 1 and 2."""

    power, limit = 0.5, 2.0

    def _share(self, age, like):
        if age is None:
            return tf.ones_like(like[:, :1])
        relative = tf.math.divide_no_nan(tf.cast(age, tf.float32), self._state.typical_age)
        return tf.minimum(relative**self.power, self.limit)[:, tf.newaxis]


class OtherAgeCorrector(OtherAge, Corrector):
    """`Corrector` with another law of age."""


class OtherAgeNystrom(OtherAge, NystromCorrector):
    """`NystromCorrector` with another law of age."""


def other_age(size, power, limit):
    corrector = OtherAgeNystrom(size)
    corrector.power, corrector.limit = power, limit
    return corrector


def correctors():
    """The table's, by name."""
    nystrom = {
        f"Nyström {m}, {kernel}": NystromCorrector(m, kernel=kernel)
        for m in (512, 1024)
        for kernel in ("rbf", "linear")
    }
    chosen = {
        f"Nyström 512, {landmarks}": NystromCorrector(512, landmarks=landmarks)
        for landmarks in ("uniform", "k-means++")
    }
    return {
        "Corrector(256)": Corrector(),
        "Corrector(1024)": Corrector(1024),
        "Corrector(256), cross-entropy": Corrector(drift_loss="cross_entropy"),
        "Corrector(256), both": Corrector(drift_loss="both"),
        **nystrom,
        **chosen,
        "Nyström 512, k-means++, 64 a step": NystromCorrector(
            512, landmarks="k-means++", num_encoded=64
        ),
        "Corrector(256), φ = √(age / τ)": OtherAgeCorrector(),
        "Nyström 1024, rbf, φ = √(age / τ)": OtherAgeNystrom(1024),
    }


def variants():
    """Those of the sweep over what is a default in the table: name -> (corrector, Adam's rate)."""
    return {
        **{
            f"Corrector({units}), rate {rate:g}": (Corrector(units), rate)
            for units in (256, 1024)
            for rate in (1e-3, 3e-3, 1e-2)
        },
        **{
            f"Nyström 512, bandwidth {bandwidth:g}, ridge {ridge:g}": (
                NystromCorrector(512, bandwidth=bandwidth, ridge=ridge),
                None,
            )
            for bandwidth in (0.5, 1.0, 2.0, 4.0)
            for ridge in (0.01, 0.1)
        },
        **{
            f"Nyström 512, linear, ridge {ridge:g}": (
                NystromCorrector(512, kernel="linear", ridge=ridge),
                None,
            )
            for ridge in (0.01, 0.1)
        },
        **{
            f"Nyström 512, φ = min((age / τ)^{power:g}, {limit:g})": (
                other_age(512, power, limit),
                None,
            )
            for power in (0.5, 1.0)
            for limit in (1.0, 2.0, 4.0)
        },
    }


class Subject:
    """A corrector that is trained as `CachedRetrieval` trains it, over and over from the start."""

    def __init__(self, name, corrector, size, rate=LEARNING_RATE):
        self.name, self.corrector = name, corrector
        corrector.build((None, DIM))
        weights = corrector.trainable_variables
        self._optimizer = keras.optimizers.Adam(rate or LEARNING_RATE) if weights else None
        if weights:
            self._optimizer.build(weights)
        self._variables = [*_all_variables(corrector)]
        if weights:
            self._variables += [*self._optimizer.variables]
        self._start = [variable.numpy() for variable in self._variables]
        self._weights = {id(weight) for weight in weights}
        self.extra = 0
        self._embeddings = tf.Variable(tf.zeros([size, DIM]))
        self._filled = tf.Variable(np.arange(size) >= HELD_OUT)
        self._chosen = None
        if getattr(corrector, "landmarks", "encoded") != "encoded":
            self._chosen = tf.function(
                lambda seed: corrector.rows_to_encode(self._embeddings, self._filled, seed)
            )
        self._learn = tf.function(self._learn_step)
        self.correct = tf.function(corrector.__call__, reduce_retracing=True)

    def reset(self, rng):
        for variable, value in zip(self._variables, self._start):
            if id(variable) in self._weights:
                # Independent draws of one distribution (or zeros) are so in any order.
                value = rng.permutation(value.ravel()).reshape(value.shape)
            variable.assign(value)

    def is_due(self, step, seed, last_only):
        """Whether it takes part in a step."""
        if self._optimizer is not None:
            return True
        size = self.corrector.num_landmarks
        if size > 1024 and seed:
            return False
        last_only |= size > 512 or self._chosen is not None
        ends = EVALUATIONS[-1:] if last_only else EVALUATIONS
        window = SHORT_WINDOW if size > 512 else WINDOW
        return any(end - window < step <= end for end in ends)

    def learn(self, examples, queries, cache, age, fresh_of, seed):
        """One step. As in the package, r is that of before the step."""
        landmarks = None
        if self._chosen is not None:
            self._embeddings.assign(cache)
            rows, mask = (part.numpy() for part in self._chosen(tf.constant(seed, tf.int32)))
            landmarks = _encoded(cache[rows], fresh_of(rows), age[rows], mask)
            self.extra = int(mask.sum())
        self._learn(examples, queries, landmarks)

    def _learn_step(self, examples, queries, landmarks):
        with tf.GradientTape() as tape:
            displacement = self.corrector.displacement_fn()
            if landmarks is not None:
                self.corrector.learn_landmarks(landmarks)
            loss = self.corrector.learn(
                examples, displacement, lambda y: SCALE * tf.matmul(queries, y, transpose_b=True)
            )
        if self._optimizer is not None:
            weights = self.corrector.trainable_variables
            self._optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))

    @property
    def trust(self):
        return float(self.corrector._trust())


def _all_variables(corrector):
    """Weights, and the state, which Keras does not list as weights."""
    weights = list(corrector.trainable_variables)
    listed = {id(weight) for weight in weights}
    state = tf.nest.flatten(vars(corrector._state))
    return weights + [variable for variable in state if id(variable) not in listed]


def _encoded(stale, fresh, age, mask=None):
    mask = np.ones(len(age), bool) if mask is None else mask
    parts = (stale, fresh, age, mask)
    return Encoded(*map(tf.constant, parts, (tf.float32, tf.float32, tf.int32, tf.bool)))


def relative_error(estimate, fresh):
    return float(np.square(estimate - fresh).sum() / np.square(fresh).sum())


def divergence(estimate, fresh, queries):
    """Mean KL(P ‖ P_h) over queries, of the softmaxes over the held-out rows."""
    logs = [SCALE * queries @ embeddings.T for embeddings in (fresh, estimate)]
    logs = [x - np.log(np.exp(x - SCALE).sum(1, keepdims=True)) - SCALE for x in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean())


def best_linear(stale, fresh, age):
    """norm(ĝ B + age ĝ C) by least squares over all rows."""
    relative = (age / max(age.mean(), 1.0))[:, np.newaxis]
    inputs = np.concatenate([stale, relative * stale], axis=1)
    gram = inputs.T @ inputs + 1e-6 * np.eye(2 * DIM)
    return unit(inputs @ np.linalg.solve(gram, inputs.T @ fresh))


def figures(estimate, fresh, age, queries):
    """The error, the divergence, and the error by age relative to the mean age."""
    relative = age / max(age.mean(), 1.0)
    bins = [(relative >= low) & (relative < high) for low, high in AGE_BINS]
    return {
        "error": relative_error(estimate, fresh),
        "KL": divergence(estimate, fresh, queries),
        "by age": [relative_error(estimate[b], fresh[b]) if b.any() else None for b in bins],
    }


def run(kind, seed, subjects, size, last_only=False):
    """One training for all subjects at once: step -> name -> figures."""
    rng = np.random.default_rng([seed, list(DRIFTS).index(kind)])
    centres, basis = rng.normal(size=(size // 100, DIM)), orthogonal(rng)
    cache = points(rng, size, centres, basis)
    queries = points(rng, 256, centres, basis)
    drift = DRIFTS[kind](rng, cache.copy())
    written = np.zeros(size, np.int64)
    held_out = np.arange(HELD_OUT)
    for subject in subjects:
        subject.reset(rng)
    results = {}
    for step in range(1, STEPS + 1):
        rows = HELD_OUT + rng.choice(size - HELD_OUT, PER_STEP, replace=False)
        age = step - written
        examples = _encoded(cache[rows], drift.fresh(rows, step), age[rows])
        asked = tf.constant(queries[rng.choice(256, NUM_QUERIES, replace=False)], tf.float32)
        for subject in subjects:
            if subject.is_due(step, seed, last_only):
                subject.learn(
                    examples,
                    asked,
                    cache,
                    age,
                    lambda some, step=step: drift.fresh(some, step),
                    (seed, step),
                )
        if drift.writes_back:
            # Held-out rows are written as often, unseen.
            others = rng.choice(HELD_OUT, PER_STEP * HELD_OUT // (size - HELD_OUT), replace=False)
            both = np.concatenate([rows, others])
            cache[both], written[both] = drift.fresh(both, step), step
        if step in EVALUATIONS and (step == STEPS or not last_only):
            everything = np.arange(size)
            fresh, age = drift.fresh(everything, step), step - written
            fitted = best_linear(cache, fresh, age)[held_out]
            stale, target, age = cache[held_out], fresh[held_out], age[held_out]
            estimates = {
                "none": stale,
                "best possible": drift.best(stale, written[held_out], step),
                "best linear": fitted,
            }
            now = {
                name: figures(estimate, target, age, queries)
                for name, estimate in estimates.items()
            }
            for subject in subjects:
                if not subject.is_due(step, seed, last_only):
                    continue
                corrected = subject.correct(
                    tf.constant(stale, tf.float32), tf.constant(age, tf.int32)
                ).numpy()
                now[subject.name] = {
                    **figures(corrected, target, age, queries),
                    "trust": subject.trust,
                }
            results[step] = now
    return results


def summarize(runs):
    """Means and spreads (largest less smallest, halved) over seeds."""
    summary = {}
    for step in runs[0]:
        for name in runs[0][step]:
            of_seeds = [one[step][name] for one in runs if name in one[step]]
            errors = np.array([one["error"] for one in of_seeds])
            entry = {"error": errors.mean(), "spread": np.ptp(errors) / 2}
            for key in ("KL", "trust"):
                if key in of_seeds[0]:
                    entry[key] = np.mean([one[key] for one in of_seeds])
            by_age = [[np.nan if x is None else x for x in one["by age"]] for one in of_seeds]
            entry["by age"] = [
                None if np.isnan(x).all() else float(np.nanmean(x)) for x in np.transpose(by_age)
            ]
            rounded = {k: round(float(v), 5) for k, v in entry.items() if k != "by age"}
            by_age = [None if x is None else round(x, 5) for x in entry["by age"]]
            summary.setdefault(step, {})[name] = {**rounded, "by age": by_age}
    return summary


def rows_of(summaries, step, key="error"):
    """A row for each corrector, a column for each drift."""
    table = collections.defaultdict(dict)
    for kind, summary in summaries.items():
        for name, entry in summary.get(step, {}).items():
            table[name]["corrector"] = name
            text = f"{entry[key]:.3f}"
            if key == "error" and entry["spread"] >= 0.0005:
                text += f" ±{entry['spread']:.3f}"
            table[name][kind] = text
    return list(table.values())


def rows_by_age(summaries):
    names = (
        "none",
        "Corrector(256)",
        "Corrector(256), φ = √(age / τ)",
        "Nyström 1024, rbf",
        "Nyström 1024, rbf, φ = √(age / τ)",
        "best linear",
        "best possible",
    )
    labels = [f"{low:g} to {high:g}" for low, high in AGE_BINS]
    return [
        {
            "drift": kind,
            "corrector": name,
            **{
                label: value for label, value in zip(labels, summaries[kind][STEPS][name]["by age"])
            },
        }
        for kind in ("of age", "wandering")
        if kind in summaries
        for name in names
    ]


def measure(kinds, subjects, size, seeds, last_only=False):
    """By drift, means over seeds."""
    summaries = {}
    for kind in kinds:
        start = time.perf_counter()
        runs = [run(kind, seed, subjects, size, last_only) for seed in range(seeds)]
        summaries[kind] = summarize(runs)
        print(f"{kind}: {time.perf_counter() - start:.0f} s", flush=True)
    return summaries


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drifts", nargs="+", choices=DRIFTS, default=list(DRIFTS))
    parser.add_argument("--parts", nargs="+", default=["table", "sweep"])
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/drift.json")
    )
    options = parser.parse_args()
    start = time.perf_counter()
    record = {"size": options.size, "dim": DIM, "steps": STEPS, "seeds": options.seeds}
    if options.output.exists() and set(options.parts) != {"table", "sweep"}:
        # The parts of another run stay.
        record = json.loads(options.output.read_text()) | record
        del record["machine"]
    if "table" in options.parts:
        subjects = [Subject(name, one, options.size) for name, one in correctors().items()]
        summaries = measure(options.drifts, subjects, options.size, options.seeds)
        extra = {subject.name: subject.extra * STEPS for subject in subjects}
        rows = [{**row, "extra": extra.get(row["corrector"], 0)} for row in rows_of(summaries, 300)]
        print("\nError at the last step; extra: candidates encoded for the corrector alone")
        print(_measure.table(rows))
        print("\nKL at the last step\n" + _measure.table(rows_of(summaries, STEPS, "KL")))
        for step in EVALUATIONS[:-1]:
            print(f"\nError at step {step}\n" + _measure.table(rows_of(summaries, step)))
        by_age = rows_by_age(summaries)
        if by_age:
            print("\nError at the last step, by age / mean age\n" + _measure.table(by_age))
        record |= {"table": rows, "extra candidates": extra, "drifts": summaries, "by age": by_age}
        record["seconds of the table"] = round(time.perf_counter() - start)
    if "sweep" in options.parts:
        subjects = [
            Subject(name, corrector, options.size, rate)
            for name, (corrector, rate) in variants().items()
        ]
        begin = time.perf_counter()
        summaries = measure(options.drifts, subjects, options.size, 1, last_only=True)
        rows = rows_of(summaries, STEPS)
        print("\nError at the last step, one seed\n" + _measure.table(rows))
        record |= {"sweep": rows, "seconds of the sweep": round(time.perf_counter() - begin)}
    print(f"\n{time.perf_counter() - start:.0f} s")
    _measure.save(options.output, record)


if __name__ == "__main__":
    main()
