"""Trains one two-tower text model twice, with in-batch softmax and with a negative cache.

`python -m negative_cache.demo` searches Python functions by description. A query is a sentence. The
candidates are the functions of the packages installed on this machine. Both models have the same
towers and data order. Each is trained until its MRR on validation queries stops rising, and what it
was at its best is evaluated on test queries. Both evaluations are against the whole corpus.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.datasets import installed_code

QUERIES = (
    "read a csv file into rows",
    "compute the eigenvalues of a symmetric matrix",
    "parse an http date header",
    "draw a histogram of the values",
)
METRICS = ("mrr", "recall_at_1", "recall_at_10", "recall_at_100")
CODE_LENGTH, QUERY_LENGTH = 128, 24
_ENCODING_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of both trainings, and the size of the cache.

    A training ends after `steps` at the latest, in which it would be evaluated `evaluations` times.
    It ends before if the best MRR is `patience` evaluations old. If `patience` is None, it takes
    all steps and keeps its last weights.
    """

    steps: int = 4000
    evaluations: int = 16
    patience: int | None = 3
    batch_size: int = 64
    cache_size: int = 16384
    num_negatives: int = 1
    num_draws: int | None = None
    exact_query_gradient: bool = True
    dim: int = 128
    temperature: float | str | nc.LearnedTemperature = 0.05
    learning_rate: float = 2e-3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained model and its metrics.

    Attributes:
      name: of the method.
      model: with the weights of `kept_step`.
      steps: those after which it was evaluated on validation queries.
      history: the metrics of each evaluation.
      kept_step: the one of `steps` whose weights the model has.
      test: the metrics of the model on test queries, of which nothing was chosen.
      milliseconds_per_step: the median.
      candidates_encoded: until `kept_step`.
    """

    name: str
    model: nc.DualEncoder
    steps: list[int]
    history: dict[str, list[float]]
    kept_step: int
    test: dict[str, float]
    milliseconds_per_step: float
    candidates_encoded: int

    def final(self, metric: str) -> float:
        """A metric of the last evaluation."""
        return self.history[f"val_{metric}"][-1]


class TextTower(keras.layers.Layer):
    """The mean of word vectors, scaled to length 1: ids [n, words] -> [n, d].

    Ids are given alone, or as the feature "ids".
    """

    def __init__(self, words: keras.layers.Layer, **kwargs: Any):
        super().__init__(**kwargs)
        self.words = words
        self.pool = keras.layers.GlobalAveragePooling1D()
        self.normalize = keras.layers.UnitNormalization()

    def call(self, inputs: tf.Tensor | dict[str, tf.Tensor]) -> tf.Tensor:
        ids = inputs["ids"] if isinstance(inputs, dict) else inputs
        mask = self.words.compute_mask(ids)
        return self.normalize(self.pool(self.words(ids), mask=mask))


class Data:
    """The corpus as word ids, and the datasets for training and evaluation."""

    def __init__(self, corpus: installed_code.Corpus):
        train = corpus.train
        texts = np.concatenate([corpus.codes[train], corpus.summaries[train]])
        code_words = installed_code.text_to_ids(texts, sequence_length=CODE_LENGTH)
        self.query_words = installed_code.text_to_ids(
            vocabulary=code_words.get_vocabulary(), sequence_length=QUERY_LENGTH
        )
        self.corpus = corpus
        self.vocabulary_size = code_words.vocabulary_size()
        self.code_ids = _vectorize(code_words, corpus.codes)
        self.query_ids = _vectorize(self.query_words, corpus.summaries)

    def candidates(self, rows: np.ndarray) -> tf.data.Dataset:
        """Makes batches of candidate features: word ids, and the row in the corpus as the id."""
        features = {"ids": self.code_ids[rows], "row": rows.astype(np.int32)}
        return tf.data.Dataset.from_tensor_slices(features).batch(_ENCODING_BATCH)

    def pairs(self, rows: np.ndarray) -> tf.data.Dataset:
        """Makes single pairs of query and candidate features."""
        features = {"ids": self.code_ids[rows], "row": rows.astype(np.int32)}
        return tf.data.Dataset.from_tensor_slices(
            {"query": self.query_ids[rows], "candidate": features}
        )


def make_model(data: Data, cache_size: int, settings: Settings) -> nc.DualEncoder:
    """Makes a new model. It has no cache if `cache_size` is 0."""
    keras.utils.set_random_seed(settings.seed)
    words = keras.layers.Embedding(data.vocabulary_size, settings.dim, mask_zero=True)
    query_tower, candidate_tower = TextTower(words), TextTower(words)
    task = nc.CachedRetrieval(
        candidate_tower,
        {
            "ids": tf.io.FixedLenFeature([CODE_LENGTH], tf.int64),
            "row": tf.io.FixedLenFeature([], tf.int32),
        },
        cache_size,
        temperature=settings.temperature,
        num_draws=settings.num_draws,
        num_negatives=None if settings.num_draws else settings.num_negatives,
        exact_query_gradient=settings.exact_query_gradient,
        in_batch_negatives=True,
        candidate_id_key="row",
        remove_accidental_hits=True,
    )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model.compile(optimizer=keras.optimizers.Adam(settings.learning_rate))
    return model


def count_draws(settings: Settings) -> int:
    """The candidates that a step draws from the cache and encodes."""
    if settings.num_draws is not None:
        return settings.num_draws
    return settings.batch_size * settings.num_negatives


def train(name: str, data: Data, cache_size: int, settings: Settings) -> Result:
    """Trains a model and evaluates it. It has no cache if `cache_size` is 0."""
    model = make_model(data, cache_size, settings)
    corpus = data.corpus
    order = np.random.default_rng(settings.seed).permutation(corpus.train)
    batches = data.pairs(order).shuffle(len(order), seed=settings.seed).repeat()
    batches = batches.batch(settings.batch_size).prefetch(tf.data.AUTOTUNE)
    functions = data.candidates(np.arange(len(corpus)))
    validation, test = (
        data.pairs(rows).batch(_ENCODING_BATCH) for rows in (corpus.validation, corpus.test)
    )
    timer = _StepTimer()
    callbacks = [nc.CorpusMetrics(functions, validation, candidate_id_key="row"), timer]
    if settings.patience is not None:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                "val_mrr", mode="max", patience=settings.patience, restore_best_weights=True
            )
        )
    encoded_per_step = settings.batch_size
    if cache_size:
        callbacks.insert(0, nc.CacheWarmStart(data.candidates(order)))
        encoded_per_step += count_draws(settings)
    print(f"\n{name}: {settings.steps} steps of {settings.batch_size} pairs at most")
    evaluations = min(settings.evaluations, settings.steps)
    steps_per_epoch = settings.steps // evaluations
    history = model.fit(
        batches,
        epochs=evaluations,
        steps_per_epoch=steps_per_epoch,
        shuffle=False,
        callbacks=callbacks,
        verbose=2,
    ).history
    mrr = history["val_mrr"]
    kept = len(mrr) - 1 if settings.patience is None else int(np.argmax(mrr))
    kept_step = steps_per_epoch * (kept + 1)
    return Result(
        name=name,
        model=model,
        steps=[steps_per_epoch * (epoch + 1) for epoch in range(len(mrr))],
        history={key: [float(value) for value in values] for key, values in history.items()},
        kept_step=kept_step,
        test=nc.evaluation.evaluate(model, functions, test, candidate_id_key="row"),
        milliseconds_per_step=timer.median_milliseconds(),
        candidates_encoded=min(cache_size, len(order)) + encoded_per_step * kept_step,
    )


def table(results: Sequence[Result]) -> str:
    """Formats the metrics on test queries as a table with one row for each model."""
    rows: list[tuple[str, ...]] = [
        ("", "MRR", "recall@1", "recall@10", "recall@100", "step", "ms/step", "candidates encoded")
    ]
    for result in results:
        rows.append(
            (
                result.name,
                *(f"{result.test[metric]:.3f}" for metric in METRICS),
                f"{result.kept_step:,}",
                f"{result.milliseconds_per_step:.1f}",
                f"{result.candidates_encoded:,}",
            )
        )
    first, second = (result.test for result in results)
    ratios = (f"{second[metric] / max(first[metric], 1e-9):.2f}x" for metric in METRICS)
    rows.append(("ratio", *ratios, "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(results: Sequence[Result], path: pathlib.Path) -> None:
    """Plots MRR on validation queries against steps, one line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for result in results:
        mrr = result.history["val_mrr"]
        (line,) = axes.plot(result.steps, mrr, marker="o", label=result.name)
        kept = mrr[result.steps.index(result.kept_step)]
        (star,) = axes.plot(result.kept_step, kept, marker="*", color=line.get_color())
        star.set(markersize=14, clip_on=False)
    axes.set(xlabel="training steps", ylabel="MRR of validation queries", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def answer(model: nc.DualEncoder, data: Data, queries: Sequence[str], count: int = 5) -> str:
    """Formats the functions that the model finds for each query, with their scores."""
    encoder = nc.evaluation.Encoder(model.candidate_network)
    corpus = encoder(data.candidates(np.arange(len(data.corpus))))
    scores = model.query_network(data.query_words(tf.constant(list(queries)))).numpy() @ corpus.T
    lines = []
    for query, row in zip(queries, scores):
        lines.append(f"\n“{query}”")
        for best in np.argsort(-row)[:count]:
            lines.append(f"  {row[best]:.2f}  {data.corpus.names[best]}")
    return "\n".join(lines)


class _StepTimer(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self._seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self._seconds.append(time.perf_counter() - self._start)

    def median_milliseconds(self) -> float:
        return 1000 * float(np.median(self._seconds))


def _vectorize(layer: keras.layers.Layer, texts: np.ndarray) -> np.ndarray:
    starts = range(0, len(texts), _ENCODING_BATCH)
    return np.concatenate([layer(texts[i : i + _ENCODING_BATCH]).numpy() for i in starts])


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m negative_cache.demo", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=defaults.steps, help="training steps of each model, at most")
    add(
        "--patience",
        type=int,
        default=defaults.patience,
        help="evaluations without a better MRR after which a training ends",
    )
    add("--cache-size", type=int, default=defaults.cache_size, help="rows of the cache")
    add(
        "--num-negatives",
        type=int,
        default=defaults.num_negatives,
        help="draws for each query",
    )
    add("--seed", type=int, default=defaults.seed)
    add("--output", type=pathlib.Path, default=pathlib.Path("demo"), help="folder of the results")
    add("--query", action="append", metavar="TEXT", help="your own query (may be repeated)")
    parsed = parser.parse_args(arguments)
    for name in ("steps", "patience", "num_negatives"):
        value = getattr(parsed, name)
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, received {value}")
    if parsed.cache_size < 1024:
        parser.error(f"--cache-size must be at least 1024, received {parsed.cache_size}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo with the `arguments` of the command line."""
    options = _parse_arguments(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        steps=options.steps,
        patience=options.patience,
        cache_size=options.cache_size,
        num_negatives=options.num_negatives,
        seed=options.seed,
    )
    draws_plot = importlib.util.find_spec("matplotlib") is not None
    if not draws_plot:
        print("There will be no plot: matplotlib is not installed (pip install matplotlib).")
    corpus = installed_code.load()
    print(f"{len(corpus):,} functions, {len(corpus.train):,} of them to train on")
    data = Data(corpus)
    results = [
        train("in-batch softmax", data, 0, settings),
        train("negative cache", data, settings.cache_size, settings),
    ]
    print(
        f"\n{len(corpus.test):,} test queries against all {len(corpus):,} functions, each model at"
        f" the step with the best MRR of {len(corpus.validation):,} validation queries\n"
    )
    print(table(results))
    written = [options.output / "results.json"]
    if draws_plot:
        written.insert(0, options.output / "mrr.png")
        plot(results, written[0])
    record = {
        "settings": dataclasses.asdict(settings),
        "results": [
            {
                "name": result.name,
                "steps": result.steps,
                "history": result.history,
                "kept_step": result.kept_step,
                "test": result.test,
                "milliseconds_per_step": result.milliseconds_per_step,
                "candidates_encoded": result.candidates_encoded,
            }
            for result in results
        ],
    }
    written[-1].write_text(json.dumps(record, indent=1))
    print("\nWritten: " + ", ".join(map(str, written)))
    print(answer(results[1].model, data, options.query or QUERIES))


if __name__ == "__main__":
    main()
