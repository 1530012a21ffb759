"""What to do about stale candidates when encoding them is the bill, on `installed_code`.

    python benchmarks/staleness.py --tower words --regime scratch
    python benchmarks/staleness.py --tower words --regime finetune
    python benchmarks/staleness.py --tower transformer --regime scratch
    python benchmarks/staleness.py --tower transformer --regime finetune

The candidates are a fixed set of functions, and the cache holds all of them: row i is candidate i.
The loss is softmax cross-entropy over all of them, one draw a query. Settings differ in what is
done about the age of the cached embeddings; towers, their first weights, the order of the data, the
optimizer and the number of steps are the same. "From scratch" begins with random towers;
"finetune" with towers that were trained with in-batch softmax, and a cache that is filled once.
Training uses a part of the pairs only, so that, as in large corpora, many candidates are never a
positive.

Printed are MRR and recall over the whole corpus against candidates encoded, which for a large tower
is the bill, and how stale the cache is: the mean of ‖ĝ - g‖² / ‖g‖² over all rows but those written
by the last step, as cached and as corrected. The bias is ‖E ∇̂ - ∇L‖ / ‖∇L‖ for the gradients by
256 training queries: the expected one of draws from the cache as it is, corrected if it is, against
that of the softmax over fresh embeddings. Time a step leaves refreshes of the whole cache aside,
and is of a machine that may do other things.

In fine-tuning all seeds begin with the same towers: the spread is that of the order of the data and
of the draws. "Every epoch" means at the end of each; the oracle of the transformer refreshes at
every eighth step only, as its name in the table says.
"""

import argparse
import dataclasses
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import _towers
import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache import demo
from negative_cache._compat import keras
from negative_cache.datasets import installed_code
from negative_cache.ops import contrastive

METRICS = ("mrr", "recall_at_1", "recall_at_10", "recall_at_100")
# Word ids of a candidate; content vectors of the bag of all of them.
_LENGTHS = {"words": demo.CODE_LENGTH, "transformer": 32}
_CONTENT_DIM = 64
_ENCODING_BATCH = 1024
_LEARNING_RATES = {
    ("words", "scratch"): 2e-3,
    ("words", "finetune"): 5e-4,
    ("transformer", "scratch"): 1e-3,
    ("transformer", "finetune"): 2e-4,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is done about stale rows.

    Attributes:
      has_cache: False for in-batch softmax.
      write_back: whether draws and positives are written.
      refresh_fraction: ρ.
      refreshes: how often in an epoch all candidates are encoded anew; 0 for never.
      every_steps: the same as a number of steps.
      corrector: a function of the learning rate that makes a corrector, or None.
    """

    has_cache: bool = True
    write_back: bool = False
    refresh_fraction: float = 0.0
    refreshes: int = 0
    every_steps: int | None = None
    corrector: object = None


def _corrector(learning_rate, **options):
    options = {"hidden_units": 256, "rate": 1e-3, **options}
    multiplier = options.pop("rate") / learning_rate
    return nc.Corrector(learning_rate_multiplier=multiplier, **options)


IN_BATCH, NEVER, ONCE, ORACLE = "in-batch", "never", "every epoch", "oracle"
CORRECTOR, WIDE, NYSTROM = "corrector", "corrector, wide, content", "Nyström"
SETTINGS = {
    IN_BATCH: Setting(has_cache=False),
    NEVER: Setting(),
    ONCE: Setting(refreshes=1),
    "10 times an epoch": Setting(refreshes=10),
    "written back": Setting(write_back=True),
    "rho = 0.001": Setting(write_back=True, refresh_fraction=0.001),
    "rho = 0.01": Setting(write_back=True, refresh_fraction=0.01),
    "rho = 0.1": Setting(write_back=True, refresh_fraction=0.1),
    NYSTROM: Setting(corrector=lambda rate: nc.NystromCorrector(1024, bandwidth=1.0)),
    CORRECTOR: Setting(corrector=_corrector),
    WIDE: Setting(
        corrector=lambda rate: _corrector(rate, hidden_units=1024, content_key="content")
    ),
    f"{WIDE}, rate 0.003": Setting(
        corrector=lambda rate: _corrector(rate, hidden_units=1024, content_key="content", rate=3e-3)
    ),
    "corrector, written back": Setting(write_back=True, corrector=_corrector),
    "corrector, rho = 0.001": Setting(
        write_back=True, refresh_fraction=0.001, corrector=_corrector
    ),
    ORACLE: Setting(every_steps=1),
}


class Problem:
    """The candidates as word ids, the pairs that are trained on, and who is asked for."""

    def __init__(self, options):
        corpus = installed_code.load()
        rows = np.sort(np.concatenate([corpus.train, corpus.validation]))
        if options.candidates is not None:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[: options.candidates])
        columns = (getattr(corpus, field.name)[rows] for field in dataclasses.fields(corpus))
        corpus = installed_code.Corpus(*columns)
        data = demo.Data(corpus)
        self.length = _LENGTHS[options.tower]
        self.num_candidates, self.vocabulary_size = len(corpus), data.vocabulary_size
        self.query_ids = data.query_ids
        # What the projection of a bag of words says does not change with the towers.
        vectors = np.random.default_rng(1).standard_normal([data.vocabulary_size, _CONTENT_DIM])
        vectors[0] = 0.0
        content = np.stack([vectors[ids].sum(axis=0) for ids in data.code_ids])
        content *= _CONTENT_DIM**0.5 / np.linalg.norm(content, axis=1, keepdims=True)
        self.features = {
            "ids": data.code_ids[:, : self.length],
            "row": np.arange(len(corpus), dtype=np.int32),
            "content": content.astype(np.float32),
        }
        self.validation, self.all_pairs = corpus.validation, corpus.train
        size = int(options.pairs * len(corpus.train))
        self.pairs = np.random.default_rng(2).permutation(corpus.train)[:size]

    def candidates(self) -> tf.data.Dataset:
        """Batches of the features of all candidates."""
        return tf.data.Dataset.from_tensor_slices(self.features).batch(_ENCODING_BATCH)

    def batches(self, pairs: np.ndarray, batch_size: int, seed: int) -> tf.data.Dataset:
        """Batches of epochs without end; the same order for the same seed."""
        data = tf.data.Dataset.from_tensor_slices(np.random.default_rng(seed).permutation(pairs))
        data = data.shuffle(len(pairs), seed=seed).batch(batch_size, drop_remainder=True).repeat()
        queries = tf.constant(self.query_ids)
        features = {key: tf.constant(values) for key, values in self.features.items()}

        def pairs_of(rows):
            candidate = {key: tf.gather(values, rows) for key, values in features.items()}
            return {"query": tf.gather(queries, rows), "candidate": candidate}

        return data.map(pairs_of)


class Observer(keras.callbacks.Callback):
    """Evaluates at some steps, and measures the time of the others."""

    def __init__(self, problem: Problem, steps: set[int], temperature: float):
        super().__init__()
        self._problem, self._steps, self._temperature = problem, steps, temperature
        self.history = {name: [] for name in ("step", *METRICS, "staleness", "corrected", "bias")}
        self.seconds = []

    def on_train_begin(self, logs=None):
        self._encode = tf.function(lambda ids: self.model.candidate_network(ids))
        self._done = 0

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)
        self._done += 1
        if self._done in self._steps:
            for name, value in {"step": self._done, **self.evaluate()}.items():
                self.history[name].append(value)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the validation queries, and the mean staleness of the cache's rows."""
        problem, rows = self._problem, self._problem.validation
        ids = problem.features["ids"]
        candidates = tf.concat(
            [
                self._encode(tf.constant(ids[start : start + _ENCODING_BATCH]))
                for start in range(0, len(ids), _ENCODING_BATCH)
            ],
            axis=0,
        )
        queries = self.model.query_network(problem.query_ids[rows])
        ranks = nc.evaluation.positive_ranks(
            queries, tf.gather(candidates, rows), candidates, positive_rows=rows
        )
        metrics = nc.evaluation.retrieval_metrics(ranks)
        staleness = corrected = bias = float("nan")
        task = self.model.task
        if task.cache is not None:
            stale, age = tf.convert_to_tensor(task.cache.embeddings), task.cache.age
            known = stale
            if task.corrector is not None:
                key = task.corrector.content_key
                content = None if key is None else task.cache.data[key]
                known = task.corrector(stale, age, content)
            waits = age > 0
            staleness, corrected = (
                _mean_where(contrastive.relative_staleness(values, candidates), waits)
                for values in (stale, known)
            )
            bias = self._gradient_bias(candidates, known)
        return {**metrics, "staleness": staleness, "corrected": corrected, "bias": bias}

    def _gradient_bias(self, candidates, known) -> float:
        """The relative bias of the queries' gradients where draws follow `known` embeddings."""
        rows = self._problem.pairs[:256]
        queries = self.model.query_network(self._problem.query_ids[rows]) / self._temperature
        positives = tf.gather(candidates, rows)
        positive_scores = tf.reduce_sum(queries * positives, axis=1, keepdims=True)
        own = tf.one_hot(rows, len(candidates), on_value=True, off_value=False, dtype=tf.bool)

        def gradient(embeddings):
            scores = tf.matmul(queries, embeddings, transpose_b=True)
            scores = contrastive.leave_out(scores, own)
            p = tf.nn.softmax(tf.concat([positive_scores, scores], axis=1))
            # Σ_y P(y|x) (g(y) - g(y⁺)): draws are encoded, so that g is of now in any case.
            return tf.matmul(p[:, 1:], candidates) - (1.0 - p[:, :1]) * positives

        exact = gradient(candidates)
        return float(tf.norm(gradient(known) - exact) / tf.norm(exact))


def pretrain(problem: Problem, options) -> list[np.ndarray]:
    """Weights of towers after some epochs of in-batch softmax over all pairs."""
    keras.utils.set_random_seed(1000)
    model = make_model(problem, options, Setting(has_cache=False), 2e-3, seed=1000)
    steps = len(problem.all_pairs) // options.batch_size
    observer = Observer(problem, {steps * options.pretraining_epochs}, options.temperature)
    model.fit(
        problem.batches(problem.all_pairs, options.batch_size, 1000),
        epochs=options.pretraining_epochs,
        steps_per_epoch=steps,
        callbacks=[observer],
        verbose=0,
    )
    print(f"pretrained: MRR {observer.history['mrr'][-1]:.4f}", flush=True)
    return [*model.query_network.get_weights(), *model.candidate_network.get_weights()]


def make_model(problem, options, setting, learning_rate, seed, weights=None) -> nc.DualEncoder:
    """A model of one setting, its cache filled."""
    keras.utils.set_random_seed(seed)
    towers = _towers.make_towers(
        options.tower, problem.vocabulary_size, problem.length, options.dim
    )
    if weights is not None:
        num_query_weights = len(towers[0].get_weights())
        towers[0].set_weights(weights[:num_query_weights])
        towers[1].set_weights(weights[num_query_weights:])
    query_tower, candidate_tower = towers
    shared = {"temperature": options.temperature, "seed": seed}
    if setting.has_cache:
        cache = nc.Cache.from_dataset(
            problem.candidates(), candidate_tower, candidate_id_key="row", verbose=0
        )
        corrector = None if setting.corrector is None else setting.corrector(learning_rate)
        task = nc.CachedRetrieval(
            candidate_tower,
            cache=cache,
            corrector=corrector,
            refresh_fraction=setting.refresh_fraction,
            write_back=setting.write_back,
            num_negatives=options.draws,
            **shared,
        )
    else:
        specs = {
            key: tf.io.FixedLenFeature(list(values.shape[1:]), values.dtype)
            for key, values in problem.features.items()
        }
        task = nc.CachedRetrieval(
            candidate_tower, specs, cache_size=0, in_batch_negatives=True, **shared
        )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model.compile(optimizer=keras.optimizers.Adam(learning_rate))
    return model


def train(problem: Problem, name: str, options, seed: int, weights) -> dict:
    """Trains with one setting; `history` is what the evaluations show."""
    setting = SETTINGS[name]
    learning_rate = _LEARNING_RATES[options.tower, options.regime]
    model = make_model(problem, options, setting, learning_rate, seed, weights)
    steps = len(problem.pairs) // options.batch_size
    total = steps * options.epochs
    marks = {total * (i + 1) // options.evaluations for i in range(options.evaluations)}
    observer = Observer(problem, marks | {steps}, options.temperature)
    callbacks = [observer]
    every = setting.every_steps or (setting.refreshes and max(steps // setting.refreshes, 1))
    if name == ORACLE:
        every = options.oracle_every
    if every:
        callbacks.append(nc.CacheRefresh(every, batch_size=_ENCODING_BATCH, verbose=0))
    history = model.fit(
        problem.batches(problem.pairs, options.batch_size, seed),
        epochs=options.epochs,
        steps_per_epoch=steps,
        callbacks=callbacks,
        verbose=0,
    ).history
    encoded = total * options.batch_size
    if setting.has_cache:
        # The last log is of before a refresh that was due with the last step.
        encoded = int(history["candidates_encoded"][-1])
    if name == ORACLE and every > 1:
        name = f"{ORACLE}, every {every} steps"
    record = {
        "setting": name,
        "seed": seed,
        "candidates encoded": encoded,
        "ms/step": 1000 * float(np.median(observer.seconds)),
        "steps per epoch": steps,
        "history": observer.history,
    }
    mrr = " ".join(f"{value:.4f}" for value in observer.history["mrr"])
    print(
        f"seed {seed}, {name}: MRR {mrr}; staleness {observer.history['staleness'][-1]:.4f} ->"
        f" {observer.history['corrected'][-1]:.4f}; {encoded:,} encoded;"
        f" {record['ms/step']:.0f} ms",
        flush=True,
    )
    return record


def summary(runs: list[dict]) -> list[dict]:
    """A row of the table for each setting: means over the seeds, and their standard deviations."""
    rows = []
    for name in dict.fromkeys(run["setting"] for run in runs):
        own = [run for run in runs if run["setting"] == name]

        def of(metric, step=-1, own=own):
            return np.array([run["history"][metric][step] for run in own])

        first = own[0]["history"]["step"].index(own[0]["steps per epoch"])
        before, after = of("staleness", first), of("corrected", first)
        rows.append(
            {
                "setting": name,
                "candidates encoded": own[0]["candidates encoded"],
                "mrr": _with_spread(of("mrr")),
                **{metric: f"{of(metric).mean():.3f}" for metric in METRICS[1:]},
                "stale, epoch 1": f"{before.mean():.4f}",
                "corrected": f"{after.mean():.4f}",
                "ratio": _with_spread(before / np.maximum(after, 1e-12), 2),
                "stale, end": f"{of('staleness').mean():.4f}",
                "corrected, end": f"{of('corrected').mean():.4f}",
                "bias, end": f"{of('bias').mean():.3f}",
                "ms/step": round(float(np.median([run["ms/step"] for run in own]))),
            }
        )
    return rows


def plot(runs: list[dict], title: str, path: pathlib.Path) -> None:
    """MRR against candidates encoded, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(run["setting"] for run in runs)):
        own = [run for run in runs if run["setting"] == name]
        mrr = np.array([run["history"]["mrr"][-1] for run in own])
        error = [[mrr.mean() - mrr.min()], [mrr.max() - mrr.mean()]]
        axes.errorbar(
            own[0]["candidates encoded"],
            mrr.mean(),
            error,
            marker="osv^D"[i // 10] if i >= 10 else "o",
            capsize=3,
            label=name,
            color=f"C{i % 10}",
        )
    axes.set(xlabel="candidates encoded", ylabel="MRR over all candidates", title=title)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _with_spread(values, digits=3):
    return f"{values.mean():.{digits}f} ± {values.std(ddof=min(1, len(values) - 1)):.{digits}f}"


def _mean_where(values, mask):
    weight = tf.cast(mask, tf.float32)
    total = tf.reduce_sum(weight)
    return float(tf.math.divide_no_nan(tf.reduce_sum(weight * values), total))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", choices=list(_LENGTHS), default="words")
    parser.add_argument("--regime", choices=["scratch", "finetune"], default="finetune")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--candidates", type=int, help="all, if not given")
    parser.add_argument("--pairs", type=float, default=0.5, help="share of the pairs trained on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pretraining-epochs", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--oracle-every", type=int, help="1 for words, 8 for the transformer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    if options.oracle_every is None:
        options.oracle_every = 1 if options.tower == "words" else 8
    name = f"{options.tower}_{options.regime}"
    output = options.output or pathlib.Path(f"benchmarks/results/staleness_{name}.json")
    problem = Problem(options)
    print(
        f"{problem.num_candidates:,} candidates, {len(problem.pairs):,} training pairs,"
        f" {len(problem.validation):,} validation queries; {name}"
    )
    weights = pretrain(problem, options) if options.regime == "finetune" else None
    runs = []
    for seed in range(options.seeds):
        for setting in options.settings:
            runs.append(train(problem, setting, options, seed, weights))
            keras.backend.clear_session()
    rows = summary(runs)
    print("\n" + _measure.table(rows))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    _measure.save(output, {"options": settings, "rows": rows, "runs": runs})
    plot(runs, f"{options.tower}, {options.regime}", output.with_suffix(".png"))


if __name__ == "__main__":
    main()
