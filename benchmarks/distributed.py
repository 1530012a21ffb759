"""What it costs, and what it is worth, that the caches of all replicas are one pool.

    python benchmarks/distributed.py --parts bytes          # a minute
    python benchmarks/distributed.py --parts time
    python benchmarks/distributed.py --parts mrr            # an hour on two idle cores

* `bytes`: what a replica sends a step, from the sizes of what is given to the collective operations
  of TensorFlow, if these are rings: (R - 1) n for a gathering of n bytes of each replica, and
  2 n (R - 1) / R for a sum. Against the batch, the dimension, the draws, the replicas and the rows.
* `time`: milliseconds of a step with one, two and four replicas, which share the cores of this
  machine, for the same queries and rows in all.
* `mrr`: the demo's towers on `installed_code`, for the same number of steps of the same number of
  pairs: one replica with all rows; four with a quarter each as a pool; and four with a quarter each
  that each trains against alone.

Every part runs in processes of its own: the number of devices cannot be changed later.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import _measure
import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache import demo, util
from negative_cache._compat import keras
from negative_cache.datasets import installed_code

WORDS, VOCABULARY = 16, 50_000
# What is changed, one at a time, and what the others are.
BASE = {"replicas": 2, "batch": 32, "dim": 64, "draws": 1, "rows": 4096}
CHANGES = {
    "replicas": (4, 8),
    "batch": (64, 128),
    "dim": (128, 256),
    "draws": (2, 4),
    "rows": (1024, 65536),
}
# Global, of all replicas together.
PAIRS, ROWS, TEMPERATURE, EVALUATIONS = 64, 16_384, 0.07, 8


def make_strategy(num_replicas):
    """To be called first in a process."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * num_replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])


class _Counter:
    """Counts the bytes that the functions of `util` give to collective operations."""

    def __init__(self, num_replicas):
        self._num_replicas, self.sent, self.calls = num_replicas, 0, 0
        self._gather, self._sum = util._all_gather, util.cross_replica_sum

    def __enter__(self):
        util._all_gather, util.cross_replica_sum = self._counted_gather, self._counted_sum
        return self

    def __exit__(self, *error):
        util._all_gather, util.cross_replica_sum = self._gather, self._sum

    def _counted_gather(self, tensor, axis):
        self._add(tensor, self._num_replicas - 1)
        return self._gather(tensor, axis)

    def _counted_sum(self, tensor):
        self._add(tensor, 2 * (self._num_replicas - 1) / self._num_replicas)
        return self._sum(tensor)

    def _add(self, tensor, times):
        if int(util.replica_id()) == 0:
            self.sent += times * int(tf.size(tensor)) * tensor.dtype.size
            self.calls += 1


def random_features(count, seed):
    rng = np.random.default_rng(seed)
    return {
        "ids": tf.constant(rng.integers(1, VOCABULARY, [count, WORDS]), tf.int32),
        "row": tf.constant(rng.integers(0, 2**30, count), tf.int32),
    }


def make_task(setting, pool):
    """A task with bags of words as towers, whose caches are full, and its tower."""
    words = keras.layers.Embedding(VOCABULARY, setting["dim"], mask_zero=True)
    tower = demo.TextTower(words)
    task = nc.CachedRetrieval(
        tower,
        {
            "ids": tf.io.FixedLenFeature([WORDS], tf.int32),
            "row": tf.io.FixedLenFeature([], tf.int32),
        },
        setting["rows"],
        temperature=TEMPERATURE,
        candidate_id_key="row",
        remove_accidental_hits=True,
        num_negatives=setting["draws"],
        embedding_dim=setting["dim"],
        pool=pool,
        seed=1,
    )
    return task, tower


def count_bytes(setting):
    """(bytes that a replica sends a step, collective operations) of a setting."""
    strategy = make_strategy(setting["replicas"])
    with strategy.scope():
        task, tower = make_task(setting, "replicas")
        task.add_to_cache(random_features(1024, 1))
    features = random_features(setting["batch"], 2)
    queries = _measure.normalized([setting["batch"], setting["dim"]], 3)
    with _Counter(setting["replicas"]) as counter:
        # Eagerly, so that every size is known.
        strategy.run(lambda: task(queries, tower(features), features, training=True))
    return counter.sent, counter.calls


def print_bytes():
    rows = []
    for name, values in [("", (None,)), *CHANGES.items()]:
        for value in values:
            setting = {**BASE, **({name: value} if name else {})}
            sent, calls = _measure.in_new_process(count_bytes, setting)
            rows.append({**setting, "bytes sent": int(sent), "operations": calls})
            base = rows[0]["bytes sent"]
            rows[-1]["times the first"] = rows[-1]["bytes sent"] / base
    print("\n" + _measure.table(rows), flush=True)
    return rows


def time_steps(num_replicas):
    """{pool: milliseconds of the gradient of a step}, side by side."""
    strategy = make_strategy(num_replicas)
    per_replica = {**BASE, "rows": ROWS // num_replicas, "batch": PAIRS // num_replicas}
    steps = {}
    for name, pool in (("private", None), ("pooled", "replicas")):
        with strategy.scope():
            task, tower = make_task(per_replica, pool)
            for seed in range(ROWS // 1024):
                task.add_to_cache(random_features(min(1024, per_replica["rows"]), seed))
        steps[name] = _step(strategy, task, tower, per_replica)
    return {name: float(value) for name, value in _measure.medians(steps, repeats=31).items()}


def _step(strategy, task, tower, setting):
    features = random_features(setting["batch"], 2)
    queries = _measure.normalized([setting["batch"], setting["dim"]], 3)

    def of_replica():
        with tf.GradientTape() as tape:
            loss = task(queries, tower(features), features, training=True)
        gradients = tape.gradient(loss, tower.trainable_variables)
        return tf.add_n([tf.reduce_sum(part.values) for part in gradients])

    @tf.function
    def step():
        return strategy.reduce("SUM", strategy.run(of_replica), axis=None)

    return step


def print_times():
    rows = []
    for num_replicas in (1, 2, 4):
        found = _measure.in_new_process(time_steps, num_replicas)
        ratio = found["pooled"] / found["private"]
        rows.append({"replicas": num_replicas, **found, "pooled/private": ratio})
    print("\n" + _measure.table(rows), flush=True)
    return rows


def train(kind, seed, num_steps):
    """Test MRR at the best validation, and milliseconds of a step, of a training."""
    num_replicas = 1 if kind == "one replica" else 4
    strategy = make_strategy(num_replicas)
    data = demo.Data(installed_code.load())
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        words = keras.layers.Embedding(data.vocabulary_size, 64, mask_zero=True)
        towers = demo.TextTower(words), demo.TextTower(words)
        task = nc.CachedRetrieval(
            towers[1],
            {
                "ids": tf.io.FixedLenFeature([demo.CODE_LENGTH], tf.int64),
                "row": tf.io.FixedLenFeature([], tf.int32),
            },
            ROWS // num_replicas,
            temperature=TEMPERATURE,
            in_batch_negatives=True,
            candidate_id_key="row",
            remove_accidental_hits=True,
            embedding_dim=64,
            pool="replicas" if kind == "pooled" else None,
        )
        model = nc.DualEncoder(*towers, task)
        model.compile(optimizer=keras.optimizers.Adam(2e-3))
        for tower, ids in zip(towers, (data.query_ids, data.code_ids)):
            tower(tf.constant(ids[:1]))
    corpus = data.corpus
    order = np.random.default_rng(seed).permutation(corpus.train)
    batches = data.pairs(order).shuffle(len(order), seed=seed).repeat()
    functions = data.candidates(np.arange(len(corpus)))
    validation, test = (data.pairs(rows).batch(512) for rows in (corpus.validation, corpus.test))
    history = model.fit(
        batches.batch(PAIRS, drop_remainder=True).prefetch(2),
        epochs=EVALUATIONS,
        steps_per_epoch=num_steps // EVALUATIONS,
        shuffle=False,
        verbose=0,
        callbacks=[
            nc.CacheWarmStart(data.candidates(order), verbose=0),
            nc.CorpusMetrics(functions, validation, candidate_id_key="row"),
            keras.callbacks.EarlyStopping(
                "val_mrr", mode="max", patience=EVALUATIONS, restore_best_weights=True
            ),
        ],
    ).history
    found = nc.evaluation.evaluate(model, functions, test, candidate_id_key="row")
    return max(history["val_mrr"]), found["mrr"]


def print_mrr(options):
    rows = []
    for kind in ("one replica", "pooled", "private"):
        runs = []
        for seed in range(options.seeds):
            runs.append(_measure.in_new_process(train, kind, seed, options.steps))
            print(f"{kind}, seed {seed}: validation {runs[-1][0]:.4f}, test {runs[-1][1]:.4f}")
            sys.stdout.flush()
        mrr = np.array([test for _, test in runs])
        rows.append(
            {
                "rows": "1 × 16,384" if kind == "one replica" else f"4 × 4,096, {kind}",
                "MRR": float(mrr.mean()),
                "of seeds": " ".join(f"{value:.4f}" for value in mrr),
            }
        )
    print("\n" + _measure.table(rows), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("bytes", "time", "mrr")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--steps", type=int, default=2000, help="of the trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/distributed.json")
    )
    options = parser.parse_args()
    print_part = {"bytes": print_bytes, "time": print_times, "mrr": lambda: print_mrr(options)}
    record = {part: print_part[part]() for part in options.parts}
    _measure.save(options.output, record)


if __name__ == "__main__":
    main()
